// Kernels that reduce along columns: means and variances over the batch in one launch.
//
// A block takes a tile of columns and a slice of the rows; its threads stand `lanes` beside one another along a row, in
// as many groups as there are threads for. Every thread keeps the mean, and the sum of squared distances from it, of what
// it has seen of its own columns: a few rows are reduced in registers, twice over, and merged with those before (Chan,
// Golub and LeVeque 1983). So no sum of squares is large beside what it is to give, wherever the values lie. Then the
// groups merge, and after a barrier of the whole grid the slices do: whole blocks to a few columns each, their mean first
// and the distances from it after. The slices follow from the shape alone, and with them the order of every sum: the bits
// do not depend on how many blocks a device holds.
#pragma once
#include "cuda_launch.h"
#include "cuda_pieces.h"
#include "cuda_tune.h"

#include <cooperative_groups.h>

namespace bomkern {
namespace BOMKERN_ISA {

constexpr int column_threads = 256;  // of a block
constexpr int most_chunk_rows = 4;
constexpr int slice_capacity = 256;     // slices that can merge
constexpr int most_finish_groups = 32;  // of a block while they do
// Rows of a thread in flight: what registers hold.
template <int W> constexpr int chunk_rows = W == 8 ? 2 : most_chunk_rows;

// The mapping of a grid to a matrix.
struct Tiling {
  int64_t batch, dims, tiles, slices, slice_rows;
  int lanes;         // threads along a row, a power of 2 up to 32
  int finish_lanes;  // columns of a block while the slices merge
  int64_t sets;      // of so many columns
};

// About `items` in all, where there is enough; each item, a tile's slice, is one block's.
inline Tiling tiling_of(int64_t batch, int64_t dims, int width, int64_t items) {
  Tiling t{};
  const int64_t pieces = ceil_div(dims, width);
  t.batch = batch, t.dims = dims;
  t.lanes = power_of_2(pieces, 32);
  // A last tile that is mostly empty keeps a block as long as a full one.
  while (pieces > 32 && t.lanes > 8 && ceil_div(pieces, t.lanes) * t.lanes * 8 > pieces * 9) t.lanes /= 2;
  t.tiles = ceil_div(pieces, t.lanes);
  const int64_t groups = column_threads / t.lanes, most = ceil_div(batch, groups * most_chunk_rows);
  int64_t slices = items / t.tiles;
  slices = slices < 1 ? 1 : slices > most ? most : slices;
  t.slice_rows = ceil_div(ceil_div(batch, slices), groups) * groups;
  t.slices = ceil_div(batch, t.slice_rows);
  t.finish_lanes = column_threads / power_of_2(t.slices, most_finish_groups);
  t.sets = ceil_div(dims, t.finish_lanes);
  return t;
}

// Up to `one_slice` elements, one block is sooner done than a grid that waits for itself.
BOMKERN_SHARED_THRESHOLD one_slice = 16384;
BOMKERN_SHARED_THRESHOLD most_slices = slice_capacity;  // two blocks for each of some 130 multiprocessors
BOMKERN_SHARED_THRESHOLD most_column_blocks = 8;        // for each multiprocessor, where no slices merge

// The tiling of a grid with barriers, whose slices merge.
inline Tiling merging_tiling_of(int64_t batch, int64_t dims, int width) {
  return tiling_of(batch, dims, width, batch * dims <= one_slice ? 1 : most_slices);
}

// A thread's part of an item: columns from `column` on, and each `groups`-th row.
template <int W> struct Item {
  int64_t tile, slice, column, first, end;
  int groups;
  bool inside;  // its columns
  BOMKERN_HD Item(const Tiling& t, int64_t index) {
    slice = index / t.tiles, tile = index - slice * t.tiles;
    groups = blockDim.x / t.lanes;
    column = (tile * t.lanes + threadIdx.x % t.lanes) * W;
    first = slice * t.slice_rows + threadIdx.x / t.lanes;
    end = min((slice + 1) * t.slice_rows, t.batch);
    inside = column < t.dims;
  }
  // How many of the chunk's rows, which begin at `row`, there are.
  BOMKERN_HD int rows_from(int64_t row) const {
    int n = 0;
#pragma unroll
    for (int j = 0; j < chunk_rows<W>; ++j) n += inside && row + j * groups < end;
    return n;
  }
};

template <int W> struct Chunk {
  Raw<W> row[chunk_rows<W>];
  BOMKERN_HD void fetch_from(const Matrix& m, const Item<W>& item, int64_t row0, int n) {
    fetch_rows<W>(m, row0, item.groups, item.column, n, row);
  }
};

// The weights of a chunk of n rows in the merge with `count` earlier rows.
template <class S> struct Weights {
  S share, weight, before;  // of one row in the chunk; of the chunk in all; that times `count`
  BOMKERN_HD Weights(unsigned count, int n) {
    static_assert(most_chunk_rows == 4);
    share = n == 1 ? S(1) : n == 2 ? S(0.5) : n == 3 ? S(1) / S(3) : S(0.25);
    weight = S(n) / S(count + n), before = weight * S(count);
  }
};

// Mean, and sum of squared distances from it, of `count` differences from the column's first value.
template <class S, int W> struct Moments {
  S mean[W], square[W];
  unsigned count;

  BOMKERN_HD void clear() {
#pragma unroll
    for (int i = 0; i < W; ++i) mean[i] = square[i] = 0;
    count = 0;
  }
  BOMKERN_HD void join(int i, S other_mean, S other_square, S weight, S before) {
    const S delta = other_mean - mean[i];
    mean[i] = fma_of(delta, weight, mean[i]);
    square[i] += fma_of(delta * before, delta, other_square);
  }
  // The first n rows of a chunk, less the columns' first values; at least 1.
  BOMKERN_HD void take(const Chunk<W>& chunk, DType dtype, const S (&first)[W], int n, const Weights<S>& weights) {
    S u[chunk_rows<W>][W];
    widen_rows(chunk.row, dtype, u);
    take_widened(u, first, n, weights);
  }
  BOMKERN_HD void take_widened(S (&u)[chunk_rows<W>][W], const S (&first)[W], int n, const Weights<S>& weights) {
    count += n;
#pragma unroll
    for (int j = 0; j < chunk_rows<W>; ++j) {
#pragma unroll
      for (int i = 0; i < W; ++i) u[j][i] = j < n ? u[j][i] - first[i] : S(0);
    }
#pragma unroll
    for (int i = 0; i < W; ++i) {
      S center = 0, sum = 0;
#pragma unroll
      for (int j = 0; j < chunk_rows<W>; j += 2) center += u[j][i] + u[j + 1][i];
      center *= weights.share;
#pragma unroll
      for (int j = 0; j < chunk_rows<W>; ++j) {
        const S d = j < n ? u[j][i] - center : S(0);
        sum = fma_of(d, d, sum);
      }
      join(i, center, sum, weights.weight, weights.before);
    }
  }
  BOMKERN_HD void merge(const Moments& other) {
    if (other.count == 0) return;
    const S weight = S(other.count) / S(count + other.count), before = weight * S(count);
    count += other.count;
#pragma unroll
    for (int i = 0; i < W; ++i) join(i, other.mean[i], other.square[i], weight, before);
  }
};

// The groups' results into group 0. All threads of the block; T is Moments, or merges as it does.
template <class T> BOMKERN_HD void merge_groups(T& mine, int lanes, unsigned char* bytes) {
  T* const slot = reinterpret_cast<T*>(bytes);
  __syncthreads();  // it may still be read from the last time
  for (int half = blockDim.x / 2; half >= lanes; half /= 2) {
    const int i = threadIdx.x;
    if (i >= half && i < 2 * half) slot[i] = mine;
    __syncthreads();
    if (i < half) mine.merge(slot[i + half]);
  }
}

// A barrier of all blocks, which are resident: the launch is cooperative unless there is but one.
BOMKERN_HD void grid_sync() {
  if (gridDim.x > 1) {
    cooperative_groups::this_grid().sync();
  } else {
    __syncthreads();
  }
}

// The sums over the groups of a finishing block, in each of its threads that of its column; the order is fixed.
template <class S, int N> BOMKERN_HD void sum_groups(S (&x)[N], int lanes, unsigned char* bytes) {
  S* const shared = reinterpret_cast<S*>(bytes);  // [N, column_threads]
#pragma unroll
  for (int offset = 16; offset >= column_threads / most_finish_groups; offset /= 2) {
    if (offset < lanes) break;
#pragma unroll
    for (int k = 0; k < N; ++k) x[k] += __shfl_xor_sync(whole_warp, x[k], offset);
  }
  __syncthreads();  // it may still be read from the last time
#pragma unroll
  for (int k = 0; k < N; ++k) shared[k * column_threads + threadIdx.x] = x[k], x[k] = 0;
  __syncthreads();
  const int pitch = max(lanes, 32);
#pragma unroll
  for (int row = 0; row < column_threads / 32; ++row) {
    if (row * pitch >= column_threads) break;
#pragma unroll
    for (int k = 0; k < N; ++k) x[k] += shared[k * column_threads + row * pitch + threadIdx.x % pitch];
  }
}

// A thread's part of a set of columns while the slices merge: one column, and each `groups`-th slice.
struct Finisher {
  static constexpr int parts = slice_capacity / most_finish_groups;  // at most
  int64_t column, slices, dims;
  int group, groups;
  bool inside;
  BOMKERN_HD Finisher(const Tiling& t, int64_t set) : slices(t.slices), dims(t.dims) {
    column = set * t.finish_lanes + threadIdx.x % t.finish_lanes;
    group = threadIdx.x / t.finish_lanes, groups = column_threads / t.finish_lanes;
    inside = column < dims;
  }
  BOMKERN_HD int slice(int i) const { return group + i * groups; }
  BOMKERN_HD bool has(int i) const { return inside && slice(i) < slices; }
  template <class S> BOMKERN_HD S part(const S* plane, int i) const {
    return has(i) ? plane[slice(i) * dims + column] : S(0);
  }
};

// Calls write(column, mean, square) in one thread for each of a set's columns: the moments of all rows from those of the
// slices, parts [2, slices, dims]. The slices' sizes are known, so no slice takes a division; all are read at once.
template <class S, class Write>
BOMKERN_HD void finish_moments(const S* parts, const Tiling& t, int64_t set, unsigned char* bytes, Write write) {
  const Finisher f(t, set);
  const S batch = S(t.batch), rows = S(t.slice_rows), last_rows = S(t.batch - (t.slices - 1) * t.slice_rows);
  const S weight = rows / batch, last_weight = last_rows / batch;
  const int last = int(t.slices) - 1;
  S part[Finisher::parts], square = 0, sum[1] = {0};
#pragma unroll
  for (int i = 0; i < Finisher::parts; ++i) part[i] = f.part(parts, i);
#pragma unroll
  for (int i = 0; i < Finisher::parts; ++i) square += f.part(parts + t.slices * t.dims, i);
#pragma unroll
  for (int i = 0; i < Finisher::parts; ++i) sum[0] = fma_of(f.slice(i) == last ? last_weight : weight, part[i], sum[0]);
  sum_groups(sum, t.finish_lanes, bytes);
  // The mean distance from the mean is the mean's rounding error.
  S around[2] = {0, square};
#pragma unroll
  for (int i = 0; i < Finisher::parts; ++i) {
    const S distance = f.has(i) ? part[i] - sum[0] : S(0);
    around[0] = fma_of(f.slice(i) == last ? last_weight : weight, distance, around[0]);
    around[1] = fma_of((f.slice(i) == last ? last_rows : rows) * distance, distance, around[1]);
  }
  sum_groups(around, t.finish_lanes, bytes);
  if (f.group != 0 || !f.inside) return;
  const S excess = batch * around[0] * around[0], less = isfinite(excess) ? around[1] - excess : around[1];
  write(f.column, sum[0] + around[0], less < 0 ? S(0) : less);
}

// The same of N sums, parts [N, slices, dims]: calls write(column, sums).
template <int N, class S, class Write>
BOMKERN_HD void finish_sums(const S* parts, const Tiling& t, int64_t set, unsigned char* bytes, Write write) {
  const Finisher f(t, set);
  S sum[N];
#pragma unroll
  for (int k = 0; k < N; ++k) {
    sum[k] = 0;
#pragma unroll
    for (int i = 0; i < Finisher::parts; ++i) sum[k] += f.part(parts + k * t.slices * t.dims, i);
  }
  sum_groups(sum, t.finish_lanes, bytes);
  if (f.group == 0 && f.inside) write(f.column, sum);
}

// True in all threads of the last of `blocks` blocks to come here, which sees what each of them wrote before. `arrived`
// was 0 at a barrier of the grid.
BOMKERN_HD bool is_last_block(unsigned* arrived, int blocks, unsigned char* bytes) {
  unsigned* const place = reinterpret_cast<unsigned*>(bytes);
  __syncthreads();
  if (blocks == 1) return true;
  if (threadIdx.x == 0) {
    __threadfence();
    *place = atomicAdd(arrived, 1u);
    __threadfence();
  }
  __syncthreads();
  const bool last = *place == unsigned(blocks) - 1;
  __syncthreads();  // the bytes have other uses
  return last;
}

// The moments of one item, into parts [2, slices, dims].
template <class S, int W>
BOMKERN_HD void write_parts(Moments<S, W>& m, const Tiling& t, const Item<W>& item, S* parts, unsigned char* bytes) {
  merge_groups(m, t.lanes, bytes);
  if (int(threadIdx.x) >= t.lanes || !item.inside) return;
  S* const mean = parts + item.slice * t.dims + item.column;
  S* const square = mean + t.slices * t.dims;
#pragma unroll
  for (int i = 0; i < W; ++i) mean[i] = m.mean[i], square[i] = m.square[i];
}

template <class S, int W>
BOMKERN_HD void moments_of(const Matrix& x, const Tiling& t, S* parts, unsigned char* bytes) {
  for (int64_t index = blockIdx.x; index < t.tiles * t.slices; index += gridDim.x) {
    const Item<W> item(t, index);
    Moments<S, W> m;
    m.clear();
    if (item.inside) {
      S first[W];
      load<S, W>(x, 0, item.column, first);
      // The next chunk is on its way while one is worked on.
      const int64_t step = chunk_rows<W> * item.groups;
      int64_t row = item.first;
      int n = item.rows_from(row);
      Chunk<W> chunk, next;
      chunk.fetch_from(x, item, row, n);
      for (; n == chunk_rows<W>; chunk = next) {
        row += step;
        n = item.rows_from(row);
        next.fetch_from(x, item, row, n);
        m.take(chunk, x.dtype, first, chunk_rows<W>, Weights<S>(m.count, chunk_rows<W>));
      }
      if (n) m.take(chunk, x.dtype, first, n, Weights<S>(m.count, n));
    }
    write_parts(m, t, item, parts, bytes);
  }
}

// The sum over the block, in each of its threads.
BOMKERN_HD double block_sum(double x, unsigned char* bytes) {
  return team_sum(x, blockDim.x, reinterpret_cast<double*>(bytes));
}

template <class S, int W> constexpr size_t column_shared = column_threads * sizeof(Moments<S, W>);

}  // namespace BOMKERN_ISA
}  // namespace bomkern

// See cuda_tune.h.
BOMKERN_EXPORT_SHARED int64_t bomkern_tune_columns(const char* name, int64_t value) {
  using namespace bomkern::cuda;
  return tune({{"one_slice", &one_slice},
               {"most_slices", &most_slices, [](int64_t slices) { return slices <= slice_capacity; }},
               {"most_column_blocks", &most_column_blocks}},
              name, value);
}
