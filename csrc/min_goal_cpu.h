// min_goal on the CPU: ranges of samples run in parallel, and their partial results are added in a fixed order.
#pragma once
#include "../kernels/min_goal/min_goal.h"

#include <torch_headers.h>

#include <algorithm>
#include <vector>

namespace bomkern::min_goal {

inline const auto& forward_of(const CpuKernels& kernels, float) { return kernels.forward_f32; }
inline const auto& forward_of(const CpuKernels& kernels, double) { return kernels.forward_f64; }
inline const auto& backward_of(const CpuKernels& kernels, float) { return kernels.backward_f32; }
inline const auto& backward_of(const CpuKernels& kernels, double) { return kernels.backward_f64; }

inline int64_t chunks_of(int64_t batch) { return (batch + chunk - 1) / chunk; }

// Adds the partial results in order.
template <class S> void finish(const Forward<S>& a, const Partial* parts, int64_t ranges) {
  double loss = 0;
  bool finite = true;
  const Partial* worst = parts;
  for (const Partial* p = parts; p < parts + ranges; ++p) {
    loss += p->loss;
    finite &= p->finite;
    const bool is_nan = p->worst_loss != p->worst_loss, was_nan = worst->worst_loss != worst->worst_loss;
    if (p->worst_loss > worst->worst_loss || (is_nan && !was_nan)) worst = p;
  }
  if (a.reduction == Reduction::min) {
    *a.loss = static_cast<S>(worst->worst_loss);
    *a.slope = static_cast<S>(worst->worst_slope);
    *a.worst = worst->worst;
  } else if (a.reduction != Reduction::none) {
    *a.loss = static_cast<S>(a.reduction == Reduction::mean ? loss / static_cast<double>(a.goals.batch) : loss);
  }
  if (!a.bottleneck) return;
  *a.finite = finite;
  const auto batch = static_cast<double>(a.goals.batch);
  for (int k = 0; k < a.goals.count; ++k) {
    double level = 0, owned = 0;
    for (const Partial* p = parts; p < parts + ranges; ++p) {
      level += p->level[k];
      owned += static_cast<double>(p->owned[k]);
    }
    a.level[k] = static_cast<S>(level / batch);
    a.share[k] = static_cast<S>(a.reduction == Reduction::min ? worst->worst % a.goals.count == k : owned / batch);
  }
}

template <class S> void run_cpu(const Forward<S>& a) {
  const auto forward = forward_of(cpu_kernels(), S{});
  const int64_t ranges = chunks_of(a.goals.batch);
  if (ranges == 1) {
    Partial part;
    forward(a, 0, a.goals.batch, &part);
    return finish(a, &part, 1);
  }
  std::vector<Partial> parts(ranges);
  at::parallel_for(0, ranges, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) forward(a, c * chunk, std::min((c + 1) * chunk, a.goals.batch), &parts[c]);
  });
  finish(a, parts.data(), ranges);
}

}  // namespace bomkern::min_goal
