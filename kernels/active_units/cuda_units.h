// Active and effective units from column variances, and their gradients, for active_units and latent_statistics.
#pragma once
#include "../common/cuda_columns.h"

namespace bomkern {
namespace active_units {
namespace cuda {

using namespace bomkern::BOMKERN_ISA;

// The formulas' parts (active_units.h).
template <class S> BOMKERN_HD S sigmoid_of(S v, S threshold, S temperature) {
  return 1 / (1 + exp_of(-(v - threshold) / temperature));
}
template <class S> BOMKERN_HD S entropy_of(S v, S total) {
  const S p = v / total;
  return p == 0 ? S(0) : -p * log_of(p);
}

// The sum of all columns' variances, in each thread of the block.
template <class S> BOMKERN_HD S total_of(const S* variance, int64_t dims, unsigned char* bytes) {
  Sum<S> sum;
#pragma unroll 4
  for (int64_t d = threadIdx.x; d < dims; d += blockDim.x) sum.add(variance[d]);
  return S(block_sum(sum.value(), bytes));
}

template <class S> struct UnitsOutput {
  S threshold, temperature;
  S *active, *effective;
  const S* variance;  // [D]
};

// All threads of one block, which sees all variances.
template <class S> BOMKERN_HD void write_units(const UnitsOutput<S>& u, int64_t dims, unsigned char* bytes) {
  const S total = total_of(u.variance, dims, bytes);
  Sum<S> active_part, entropy_part;
  for (int64_t d = threadIdx.x; d < dims; d += blockDim.x) {
    const S v = u.variance[d];
    active_part.add(sigmoid_of(v, u.threshold, u.temperature));
    entropy_part.add(total == 0 ? S(0) : entropy_of(v, total));
  }
  const double active = block_sum(active_part.value(), bytes), entropy = block_sum(entropy_part.value(), bytes);
  if (threadIdx.x != 0) return;
  *u.active = S(active / double(dims));
  *u.effective = total == 0 ? S(0) : S(exp(entropy) / double(dims));
}

template <class S> struct UnitsGradient {
  S threshold, temperature;
  const S *active, *effective;  // gradients; null counts as 0
  const S* variance;            // [D]
};

// Sums over all variances that their gradients need. All threads of a block call it.
template <class S> struct Units {
  S total, entropy, by_active, by_effective;

  BOMKERN_HD Units(const UnitsGradient<S>& g, int64_t dims, unsigned char* bytes)
      : total(0), entropy(0), by_active(0), by_effective(0) {
    if (g.active) by_active = *g.active / (g.temperature * S(dims));
    if (g.effective == nullptr) return;
    total = total_of(g.variance, dims, bytes);
    if (total == 0) return;
    Sum<S> h;
    for (int64_t d = threadIdx.x; d < dims; d += blockDim.x) h.add(entropy_of(g.variance[d], total));
    const double sum = block_sum(h.value(), bytes);
    entropy = S(sum);
    by_effective = S(double(*g.effective) * -(exp(sum) / double(dims)) / double(total));
  }
  BOMKERN_HD S slope(const UnitsGradient<S>& g, S v) const {
    const S s = sigmoid_of(v, g.threshold, g.temperature), p = v / total;
    const S of_active = by_active == 0 ? S(0) : by_active * (s * (1 - s));
    return of_active + (by_effective == 0 || p == 0 ? S(0) : by_effective * (log_of(p) + entropy));
  }
};

// The gradient by x of a column whose mean and variance have one: constant + slope (x - mean).
template <class S, int W> struct MomentGradient {
  S first[W], offset[W], constant[W], slope[W];
  BOMKERN_HD S of(S x, int i) const { return fma_of(slope[i], (x - first[i]) - offset[i], constant[i]); }
};

}  // namespace cuda
}  // namespace active_units
}  // namespace bomkern
