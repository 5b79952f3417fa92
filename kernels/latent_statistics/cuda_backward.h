// latent_statistics' backward pass on the GPU: each gradient is of its own input alone, and has blocks of its own.
#pragma once
#include "cuda_forward.h"

namespace bomkern {
namespace latent_statistics {
namespace cuda {

enum class Kind : int { z, mu, logvar };

template <class S> struct BackwardLaunch {
  Backward<S> a;
  Tiling tiling;
  Kind kind[3];  // of the gradients that are wanted
  int kinds;
};

// An element's gradient: of its column's moments, and what its row's statistics add.
template <class S, int W, Kind kind>
BOMKERN_HD void write_gradient(const BackwardLaunch<S>& l, const Matrix& x, void* to, const MomentGradient<S, W>& moments,
                               const Item<W>& item) {
  const Backward<S>& a = l.a;
  const S share = S(1) / S(a.in.dims);
  for (int64_t row = item.first; row < item.end; row += chunk_rows<W> * item.groups) {
    const int n = item.rows_from(row);
    Chunk<W> chunk;
    chunk.fetch_from(x, item, row, n);
    S kl[chunk_rows<W>], mean[chunk_rows<W>], square[chunk_rows<W>];
#pragma unroll
    for (int j = 0; j < chunk_rows<W>; ++j) {
      const int64_t b = row + j * item.groups;
      kl[j] = kind != Kind::z && j < n ? grad_of(a.kl, b) : S(0);
      mean[j] = kind == Kind::logvar && j < n ? grad_of(a.logvar_mean, b) * share : S(0);
      square[j] = kind == Kind::logvar && j < n ? grad_of(a.logvar_square, b) * (2 * share) : S(0);
    }
#pragma unroll
    for (int j = 0; j < chunk_rows<W>; ++j) {
      if (j >= n) break;
      S v[W];
      widen<S, W>(chunk.row[j], x.dtype, v);
#pragma unroll
      for (int i = 0; i < W; ++i) {
        if constexpr (kind == Kind::logvar) {
          const S slope = (variance_of<S, S>(v[i]).slope - 1) / 2;
          v[i] = fma_of(kl[j], slope, fma_of(square[j], v[i], mean[j]));
        } else if constexpr (kind == Kind::mu) {
          v[i] = fma_of(kl[j], v[i], moments.of(v[i], i));
        } else {
          v[i] = moments.of(v[i], i);
        }
      }
      store<S, W>(to, x.dtype, (row + j * item.groups) * a.in.dims + item.column, v);
    }
  }
}

// The gradients of a piece of columns; slope(d) is the gradient of the variance of column d.
template <class S, int W, class Slope>
BOMKERN_HD MomentGradient<S, W> moment_gradient(const Inputs<S>& in, const Matrix& x, const S* offset, const S* by_mean,
                                                int64_t column, Slope slope) {
  MomentGradient<S, W> g;
  load<S, W>(x, 0, column, g.first);
  load_vector<S, W>(offset, column, g.offset);
#pragma unroll
  for (int i = 0; i < W; ++i) {
    g.constant[i] = by_mean ? by_mean[column + i] / S(in.batch) : S(0);
    g.slope[i] = slope(column + i) * (S(2) / S(in.batch - 1));
  }
  return g;
}

template <class S, int W>
__global__ void __launch_bounds__(column_threads, 1) backward_kernel(const __grid_constant__ BackwardLaunch<S> l) {
  BOMKERN_SHARED_BYTES(bytes);
  const Backward<S>& a = l.a;
  const Inputs<S>& in = a.in;
  const Tiling& t = l.tiling;
  const Kind kind = l.kind[blockIdx.x % l.kinds];
  UnitsGradient<S> given{in.threshold, in.temperature, a.active, a.effective, a.variance};
  if (kind != Kind::mu) given.active = given.effective = nullptr;
  const Units<S> units(given, t.dims, bytes);
  for (int64_t index = blockIdx.x / l.kinds; index < t.tiles * t.slices; index += gridDim.x / l.kinds) {
    const Item<W> item(t, index);
    if (!item.inside) continue;
    if (kind == Kind::z) {
      const auto moments = moment_gradient<S, W>(in, in.z, a.z_offset, a.z_mean, item.column, [&](int64_t d) {
        return a.z_variance ? a.z_variance[d] : S(0);
      });
      write_gradient<S, W, Kind::z>(l, in.z, a.grad_z, moments, item);
    } else if (kind == Kind::mu) {
      const auto moments = moment_gradient<S, W>(in, in.mu, a.mu_offset, a.mu_mean, item.column, [&](int64_t d) {
        return units.slope(given, a.variance[d]) + (a.mu_variance ? a.mu_variance[d] : S(0));
      });
      write_gradient<S, W, Kind::mu>(l, in.mu, a.grad_mu, moments, item);
    } else {
      write_gradient<S, W, Kind::logvar>(l, in.logvar, a.grad_logvar, {}, item);
    }
  }
}

}  // namespace cuda
}  // namespace latent_statistics
}  // namespace bomkern
