// Active and effective units from column variances, and their gradients: what active_units and latent_statistics share.
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

template <class S> struct UnitsOutput {
  S threshold, temperature;
  S *active, *effective;
  const S* variance;  // [D]
  double* parts;      // [3, blocks] of the workspace
};

constexpr int unit_parts = 3;
constexpr int64_t few_columns = 64;  // one block finishes so many alone: it is sooner done than the grid has met

// Blocks that finish the columns; the others are done after the first barrier.
BOMKERN_HD int finishing_blocks(int64_t dims) { return dims <= few_columns ? 1 : gridDim.x; }

BOMKERN_HD void sync_blocks(int blocks) {
  if (blocks > 1) {
    grid_sync();
  } else {
    __syncthreads();
  }
}

// Calls visit(v) with the variances of this block's columns, which it wrote itself in finish_columns().
template <class S, class Visit>
BOMKERN_HD void visit_columns(const S* variance, int64_t dims, int blocks, Visit visit) {
  const int64_t step = int64_t(blocks) * column_threads;
  for (int64_t d = (int64_t(threadIdx.x / finish_lanes) * blocks + blockIdx.x) * finish_lanes + threadIdx.x % finish_lanes;
       d < dims; d += step) {
    visit(variance[d]);
  }
}

// After finish_columns(), in all of its `blocks` blocks: two more barriers, and block 0 writes.
template <class S>
BOMKERN_HD void write_units(const UnitsOutput<S>& u, int64_t dims, int blocks, unsigned char* bytes) {
  __syncthreads();
  Sum<S> total_part, active_part, entropy_part;
  visit_columns(u.variance, dims, blocks, [&](S v) { total_part.add(v); });
  const double own = block_sum(total_part.value(), bytes);
  if (threadIdx.x == 0) u.parts[blockIdx.x] = own;
  sync_blocks(blocks);
  const auto sum_of = [&](const double* parts) {
    double x = 0;
    for (int i = threadIdx.x; i < blocks; i += blockDim.x) x += parts[i];
    return block_sum(x, bytes);  // in every block the same bits
  };
  const S total = S(sum_of(u.parts));
  visit_columns(u.variance, dims, blocks, [&](S v) {
    active_part.add(sigmoid_of(v, u.threshold, u.temperature));
    entropy_part.add(total == 0 ? S(0) : entropy_of(v, total));
  });
  const double active = block_sum(active_part.value(), bytes), entropy = block_sum(entropy_part.value(), bytes);
  if (threadIdx.x == 0) u.parts[blocks + blockIdx.x] = active, u.parts[2 * blocks + blockIdx.x] = entropy;
  sync_blocks(blocks);
  if (blockIdx.x != 0) return;
  const double all_active = sum_of(u.parts + blocks), all_entropy = sum_of(u.parts + 2 * blocks);
  if (threadIdx.x != 0) return;
  *u.active = S(all_active / double(dims));
  *u.effective = total == 0 ? S(0) : S(exp(all_entropy) / double(dims));
}

template <class S> struct UnitsGradient {
  S threshold, temperature;
  const S *active, *effective;  // gradients; null counts as 0
  const S* variance;            // [D]
};

// What the gradients by the variances need of all of them. All threads of a block.
template <class S> struct Units {
  S total, entropy, by_active, by_effective;

  BOMKERN_HD Units(const UnitsGradient<S>& g, int64_t dims, unsigned char* bytes)
      : total(0), entropy(0), by_active(0), by_effective(0) {
    if (g.active) by_active = *g.active / (g.temperature * S(dims));
    if (g.effective == nullptr) return;
    Sum<S> v, h;
#pragma unroll 4
    for (int64_t d = threadIdx.x; d < dims; d += blockDim.x) v.add(g.variance[d]);
    total = S(block_sum(v.value(), bytes));
    if (total == 0) return;
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
