// active_units: argument checks, autograd and dispatch. The arithmetic is in kernels/active_units/.
#include <torch_headers.h>

#include "../kernels/active_units/active_units.h"
#include "autograd.h"
#include "checks.h"
#include "launch.h"

#ifdef BOMKERN_CUDA
#include "../kernels/active_units/cuda.h"
#endif

namespace {

using namespace bomkern::active_units;
using at::Tensor;
using bomkern::fresh;
using bomkern::Shape;
using MaybeTensor = std::optional<Tensor>;

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // active, effective, offset, variance

Shape check(const Tensor& mu, double threshold, double temperature) {
  bomkern::check_units(threshold, temperature);
  return bomkern::check_matrices(2, {{"mu", mu}});
}

template <class S> Inputs<S> describe(const Tensor& mu, double threshold, double temperature, const Shape& shape) {
  return {bomkern::describe(mu), shape.batch, shape.dims, static_cast<S>(threshold), static_cast<S>(temperature)};
}

template <bool Cuda, class Arguments> void launch(const Arguments& a, const Tensor& like) {
  bomkern::launch<Cuda>("active_units", cpu_kernels(), a, like);
}

template <bool Cuda> Result active_units(const Tensor& mu, double threshold, double temperature) {
  const Shape shape = check(mu, threshold, temperature);
  const auto number = mu.options().dtype(shape.type());
  const Result out(fresh<Cuda>({}, number), fresh<Cuda>({}, number), fresh<Cuda>({shape.dims}, number),
                   fresh<Cuda>({shape.dims}, number));
  bomkern::with_number(shape.wide, [&](auto zero) {
    using S = decltype(zero);
    const auto& [active, effective, offset, variance] = out;
    launch<Cuda>(Forward<S>{describe<S>(mu, threshold, temperature, shape), active.template mutable_data_ptr<S>(),
                            effective.template mutable_data_ptr<S>(), offset.template mutable_data_ptr<S>(),
                            variance.template mutable_data_ptr<S>()},
                 mu);
  });
  return out;
}

template <bool Cuda>
Tensor active_units_backward(const MaybeTensor& grad_active, const MaybeTensor& grad_effective, const Tensor& mu,
                             const Tensor& offset, const Tensor& variance, double threshold, double temperature) {
  const Shape shape = check(mu, threshold, temperature);
  bomkern::check_kept("offset", offset, {shape.dims}, shape.type());
  bomkern::check_kept("variance", variance, {shape.dims}, shape.type());
  if (grad_active) bomkern::check_given("grad_active", *grad_active, {}, shape.type());
  if (grad_effective) bomkern::check_given("grad_effective", *grad_effective, {}, shape.type());
  const Tensor out = bomkern::fresh_like<Cuda>(mu, true);
  bomkern::with_number(shape.wide, [&](auto zero) {
    using S = decltype(zero);
    launch<Cuda>(Backward<S>{describe<S>(mu, threshold, temperature, shape),
                             grad_active ? grad_active->const_data_ptr<S>() : nullptr,
                             grad_effective ? grad_effective->const_data_ptr<S>() : nullptr, offset.const_data_ptr<S>(),
                             variance.const_data_ptr<S>(), out.mutable_data_ptr()},
                 mu);
  });
  return out;
}

using ForwardOp = Result(const Tensor&, double, double);
using BackwardOp = Tensor(const MaybeTensor&, const MaybeTensor&, const Tensor&, const Tensor&, const Tensor&, double,
                          double);

using ReferenceOp = std::tuple<Tensor, Tensor>(const Tensor&, double, double);

Result active_units_autograd(const Tensor& mu, double threshold, double temperature) {
  static const auto op = bomkern::operator_named<ForwardOp>("bomkern::active_units", "");
  static const auto back = bomkern::operator_named<BackwardOp>("bomkern::active_units_backward", "");
  const bomkern::Differentiable autograd("active_units", {mu});
  const Result out = autograd.run([&] { return op.call(mu, threshold, temperature); });
  const auto& [active, effective, offset, variance] = out;
  const auto pull = [threshold, temperature](const auto& grads, const auto& kept, const auto&) {
    return bomkern::variable_list{back.call(bomkern::maybe(grads[0]), bomkern::maybe(grads[1]), kept[0], kept[1], kept[2],
                                            threshold, temperature)};
  };
  const auto results = [threshold, temperature](const auto& inputs) {
    static const auto reference = bomkern::operator_named<ReferenceOp>("bomkern::active_units_reference", "");
    const auto [a, e] = reference.call(inputs[0], threshold, temperature);
    return bomkern::variable_list{a, e};
  };
  autograd.finish({active, effective}, {mu, offset, variance}, pull, {mu}, bomkern::by_reference(results));
  return out;
}

}  // namespace

// The schemas of all ops are on one page: bomkern/dispatch/schemas.py.
TORCH_LIBRARY_IMPL(bomkern, CPU, m) {
  m.impl("active_units", active_units<false>);
  m.impl("active_units_backward", active_units_backward<false>);
}

#ifdef BOMKERN_CUDA
TORCH_LIBRARY_IMPL(bomkern, CUDA, m) {
  m.impl("active_units", active_units<true>);
  m.impl("active_units_backward", active_units_backward<true>);
}
#endif

TORCH_LIBRARY_IMPL(bomkern, Autograd, m) {
  m.impl("active_units", active_units_autograd);
  m.impl("active_units_backward", bomkern::no_derivative());
}
