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
using Parts = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // out, log_q, joint, marginal

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
  TORCH_CHECK_VALUE(!stratified || p.batch > 1, "z must hold at least 2 samples for estimator 'mss', got 1: use a larger "
                    "batch, and drop_last=True if it was the last one of a DataLoader");
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

// log_q has no elements where it is not wanted.
template <class S, bool Cuda>
Parts run(const Tensor& z, const Tensor& mu, const Tensor& logvar, const Problem& p, bool parts) {
  constexpr double half_log_2_pi = 0.91893853320467274178;
  const auto number = z.options().dtype(c10::CppTypeToScalarType<S>::value);
  const Parts out(fresh<Cuda>({p.rows}, number), parts ? fresh<Cuda>({p.rows}, z.options().dtype(at::kDouble)) : Tensor(),
                  fresh<Cuda>({p.rows}, number), fresh<Cuda>({p.dims, p.rows}, number));
  const auto& [value, log_q, joint, marginal] = out;
  const auto dims = static_cast<double>(p.dims);
  launch<Cuda>(Forward<S>{describe<S>(z, mu, logvar, p), (1.0 - dims) * p.log_weight(),
                          p.log_weight() - dims * half_log_2_pi, value.template mutable_data_ptr<S>(),
                          parts ? log_q.template mutable_data_ptr<double>() : nullptr, joint.template mutable_data_ptr<S>(),
                          marginal.template mutable_data_ptr<S>()},
               z);
  return out;
}

template <bool Cuda>
Parts compute(const Tensor& z, const Tensor& mu, const Tensor& logvar, std::optional<int64_t> dataset_size,
              bool stratified, std::optional<int64_t> first, bool parts) {
  const Problem p = check(z, mu, logvar, dataset_size, stratified, first);
  return p.wide ? run<double, Cuda>(z, mu, logvar, p, parts) : run<float, Cuda>(z, mu, logvar, p, parts);
}

template <bool Cuda>
Result total_correlation(const Tensor& z, const Tensor& mu, const Tensor& logvar, std::optional<int64_t> dataset_size,
                         bool stratified, std::optional<int64_t> first) {
  auto [value, log_q, joint, marginal] = compute<Cuda>(z, mu, logvar, dataset_size, stratified, first, false);
  return {std::move(value), std::move(joint), std::move(marginal)};
}

template <bool Cuda>
Parts total_correlation_parts(const Tensor& z, const Tensor& mu, const Tensor& logvar,
                              std::optional<int64_t> dataset_size, bool stratified, std::optional<int64_t> first) {
  return compute<Cuda>(z, mu, logvar, dataset_size, stratified, first, true);
}

template <class S, bool Cuda>
Result run_backward(const Tensor& grad, const Tensor& z, const Tensor& mu, const Tensor& logvar, const Tensor& joint,
                    const Tensor& marginal, const Problem& p, std::array<bool, 3> want,
                    const std::optional<Tensor>& grad_log_q) {
  const auto number = joint.options();
  std::array<Tensor, 3> made;
  std::array<S*, 3> to{};
  for (size_t i = 0; i < 3; ++i) {
    made[i] = want[i] ? fresh<Cuda>({i == 0 ? p.rows : p.batch, p.dims}, number) : fresh<Cuda>({0}, number);
    if (want[i]) to[i] = made[i].template mutable_data_ptr<S>();
  }
  launch<Cuda>(Backward<S>{describe<S>(z, mu, logvar, p), bomkern::describe_grad<S>(grad),
                           grad_log_q ? bomkern::describe_grad<double>(*grad_log_q) : bomkern::RowGrad<double>{},
                           joint.const_data_ptr<S>(), marginal.const_data_ptr<S>(), to[0], to[1], to[2]},
               z);
  return {made[0].to(z.scalar_type()), made[1].to(mu.scalar_type()), made[2].to(logvar.scalar_type())};
}

template <bool Cuda>
Result total_correlation_backward(const Tensor& grad, const Tensor& z, const Tensor& mu, const Tensor& logvar,
                                  const Tensor& joint, const Tensor& marginal, std::optional<int64_t> dataset_size,
                                  bool stratified, std::optional<int64_t> first, std::array<bool, 3> want,
                                  const std::optional<Tensor>& grad_log_q) {
  const Problem p = check(z, mu, logvar, dataset_size, stratified, first);
  bomkern::check_given("grad", grad, {p.rows}, p.type());
  if (grad_log_q) bomkern::check_given("grad_log_q", *grad_log_q, {p.rows}, at::kDouble);
  bomkern::check_kept("joint", joint, {p.rows}, p.type());
  bomkern::check_kept("marginal", marginal, {p.dims, p.rows}, p.type());
  return p.wide ? run_backward<double, Cuda>(grad, z, mu, logvar, joint, marginal, p, want, grad_log_q)
                : run_backward<float, Cuda>(grad, z, mu, logvar, joint, marginal, p, want, grad_log_q);
}

template <class Results>
using ForwardOp = Results(const Tensor&, const Tensor&, const Tensor&, std::optional<int64_t>, bool,
                          std::optional<int64_t>);
using BackwardOp = Result(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                          std::optional<int64_t>, bool, std::optional<int64_t>, std::array<bool, 3>,
                          const std::optional<Tensor>&);
using GradientsOp = Result(const Tensor&, const Tensor&, const Tensor&, const Tensor&, std::optional<int64_t>, bool,
                           std::optional<int64_t>, const std::optional<Tensor>&);

// The gradients of out, zeros if it has none, and of log_q. `like` has R rows.
std::pair<Tensor, std::optional<Tensor>> gradients_of(const bomkern::variable_list& grads, const Tensor& like) {
  return {grads[0].defined() ? grads[0] : at::zeros({}, like.options()).expand({like.size(0)}),
          grads.size() > 1 ? bomkern::maybe(grads[1]) : std::nullopt};
}

template <class Results>
Results total_correlation_autograd(const Tensor& z, const Tensor& mu, const Tensor& logvar,
                                   std::optional<int64_t> dataset_size, bool stratified, std::optional<int64_t> first) {
  constexpr size_t joint = std::tuple_size_v<Results> - 2;  // those before it have a gradient
  static const auto op = bomkern::operator_named<ForwardOp<Results>>("bomkern::total_correlation", joint == 2 ? "parts" : "");
  static const auto back = bomkern::operator_named<BackwardOp>("bomkern::total_correlation_backward", "");
  const bomkern::Differentiable autograd("total_correlation", {z, mu, logvar});
  const Results out = autograd.run([&] { return op.call(z, mu, logvar, dataset_size, stratified, first); });
  std::vector<Tensor> values{std::get<0>(out)};
  if constexpr (joint == 2) values.push_back(std::get<1>(out));
  autograd.finish(values, {z, mu, logvar, std::get<joint>(out), std::get<joint + 1>(out)},
                  [dataset_size, stratified, first](const auto& grads, const auto& kept, const auto& want) {
                    const auto [grad, grad_log_q] = gradients_of(grads, kept[3]);
                    return bomkern::wanted(back.call(grad, kept[0], kept[1], kept[2], kept[3], kept[4], dataset_size,
                                                     stratified, first, {want[0], want[1], want[2]}, grad_log_q),
                                           want);
                  },
                  {z, mu, logvar},
                  [dataset_size, stratified, first](const auto& grads, const auto& inputs, const auto& want) {
                    static const auto reference =
                        bomkern::operator_named<GradientsOp>("bomkern::total_correlation_gradients_reference", "");
                    const auto [grad, grad_log_q] = gradients_of(grads, inputs[0]);
                    return bomkern::wanted(reference.call(grad, inputs[0], inputs[1], inputs[2], dataset_size,
                                                          stratified, first, grad_log_q),
                                           want);
                  });
  return out;
}

}  // namespace

// The schemas of all ops are on one page: bomkern/dispatch/schemas.py.
TORCH_LIBRARY_IMPL(bomkern, CPU, m) {
  m.impl("total_correlation", total_correlation<false>);
  m.impl("total_correlation.parts", total_correlation_parts<false>);
  m.impl("total_correlation_backward", total_correlation_backward<false>);
}

#ifdef BOMKERN_CUDA
TORCH_LIBRARY_IMPL(bomkern, CUDA, m) {
  m.impl("total_correlation", total_correlation<true>);
  m.impl("total_correlation.parts", total_correlation_parts<true>);
  m.impl("total_correlation_backward", total_correlation_backward<true>);
}
#endif

TORCH_LIBRARY_IMPL(bomkern, Autograd, m) {
  m.impl("total_correlation", total_correlation_autograd<Result>);
  m.impl("total_correlation.parts", total_correlation_autograd<Parts>);
  m.impl("total_correlation_backward", bomkern::no_derivative());
}
