// covariance_penalty on the GPU: the stages around the matrix products, which are a library's. covariance_penalty_cuda.h in
// csrc/ puts them together; common/cuda_op.h says what holds for every op.
//
// Each stage is one launch. Matrices of S are contiguous. Words as in covariance_penalty.h.
#pragma once
#include "../common/cuda_op.h"
#include "../common/dtype.h"

namespace bomkern {
namespace covariance_penalty {

// S is float, or double where z is double.
template <class S> struct Center {
  Matrix z;  // [B, D]
  int64_t batch, dims;
  bool normalize;
  S *offset, *inverse;  // [D], outputs as the schema says
  S* spread;            // [D], output: v_d = sum_b x_bd^2 / (B - 1)
  S* x;                 // [B, D], output
};

// Backward's x, from what Center wrote.
template <class S> struct Recenter {
  Matrix z;
  int64_t batch, dims;
  const S *offset, *inverse;
  RowGrad<S> weight;  // [B]
  S scale;
  S* x;         // [B, D], output; null where not wanted
  S* weighted;  // [B, D], output: scale weight_b x_b; null where not wanted
};

// In place: scale times a product, its diagonal 0. And the sum of squares over all elements, if wanted.
template <class S> struct Gram {
  S* matrix;  // [side, side]
  int64_t side;
  S scale;
  bool offdiagonal;  // write it; else the matrix stays as it is, and its diagonal counts
  S* out;            // one: share (sum (scale m_ij)^2 - sum v_d^2); null where not wanted
  const S* spread;   // [dims]; null where there is nothing to subtract
  int64_t dims;
  S share;
};

// out_b = share x_b . y_b, where y = scale m - v x.
template <class S> struct Parts {
  const S* x;  // [B, D]
  S* y;        // [B, D]: m; becomes y where v is not null
  const S* spread;  // [D]; null: y is m as it stands, and scale 1
  int64_t batch, dims;
  S scale, share;
  S* out;  // [B]
};

// The gradient by z, with h = of_product g_b y_b + of_more more_b:
//   inverse_d (h_bd - of_mean sum_i g_i y_id - (of_slope sum_i g_i x_id y_id + of_square sum_i g_i x_id^2) x_bd).
template <class S> struct Finish {
  Matrix z;
  int64_t batch, dims;
  const S *offset, *inverse;
  RowGrad<S> grad;  // g [B]
  const S* product;  // y [B, D]
  const S* more;     // [B, D]; null counts as 0
  S of_product, of_more, of_mean, of_slope, of_square;  // if the last three are 0, no sum is made
  void* to;  // [B, D], output, contiguous, of z's dtype
};

// Launches are cooperative where a stage sums and the grid has more than one block.
BOMKERN_CUDA_DECLARE(Center)
BOMKERN_CUDA_DECLARE(Recenter)
BOMKERN_CUDA_DECLARE(Gram)
BOMKERN_CUDA_DECLARE(Parts)
BOMKERN_CUDA_DECLARE(Finish)

}  // namespace covariance_penalty
}  // namespace bomkern
