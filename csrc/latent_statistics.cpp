// latent_statistics: argument checks, autograd and dispatch. The arithmetic is in kernels/latent_statistics/.
#include <torch_headers.h>

#include "../kernels/latent_statistics/latent_statistics.h"
#include "autograd.h"
#include "checks.h"
#include "launch.h"

#ifdef BOMKERN_CUDA
#include "../kernels/latent_statistics/cuda.h"
#endif

namespace {

using namespace bomkern::latent_statistics;
using at::Tensor;
using bomkern::fresh;
using bomkern::Shape;
using MaybeTensors = c10::List<std::optional<Tensor>>;

// kl, logvar_mean, logvar_square, z_mean, z_variance, mu_mean, mu_variance, active, effective, z_offset, mu_offset
using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor>;
constexpr size_t results = 9;  // with gradients

Shape check(const Tensor& z, const Tensor& mu, const Tensor& logvar, double threshold, double temperature) {
  bomkern::check_units(threshold, temperature);
  return bomkern::check_matrices(2, {{"z", z}, {"mu", mu}, {"logvar", logvar}});
}

template <class S>
Inputs<S> describe(const Tensor& z, const Tensor& mu, const Tensor& logvar, double threshold, double temperature,
                   const Shape& shape) {
  return {bomkern::describe(z), bomkern::describe(mu), bomkern::describe(logvar), shape.batch, shape.dims,
          static_cast<S>(threshold), static_cast<S>(temperature)};
}

template <bool Cuda, class Arguments> void launch(const Arguments& a, const Tensor& like) {
  bomkern::launch<Cuda>("latent_statistics", cpu_kernels(), a, like);
}

template <bool Cuda>
Result latent_statistics(const Tensor& z, const Tensor& mu, const Tensor& logvar, double threshold, double temperature) {
  const Shape shape = check(z, mu, logvar, threshold, temperature);
  const auto number = z.options().dtype(shape.type());
  const auto row = [&] { return fresh<Cuda>({shape.batch}, number); };
  const auto column = [&] { return fresh<Cuda>({shape.dims}, number); };
  const auto one = [&] { return fresh<Cuda>({}, number); };
  const Result out(row(), row(), row(), column(), column(), column(), column(), one(), one(), column(), column());
  bomkern::with_number(shape.wide, [&](auto zero) {
    using S = decltype(zero);
    const auto inputs = describe<S>(z, mu, logvar, threshold, temperature, shape);
    std::apply(
        [&](const auto&... x) { launch<Cuda>(Forward<S>{inputs, x.template mutable_data_ptr<S>()...}, z); }, out);
  });
  return out;
}

template <bool Cuda>
Gradients latent_statistics_backward(const MaybeTensors& grads, const Tensor& z, const Tensor& mu, const Tensor& logvar,
                                     const Tensor& z_offset, const Tensor& mu_offset, const Tensor& mu_variance,
                                     double threshold, double temperature, std::array<bool, 3> want) {
  const Shape shape = check(z, mu, logvar, threshold, temperature);
  bomkern::check_kept("z_offset", z_offset, {shape.dims}, shape.type());
  bomkern::check_kept("mu_offset", mu_offset, {shape.dims}, shape.type());
  bomkern::check_kept("mu_variance", mu_variance, {shape.dims}, shape.type());
  TORCH_CHECK_VALUE(grads.size() == results, "grads must have ", results, " entries, got ", grads.size());
  std::array<Tensor, results> given;  // undefined counts as 0
  for (size_t i = 0; i < results; ++i) {
    const std::optional<Tensor> lazy = grads.get(i);
    if (!lazy || !lazy->defined()) continue;
    const Tensor grad = lazy->resolve_neg();  // the dispatcher does so for tensors, but not in a list of optional tensors
    const std::vector<int64_t> size = i < 3 ? std::vector{shape.batch} : i < 7 ? std::vector{shape.dims} : std::vector<int64_t>{};
    bomkern::check_given("grads[" + std::to_string(i) + "]", grad, size, shape.type());
    given[i] = i < 3 ? grad : grad.contiguous();
  }
  const Gradients out(bomkern::fresh_like<Cuda>(z, want[0]), bomkern::fresh_like<Cuda>(mu, want[1]),
                      bomkern::fresh_like<Cuda>(logvar, want[2]));
  bomkern::with_number(shape.wide, [&](auto zero) {
    using S = decltype(zero);
    const auto by_row = [&](size_t i) {
      return given[i].defined() ? bomkern::describe_grad<S>(given[i]) : bomkern::RowGrad<S>{nullptr, 0};
    };
    const auto at = [&](size_t i) { return given[i].defined() ? given[i].const_data_ptr<S>() : nullptr; };
    launch<Cuda>(Backward<S>{describe<S>(z, mu, logvar, threshold, temperature, shape), by_row(0), by_row(1), by_row(2),
                             at(3), at(4), at(5), at(6), at(7), at(8), z_offset.const_data_ptr<S>(),
                             mu_offset.const_data_ptr<S>(), mu_variance.const_data_ptr<S>(),
                             bomkern::data_of(std::get<0>(out), want[0]), bomkern::data_of(std::get<1>(out), want[1]),
                             bomkern::data_of(std::get<2>(out), want[2])},
                 z);
  });
  return out;
}

using ForwardOp = Result(const Tensor&, const Tensor&, const Tensor&, double, double);
using BackwardOp = Gradients(const MaybeTensors&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                             const Tensor&, double, double, std::array<bool, 3>);

using Nine = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using ReferenceOp = Nine(const Tensor&, const Tensor&, const Tensor&, double, double);

Result latent_statistics_autograd(const Tensor& z, const Tensor& mu, const Tensor& logvar, double threshold,
                                  double temperature) {
  static const auto op = bomkern::operator_named<ForwardOp>("bomkern::latent_statistics", "");
  static const auto back = bomkern::operator_named<BackwardOp>("bomkern::latent_statistics_backward", "");
  const bomkern::Differentiable autograd("latent_statistics", {z, mu, logvar});
  const Result out = autograd.run([&] { return op.call(z, mu, logvar, threshold, temperature); });
  if (!autograd.wanted()) return out;
  const auto& [kl, logvar_mean, logvar_square, z_mean, z_variance, mu_mean, mu_variance, active, effective, z_offset,
               mu_offset] = out;
  const auto pull = [threshold, temperature](const auto& grads, const auto& kept, const auto& want) {
    bomkern::refuse_batched(grads, "latent_statistics");
    MaybeTensors given;
    for (const Tensor& grad : grads) given.push_back(bomkern::maybe(grad));
    return bomkern::wanted(back.call(given, kept[0], kept[1], kept[2], kept[3], kept[4], kept[5], threshold, temperature,
                                     {want[0], want[1], want[2]}),
                           want);
  };
  const auto made_again = [threshold, temperature](const auto& inputs) {
    static const auto reference = bomkern::operator_named<ReferenceOp>("bomkern::latent_statistics_reference", "");
    const auto made = reference.call(inputs[0], inputs[1], inputs[2], threshold, temperature);
    return std::apply([](const auto&... x) { return bomkern::variable_list{x...}; }, made);
  };
  // Detached, because the history of a saved output would hold this node.
  autograd.finish({kl, logvar_mean, logvar_square, z_mean, z_variance, mu_mean, mu_variance, active, effective},
                  {z, mu, logvar, z_offset, mu_offset, mu_variance.detach()}, pull, {z, mu, logvar},
                  bomkern::by_reference(made_again));
  return out;
}

}  // namespace

// The schemas of all ops are on one page: bomkern/dispatch/schemas.py.
TORCH_LIBRARY_IMPL(bomkern, CPU, m) {
  m.impl("latent_statistics", latent_statistics<false>);
  m.impl("latent_statistics_backward", latent_statistics_backward<false>);
}

#ifdef BOMKERN_CUDA
TORCH_LIBRARY_IMPL(bomkern, CUDA, m) {
  m.impl("latent_statistics", latent_statistics<true>);
  m.impl("latent_statistics_backward", latent_statistics_backward<true>);
}
#endif

TORCH_LIBRARY_IMPL(bomkern, Autograd, m) {
  m.impl("latent_statistics", latent_statistics_autograd);
  m.impl("latent_statistics_backward", bomkern::no_derivative());
}
