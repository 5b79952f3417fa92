// goal_set's backward pass on the GPU: each column's weights times the gradient of the loss, in one launch.
//
// Columns: a thread to a piece of one column; behind those blocks, one block to each batch-level goal's sum. The [B, K]
// matrix: a block turns a tile of the weights round in shared memory.
#pragma once
#include "../common/cuda_columns.h"

#include "goal_set.h"

namespace bomkern {
namespace goal_set {
namespace cuda {

using namespace bomkern::BOMKERN_ISA;

constexpr int backward_threads = 256;
template <class S> constexpr int tile_rows = 512 / sizeof(S);  // of a matrix's tile: 33 KB where there are 64 columns

template <class S> struct BackwardLaunch {
  Backward<S> a;
  int64_t blocks_each;         // of a column
  int dense;                   // columns that are not summed
  uint8_t order[max_goals];    // the outputs, those `dense` first
};

// A weight of 0 stops an infinite or NaN gradient from above.
template <class S> BOMKERN_HD S times(S weight, S grad) { return weight == 0 ? S(0) : weight * grad; }

// The gradients of W samples from `first` on.
template <class S, int W> BOMKERN_HD void gradients_of(const Backward<S>& a, int column, int64_t first, S (&v)[W]) {
  load<S, W>(Matrix{a.weight, {a.batch, 1}, dtype_of_number<S>}, column, first, v);
#pragma unroll
  for (int i = 0; i < W; ++i) v[i] = times(v[i], grad_of(a.grad, first + i));
}

template <class S, int W> BOMKERN_HD void sum_batch(const Backward<S>& a, const Output& out, unsigned char* bytes) {
  Sum<S> sum;
  for (int64_t b = threadIdx.x * int64_t(W); b < a.batch; b += blockDim.x * W) {
    S v[W];
    gradients_of<S, W>(a, out.column, b, v);
#pragma unroll
    for (int i = 0; i < W; ++i) sum.add(v[i]);
  }
  const S total[1] = {S(block_sum(sum.value(), bytes))};
  if (threadIdx.x == 0) store<S, 1>(out.data, out.dtype, 0, total);
}

template <class S, int W>
__global__ void __launch_bounds__(backward_threads) backward_kernel(const __grid_constant__ BackwardLaunch<S> l) {
  BOMKERN_SHARED_BYTES(bytes);
  const int64_t dense_blocks = l.dense * l.blocks_each;
  if (blockIdx.x >= dense_blocks) return sum_batch<S, W>(l.a, l.a.out[l.order[l.dense + blockIdx.x - dense_blocks]], bytes);
  const int64_t place = blockIdx.x / l.blocks_each;
  const Output& out = l.a.out[l.order[place]];
  const int64_t b = ((blockIdx.x - place * l.blocks_each) * blockDim.x + threadIdx.x) * W;
  if (b >= l.a.batch) return;
  S v[W];
  gradients_of<S, W>(l.a, out.column, b, v);
  store<S, W>(out.data, out.dtype, b, v);
}

template <class S, int W>
__global__ void __launch_bounds__(backward_threads) matrix_kernel(const __grid_constant__ Backward<S> a) {
  BOMKERN_SHARED_BYTES(bytes);
  S* const tile = reinterpret_cast<S*>(bytes);
  const int pitch = a.columns | 1;  // odd: the lanes of a warp, which write one column, meet in no bank
  const int64_t begin = int64_t(blockIdx.x) * tile_rows<S>;
  const int n = int(min(a.batch - begin, int64_t(tile_rows<S>)));
  for (int e = threadIdx.x; e < a.columns * tile_rows<S>; e += blockDim.x) {
    const int column = e / tile_rows<S>, row = e % tile_rows<S>;
    S v[1];
    if (row >= n) continue;
    gradients_of<S, 1>(a, column, begin + row, v);
    tile[row * pitch + column] = v[0];
  }
  __syncthreads();
  for (int e = threadIdx.x * W; e < n * a.columns; e += blockDim.x * W) {
    int row = e / a.columns, column = e - row * a.columns;
    S v[W];
#pragma unroll
    for (int i = 0; i < W; ++i) {
      v[i] = tile[row * pitch + column];
      if (++column == a.columns) column = 0, ++row;
    }
    store<S, W>(a.out[0].data, a.out[0].dtype, begin * a.columns + e, v);
  }
}

}  // namespace cuda
}  // namespace goal_set
}  // namespace bomkern
