// goal_set on the GPU: which kernel, how many blocks, how shared memory and the workspace are laid out.
#include "cuda.h"

#include "../common/cuda_tune.h"
#include "cuda_backward.h"
#include "cuda_forward.h"
#include "cuda_keep.h"

namespace bomkern {
namespace goal_set {
namespace cuda {
namespace {

// Up to `one_block` samples, a grid that waits for itself would cost more than it saves.
int64_t one_block = 1024;
int64_t least_grid_threads = 64, most_grid_threads = 128;
constexpr size_t shared_limit = 49152;  // what any block may have unasked

bool are_warps(int64_t threads) { return threads % 32 == 0 && threads <= most_threads; }

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Neighbours, where four of them are one aligned piece everywhere.
template <class S> Access access_of(const Forward<S>& a) {
  bool adjacent = aligned(a.bottleneck) && (a.reduction != Reduction::none || aligned(a.loss)), halves = true;
  if (a.weight) adjacent &= aligned(a.weight) && a.columns.batch * sizeof(S) % 16 == 0;
  for (int k = 0; k < a.columns.count; ++k) {
    const bool half = size_of(a.columns.dtype[k]) == 2;
    const int64_t stride = a.columns.stride[k];
    const bool whole = aligned(a.columns.data[k]) || (half && reinterpret_cast<uintptr_t>(a.columns.data[k]) % 8 == 0);
    adjacent &= stride == 0 || (stride == 1 && whole);
    halves &= half;
  }
  return adjacent ? Access::adjacent : halves ? Access::halves : Access::apart;
}

template <class S> bool valid(const Forward<S>& a) {
  return a.columns.batch >= 1 && a.columns.count >= 1 && a.columns.count <= max_goals && a.groups.count >= 1;
}

// The kernel for these arguments, and how many of its blocks a device holds at once.
template <class S> auto kernel_of(const Forward<S>& a) {
  return a.present ? forward_kernel<S, true> : forward_kernel<S, false>;
}
template <class S> int64_t resident_of(const Forward<S>& a) {
  static std::atomic<int> known[2][most_threads / 32 + 1][16];  // for each number of warps that a bench may set
  return resident_blocks(kernel_of(a), most_grid_threads, shared_limit, known[a.present != nullptr][most_grid_threads / 32]);
}

template <class S> struct ForwardPlan {
  ForwardLaunch<S> l{};
  int64_t blocks = 1;
  int threads;
  size_t shared, bytes = 0;

  ForwardPlan(const Forward<S>& a, void* base) {
    const int64_t batch = a.columns.batch;
    const int columns = a.columns.count, goals = a.groups.count;
    l.a = a;
    l.access = access_of(a);
    if (batch <= one_block) {
      threads = int(ceil_div(batch, warp_rows)) * 32;
    } else {
      const int64_t resident = resident_of(a);
      // Small blocks reach more multiprocessors, until they would be half of all that can be resident.
      threads = ceil_div(batch, least_grid_threads * rows) * 2 <= resident ? least_grid_threads : most_grid_threads;
      blocks = least(ceil_div(batch, threads * rows), resident);
      Memory memory(base);
      l.parts.total = memory.take<Total>(blocks);
      l.parts.sums = memory.take<double>(blocks * RecordAt(goals, columns).highest);
      l.parts.highest = memory.take<S>(blocks * columns);
      bytes = memory.bytes();
    }
    const size_t fixed = stage_offset<S>(threads / 32, goals, columns), column_bytes = threads * rows * sizeof(S);
    l.group = int(least(columns, (shared_limit - fixed) / column_bytes));
    shared = fixed + l.group * column_bytes;
  }
};

template <class S> size_t workspace(const Forward<S>& a) { return valid(a) ? ForwardPlan<S>(a, nullptr).bytes : 0; }

template <class S> cudaError_t run(const Forward<S>& a, void* base, cudaStream_t stream) {
  if (!valid(a)) return cudaErrorInvalidValue;
  const ForwardPlan<S> plan(a, base);
  if (plan.bytes && base == nullptr) return cudaErrorInvalidValue;
  return start(kernel_of(a), plan.blocks, plan.threads, plan.shared, plan.blocks > 1, stream, plan.l);
}

template <class S> bool valid(const Backward<S>& a) {
  return a.batch >= 1 && a.outputs >= 0 && a.outputs <= max_goals && a.columns <= max_goals;
}

// Partial sums of goals without a batch dimension.
template <class S> size_t workspace(const Backward<S>& a) {
  const int64_t parts = ceil_div(a.batch, sum_chunk);
  if (!valid(a) || parts == 1) return 0;
  int sums = 0;
  for (int o = 0; o < a.outputs; ++o) sums += a.out[o].batch_level;
  return sums * parts * sizeof(double);
}

template <class S> cudaError_t run(const Backward<S>& a, void* base, cudaStream_t stream) {
  if (!valid(a)) return cudaErrorInvalidValue;
  if (a.outputs == 0) return cudaSuccess;
  if (a.out[0].column < 0) {
    if (a.outputs > 1) return cudaErrorInvalidValue;
    const int width = width_of<S>(1, a.batch * a.columns, {contiguous(a.out[0].data, a.out[0].dtype, 1),
                                                           contiguous(a.out[0].data, dtype_of_number<S>, 1)});
    const size_t tile = size_t(tile_rows<S>) * (a.columns | 1) * sizeof(S);
    return with_width<S, false>(width, [&](auto w) {
      return start(matrix_kernel<S, decltype(w)::value>, ceil_div(a.batch, tile_rows<S>), backward_threads, tile, false,
                   stream, a);
    });
  }
  const bool partials = workspace(a) > 0;
  if (partials && base == nullptr) return cudaErrorInvalidValue;
  BackwardLaunch<S> l{};
  l.a = a;
  l.partials = partials ? static_cast<double*>(base) : nullptr;
  l.sum_blocks = ceil_div(a.batch, sum_chunk);
  Matrix matrices[max_goals + 1] = {contiguous(const_cast<S*>(a.weight), dtype_of_number<S>, a.batch)};
  int sums = 0;
  for (int o = 0; o < a.outputs; ++o) {
    if (a.out[o].batch_level) {
      l.order[a.outputs - ++sums] = uint8_t(o);
    } else {
      l.order[l.dense++] = uint8_t(o);
      matrices[l.dense] = contiguous(a.out[o].data, a.out[o].dtype, a.batch);
    }
  }
  const int width = width_of<S>(1, a.batch, matrices, size_t(l.dense + 1));
  const size_t shared = backward_threads / 32 * sizeof(double);
  const cudaError_t first = with_width<S, false>(width, [&](auto w) {
    constexpr int W = decltype(w)::value;
    l.blocks_each = ceil_div(a.batch, backward_threads * W);
    const int64_t blocks = l.dense * l.blocks_each + sums * l.sum_blocks;
    return start(backward_kernel<S, W>, blocks, backward_threads, shared, false, stream, l);
  });
  if (first != cudaSuccess || !partials) return first;
  return start(sum_kernel<S>, sums, backward_threads, shared, false, stream, l);
}

template <class S, class T> cudaError_t run(const Keep<S, T>& a, cudaStream_t stream) {
  if (a.goals < 0 || a.goals > max_goals || a.size < 1 || a.rows < 1) return cudaErrorInvalidValue;
  return start(keep_kernel<S, T>, 1, keep_threads, 2 * max_goals * sizeof(T), false, stream, a);
}

}  // namespace
}  // namespace cuda

BOMKERN_CUDA_OP

template <class S, class T> cudaError_t cuda_run(const Keep<S, T>& a, cudaStream_t stream) { return cuda::run(a, stream); }

template cudaError_t cuda_run(const Keep<float, float>&, cudaStream_t);
template cudaError_t cuda_run(const Keep<float, double>&, cudaStream_t);
template cudaError_t cuda_run(const Keep<double, float>&, cudaStream_t);
template cudaError_t cuda_run(const Keep<double, double>&, cudaStream_t);

}  // namespace goal_set
}  // namespace bomkern

// See cuda_tune.h.
BOMKERN_EXPORT int64_t bomkern_tune_goal_set(const char* name, int64_t value) {
  using namespace bomkern::goal_set::cuda;
  return bomkern::cuda::tune({{"one_block", &one_block, [](int64_t batch) { return batch <= most_threads * rows; }},
                              {"least_grid_threads", &least_grid_threads, are_warps},
                              {"most_grid_threads", &most_grid_threads, are_warps}},
                             name, value);
}
