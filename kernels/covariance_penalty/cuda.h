// covariance_penalty on an NVIDIA GPU of compute capability 8.0 or later: what stands around the matrix products, which
// are a library's (csrc/covariance_penalty_cuda.h puts them together). No torch here.
//
// All pointers are device memory of the current device; the caller sets the device guard. Each stage is one launch,
// asynchronous on the stream, safe in a CUDA graph, and shares no state with another. No output needs to be initialised,
// and two runs give the same bits. Matrices of S are contiguous. Words as in covariance_penalty.h.
#pragma once
#include <cuda_runtime_api.h>
#include <stddef.h>

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

// Bytes at `workspace`, 16-byte aligned, uninitialised; cooperative launches where a stage sums and the grid has more than
// one block.
#define BOMKERN_STAGE(Stage, keyword)                                                   \
  keyword template size_t cuda_workspace(const Stage<float>&);                          \
  keyword template size_t cuda_workspace(const Stage<double>&);                         \
  keyword template cudaError_t cuda_run(const Stage<float>&, void*, cudaStream_t);      \
  keyword template cudaError_t cuda_run(const Stage<double>&, void*, cudaStream_t);
#define BOMKERN_STAGES(keyword)    \
  BOMKERN_STAGE(Center, keyword)   \
  BOMKERN_STAGE(Recenter, keyword) \
  BOMKERN_STAGE(Gram, keyword)     \
  BOMKERN_STAGE(Parts, keyword)    \
  BOMKERN_STAGE(Finish, keyword)

template <class S> size_t cuda_workspace(const Center<S>& a);
template <class S> size_t cuda_workspace(const Recenter<S>& a);
template <class S> size_t cuda_workspace(const Gram<S>& a);
template <class S> size_t cuda_workspace(const Parts<S>& a);
template <class S> size_t cuda_workspace(const Finish<S>& a);

template <class S> cudaError_t cuda_run(const Center<S>& a, void* workspace, cudaStream_t stream);
template <class S> cudaError_t cuda_run(const Recenter<S>& a, void* workspace, cudaStream_t stream);
template <class S> cudaError_t cuda_run(const Gram<S>& a, void* workspace, cudaStream_t stream);
template <class S> cudaError_t cuda_run(const Parts<S>& a, void* workspace, cudaStream_t stream);
template <class S> cudaError_t cuda_run(const Finish<S>& a, void* workspace, cudaStream_t stream);

BOMKERN_STAGES(extern)

}  // namespace covariance_penalty
}  // namespace bomkern
