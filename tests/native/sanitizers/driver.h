// What the programs under sanitizers share: memory of exactly the size asked for, inputs in any layout, threads, and
// the check that every number was written, the same whatever the threads do.
#pragma once
#include "../../../kernels/common/cpu_features.h"
#include "../../../kernels/common/dtype.h"
#include "../../../kernels/common/parallel.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define FORBID(from, bytes) __asan_poison_memory_region(from, bytes)
#define PERMIT(from, bytes) __asan_unpoison_memory_region(from, bytes)
#else
#define FORBID(from, bytes) (void)(from)
#define PERMIT(from, bytes) (void)(from)
#endif

// Inside the file of an op: sets() gives its kernels for each instruction set that this CPU has.
#define DECLARE_KERNELS(isa)       \
  namespace isa {                  \
  extern const CpuKernels kernels; \
  }
#if defined(__x86_64__)
#define KERNELS_OF(op)                                                                        \
  namespace bomkern::op {                                                                     \
  DECLARE_KERNELS(baseline)                                                                   \
  DECLARE_KERNELS(avx2)                                                                       \
  DECLARE_KERNELS(avx512)                                                                     \
  inline std::vector<const CpuKernels*> sets() {                                              \
    std::vector<const CpuKernels*> all{&baseline::kernels, &avx2::kernels, &avx512::kernels}; \
    all.resize(int(cpu_isa()) + 1);                                                           \
    return all;                                                                               \
  }                                                                                           \
  }
#else
#define KERNELS_OF(op)                                                                        \
  namespace bomkern::op {                                                                     \
  DECLARE_KERNELS(baseline)                                                                   \
  inline std::vector<const CpuKernels*> sets() { return {&baseline::kernels}; }               \
  }
#endif

namespace driver {

using bomkern::DType;
using bomkern::Matrix;
using bomkern::Parallel;

inline void serial(int64_t tasks, void (*run)(void*, int64_t), void* state) {
  for (int64_t task = 0; task < tasks; ++task) run(state, task);
}

// Neighbouring tasks on different threads, which nothing orders: no counter that they share, as it would hide a race.
inline void threads(int64_t tasks, void (*run)(void*, int64_t), void* state) {
  constexpr int64_t most = 4;
  std::vector<std::thread> all;
  for (int64_t first = 0; first < std::min(tasks, most); ++first) {
    all.emplace_back([=] {
      for (int64_t task = first; task < tasks; task += most) run(state, task);
    });
  }
  for (std::thread& one : all) one.join();
}

inline int64_t cases = 0, failures = 0;
inline void expect(bool good, const char* what, int64_t at) {
  if (!good && ++failures < 20) fprintf(stderr, "case %lld: %s, number %lld\n", (long long)cases, what, (long long)at);
}

// n numbers and not a byte more, all NaN or -1 before; aligned to 64 where they begin, as workspaces are.
template <class T> class Exact {
 public:
  explicit Exact(int64_t n) : n_(n) {
    if (posix_memalign(&data_, 64, std::max<size_t>(bytes(), 1)) != 0) abort();
    memset(data_, 0xff, bytes());
  }
  Exact(const Exact&) = delete;
  Exact& operator=(const Exact&) = delete;
  ~Exact() { free(data_); }
  T* data() const { return static_cast<T*>(data_); }
  operator T*() const { return data(); }
  int64_t size() const { return n_; }
  size_t bytes() const { return size_t(n_) * sizeof(T); }

 private:
  int64_t n_;
  void* data_ = nullptr;
};

inline int size_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }
template <class S> constexpr DType type_of = sizeof(S) == 8 ? DType::f64 : DType::f32;

inline void write(void* to, DType dtype, int64_t at, double x) {
  if (dtype == DType::f64) return void(static_cast<double*>(to)[at] = x);
  const float narrow = float(x);
  if (dtype == DType::f32) return void(static_cast<float*>(to)[at] = narrow);
  uint16_t half;
  if (dtype == DType::bf16) {
    uint32_t word;
    memcpy(&word, &narrow, 4);
    half = uint16_t(word >> 16);
  } else {
    const _Float16 value = _Float16(narrow);
    memcpy(&half, &value, 2);
  }
  static_cast<uint16_t*>(to)[at] = half;
}
inline bool is_nan(const void* from, DType dtype, int64_t at) {
  if (dtype == DType::f64) return isnan(static_cast<const double*>(from)[at]);
  if (dtype == DType::f32) return isnan(static_cast<const float*>(from)[at]);
  const int size = static_cast<const uint16_t*>(from)[at] & 0x7fff;
  return size > (dtype == DType::bf16 ? 0x7f80 : 0x7c00);
}

inline std::mt19937 engine(7);
inline int below(int n) { return int(engine() % unsigned(n)); }
inline double uniform(double low, double high) { return low + (high - low) * (engine() / 4294967296.0); }

enum class Layout { plain, transposed, gaps, rows_alike, columns_alike, misaligned, spaced };
constexpr Layout layouts[] = {Layout::plain,         Layout::transposed, Layout::gaps,  Layout::rows_alike,
                              Layout::columns_alike, Layout::misaligned, Layout::spaced};

// A [rows, columns] input that ends where its last number does; between spaced rows lies what nobody may touch.
class Input {
 public:
  Input(int64_t rows, int64_t columns, DType dtype, Layout layout, double low, double high) {
    int64_t row = columns, column = 1;
    const int64_t skip = layout == Layout::misaligned ? 1 : 0;
    if (layout == Layout::transposed) row = 1, column = rows;
    if (layout == Layout::gaps) column = 2, row = 2 * columns + 3;
    if (layout == Layout::spaced) row = columns + 16;
    if (layout == Layout::rows_alike) row = 0;
    if (layout == Layout::columns_alike) row = 3, column = 0;
    const int64_t numbers = (rows - 1) * row + (columns - 1) * column + 1 + skip, size = size_of(dtype);
    memory_ = std::make_unique<Exact<unsigned char>>(numbers * size);
    unsigned char* const begin = memory_->data() + skip * size;
    matrix = {begin, {row, column}, dtype};
    for (int64_t b = 0; b < rows; ++b) {
      for (int64_t d = 0; d < columns; ++d) write(begin, dtype, b * row + d * column, uniform(low, high));
      if (layout == Layout::spaced && b + 1 < rows) FORBID(begin + (b * row + columns) * size, 16 * size);
    }
  }
  Input(const Input&) = delete;
  ~Input() { PERMIT(memory_->data(), memory_->bytes()); }
  Matrix matrix;

 private:
  std::unique_ptr<Exact<unsigned char>> memory_;
};

// The outputs of one run.
class Seen {
 public:
  void numbers(const void* from, DType dtype, int64_t n, const char* what) {
    for (int64_t i = 0; i < n; ++i) expect(!is_nan(from, dtype, i), what, i);
    add(from, size_t(n) * size_of(dtype));
  }
  template <class S> void numbers(const Exact<S>& x, const char* what) {
    numbers(x.data(), type_of<S>, x.size(), what);
  }
  template <class T> void whole(const Exact<T>& x, const char* what) {
    for (int64_t i = 0; i < x.size(); ++i) expect(x[i] != T(-1), what, i);
    add(x.data(), x.bytes());
  }
  bool operator==(const Seen&) const = default;

 private:
  std::vector<unsigned char> bytes_;
  void add(const void* from, size_t bytes) {
    const auto* begin = static_cast<const unsigned char*>(from);
    bytes_.insert(bytes_.end(), begin, begin + bytes);
  }
};

// run(kernels, how to spread tasks, what was seen), serially and on threads, for each instruction set: the same bits.
template <class Sets, class Run> void for_sets(const Sets& sets, const Run& run) {
  ++cases;
  for (const auto* kernels : sets) {
    Seen one, many;
    run(*kernels, serial, one);
    run(*kernels, threads, many);
    expect(one == many, "the threads change the bits", 0);
  }
}

// One call of an op, its workspace within its bounds.
template <class Kernels, class Arguments> void call(const Kernels& kernels, const Arguments& a, Parallel parallel) {
  const int64_t size = kernels.bytes(a);
  const Exact<unsigned char> workspace(size);
  kernels.run(a, size ? workspace.data() : nullptr, parallel);
}

// Contiguous gradients of an input's type.
struct Output {
  DType dtype;
  int64_t n;
  Exact<unsigned char> memory;
  Output(int64_t n, DType dtype) : dtype(dtype), n(n), memory(n * size_of(dtype)) {}
  void seen(Seen& by, const char* what) const { by.numbers(memory.data(), dtype, n, what); }
};

// Gradients by sample, `stride` apart; 0 is one for all.
template <class S> struct Grads {
  Exact<S> memory;
  int64_t stride;
  Grads(int64_t batch, int64_t stride) : memory(stride * (batch - 1) + 1), stride(stride) {
    for (int64_t i = 0; i < memory.size(); ++i) memory[i] = S(uniform(-2, 2));
  }
  bomkern::RowGrad<S> row() const { return {memory.data(), stride}; }
};

// Any type that arithmetic in S takes.
template <class S> DType any_type() { return DType(below(sizeof(S) == 8 ? 4 : 3)); }

// f(batch, dims, layout, whether any dtypes) for what a kernel may meet: less than a vector, a vector, panels, slices.
template <class F> void for_shapes(const F& f) {
  for (const int64_t batch : {2, 3, 33, 70}) {
    for (const int64_t dims : {1, 3, 8, 17, 64, 131, 515})
      f(batch, dims, Layout::plain, false), f(batch, dims, Layout::plain, true);
  }
  for (const Layout layout : layouts) {
    for (const int64_t dims : {1, 16, 21, 130}) f(37, dims, layout, true);
  }
  f(5000, 3, Layout::plain, true);
  f(1100, 40, Layout::spaced, true);
  f(4, 20000, Layout::misaligned, true);
}

void check_rows();      // gaussian_kl, consistency_variance, active_units, latent_statistics
void check_products();  // total_correlation, covariance_penalty
void check_goals();     // min_goal, goal_set, goal_set_keep

}  // namespace driver
