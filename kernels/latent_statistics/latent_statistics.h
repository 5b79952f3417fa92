// latent_statistics: the statistics of a latent code that a trainer needs, with one read of each input. No torch here.
//
//   kl_b = 1/2 sum_d (mu_bd^2 + e(logvar_bd) - 1 - logvar_bd), e as in gaussian_kl/variance.h,
//   logvar_mean_b = 1/D sum_d logvar_bd,   logvar_square_b = 1/D sum_d logvar_bd^2,
//   mean and unbiased variance of the columns of z and of mu; active and effective of mu's variances (active_units.h).
// An offset is a column's mean minus its first value.
#pragma once
#include "../common/dtype.h"
#include "../common/parallel.h"

namespace bomkern {
namespace latent_statistics {

// S is float, or double where any input is double.
template <class S> struct Inputs {
  Matrix z, mu, logvar;  // [B, D] each, B > 1
  int64_t batch, dims;
  S threshold, temperature;
};

template <class S> struct Forward {
  Inputs<S> in;
  S *kl, *logvar_mean, *logvar_square;             // [B]
  S *z_mean, *z_variance, *mu_mean, *mu_variance;  // [D]
  S *active, *effective;                           // one each
  S *z_offset, *mu_offset;                         // [D]
};

// Gradients that are null count as 0.
template <class S> struct Backward {
  Inputs<S> in;
  RowGrad<S> kl, logvar_mean, logvar_square;             // [B]
  const S *z_mean, *z_variance, *mu_mean, *mu_variance;  // [D]
  const S *active, *effective;                           // one each
  const S *z_offset, *mu_offset, *variance;              // [D] as forward wrote them; the variance of mu
  void *grad_z, *grad_mu, *grad_logvar;  // [B, D], contiguous, of the input's dtype; null where not wanted
};

typedef CpuOp<Forward, Backward> CpuKernels;

// The widest instruction set this CPU has of those compiled in.
const CpuKernels& cpu_kernels();

}  // namespace latent_statistics
}  // namespace bomkern
