// Kernels that reduce along columns: means and variances over the batch in one launch.
//
// A block takes a tile of columns and a slice of the rows; its threads stand `lanes` beside one another along a row, in
// as many groups as there are threads for. Every thread keeps the mean, and the sum of squared distances from it, of what
// it has seen of its own columns: a few rows are reduced in registers, twice over, and merged with those before (Chan,
// Golub and LeVeque 1983). So no sum of squares is large beside what it is to give, wherever the values lie. Then the
// groups merge, and after a barrier of the whole grid the slices do.
#pragma once
#include "cuda_launch.h"
#include "cuda_pieces.h"

#include <cooperative_groups.h>

namespace bomkern {
namespace BOMKERN_ISA {

constexpr int column_threads = 256;  // of a block
constexpr int finish_lanes = 32;     // columns of a block while the slices merge
constexpr int most_chunk_rows = 4;
// Rows of a thread in flight: what registers hold.
template <int W> constexpr int chunk_rows = W == 8 ? 2 : most_chunk_rows;

// How a grid lies over a matrix.
struct Tiling {
  int64_t batch, dims, tiles, slices, slice_rows;
  int lanes;  // threads along a row, a power of 2 up to 32
};

// `places` blocks are to have something to do, where there is enough; each item, a tile's slice, is one block's. `meet`:
// the grid has barriers.
inline Tiling tiling_of(int64_t batch, int64_t dims, int width, int64_t places, bool meet) {
  Tiling t{};
  const int64_t pieces = ceil_div(dims, width);
  t.batch = batch, t.dims = dims;
  t.lanes = power_of_2(pieces, 32);
  // A last tile that is mostly empty keeps a block as long as a full one.
  while (pieces > 32 && t.lanes > 8 && ceil_div(pieces, t.lanes) * t.lanes * 8 > pieces * 9) t.lanes /= 2;
  t.tiles = ceil_div(pieces, t.lanes);
  const int64_t groups = column_threads / t.lanes, most = ceil_div(batch, groups * most_chunk_rows);
  int64_t slices = places / t.tiles;
  if (meet && batch * dims <= 16384) slices = 1;  // one block is sooner done than a grid that has to wait for itself
  slices = slices < 1 ? 1 : slices > most ? most : slices;
  t.slice_rows = ceil_div(ceil_div(batch, slices), groups) * groups;
  t.slices = ceil_div(batch, t.slice_rows);
  return t;
}

// What of an item one thread has: columns from `column` on, and each `groups`-th row.
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
#pragma unroll
    for (int j = 0; j < chunk_rows<W>; ++j) {
      row[j] = Raw<W>{};
      if (j < n) row[j] = fetch<W>(m, row0 + j * item.groups, item.column);
    }
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
  // The first n rows of a chunk, less the columns' first values.
  BOMKERN_HD void take(const Chunk<W>& chunk, DType dtype, const S (&first)[W], int n) {
    if (n == 0) return;
    S u[chunk_rows<W>][W];
#pragma unroll
    for (int j = 0; j < chunk_rows<W>; ++j) {
      widen<S, W>(chunk.row[j], dtype, u[j]);
#pragma unroll
      for (int i = 0; i < W; ++i) u[j][i] = j < n ? u[j][i] - first[i] : S(0);
    }
    take(u, n);
  }
  BOMKERN_HD void take(const S (&u)[chunk_rows<W>][W], int n) {
    const S share = S(1) / S(n), weight = S(n) / S(count + n), before = weight * S(count);
    count += n;
#pragma unroll
    for (int i = 0; i < W; ++i) {
      S center = 0, sum = 0;
#pragma unroll
      for (int j = 0; j < chunk_rows<W>; j += 2) center += u[j][i] + u[j + 1][i];
      center *= share;
#pragma unroll
      for (int j = 0; j < chunk_rows<W>; ++j) {
        const S d = j < n ? u[j][i] - center : S(0);
        sum = fma_of(d, d, sum);
      }
      join(i, center, sum, weight, before);
    }
  }
  BOMKERN_HD void merge(const Moments& other) {
    if (other.count == 0) return;
    const S weight = S(other.count) / S(count + other.count), before = weight * S(count);
    count += other.count;
#pragma unroll
    for (int i = 0; i < W; ++i) join(i, other.mean[i], other.square[i], weight, before);
  }
  BOMKERN_HD Moments<S, 1> column(int i) const { return {{mean[i]}, {square[i]}, count}; }
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

// What the blocks [0, blocks) do together after the last items: block i has columns 32 (i + blocks k) + lane.
// Calls write(column, result) in one thread for each column, merged from parts [slices, dims].
template <class T, class Write>
BOMKERN_HD void finish_columns(const T* parts, const Tiling& t, int blocks, unsigned char* bytes, Write write) {
  const int lane = threadIdx.x % finish_lanes, group = threadIdx.x / finish_lanes, groups = blockDim.x / finish_lanes;
  for (int64_t first = int64_t(blockIdx.x) * finish_lanes; first < t.dims; first += int64_t(blocks) * finish_lanes) {
    const int64_t d = first + lane;
    T mine;
    mine.clear();
    if (d < t.dims) {
#pragma unroll 4
      for (int64_t s = group; s < t.slices; s += groups) mine.merge(parts[s * t.dims + d]);
    }
    merge_groups(mine, finish_lanes, bytes);
    if (group == 0 && d < t.dims) write(d, mine);
  }
}

// The moments of item after item, each into parts [slices, dims].
template <class S, int W>
BOMKERN_HD void write_parts(Moments<S, W>& m, const Tiling& t, const Item<W>& item, Moments<S, 1>* parts,
                            unsigned char* bytes) {
  merge_groups(m, t.lanes, bytes);
  if (int(threadIdx.x) >= t.lanes || !item.inside) return;
#pragma unroll
  for (int i = 0; i < W; ++i) parts[item.slice * t.dims + item.column + i] = m.column(i);
}

template <class S, int W>
BOMKERN_HD void moments_of(const Matrix& x, const Tiling& t, Moments<S, 1>* parts, unsigned char* bytes) {
  for (int64_t index = blockIdx.x; index < t.tiles * t.slices; index += gridDim.x) {
    const Item<W> item(t, index);
    Moments<S, W> m;
    m.clear();
    if (item.inside) {
      S first[W];
      load<S, W>(x, 0, item.column, first);
      for (int64_t row = item.first; row < item.end; row += chunk_rows<W> * item.groups) {
        const int n = item.rows_from(row);
        Chunk<W> chunk;
        chunk.fetch_from(x, item, row, n);
        m.take(chunk, x.dtype, first, n);
      }
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
