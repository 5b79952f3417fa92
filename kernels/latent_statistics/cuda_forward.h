// latent_statistics' forward pass on the GPU: one read of z, mu and logvar for what goes along rows and along columns.
#pragma once
#include "../active_units/cuda_units.h"
// (cuda_math.h first: variance.h is written in its words)
#include "../gaussian_kl/variance.h"

#include "latent_statistics.h"

namespace bomkern {
namespace latent_statistics {
namespace cuda {

using namespace bomkern::active_units::cuda;  // and of bomkern::cuda with it

constexpr int row_sums = 3;  // twice kl, the sums of logvar and of its square

template <class S> struct ForwardLaunch {
  Forward<S> a;
  Tiling tiling;
  S *z_parts, *mu_parts;  // [2, slices, D]
  S* row_parts;           // [tiles, row_sums, B]; null where a tile is a whole row
  unsigned* arrived;      // one
};

template <class S> BOMKERN_HD void write_row(const Forward<S>& a, int64_t row, const S (&sum)[row_sums]) {
  a.kl[row] = sum[0] / 2;
  a.logvar_mean[row] = sum[1] / S(a.in.dims);
  a.logvar_square[row] = sum[2] / S(a.in.dims);
}

// The sums over this thread's pieces of the rows. Rows past the end were fetched as 0, whose terms are 0. Ordinary: as
// variance.h says.
template <bool Ordinary, class S, int R, int W>
BOMKERN_HD void add_rows(const S (&mu)[R][W], const S (&logvar)[R][W], S (&sum)[R][row_sums]) {
#pragma unroll
  for (int j = 0; j < R; ++j) {
    sum[j][0] = sum[j][1] = sum[j][2] = 0;
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const S v = logvar[j][i], variance = Ordinary ? exp_of(v) : variance_of<S, S>(v).value;
      sum[j][0] += fma_of(mu[j][i], mu[j][i], (variance - 1) - v);
      sum[j][1] += v;
      sum[j][2] = fma_of(v, v, sum[j][2]);
    }
  }
}

// A thread's partial results of an item.
template <class S, int W> struct Seen {
  Moments<S, W> z, mu;
  S z_first[W], mu_first[W];

  // The chunk of rows that begins at `row`, in all threads of the warp. Plain: it is whole, and as arithmetic takes it.
  template <bool Plain>
  BOMKERN_HD void take(const ForwardLaunch<S>& l, const Item<W>& item, int64_t row) {
    constexpr int R = chunk_rows<W>;
    const Tiling& t = l.tiling;
    Matrix of_z = l.a.in.z, of_mu = l.a.in.mu, of_logvar = l.a.in.logvar;
    if constexpr (Plain && W < 8) of_z.dtype = of_mu.dtype = of_logvar.dtype = dtype_of_number<S>;
    const int n = Plain ? item.inside ? R : 0 : item.rows_from(row);
    Chunk<W> z_chunk, mu_chunk, logvar_chunk;
    z_chunk.fetch_from(of_z, item, row, n);
    mu_chunk.fetch_from(of_mu, item, row, n);
    logvar_chunk.fetch_from(of_logvar, item, row, n);
    S sum[R][row_sums], u[R][W], v[R][W];
    widen_rows(mu_chunk.row, of_mu.dtype, u), widen_rows(logvar_chunk.row, of_logvar.dtype, v);
    if (sizeof(S) == 4 && are_ordinary(v)) {
      add_rows<true>(u, v, sum);
    } else {
      add_rows<false>(u, v, sum);
    }
    if (n) {
      const int rows = Plain ? R : n;
      const Weights<S> weights(z.count, rows);
      z.take(z_chunk, of_z.dtype, z_first, rows, weights);
      mu.take_widened(u, mu_first, rows, weights);
    }
    sum_rows(sum, t.lanes, [&](int j, const S (&of_row)[row_sums]) {
      const int64_t b = row + j * item.groups;
      if (b >= item.end) return;
      if (l.row_parts == nullptr) return write_row(l.a, b, of_row);
#pragma unroll
      for (int k = 0; k < row_sums; ++k) l.row_parts[(item.tile * row_sums + k) * t.batch + b] = of_row[k];
    });
  }
};

template <class S, int W>
BOMKERN_HD void take_item(const ForwardLaunch<S>& l, const Item<W>& item, unsigned char* bytes) {
  const Inputs<S>& in = l.a.in;
  const Tiling& t = l.tiling;
  Seen<S, W> seen{};
  if (item.inside) {
    load<S, W>(in.z, 0, item.column, seen.z_first);
    load<S, W>(in.mu, 0, item.column, seen.mu_first);
  }
  constexpr DType number = dtype_of_number<S>;
  const bool plain = sizeof(S) == 4 && (W == 8 || (in.z.dtype == number && in.mu.dtype == number && in.logvar.dtype == number));
  // All threads come round equally often: the sum over a row is a barrier of its warp.
  const int64_t step = chunk_rows<W> * item.groups, lead = threadIdx.x / t.lanes;
  int64_t begin = item.slice * t.slice_rows;
  if (plain) {
#pragma unroll 1
    for (; begin + step <= item.end; begin += step) seen.template take<true>(l, item, begin + lead);
  }
#pragma unroll 1
  for (; begin < item.end; begin += step) seen.template take<false>(l, item, begin + lead);
  write_parts(seen.z, t, item, l.z_parts, bytes);
  write_parts(seen.mu, t, item, l.mu_parts, bytes);
}

// After the first barrier: rows that several tiles have seen.
template <class S> BOMKERN_HD void finish_rows(const ForwardLaunch<S>& l) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t b = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; b < l.tiling.batch; b += step) {
    Sum<S> sum[row_sums];
#pragma unroll 2
    for (int64_t tile = 0; tile < l.tiling.tiles; ++tile) {
#pragma unroll
      for (int k = 0; k < row_sums; ++k) sum[k].add(l.row_parts[(tile * row_sums + k) * l.tiling.batch + b]);
    }
    const S rounded[row_sums] = {sum[0].rounded(), sum[1].rounded(), sum[2].rounded()};
    write_row(l.a, b, rounded);
  }
}

// Mean and variance of a set of one input's columns. `offset` is the mean less the first value.
template <class S>
BOMKERN_HD void finish_set(const Matrix& x, const S* parts, const Tiling& t, int64_t set, unsigned char* bytes,
                           S* mean, S* variance, S* offset) {
  finish_moments(parts, t, set, bytes, [&](int64_t d, S less_first, S square) {
    S first[1];
    load<S, 1>(x, 0, d, first);
    mean[d] = first[0] + less_first;
    variance[d] = square / S(t.batch - 1);
    offset[d] = less_first;
  });
}

template <class S, int W>
__global__ void __launch_bounds__(column_threads, sizeof(S) == 4 ? 2 : 1)
    forward_kernel(const __grid_constant__ ForwardLaunch<S> l) {
  BOMKERN_SHARED_BYTES(bytes);
  const Forward<S>& a = l.a;
  const Tiling& t = l.tiling;
  if (blockIdx.x == 0 && threadIdx.x == 0) *l.arrived = 0;
  for (int64_t index = blockIdx.x; index < t.tiles * t.slices; index += gridDim.x) {
    take_item<S, W>(l, Item<W>(t, index), bytes);
  }
  grid_sync();
  if (l.row_parts) finish_rows(l);
  const int64_t sets = 2 * t.sets, blocks = min(sets, int64_t(gridDim.x));
  if (blockIdx.x >= blocks) return;
  for (int64_t set = blockIdx.x; set < sets; set += blocks) {
    const bool of_z = set < t.sets;
    finish_set(of_z ? a.in.z : a.in.mu, of_z ? l.z_parts : l.mu_parts, t, of_z ? set : set - t.sets, bytes,
               of_z ? a.z_mean : a.mu_mean, of_z ? a.z_variance : a.mu_variance, of_z ? a.z_offset : a.mu_offset);
  }
  if (!is_last_block(l.arrived, int(blocks), bytes)) return;
  write_units<S>({a.in.threshold, a.in.temperature, a.active, a.effective, a.mu_variance}, t.dims, bytes);
}

}  // namespace cuda
}  // namespace latent_statistics
}  // namespace bomkern
