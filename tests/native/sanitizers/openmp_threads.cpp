// OpenMP's parallel regions as plain threads, for the extension under ThreadSanitizer: it sees threads begin and end,
// but not what the system's libgomp, which is built without it, makes wait for what. What at::parallel_for compiles to
// calls these in place of that library's: they are hidden, so the linker binds the extension's own calls alone.
#include <omp.h>

#include <atomic>
#include <thread>
#include <vector>

#define HIDDEN extern "C" __attribute__((visibility("hidden")))

namespace {
thread_local int number = 0, count = 1;
}

HIDDEN int omp_get_thread_num() noexcept { return number; }
HIDDEN int omp_get_num_threads() noexcept { return count; }

HIDDEN void GOMP_parallel(void (*run)(void*), void* state, unsigned threads, unsigned) {
  const int all = threads ? int(threads) : omp_get_max_threads();
  std::atomic<int> here{0};
  const auto begin = [&](int own) {
    number = own;
    count = all;
    // Together: one that came first would do all there is to do, alone. Relaxed, which orders nothing.
    here.fetch_add(1, std::memory_order_relaxed);
    while (here.load(std::memory_order_relaxed) < all) std::this_thread::yield();
    run(state);
  };
  std::vector<std::thread> others;
  for (int i = 1; i < all; ++i) others.emplace_back(begin, i);
  const int number_before = number, count_before = count;
  begin(0);
  number = number_before;
  count = count_before;
  for (std::thread& one : others) one.join();
}
