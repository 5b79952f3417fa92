// covariance_penalty: argument checks, autograd and dispatch. The arithmetic is in kernels/covariance_penalty/.
#include <torch_headers.h>

#include "autograd.h"
#include "checks.h"
#include "covariance_penalty_cpu.h"

#ifdef BOMKERN_CUDA
#include "covariance_penalty_cuda.h"
#endif

namespace {

using namespace bomkern::covariance_penalty;
using at::Tensor;
using bomkern::Shape;

Shape check(const Tensor& z) { return bomkern::check_matrices(2, {{"z", z}}); }

template <bool Cuda> Result covariance_penalty(const Tensor& z, bool normalize, bool per_sample, bool save) {
  const Shape shape = check(z);
#ifdef BOMKERN_CUDA
  if constexpr (Cuda) return forward_cuda(z, normalize, per_sample, save);
#endif
  Result out;
  bomkern::with_number(shape.wide, [&](auto zero) {
    const auto column = [&] { return bomkern::fresh<Cuda>({shape.dims}, z.options().dtype(shape.type())); };
    out = OnCpu<decltype(zero)>(z, column(), column()).forward(normalize, per_sample, save);
  });
  return out;
}

template <bool Cuda>
Tensor covariance_penalty_backward(const Tensor& grad, const Tensor& z, const Tensor& product, const Tensor& second,
                                   const Tensor& offset, const Tensor& inverse, bool normalize, bool per_sample) {
  const Shape shape = check(z);
  const int64_t side = std::min(shape.batch, shape.dims);
  const std::vector<int64_t> size = per_sample ? std::vector{shape.batch} : std::vector<int64_t>{};
  bomkern::check_given("grad", grad, size, shape.type());
  const std::vector<int64_t> kept = per_sample ? std::vector{shape.batch, shape.dims} : std::vector<int64_t>{0};
  bomkern::check_kept(per_sample ? "product, of a forward with save=True," : "product", product, kept, shape.type());
  bomkern::check_kept("second", second, {side, side}, shape.type());
  bomkern::check_kept("offset", offset, {shape.dims}, shape.type());
  bomkern::check_kept("inverse", inverse, {shape.dims}, shape.type());
#ifdef BOMKERN_CUDA
  if constexpr (Cuda) return backward_cuda(grad, z, product, second, offset, inverse, normalize, per_sample);
#endif
  Tensor out;
  bomkern::with_number(shape.wide, [&](auto zero) {
    using S = decltype(zero);
    // The penalty is the mean of the parts, so each part has the same share of its gradient.
    const S share = per_sample ? S(0) : *grad.const_data_ptr<S>() / static_cast<S>(shape.batch);
    const auto weight = per_sample ? bomkern::describe_grad<S>(grad) : bomkern::RowGrad<S>{&share, 0};
    out = OnCpu<S>(z, offset, inverse).backward(weight, product, second, normalize);
  });
  return out;
}

using ForwardOp = Result(const Tensor&, bool, bool, bool);
using BackwardOp = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, bool, bool);

using ReferenceOp = Tensor(const Tensor&, bool, bool);

Result covariance_penalty_autograd(const Tensor& z, bool normalize, bool per_sample, bool save) {
  static const auto op = bomkern::operator_named<ForwardOp>("bomkern::covariance_penalty", "");
  static const auto back = bomkern::operator_named<BackwardOp>("bomkern::covariance_penalty_backward", "");
  const bomkern::Differentiable autograd("covariance_penalty", {z});
  const Result out = autograd.run([&] { return op.call(z, normalize, per_sample, save || autograd.wanted()); });
  const auto& [value, product, second, offset, inverse] = out;
  const auto pull = [normalize, per_sample](const auto& grads, const auto& kept, const auto&) {
    return bomkern::variable_list{
        back.call(grads[0], kept[0], kept[1], kept[2], kept[3], kept[4], normalize, per_sample)};
  };
  const auto results = [normalize, per_sample](const auto& inputs) {
    static const auto reference = bomkern::operator_named<ReferenceOp>("bomkern::covariance_penalty_reference", "");
    return bomkern::variable_list{reference.call(inputs[0], normalize, per_sample)};
  };
  autograd.finish({value}, {z, product, second, offset, inverse}, pull, {z}, bomkern::by_reference(results));
  return out;
}

}  // namespace

// The schemas of all ops are on one page: bomkern/dispatch/schemas.py.
TORCH_LIBRARY_IMPL(bomkern, CPU, m) {
  m.impl("covariance_penalty", covariance_penalty<false>);
  m.impl("covariance_penalty_backward", covariance_penalty_backward<false>);
}

#ifdef BOMKERN_CUDA
TORCH_LIBRARY_IMPL(bomkern, CUDA, m) {
  m.impl("covariance_penalty", covariance_penalty<true>);
  m.impl("covariance_penalty_backward", covariance_penalty_backward<true>);
}
#endif

TORCH_LIBRARY_IMPL(bomkern, Autograd, m) {
  m.impl("covariance_penalty", covariance_penalty_autograd);
  m.impl("covariance_penalty_backward", bomkern::no_derivative());
}
