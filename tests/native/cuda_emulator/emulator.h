// Runs CUDA kernels on the CPU, one fiber a CUDA thread: enough of CUDA for this project's kernels, and strict.
//
// The fibers of a block (of a cluster, or of the grid of a cooperative launch) take turns; a barrier or a shuffle is where a turn ends.
// Running the turns in several orders shows a missing barrier as a wrong result, and a barrier that not all threads
// reach as a deadlock. Shared memory starts as NaN and ends in a guard; an asynchronous copy arrives when waited for.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "numbers.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __CUDA_ARCH__ 900
#define BOMKERN_SHARED_BYTES(name) unsigned char* const name = emu::self->block->shared.data()

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};

namespace emu {

// Whether a case is left out: BOMKERN_EMULATE_EVERY=7 runs the first of every seven, and all while `every_case` is set.
inline bool every_case = false;
inline bool left_out() {
  static const char* const text = getenv("BOMKERN_EMULATE_EVERY");
  static unsigned number = 0;
  return !every_case && text && number++ % unsigned(atoi(text)) != 0;
}

[[noreturn]] inline void fail(const char* why) {
  fprintf(stderr, "emulator: %s\n", why);
  exit(1);
}

struct Barrier {
  int expected = 0, arrived = 0;
  uint64_t generation = 0;
};

struct Warp {
  Barrier barrier;
  unsigned char slot[2][32][8];
};

struct Block {
  dim3 index;
  Barrier barrier;
  std::vector<unsigned char> shared;
  std::vector<Warp> warps;
  size_t shared_bytes;
  int running;
  Block* cluster;  // its first block; the grid's where it is cooperative
  int cluster_size;
  Barrier cluster_barrier;
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fiber {
  ucontext_t context;  // where it begins; from its first barrier on, `jump` goes on with no call to the system
  jmp_buf jump;
  bool begun;
  dim3 thread;
  Block* block;
  const Barrier* waits_for = nullptr;
  uint64_t until = 0;
  bool done = false;
  std::vector<Copy> copies;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[stack_bytes]};
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t stack_bytes = 1 << 18;  // its frames have red zones
#else
  static constexpr size_t stack_bytes = 1 << 16;
#endif
  void* fake_stack = nullptr;
};

enum class Order { ascending, descending, shuffled };

struct Machine {
  // What the driver reports.
  int architecture = 90, multiprocessors = 3, resident = 2;  // blocks of any kernel on a multiprocessor
  size_t shared_limit = 49152;  // of the next launch
  Order order = Order::ascending;
  dim3 grid_dim, block_dim;
  bool cooperative = false;
  int launches = 0;
  int64_t blocks = 0;  // of all launches
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::function<void()> kernel;
  jmp_buf scheduler;
  void* fake_stack = nullptr;
  const void* stack = nullptr;
  size_t stack_bytes = 0;
};

inline Machine machine;
inline Fiber* self = nullptr;

// Tells AddressSanitizer of a switch from the scheduler to a fiber and back. `last`: the fiber has ended.
#if defined(__SANITIZE_ADDRESS__)
inline void leave_scheduler(Fiber& f) { __sanitizer_start_switch_fiber(&machine.fake_stack, f.stack.get(), Fiber::stack_bytes); }
inline void enter_fiber(Fiber& f) { __sanitizer_finish_switch_fiber(f.fake_stack, &machine.stack, &machine.stack_bytes); }
inline void leave_fiber(Fiber& f, bool last) {
  __sanitizer_start_switch_fiber(last ? nullptr : &f.fake_stack, machine.stack, machine.stack_bytes);
  if (last) f.fake_stack = nullptr;
}
inline void enter_scheduler() { __sanitizer_finish_switch_fiber(machine.fake_stack, nullptr, nullptr); }
// Bytes that are ours and no kernel's: it reports who touches them. To be given back before they are freed.
inline void forbid(const void* from, size_t bytes) { __asan_poison_memory_region(from, bytes); }
inline void permit(const void* from, size_t bytes) { __asan_unpoison_memory_region(from, bytes); }
#else
inline void leave_scheduler(Fiber&) {}
inline void enter_fiber(Fiber&) {}
inline void leave_fiber(Fiber&, bool) {}
inline void enter_scheduler() {}
inline void forbid(const void*, size_t) {}
inline void permit(const void*, size_t) {}
#endif

inline void wait(Barrier& barrier) {
  const uint64_t until = barrier.generation + 1;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  self->waits_for = &barrier;
  self->until = until;
  Fiber& f = *self;
  if (_setjmp(f.jump) == 0) {
    leave_fiber(f, false);
    _longjmp(machine.scheduler, 1);
  }
  enter_fiber(*self);
}

// A turn of one fiber, up to its next barrier.
__attribute__((noinline)) inline void resume(Fiber* f) {
  self = f;
  if (_setjmp(machine.scheduler) != 0) return enter_scheduler();
  leave_scheduler(*f);
  if (f->begun) _longjmp(f->jump, 1);
  f->begun = true;
  setcontext(&f->context);
}

inline void fiber_main() {
  enter_fiber(*self);
  machine.kernel();
  if (!self->copies.empty()) fail("a thread ended with asynchronous copies not waited for");
  self->done = true;
  // A block's shared memory ends with its last thread: who reads it from the cluster after that reads NaN.
  Block& block = *self->block;
  if (--block.running == 0) memset(block.shared.data(), 0xff, block.shared_bytes);
  leave_fiber(*self, true);
  _longjmp(machine.scheduler, 1);
}

inline void run_cluster(std::vector<Block>& blocks) {
  const int threads = machine.block_dim.x, count = threads * int(blocks.size());
  while (int(machine.fibers.size()) < count) machine.fibers.emplace_back(new Fiber);
  std::vector<Fiber*> turn;
  for (int i = 0; i < count; ++i) {
    Fiber& f = *machine.fibers[i];
    f.thread = dim3(i % threads, 0, 0);
    f.block = &blocks[i / threads];
    f.waits_for = nullptr;
    f.done = f.begun = false;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = Fiber::stack_bytes;
    makecontext(&f.context, fiber_main, 0);
    turn.push_back(&f);
  }
  if (machine.order == Order::descending) std::reverse(turn.begin(), turn.end());
  static std::mt19937 random(7);
  while (!turn.empty()) {
    if (machine.order == Order::shuffled) std::shuffle(turn.begin(), turn.end(), random);
    bool moved = false;
    for (Fiber* f : turn) {
      if (f->waits_for && f->waits_for->generation < f->until) continue;
      moved = true;
      resume(f);
    }
    if (!moved) fail("deadlock: a barrier that not every thread reaches");
    turn.erase(std::remove_if(turn.begin(), turn.end(), [](Fiber* f) { return f->done; }), turn.end());
  }
  self = nullptr;
}

inline void run(dim3 grid, dim3 block, size_t shared, int cluster, bool cooperative, std::function<void()> kernel) {
  constexpr size_t guard = 256;
  if (cooperative) {
    if (int(grid.x) > machine.multiprocessors * machine.resident) fail("a cooperative grid that is not resident");
    cluster = grid.x;
  }
  if (block.x % 32 || block.x > 1024 || grid.x % cluster || grid.x == 0 || shared > machine.shared_limit) {
    fail("a launch that no GPU would accept");
  }
  machine.shared_limit = 49152;
  machine.grid_dim = grid;
  machine.block_dim = block;
  machine.kernel = std::move(kernel);
  machine.cooperative = cooperative;
  ++machine.launches;
  machine.blocks += grid.x;
  for (unsigned first = 0; first < grid.x; first += cluster) {
    std::vector<Block> blocks(cluster);
    for (int i = 0; i < cluster; ++i) {
      Block& b = blocks[i];
      b.index = dim3(first + i, 0, 0);
      b.barrier.expected = block.x;
      b.shared.assign(shared + guard, 0xff);
      b.shared_bytes = shared;
      b.running = block.x;
      b.warps.resize(block.x / 32);
      for (Warp& w : b.warps) w.barrier.expected = 32;
      b.cluster = blocks.data();
      b.cluster_size = cluster;
      forbid(b.shared.data() + shared, guard);
    }
    blocks[0].cluster_barrier.expected = block.x * cluster;
    run_cluster(blocks);
    for (const Block& b : blocks) {
      permit(b.shared.data() + shared, guard);
      for (size_t i = 0; i < guard; ++i) {
        if (b.shared[shared + i] != 0xff) fail("a write past the end of shared memory");
      }
    }
  }
}

template <class T> T shuffle(T value, int from) {
  static_assert(sizeof(T) <= 8, "a shuffle moves 8 bytes at most");
  Warp& warp = self->block->warps[self->thread.x / 32];
  auto& slots = warp.slot[warp.barrier.generation % 2];
  const int lane = self->thread.x % 32;
  memcpy(slots[lane], &value, sizeof value);
  wait(warp.barrier);
  memcpy(&value, slots[from < 32 ? from : lane], sizeof value);
  return value;
}

inline unsigned thread_index() { return self->thread.x; }
inline unsigned block_index() { return self->block->index.x; }
inline unsigned block_size() { return machine.block_dim.x; }
inline unsigned grid_size() { return machine.grid_dim.x; }

template <unsigned (*get)()> struct Index {
  struct {
    operator unsigned() const { return get(); }
  } x;
};

}  // namespace emu

inline emu::Index<emu::thread_index> threadIdx;
inline emu::Index<emu::block_index> blockIdx;
inline emu::Index<emu::block_size> blockDim;
inline emu::Index<emu::grid_size> gridDim;

inline void __threadfence() {}
inline void __syncthreads() { emu::wait(emu::self->block->barrier); }
template <class T> T __shfl_down_sync(unsigned, T value, int offset) {
  return emu::shuffle(value, emu::self->thread.x % 32 + offset);
}
template <class T> T __shfl_sync(unsigned, T value, int lane) { return emu::shuffle(value, lane); }
template <class T> T __shfl_xor_sync(unsigned, T value, int mask) {
  return emu::shuffle(value, int(emu::self->thread.x % 32) ^ mask);
}
inline unsigned __ballot_sync(unsigned, bool predicate) {
  unsigned out = 0;
  for (int lane = 0; lane < 32; ++lane) out |= unsigned(emu::shuffle(predicate, lane)) << lane;
  return out;
}
inline unsigned atomicAdd(unsigned* to, unsigned value) { return *to += value, *to - value; }

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  if (bytes != 4 && bytes != 8 && bytes != 16) emu::fail("a copy of a size that cp.async has not");
  if ((uintptr_t(to) | uintptr_t(from)) % bytes) emu::fail("a misaligned copy");
  emu::self->copies.push_back({to, from, bytes});
}
inline void __pipeline_commit() {}
inline void __pipeline_wait_prior(int) {
  for (const emu::Copy& c : emu::self->copies) memcpy(c.to, c.from, c.bytes);
  emu::self->copies.clear();
}

namespace cooperative_groups {
struct cluster_group {
  void sync() const { emu::wait(emu::self->block->cluster->cluster_barrier); }
  template <class T> T* map_shared_rank(T* p, int rank) const {
    const emu::Block* block = emu::self->block;
    if (rank < 0 || rank >= block->cluster_size) emu::fail("a rank outside the cluster");
    const size_t offset = reinterpret_cast<const unsigned char*>(p) - block->shared.data();
    if (offset >= block->shared_bytes) emu::fail("a pointer that is not into shared memory");
    return reinterpret_cast<T*>(block->cluster[rank].shared.data() + offset);
  }
};
inline cluster_group this_cluster() { return {}; }
struct grid_group {
  void sync() const {
    if (!emu::machine.cooperative) emu::fail("a grid's barrier in a launch that is not cooperative");
    emu::wait(emu::self->block->cluster->cluster_barrier);
  }
};
inline grid_group this_grid() { return {}; }
}  // namespace cooperative_groups

// The few functions of the runtime that a launch takes.
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
typedef struct CUstream_st* cudaStream_t;
enum { cudaLaunchAttributeClusterDimension, cudaLaunchAttributeCooperative, cudaDevAttrMultiProcessorCount };
struct cudaLaunchAttribute {
  int id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
struct cudaFuncAttributes {
  int ptxVersion;
};
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* id) { return *id = 64, cudaSuccess; }  // so high that nothing is remembered of it
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, const void*) {
  return out->ptxVersion = emu::machine.architecture, cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* out, int, int) {
  return *out = emu::machine.multiprocessors, cudaSuccess;
}
template <class... P>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* out, void (*)(P...), int, size_t) {
  return *out = emu::machine.resident, cudaSuccess;
}
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaFuncSetAttribute(const void*, int, int bytes) {
  if (bytes > 101376) return cudaErrorInvalidValue;  // what every GPU since 8.0 can give
  return emu::machine.shared_limit = size_t(bytes), cudaSuccess;
}
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* c, void (*kernel)(P...), const A&... arguments) {
  int cluster = 1;
  bool cooperative = false;
  for (unsigned i = 0; i < c->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = c->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) cluster = int(attribute.val.clusterDim.x);
    if (attribute.id == cudaLaunchAttributeCooperative) cooperative = attribute.val.cooperative;
  }
  emu::run(c->gridDim, c->blockDim, c->dynamicSmemBytes, cluster, cooperative, [&] { kernel(arguments...); });
  return cudaSuccess;
}
