// gaussian_kl's GPU kernels: a team of threads goes over a row's pieces, forward and backward.
#pragma once
#include "../common/cuda_rows.h"
// (cuda_math.h first: variance.h is written in its words)
#include "variance.h"

#include "gaussian_kl.h"

namespace bomkern {
namespace gaussian_kl {
namespace cuda {

using namespace bomkern::BOMKERN_ISA;

// `unit` lanes of a row's team take a block of the prior: as `teams.lanes`, a power of 2 up to 32 or the whole block.
template <class Arguments> struct Launch {
  Arguments a;
  Teams teams;
  int unit;
};

// Twice the terms of one piece.
template <class S, int W> BOMKERN_HD S terms_of(const Inputs<S>& in, const S (&mu)[W], const S (&logvar)[W]) {
  S sum = 0;
#pragma unroll
  for (int i = 0; i < W; ++i) {
    const S excess = variance_of<S, S>(logvar[i]).value - 1;
    sum += fma_of(in.precision * mu[i], mu[i], fma_of(in.diagonal, excess, -logvar[i]));
  }
  return sum;
}

template <class S, int W, bool Blocks>
__global__ void __launch_bounds__(long_row_threads, 1) forward_kernel(const __grid_constant__ Launch<Forward<S>> l) {
  const Inputs<S>& in = l.a.in;
  BOMKERN_SHARED_BYTES(bytes);
  S* const shared = reinterpret_cast<S*>(bytes);
  const Member m(l.teams.lanes);
  const int64_t step = int64_t(gridDim.x) * m.teams;
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
        sum.add(terms_of<S, W>(in, mu, logvar));
      }
    } else {
      const int units = l.teams.lanes / l.unit, lane = m.lane % l.unit;
      const int64_t blocks = in.dims / in.block;
      // All threads of a team come round equally often: the sum over a unit is a barrier.
      for (int64_t begin = 0; begin < blocks; begin += units) {
        const int64_t k = begin + m.lane / l.unit;
        const int64_t pieces = inside && k < blocks ? in.block / W : 0;
        Sum<S> of_mu;
        for (int64_t p = lane; p < pieces; p += l.unit) {
          const int64_t d = k * in.block + p * W;
          const Raw<W> raw_mu = fetch<W>(in.mu, b, d), raw_logvar = fetch<W>(in.logvar, b, d);
          S mu[W], logvar[W];
          widen<S, W>(raw_mu, in.mu.dtype, mu);
          widen<S, W>(raw_logvar, in.logvar.dtype, logvar);
          sum.add(terms_of<S, W>(in, mu, logvar));
#pragma unroll
          for (int i = 0; i < W; ++i) of_mu.add(mu[i]);
        }
        const S block_sum = team_sum(of_mu.rounded(), l.unit, shared);
        if (lane == 0) sum.add(-in.shared * block_sum * block_sum);
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
  const Member m(l.teams.lanes);
  const int64_t step = int64_t(gridDim.x) * m.teams;
  const int units = Blocks ? l.teams.lanes / l.unit : 1, lane = m.lane % l.unit;
  const int64_t blocks = Blocks ? in.dims / in.block : 1, run = Blocks ? in.block : in.dims;
  for (int64_t first = int64_t(blockIdx.x) * m.teams; first < in.batch; first += step) {
    const int64_t b = first + m.team;
    const bool inside = b < in.batch;
    const S grad = inside ? grad_of(l.a.grad, b) : S(0);
    for (int64_t begin = 0; begin < blocks; begin += units) {
      const int64_t k = begin + m.lane / l.unit;
      const int64_t pieces = inside && k < blocks ? run / W : 0;
      S common = 0;
      if constexpr (Blocks) {
        Sum<S> of_mu;
        for (int64_t p = lane; p < pieces; p += l.unit) {
          S mu[W];
          load<S, W>(in.mu, b, k * run + p * W, mu);
#pragma unroll
          for (int i = 0; i < W; ++i) of_mu.add(mu[i]);
        }
        common = in.shared * team_sum(of_mu.rounded(), l.unit, shared);
      }
      for (int64_t p = lane; p < pieces; p += l.unit) {
        const int64_t d = k * run + p * W, at = b * in.dims + d;
        Raw<W> raw_mu{}, raw_logvar{};
        if (l.a.grad_mu) raw_mu = fetch<W>(in.mu, b, d);
        if (l.a.grad_logvar) raw_logvar = fetch<W>(in.logvar, b, d);
        S v[W];
        if (l.a.grad_mu) {
          widen<S, W>(raw_mu, in.mu.dtype, v);
#pragma unroll
          for (int i = 0; i < W; ++i) v[i] = grad * (in.precision * v[i] - common);
          store<S, W>(l.a.grad_mu, in.mu.dtype, at, v);
        }
        if (l.a.grad_logvar) {
          widen<S, W>(raw_logvar, in.logvar.dtype, v);
#pragma unroll
          for (int i = 0; i < W; ++i) v[i] = grad * (in.diagonal * variance_of<S, S>(v[i]).slope - 1) / 2;
          store<S, W>(l.a.grad_logvar, in.logvar.dtype, at, v);
        }
      }
    }
  }
}

}  // namespace cuda
}  // namespace gaussian_kl
}  // namespace bomkern
