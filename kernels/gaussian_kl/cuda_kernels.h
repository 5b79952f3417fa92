// gaussian_kl's GPU kernels: a team of threads goes over a row's pieces, forward and backward; where a team is within a
// warp and the prior has no blocks, forward takes several rows at once, what they have in common being done once.
#pragma once
#include "../common/cuda_rows.h"
// (cuda_math.h first: variance.h is written in its words)
#include "variance.h"

#include "gaussian_kl.h"

namespace bomkern {
namespace gaussian_kl {
namespace cuda {

using namespace bomkern::BOMKERN_ISA;

template <class S, int W> constexpr int rows_at_once = W == 8 || sizeof(S) == 8 ? 2 : 4;

// `unit` lanes of a row's team take a block of the prior: as `teams.lanes`, a power of 2 up to 32 or the whole block.
template <class Arguments> struct Launch {
  Arguments a;
  Teams teams;
  int unit, unit_shift;  // and its logarithm
  int blocks;            // of a row; 1 where their dimensions do not see one another
  int64_t pieces, rest;  // of a block, and of the last one
};

// Twice the terms of one piece. Ordinary: no logvar is above the limit of variance_of(), which then is an exponential.
template <bool Ordinary = false, class S, int W>
BOMKERN_HD S terms_of(const Inverse<S>& own, const S (&mu)[W], const S (&logvar)[W]) {
  S sum = 0;
#pragma unroll
  for (int i = 0; i < W; ++i) {
    const S excess = (Ordinary ? exp_of(logvar[i]) : variance_of<S, S>(logvar[i]).value) - 1;
    sum += fma_of(own.precision * mu[i], mu[i], fma_of(own.diagonal, excess, -logvar[i]));
  }
  return sum;
}

// Adds a piece of n rows, which are `step` apart. Plain: all are there, and as arithmetic takes them. Alone: the piece is
// all that this thread has of a row.
template <bool Plain, class S, int W, int R>
BOMKERN_HD void add_pieces(const Inputs<S>& in, int64_t b, int64_t step, int64_t column, int n, bool alone,
                           Sum<S> (&sum)[R]) {
  Matrix of_mu = in.mu, of_logvar = in.logvar;
  if constexpr (Plain) n = R;
  if constexpr (Plain && W < 8) of_mu.dtype = of_logvar.dtype = dtype_of_number<S>;
  Raw<W> raw_mu[R], raw_logvar[R];
  fetch_rows(of_mu, b, step, column, n, raw_mu), fetch_rows(of_logvar, b, step, column, n, raw_logvar);
  S mu[R][W], logvar[R][W];
  widen_rows(raw_mu, of_mu.dtype, mu), widen_rows(raw_logvar, of_logvar.dtype, logvar);
  S terms[R];
  if (sizeof(S) == 4 && are_ordinary(logvar)) {
#pragma unroll
    for (int r = 0; r < R; ++r) terms[r] = terms_of<true>(in.whole, mu[r], logvar[r]);
  } else {
#pragma unroll
    for (int r = 0; r < R; ++r) terms[r] = terms_of(in.whole, mu[r], logvar[r]);
  }
  if (alone) {
#pragma unroll
    for (int r = 0; r < R; ++r) sum[r].high = terms[r];
  } else {
#pragma unroll
    for (int r = 0; r < R; ++r) sum[r].add(terms[r]);
  }
}

// For teams within a warp: the rows b, b + step, ...
template <class S, int W> BOMKERN_HD void forward_rows(const Launch<Forward<S>>& l, const Member& m, int64_t step) {
  constexpr int R = rows_at_once<S, W>;
  const Inputs<S>& in = l.a.in;
  const int64_t pieces = in.dims / W;
  const bool alone = pieces <= l.teams.lanes;
  const bool plain = W == 8 || (in.mu.dtype == dtype_of_number<S> && in.logvar.dtype == dtype_of_number<S>);
  for (int64_t first = int64_t(blockIdx.x) * m.teams; first < in.batch; first += R * step) {
    const int64_t b = first + m.team;
    int n = 0;
#pragma unroll
    for (int r = 0; r < R; ++r) n += b + r * step < in.batch;
    Sum<S> sum[R];
#pragma unroll 1  // more would cost registers, and so threads in flight
    for (int64_t p = m.lane; p < pieces; p += l.teams.lanes) {
      if (plain && n == R) {
        add_pieces<true, S, W>(in, b, step, p * W, n, alone, sum);
      } else {
        add_pieces<false, S, W>(in, b, step, p * W, n, alone, sum);
      }
    }
    S twice[R][1];
#pragma unroll
    for (int r = 0; r < R; ++r) twice[r][0] = sum[r].rounded();
    sum_rows(twice, l.teams.lanes, [&](int r, const S (&of_row)[1]) {
      if (r < n) l.a.out[b + r * step] = of_row[0] / 2 + in.constant;
    });
  }
}

template <class S, int W, bool Blocks>
__global__ void __launch_bounds__(long_row_threads, 1) forward_kernel(const __grid_constant__ Launch<Forward<S>> l) {
  const Inputs<S>& in = l.a.in;
  BOMKERN_SHARED_BYTES(bytes);
  S* const shared = reinterpret_cast<S*>(bytes);
  const Member m(l.teams);
  const int64_t step = int64_t(gridDim.x) * m.teams;
  if constexpr (!Blocks) {
    if (l.teams.lanes <= 32) return forward_rows<S, W>(l, m, step);
  }
  const int units = l.teams.lanes >> l.unit_shift, lane = m.lane & (l.unit - 1), unit = m.lane >> l.unit_shift;
  for (int64_t first = int64_t(blockIdx.x) * m.teams; first < in.batch; first += step) {
    const int64_t b = first + m.team;
    const bool inside = b < in.batch;
    Sum<S> sum;
    if constexpr (!Blocks) {
      const int64_t pieces = inside ? in.dims / W : 0;
#pragma unroll 1  // more would cost registers, and so threads in flight
      for (int64_t p = m.lane; p < pieces; p += l.teams.lanes) {
        const Raw<W> raw_mu = fetch<W>(in.mu, b, p * W), raw_logvar = fetch<W>(in.logvar, b, p * W);
        S mu[W], logvar[W];
        widen<S, W>(raw_mu, in.mu.dtype, mu);
        widen<S, W>(raw_logvar, in.logvar.dtype, logvar);
        sum.add(terms_of(in.whole, mu, logvar));
      }
    } else {
      // All threads of a team come round equally often: the sum over a unit is a barrier.
      const int blocks = inside ? l.blocks : 0;
      for (int begin = 0; begin < l.blocks; begin += units) {
        const int k = begin + unit;
        const bool last = k + 1 == l.blocks;
        const Inverse<S> own = last ? in.last : in.whole;
        const int64_t pieces = k >= blocks ? 0 : last ? l.rest : l.pieces;
        Sum<S> of_mu;
        for (int64_t p = lane; p < pieces; p += l.unit) {
          const int64_t d = int64_t(k) * in.block + p * W;
          const Raw<W> raw_mu = fetch<W>(in.mu, b, d), raw_logvar = fetch<W>(in.logvar, b, d);
          S mu[W], logvar[W];
          widen<S, W>(raw_mu, in.mu.dtype, mu);
          widen<S, W>(raw_logvar, in.logvar.dtype, logvar);
          sum.add(terms_of(own, mu, logvar));
#pragma unroll
          for (int i = 0; i < W; ++i) of_mu.add(mu[i]);
        }
        const S block_sum = team_sum(of_mu.rounded(), l.unit, shared);
        if (lane == 0 && own.shared != 0) sum.add(-own.shared * block_sum * block_sum);
      }
    }
    const S twice = team_sum(sum.rounded(), l.teams.lanes, shared);
    if (inside && m.lane == 0) l.a.out[b] = twice / 2 + in.constant;
  }
}

template <class S, int W, bool Blocks>
__global__ void __launch_bounds__(long_row_threads, 1) backward_kernel(const __grid_constant__ Launch<Backward<S>> l) {
  const Inputs<S>& in = l.a.in;
  BOMKERN_SHARED_BYTES(bytes);
  S* const shared = reinterpret_cast<S*>(bytes);
  const Member m(l.teams);
  const int64_t step = int64_t(gridDim.x) * m.teams;
  const int units = Blocks ? l.teams.lanes >> l.unit_shift : 1, unit = Blocks ? m.lane >> l.unit_shift : 0;
  const int lane = Blocks ? m.lane & (l.unit - 1) : m.lane, lanes = Blocks ? l.unit : l.teams.lanes;
  const int blocks = Blocks ? l.blocks : 1;
  for (int64_t first = int64_t(blockIdx.x) * m.teams; first < in.batch; first += step) {
    const int64_t b = first + m.team;
    const bool inside = b < in.batch;
    const S grad = inside ? grad_of(l.a.grad, b) : S(0);
    for (int begin = 0; begin < blocks; begin += units) {
      const int k = begin + unit;
      const bool last = Blocks && k + 1 == blocks;
      const Inverse<S>& own = last ? in.last : in.whole;
      const int64_t pieces = !inside || k >= blocks ? 0 : Blocks ? last ? l.rest : l.pieces : in.dims / W;
      S common = 0;
      if constexpr (Blocks) {
        Sum<S> of_mu;
        for (int64_t p = lane; p < pieces; p += lanes) {
          S mu[W];
          load<S, W>(in.mu, b, int64_t(k) * in.block + p * W, mu);
#pragma unroll
          for (int i = 0; i < W; ++i) of_mu.add(mu[i]);
        }
        const S block_sum = team_sum(of_mu.rounded(), lanes, shared);
        if (own.shared != 0) common = own.shared * block_sum;
      }
      for (int64_t p = lane; p < pieces; p += lanes) {
        const int64_t d = int64_t(k) * in.block + p * W, at = b * in.dims + d;
        Raw<W> raw_mu{}, raw_logvar{};
        if (l.a.grad_mu) raw_mu = fetch<W>(in.mu, b, d);
        if (l.a.grad_logvar) raw_logvar = fetch<W>(in.logvar, b, d);
        S v[W];
        if (l.a.grad_mu) {
          widen<S, W>(raw_mu, in.mu.dtype, v);
#pragma unroll
          for (int i = 0; i < W; ++i) v[i] = grad * (own.precision * v[i] - common);
          store<S, W>(l.a.grad_mu, in.mu.dtype, at, v);
        }
        if (l.a.grad_logvar) {
          widen<S, W>(raw_logvar, in.logvar.dtype, v);
#pragma unroll
          for (int i = 0; i < W; ++i) v[i] = grad * (own.diagonal * variance_of<S, S>(v[i]).slope - 1) / 2;
          store<S, W>(l.a.grad_logvar, in.logvar.dtype, at, v);
        }
      }
    }
  }
}

}  // namespace cuda
}  // namespace gaussian_kl
}  // namespace bomkern
