// covariance_penalty on the GPU: torch's memory and cuBLAS's matrix products for kernels/covariance_penalty/cuda_steps.h.
//
// Splitting the factors and multiplying the parts in TF32 (three products) would keep float32's digits, but it pays only in
// a product of our own that splits in registers. By count, at 65,536 x 128 on an H200: the split moves 101 MB and the
// products as much again, 47 us at a copy's rate. The float32 product, 2.1 GFLOP, takes about 40 us.
#pragma once
#include "../kernels/covariance_penalty/cuda_steps.h"
#include "launch.h"
#include "products.h"

#include <torch_headers.h>

#include <tuple>

namespace bomkern::covariance_penalty {

template <class S> struct TorchLibrary {
  using Array = Tensor;
  const Tensor& z;

  Tensor fresh_numbers(at::IntArrayRef size) const {
    return fresh<true>(size, z.options().dtype(c10::CppTypeToScalarType<S>::value));
  }
  Tensor empty(int64_t rows, int64_t columns) const { return fresh_numbers({rows, columns}); }
  S* data(const Tensor& x) const { return x.mutable_data_ptr<S>(); }
  Tensor transposed(const Tensor& x) const { return x.t(); }
  // Calls the CUDA backend directly, because autocast in the dispatcher might use half precision.
  Tensor product(const Tensor& a, const Tensor& b) const {
    const at::NoTF32Guard digits;  // for this thread; cuBLAS obeys it, cuBLASLt does not
    const at::AutoDispatchBelowADInplaceOrView below;
    Tensor out = empty(a.size(0), b.size(1));
    if (std::is_same_v<S, float> && at::globalContext().blasPreferredBackend() != at::BlasBackend::Cublas &&
        loses_digits(at::Float32Backend::CUDA)) {
      Tensor wide = fresh<true>(out.sizes(), out.options().dtype(at::kDouble));
      cuda_mm_out(wide, a.to(at::kDouble), b.to(at::kDouble));
      out.copy_(wide);
    } else {
      cuda_mm_out(out, a, b);
    }
    return out;
  }
  template <class Stage> void run(const Stage& a) const { launch<true>("covariance_penalty", 0, a, z); }
};

template <class S>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward_cuda_as(const Tensor& z, bool normalize, bool per_sample,
                                                                   bool save) {
  const TorchLibrary<S> library{z};
  const int64_t batch = z.size(0), dims = z.size(1);
  const Tensor offset = library.fresh_numbers({dims}), inverse = library.fresh_numbers({dims});
  const Tensor out = per_sample ? library.fresh_numbers({batch}) : library.fresh_numbers({});
  const Steps<S, TorchLibrary<S>> steps(library, describe(z), batch, dims);
  auto saved = steps.forward(normalize, per_sample, library.data(out), library.data(offset), library.data(inverse));
  if (!per_sample || !save) saved.product = library.fresh_numbers({0});
  return {out, saved.product, saved.second, offset, inverse};
}

// (out, product, second, offset, inverse), as the schema says.
inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward_cuda(const Tensor& z, bool normalize, bool per_sample,
                                                                       bool save) {
  const c10::cuda::CUDAGuard guard(z.device());
  return z.scalar_type() == at::kDouble ? forward_cuda_as<double>(z, normalize, per_sample, save)
                                        : forward_cuda_as<float>(z, normalize, per_sample, save);
}

// [B, D], contiguous, in z's dtype.
inline Tensor backward_cuda(const Tensor& grad, const Tensor& z, const Tensor& product, const Tensor& second,
                            const Tensor& offset, const Tensor& inverse, bool normalize, bool per_sample) {
  const c10::cuda::CUDAGuard guard(z.device());
  const Tensor out = fresh<true>(z.sizes(), z.options());
  with_number(z.scalar_type() == at::kDouble, [&](auto zero) {
    using S = decltype(zero);
    const TorchLibrary<S> library{z};
    const Steps<S, TorchLibrary<S>> steps(library, describe(z), z.size(0), z.size(1));
    const RowGrad<S> weight{grad.const_data_ptr<S>(), per_sample ? grad.stride(0) : 0};
    steps.backward(weight, {product, second}, offset.const_data_ptr<S>(), inverse.const_data_ptr<S>(), normalize,
                   per_sample, out.mutable_data_ptr());
  });
  return out;
}

}  // namespace bomkern::covariance_penalty
