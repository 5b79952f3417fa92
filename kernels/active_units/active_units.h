// active_units: how many dimensions of a code vary over the batch. No torch here.
//
// With v_d the unbiased variance of column d, t the threshold, T the temperature, p_d = v_d / sum v and
// H = - sum_d p_d log p_d (0 log 0 = 0):
//   active = 1/D sum_d sigmoid((v_d - t) / T),   effective = e^H / D, or 0 where sum v = 0,
//   d active / d v_d = s (1 - s) / (T D), s the sigmoid,
//   d effective / d v_d = - effective (log p_d + H) / sum v, or 0 where v_d = 0,
//   d v_d / d mu_bd = 2 (mu_bd - mean_d) / (B - 1).
// mean_d = mu_0d + offset_d: differences from the first sample keep their digits where all values are far from 0, and are
// exactly 0 in a constant column.
#pragma once
#include "../common/dtype.h"
#include "../common/parallel.h"

namespace bomkern {
namespace active_units {

// S is float, or double where mu is double.
template <class S> struct Inputs {
  Matrix mu;  // [B, D], B > 1
  int64_t batch, dims;
  S threshold, temperature;
};

template <class S> struct Forward {
  Inputs<S> in;
  S *active, *effective;  // one each
  S *offset, *variance;   // [D]
};

template <class S> struct Backward {
  Inputs<S> in;
  const S *grad_active, *grad_effective;  // one each; null counts as 0
  const S *offset, *variance;             // as forward wrote them
  void* grad_mu;                          // [B, D], contiguous, of mu's dtype
};

typedef CpuOp<Forward, Backward> CpuKernels;

// The widest instruction set this CPU has of those compiled in.
const CpuKernels& cpu_kernels();

}  // namespace active_units
}  // namespace bomkern
