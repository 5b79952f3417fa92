// goal_set's backward pass on the GPU: each column's weights times the gradient of the loss.
//
// Columns: a thread to a piece of one column. Behind those blocks, the sums of goals without a batch dimension: a block to
// each `sum_chunk` samples, and where there are more a second launch adds up, in an order that B alone fixes. The [B, K]
// matrix: a block turns a tile of the weights round in shared memory.
#pragma once
#include "../common/cuda_columns.h"

#include "goal_set.h"

namespace bomkern {
namespace goal_set {
namespace cuda {

using namespace bomkern::BOMKERN_ISA;

constexpr int backward_threads = 256;
constexpr int64_t sum_chunk = 4096;
template <class S> constexpr int tile_rows = 512 / sizeof(S);  // of a matrix's tile: 33 KB where there are 64 columns

template <class S> struct BackwardLaunch {
  Backward<S> a;
  double* partials;          // [sums, sum_blocks]; null where that is one
  int64_t blocks_each;       // of a column
  int64_t sum_blocks;        // of a sum
  int dense;                 // columns that are not summed
  uint8_t order[max_goals];  // the outputs, those `dense` first
};

// A weight of 0 blocks an infinite or NaN incoming gradient.
template <class S> BOMKERN_HD S times(S weight, S grad) { return weight == 0 ? S(0) : weight * grad; }

// The gradients of W samples from `first` on.
template <class S, int W> BOMKERN_HD void gradients_of(const Backward<S>& a, int column, int64_t first, S (&v)[W]) {
  load<S, W>(Matrix{a.weight, {a.batch, 1}, dtype_of_number<S>}, column, first, v);
#pragma unroll
  for (int i = 0; i < W; ++i) v[i] = times(v[i], grad_of(a.grad, first + i));
}

template <class S> BOMKERN_HD void write_sum(const Output& out, double sum) {
  const S total[1] = {S(sum)};
  if (threadIdx.x == 0) store<S, 1>(out.data, out.dtype, 0, total);
}

// Block `index` of those of the sums.
template <class S, int W> BOMKERN_HD void sum_samples(const BackwardLaunch<S>& l, int64_t index, unsigned char* bytes) {
  const int64_t place = index / l.sum_blocks, begin = (index - place * l.sum_blocks) * sum_chunk;
  const int64_t end = min(begin + sum_chunk, l.a.batch);
  const Output& out = l.a.out[l.order[l.dense + place]];
  Sum<S> sum;
  for (int64_t b = begin + threadIdx.x * W; b < end; b += blockDim.x * W) {
    S v[W];
    gradients_of<S, W>(l.a, out.column, b, v);
#pragma unroll
    for (int i = 0; i < W; ++i) sum.add(v[i]);
  }
  const double total = block_sum(sum.value(), bytes);
  if (l.partials == nullptr) return write_sum<S>(out, total);
  if (threadIdx.x == 0) l.partials[index] = total;
}

template <class S, int W>
__global__ void __launch_bounds__(backward_threads) backward_kernel(const __grid_constant__ BackwardLaunch<S> l) {
  BOMKERN_SHARED_BYTES(bytes);
  const int64_t dense_blocks = l.dense * l.blocks_each;
  if (blockIdx.x >= dense_blocks) return sum_samples<S, W>(l, blockIdx.x - dense_blocks, bytes);
  const int64_t place = blockIdx.x / l.blocks_each;
  const Output& out = l.a.out[l.order[place]];
  const int64_t b = ((blockIdx.x - place * l.blocks_each) * blockDim.x + threadIdx.x) * W;
  if (b >= l.a.batch) return;
  S v[W];
  gradients_of<S, W>(l.a, out.column, b, v);
  store<S, W>(out.data, out.dtype, b, v);
}

// A block to each sum, after those that left partial sums of it.
template <class S>
__global__ void __launch_bounds__(backward_threads) sum_kernel(const __grid_constant__ BackwardLaunch<S> l) {
  BOMKERN_SHARED_BYTES(bytes);
  const double* const partials = l.partials + blockIdx.x * l.sum_blocks;
  double sum = 0;
#pragma unroll 4
  for (int64_t b = threadIdx.x; b < l.sum_blocks; b += backward_threads) sum += partials[b];
  write_sum<S>(l.a.out[l.order[l.dense + blockIdx.x]], block_sum(sum, bytes));
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
