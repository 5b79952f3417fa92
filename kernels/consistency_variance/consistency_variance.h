// consistency_variance: mean over D of the variance over V views, by sample. No torch here.
//
// With u_v = x_v - x_0 and m = 1/V sum_v u_v: out_b = scale sum_d (sum_v u_v^2 - V m^2), scale = 1 / ((V - correction) D);
// d out_b / d x_v = 2 scale (u_v - m).
#pragma once
#include "../common/dtype.h"
#include "../common/parallel.h"

namespace bomkern {
namespace consistency_variance {

constexpr int max_views = 16;

// S is float, or double where any view is double. By value to a launch: 0.5 KB.
template <class S> struct Inputs {
  Matrix view[max_views];  // [B, D] each
  int views;               // V
  int64_t batch, dims;
  S scale;
};

template <class S> struct Forward {
  Inputs<S> in;
  S* out;  // [B]
};

template <class S> struct Backward {
  Inputs<S> in;
  RowGrad<S> grad;         // [B]
  void* out[max_views];    // [B, D] each, contiguous, of the view's dtype; null where not wanted
};

typedef CpuOp<Forward, Backward> CpuKernels;

// The widest instruction set this CPU has of those compiled in.
const CpuKernels& cpu_kernels();

}  // namespace consistency_variance
}  // namespace bomkern
