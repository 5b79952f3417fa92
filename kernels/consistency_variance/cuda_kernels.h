// consistency_variance's GPU kernels: a team of threads goes over a row's pieces, all views of a piece at once.
#pragma once
#include "../common/cuda_rows.h"

#include "consistency_variance.h"

namespace bomkern {
namespace consistency_variance {
namespace cuda {

using namespace bomkern::BOMKERN_ISA;

// Views that are in flight together, and stay in registers; the others follow. A kernel that holds few has registers for
// more threads.
constexpr int few_views = 4, many_views = 8;

template <class Arguments> struct Launch {
  Arguments a;
  Teams teams;
};

// One piece of the views. Shifted by the first view: values far from 0 lose no digits.
template <class S, int W, int Held> struct Piece {
  Raw<W> held[Held];
  S first[W], sum[W], square[W];  // of the differences from the first view

  template <bool Squares> BOMKERN_HD void add(const Raw<W>& raw, DType dtype) {
    S x[W];
    widen<S, W>(raw, dtype, x);
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const S u = x[i] - first[i];
      sum[i] += u;
      if constexpr (Squares) square[i] = fma_of(u, u, square[i]);
    }
  }

  template <bool Squares> BOMKERN_HD void read(const Inputs<S>& in, int64_t b, int64_t d) {
#pragma unroll
    for (int v = 0; v < Held; ++v) {
      if (v < in.views) held[v] = fetch<W>(in.view[v], b, d);
    }
    widen<S, W>(held[0], in.view[0].dtype, first);
#pragma unroll
    for (int i = 0; i < W; ++i) sum[i] = square[i] = 0;
#pragma unroll
    for (int v = 1; v < Held; ++v) {
      if (v < in.views) add<Squares>(held[v], in.view[v].dtype);
    }
    if constexpr (Held == many_views) {
#pragma unroll 2
      for (int v = Held; v < in.views; ++v) add<Squares>(fetch<W>(in.view[v], b, d), in.view[v].dtype);
    }
  }
};

template <class S, int W, int Held>
__global__ void __launch_bounds__(long_row_threads, 1) forward_kernel(const __grid_constant__ Launch<Forward<S>> l) {
  const Inputs<S>& in = l.a.in;
  BOMKERN_SHARED_BYTES(bytes);
  const Member m(l.teams);
  const int64_t step = int64_t(gridDim.x) * m.teams;
  const S share = S(1) / S(in.views);
  for (int64_t first = int64_t(blockIdx.x) * m.teams; first < in.batch; first += step) {
    const int64_t b = first + m.team;
    const bool inside = b < in.batch;
    const int64_t pieces = inside ? in.dims / W : 0;
    Sum<S> sum;
    for (int64_t p = m.lane; p < pieces; p += l.teams.lanes) {
      Piece<S, W, Held> piece;
      piece.template read<true>(in, b, p * W);
      S part = 0;
#pragma unroll
      for (int i = 0; i < W; ++i) part += fma_of(-share * piece.sum[i], piece.sum[i], piece.square[i]);
      sum.add(part);
    }
    const S total = team_sum(sum.rounded(), l.teams.lanes, reinterpret_cast<S*>(bytes));
    if (inside && m.lane == 0) l.a.out[b] = in.scale * total;
  }
}

template <class S, int W, int Held>
BOMKERN_HD void write(const Backward<S>& a, int v, const Raw<W>& raw, const Piece<S, W, Held>& piece, S grad,
                      int64_t at) {
  S x[W];
  widen<S, W>(raw, a.in.view[v].dtype, x);
#pragma unroll
  for (int i = 0; i < W; ++i) x[i] = grad * ((x[i] - piece.first[i]) - piece.sum[i]);
  store<S, W>(a.out[v], a.in.view[v].dtype, at, x);
}

template <class S, int W, int Held>
__global__ void __launch_bounds__(long_row_threads, 1) backward_kernel(const __grid_constant__ Launch<Backward<S>> l) {
  const Backward<S>& a = l.a;
  const Inputs<S>& in = a.in;
  const Member m(l.teams);
  const int64_t step = int64_t(gridDim.x) * m.teams;
  const S share = S(1) / S(in.views);
  for (int64_t b = int64_t(blockIdx.x) * m.teams + m.team; b < in.batch; b += step) {
    const S grad = 2 * in.scale * grad_of(a.grad, b);
    for (int64_t p = m.lane; p < in.dims / W; p += l.teams.lanes) {
      const int64_t at = b * in.dims + p * W;
      Piece<S, W, Held> piece;
      piece.template read<false>(in, b, p * W);
#pragma unroll
      for (int i = 0; i < W; ++i) piece.sum[i] *= share;  // the mean
#pragma unroll
      for (int v = 0; v < Held; ++v) {
        if (v < in.views && a.out[v]) write(a, v, piece.held[v], piece, grad, at);
      }
      if constexpr (Held == many_views) {
#pragma unroll 1
        for (int v = Held; v < in.views; ++v) {  // read a moment ago: from the cache
          if (a.out[v]) write(a, v, fetch<W>(in.view[v], b, p * W), piece, grad, at);
        }
      }
    }
  }
}

}  // namespace cuda
}  // namespace consistency_variance
}  // namespace bomkern
