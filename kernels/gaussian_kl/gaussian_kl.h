// gaussian_kl: KL(N(mu, diag e^logvar) || N(0, S)) by sample. No torch here.
//
// S has blocks (1 - rho) I + rho 11' of `block` dimensions, the last of those that are left, whose inverses are
// precision I - shared 11'. With S_k the sum of mu over block k, diagonal = precision - shared, and each block's own numbers,
//   KL = 1/2 sum_k (sum_d [diagonal (e(logvar_d) - 1) - logvar_d + precision mu_d^2] - shared S_k^2) + constant,
//   dKL / dmu_d = precision mu_d - shared S_k,   dKL / dlogvar_d = 1/2 (diagonal e'(logvar_d) - 1),
// where e(v) = e^v, above v = 80 its tangent (variance.h). A block of one has precision = diagonal = 1, shared = 0.
#pragma once
#include "../common/dtype.h"
#include "../common/parallel.h"

namespace bomkern {
namespace gaussian_kl {

// The inverse of a block of the prior. Where `shared` is 0, its dimensions do not see one another.
template <class S> struct Inverse {
  S precision, shared, diagonal;
};

// S is float, or double where any input is double.
template <class S> struct Inputs {
  Matrix mu, logvar;  // [B, D] each
  int64_t batch, dims;
  int64_t block;          // dimensions of a block, 1 to D
  Inverse<S> whole, last;  // of a block of so many, and of the last one, which may have fewer
  S constant;
};

template <class S> struct Forward {
  Inputs<S> in;
  S* out;  // [B]
};

template <class S> struct Backward {
  Inputs<S> in;
  RowGrad<S> grad;  // [B]
  void* grad_mu;    // [B, D], contiguous, of mu's dtype; null where not wanted
  void* grad_logvar;
};

typedef CpuOp<Forward, Backward> CpuKernels;

// The widest instruction set this CPU has of those compiled in.
const CpuKernels& cpu_kernels();

}  // namespace gaussian_kl
}  // namespace bomkern
