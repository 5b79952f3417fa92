// total_correlation: TC_b = log q(z_b) - sum_d log q(z_bd), q the batch's mixture of posteriors, and log q(z_b) itself.
// No torch here.
// R rows of z against all B components: R = B on one process, where several share a batch each has its own rows.
//
// Everything is in bits (base 2), where an exponential is one instruction's work. With
//   a_id = log2(e) / 2 exp(-logvar_id),   c_id = -log2(e) / 2 logvar_id,
//   t_bid = (c_id - C_d) - a_id (z_bd - mu_id)^2,
// C_d of an implementation's choosing, so near max_i c_id (within 72) that a sum of 2^t cannot overflow and needs no
// running maximum, the forward pass gives
//   joint_b    = log2 sum_i w_bi 2^(sum_d t_bid),
//   marginal_bd = log2 sum_i w_bi 2^t_bid,
//   TC_b = ln 2 (joint_b - sum_d marginal_bd) + (1 - D) log_weight,
//   log q(z_b) = ln 2 (joint_b + sum_d C_d) - D / 2 log 2 pi + log_weight,
// because log 2 pi and every C_d stand once in the joint and once in the marginals. w_bi is the weight of component i in
// the mixture of row b over exp(log_weight): 1 everywhere, or the stratified weights of MSS (Chen et al. 2018, appendix C).
#pragma once
#include "../common/dtype.h"
#include "../common/parallel.h"

namespace bomkern {
namespace total_correlation {

// S is float, or double where any input is double.
template <class S> struct Inputs {
  Matrix z;            // [R, D]
  Matrix mu, logvar;   // [B, D] each
  int64_t rows, batch, dims;
  int64_t first;       // the component that row 0 was drawn from; row b is of component first + b < B
  bool stratified;     // else own = next = 1
  S own;               // w_bi for i = first + b
  S next;              // w_bi for i = (first + b + 1) mod B; all others are 1. With B = 2 there are no others.
};

template <class S> struct Forward {
  Inputs<S> in;
  double offset;          // (1 - D) log_weight
  double density_offset;  // log_weight - D / 2 log 2 pi
  S* out;                 // [R] TC
  double* log_q;          // [R] log q(z_b), of which the parts are small differences; null where not wanted
  S* joint;               // [R] in bits
  S* marginal;            // [D, R] in bits: rows lie side by side
};

// With p_bi = w_bi 2^(sum_d t_bid - joint_b), q_bid = w_bi 2^(t_bid - marginal_bd), grad_b = dL / dTC_b and
// grad_log_q_b = dL / dlog q(z_b):
//   e_bid = (grad_b + grad_log_q_b) p_bi - grad_b q_bid is dL / d(natural log density of z_bd under component i), and
//   grad_mu_id = sum_b e_bid (z_bd - mu_id) exp(-logvar_id),  grad_z_bd = - sum_i of the same,
//   grad_logvar_id = 1/2 sum_b e_bid ((z_bd - mu_id)^2 exp(-logvar_id) - 1).
template <class S> struct Backward {
  Inputs<S> in;
  RowGrad<S> grad;             // [R], not null
  RowGrad<double> grad_log_q;  // [R]
  const S* joint;              // as forward wrote them
  const S* marginal;
  S* grad_z;   // [R, D], contiguous; null where not wanted
  S* grad_mu;  // [B, D]
  S* grad_logvar;
};

typedef CpuOp<Forward, Backward> CpuKernels;

// The widest instruction set this CPU has of those compiled in.
const CpuKernels& cpu_kernels();

}  // namespace total_correlation
}  // namespace bomkern
