// goal_set_keep on the GPU: one block, a thread for each goal.
#pragma once
#include <cuda_runtime.h>

#include "../common/cuda_math.h"
#include "keep.h"

namespace bomkern {
namespace goal_set {
namespace cuda {

constexpr int keep_threads = 128;
static_assert(keep_threads >= min_goal::max_goals, "a thread for each goal");

template <class S, class T> __global__ void __launch_bounds__(keep_threads) keep_kernel(const Keep<S, T> a) {
  BOMKERN_SHARED_BYTES(shared);
  T* const now = reinterpret_cast<T*>(shared);  // [goals]
  T* const weights = now + a.goals;             // [goals]
  const int g = threadIdx.x;
  T* row = row_of(a);
  for (int64_t i = g; i < a.size; i += keep_threads) row[i] = static_cast<T>(a.record[i]);
  if (g < a.goals) {
    now[g] = moved(a, g);
    a.average_before[g] = a.average[g];
    a.multipliers_before[g] = a.multipliers[g];
  }
  __syncthreads();  // by now all threads have read the place
  if (g < a.goals) weights[g] = wanted(a, now, g);
  if (a.relative) __syncthreads();
  if (g < a.goals) {
    a.average[g] = now[g];
    const T sum = a.relative ? sum_of(weights, a.goals) : T(1);  // in one order, so that all threads have the same
    a.multipliers[g] = followed(a, a.multipliers[g], weights[g], sum);
  }
  if (g == 0) ++*a.place;
}

}  // namespace cuda
}  // namespace goal_set
}  // namespace bomkern
