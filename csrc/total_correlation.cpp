// total_correlation: argument checks, autograd node and dispatch. The arithmetic is in kernels/total_correlation/.
#include <torch_headers.h>

#include "../kernels/total_correlation/total_correlation.h"
#include "autograd.h"
#include "checks.h"
#include "launch.h"

#include <cmath>

#ifdef BOMKERN_CUDA
#include "../kernels/total_correlation/cuda.h"
#endif

namespace {

using namespace bomkern::total_correlation;
using at::Tensor;
using bomkern::fresh;

using Result = std::tuple<Tensor, Tensor, Tensor>;  // out, joint, marginal; or the gradients of z, mu and logvar

struct Problem : bomkern::Shape {  // batch: components
  int64_t rows, first;
  std::optional<int64_t> dataset_size;
  bool stratified;

  double log_weight() const {
    if (stratified) return -std::log(static_cast<double>(batch - 1));
    return -std::log(static_cast<double>(batch)) - std::log(static_cast<double>(dataset_size.value_or(1)));
  }
};

// Checks the rows of z: a part of the batch from `first` on, or the whole batch.
bomkern::Shape check_shapes(const Tensor& z, const Tensor& mu, const Tensor& logvar, std::optional<int64_t> first) {
  if (!first) return bomkern::check_matrices(1, {{"z", z}, {"mu", mu}, {"logvar", logvar}});
  bomkern::Shape shape = bomkern::check_matrices(1, {{"mu", mu}, {"logvar", logvar}});
  const bomkern::Shape rows = bomkern::check_matrices(1, {{"z", z}});
  TORCH_CHECK_VALUE(z.device() == mu.device(), "z is on ", z.device(), ", mu on ", mu.device(),
                    ": move them to one device");
  TORCH_CHECK_VALUE(rows.dims == shape.dims, "z must have the ", shape.dims, " dimensions of mu, got ", rows.dims);
  TORCH_CHECK_VALUE(*first >= 0 && rows.batch <= shape.batch - *first, "first must be at least 0, and ", rows.batch,
                    " rows from there on be among the ", shape.batch, " of mu, got ", *first);
  shape.wide |= rows.wide;
  return shape;
}

// Makes the same checks as bomkern/common/checks.py for the implementations in Python.
Problem check(const Tensor& z, const Tensor& mu, const Tensor& logvar, std::optional<int64_t> dataset_size,
              bool stratified, std::optional<int64_t> first) {
  const Problem p{check_shapes(z, mu, logvar, first), z.size(0), first.value_or(0), dataset_size, stratified};
  TORCH_CHECK_VALUE(dataset_size || !stratified,
                    "dataset_size must be given for estimator 'mss': its weights depend on it");
  TORCH_CHECK_VALUE(!dataset_size || *dataset_size >= p.batch, "dataset_size must be at least the batch size, ",
                    p.batch, ", got ", dataset_size.value_or(0));
  TORCH_CHECK_VALUE(!stratified || p.batch > 1, "z must hold at least 2 samples for estimator 'mss', got 1");
  return p;
}

template <class S> Inputs<S> describe(const Tensor& z, const Tensor& mu, const Tensor& logvar, const Problem& p) {
  Inputs<S> in{bomkern::describe(z), bomkern::describe(mu), bomkern::describe(logvar), p.rows, p.batch,
               p.dims, p.first, p.stratified, S(1), S(1)};
  if (p.stratified && p.dataset_size) {  // over the weight 1/M of all others, M = B - 1
    const auto m = static_cast<double>(p.batch - 1), n = static_cast<double>(*p.dataset_size);
    in.own = static_cast<S>(m / n);
    in.next = static_cast<S>((n - m) / n);
  }
  return in;
}

template <bool Cuda, class Arguments> void launch(const Arguments& a, const Tensor& like) {
#ifdef BOMKERN_CUDA
  constexpr int64_t most = max_cuda_dims<std::remove_const_t<std::remove_pointer_t<decltype(a.joint)>>>;
  TORCH_CHECK_VALUE(!Cuda || a.in.dims <= most, "z must have at most ", most, " dimensions on the CUDA kernels, got ",
                    a.in.dims, "; impl='triton' has no limit");
#endif
  bomkern::launch<Cuda>("total_correlation", cpu_kernels(), a, like);
}

template <class S, bool Cuda>
Result run(const Tensor& z, const Tensor& mu, const Tensor& logvar, const Problem& p) {
  const auto number = z.options().dtype(c10::CppTypeToScalarType<S>::value);
  const Result out(fresh<Cuda>({p.rows}, number), fresh<Cuda>({p.rows}, number),
                   fresh<Cuda>({p.dims, p.rows}, number));
  const auto& [value, joint, marginal] = out;
  launch<Cuda>(Forward<S>{describe<S>(z, mu, logvar, p), (1.0 - static_cast<double>(p.dims)) * p.log_weight(),
                          value.template mutable_data_ptr<S>(), joint.template mutable_data_ptr<S>(),
                          marginal.template mutable_data_ptr<S>()},
               z);
  return out;
}

template <bool Cuda>
Result total_correlation(const Tensor& z, const Tensor& mu, const Tensor& logvar, std::optional<int64_t> dataset_size,
                         bool stratified, std::optional<int64_t> first) {
  const Problem p = check(z, mu, logvar, dataset_size, stratified, first);
  return p.wide ? run<double, Cuda>(z, mu, logvar, p) : run<float, Cuda>(z, mu, logvar, p);
}

template <class S, bool Cuda>
Result run_backward(const Tensor& grad, const Tensor& z, const Tensor& mu, const Tensor& logvar, const Tensor& joint,
                    const Tensor& marginal, const Problem& p, std::array<bool, 3> want) {
  const auto number = joint.options();
  std::array<Tensor, 3> made;
  std::array<S*, 3> to{};
  for (size_t i = 0; i < 3; ++i) {
    made[i] = want[i] ? fresh<Cuda>({i == 0 ? p.rows : p.batch, p.dims}, number) : fresh<Cuda>({0}, number);
    if (want[i]) to[i] = made[i].template mutable_data_ptr<S>();
  }
  launch<Cuda>(Backward<S>{describe<S>(z, mu, logvar, p), grad.const_data_ptr<S>(), grad.stride(0),
                           joint.const_data_ptr<S>(), marginal.const_data_ptr<S>(), to[0], to[1], to[2]},
               z);
  return {made[0].to(z.scalar_type()), made[1].to(mu.scalar_type()), made[2].to(logvar.scalar_type())};
}

template <bool Cuda>
Result total_correlation_backward(const Tensor& grad, const Tensor& z, const Tensor& mu, const Tensor& logvar,
                                  const Tensor& joint, const Tensor& marginal, std::optional<int64_t> dataset_size,
                                  bool stratified, std::optional<int64_t> first, std::array<bool, 3> want) {
  const Problem p = check(z, mu, logvar, dataset_size, stratified, first);
  bomkern::check_given("grad", grad, {p.rows}, p.type());
  bomkern::check_kept("joint", joint, {p.rows}, p.type());
  bomkern::check_kept("marginal", marginal, {p.dims, p.rows}, p.type());
  return p.wide ? run_backward<double, Cuda>(grad, z, mu, logvar, joint, marginal, p, want)
                : run_backward<float, Cuda>(grad, z, mu, logvar, joint, marginal, p, want);
}

using ForwardOp = Result(const Tensor&, const Tensor&, const Tensor&, std::optional<int64_t>, bool,
                         std::optional<int64_t>);
using BackwardOp = Result(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                          std::optional<int64_t>, bool, std::optional<int64_t>, std::array<bool, 3>);

using GradientsOp = Result(const Tensor&, const Tensor&, const Tensor&, const Tensor&, std::optional<int64_t>, bool,
                           std::optional<int64_t>);

Result total_correlation_autograd(const Tensor& z, const Tensor& mu, const Tensor& logvar,
                                  std::optional<int64_t> dataset_size, bool stratified, std::optional<int64_t> first) {
  static const auto op = bomkern::operator_named<ForwardOp>("bomkern::total_correlation", "");
  static const auto back = bomkern::operator_named<BackwardOp>("bomkern::total_correlation_backward", "");
  const bomkern::Differentiable autograd("total_correlation", {z, mu, logvar});
  const Result out = autograd.run([&] { return op.call(z, mu, logvar, dataset_size, stratified, first); });
  const auto& [value, joint, marginal] = out;
  autograd.finish({value}, {z, mu, logvar, joint, marginal},
                  [dataset_size, stratified, first](const auto& grads, const auto& kept, const auto& want) {
                    return bomkern::wanted(back.call(grads[0], kept[0], kept[1], kept[2], kept[3], kept[4], dataset_size,
                                                     stratified, first, {want[0], want[1], want[2]}),
                                           want);
                  },
                  {z, mu, logvar},
                  [dataset_size, stratified, first](const auto& grads, const auto& inputs, const auto& want) {
                    static const auto reference =
                        bomkern::operator_named<GradientsOp>("bomkern::total_correlation_gradients_reference", "");
                    return bomkern::wanted(
                        reference.call(grads[0], inputs[0], inputs[1], inputs[2], dataset_size, stratified, first), want);
                  });
  return out;
}

}  // namespace

// The schemas of all ops are on one page: bomkern/dispatch/schemas.py.
TORCH_LIBRARY_IMPL(bomkern, CPU, m) {
  m.impl("total_correlation", total_correlation<false>);
  m.impl("total_correlation_backward", total_correlation_backward<false>);
}

#ifdef BOMKERN_CUDA
TORCH_LIBRARY_IMPL(bomkern, CUDA, m) {
  m.impl("total_correlation", total_correlation<true>);
  m.impl("total_correlation_backward", total_correlation_backward<true>);
}
#endif

TORCH_LIBRARY_IMPL(bomkern, Autograd, m) {
  m.impl("total_correlation", total_correlation_autograd);
  m.impl("total_correlation_backward", bomkern::no_derivative());
}
