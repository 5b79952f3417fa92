// total_correlation: argument checks, autograd node and dispatch. The arithmetic is in kernels/total_correlation/.
#include "../kernels/total_correlation/total_correlation.h"
#include "op.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <atomic>
#include <cmath>

#ifdef BOMKERN_CUDA
#include "../kernels/total_correlation/cuda.h"

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace {

using namespace bomkern::total_correlation;
using at::Tensor;
using bomkern::dtype_of;
using bomkern::fresh;
using bomkern::is_float;
using bomkern::make_node;
using bomkern::Matrix;
using bomkern::operator_named;
using bomkern::refuse_second_derivative;

using Result = std::tuple<Tensor, Tensor, Tensor>;  // out, joint, marginal; or the gradients of z, mu and logvar

struct Problem {
  int64_t batch, dims;
  std::optional<int64_t> dataset_size;
  bool stratified;
  bool wide;  // float64

  double log_weight() const {
    if (stratified) return -std::log(static_cast<double>(batch - 1));
    return -std::log(static_cast<double>(batch)) - std::log(static_cast<double>(dataset_size.value_or(1)));
  }
};

// The same checks as bomkern/_check.py makes for the implementations in Python.
Problem check(const Tensor& z, const Tensor& mu, const Tensor& logvar, std::optional<int64_t> dataset_size,
              bool stratified) {
  const std::pair<const char*, const Tensor*> given[] = {{"z", &z}, {"mu", &mu}, {"logvar", &logvar}};
  Problem p{0, 0, dataset_size, stratified, false};
  for (const auto& [name, x] : given) {
    const auto type = x->scalar_type();
    TORCH_CHECK_TYPE(is_float(type), name, " must be float16, bfloat16, float32 or float64, got ", type);
    TORCH_CHECK_TYPE(x->layout() == at::kStrided, name, " must be a dense tensor, got layout ", x->layout());
    TORCH_CHECK_VALUE(x->device() == z.device(), name, " is on ", x->device(), ", z on ", z.device(),
                      ": move them to one device");
    TORCH_CHECK_VALUE(x->dim() == 2, name, " must have shape [B, D], got ", x->sizes());
    TORCH_CHECK_VALUE(x->sizes() == z.sizes(), name, " must have the shape of z, ", z.sizes(), ", got ", x->sizes());
    p.wide |= type == at::kDouble;
  }
  p.batch = z.size(0);
  p.dims = z.size(1);
  TORCH_CHECK_VALUE(p.batch > 0 && p.dims > 0, "z must hold at least one sample of at least one dimension, got shape ",
                    z.sizes());
  TORCH_CHECK_VALUE(dataset_size || !stratified,
                    "dataset_size must be given for estimator 'mss': its weights depend on it");
  TORCH_CHECK_VALUE(!dataset_size || *dataset_size >= p.batch, "dataset_size must be at least the batch size, ",
                    p.batch, ", got ", dataset_size.value_or(0));
  TORCH_CHECK_VALUE(!stratified || p.batch > 1, "z must hold at least 2 samples for estimator 'mss', got 1");
  return p;
}

Matrix describe(const Tensor& x) {
  return {x.const_data_ptr(), {x.stride(0), x.stride(1)}, dtype_of(x.scalar_type())};
}

template <class S> Inputs<S> describe(const Tensor& z, const Tensor& mu, const Tensor& logvar, const Problem& p) {
  Inputs<S> in{describe(z), describe(mu), describe(logvar), p.batch, p.dims, p.stratified, S(1), S(1)};
  if (p.stratified) {  // over the weight 1/M of all others, M = B - 1
    const auto m = static_cast<double>(p.batch - 1), n = static_cast<double>(*p.dataset_size);
    in.own = static_cast<S>(m / n);
    in.next = static_cast<S>((n - m) / n);
  }
  return in;
}

// Each thread takes the next task there is: one that is slower, or shares its core, takes fewer.
void run_tasks(int64_t tasks, void (*run)(void*, int64_t), void* state) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(tasks, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    for (int64_t task = next++; task < tasks; task = next++) run(state, task);
  });
}

// Asks the kernels how much, allocates it and starts them: `a` is a Forward or a Backward.
template <bool Cuda, class Arguments> void launch(const Arguments& a, const Tensor& like) {
  constexpr bool forward = std::is_same_v<Arguments, Forward<float>> || std::is_same_v<Arguments, Forward<double>>;
  const auto bytes_of = [&](int64_t bytes) { return fresh<Cuda>({bytes}, like.options().dtype(at::kByte)); };
  if constexpr (Cuda) {
#ifdef BOMKERN_CUDA
    using S = std::remove_pointer_t<decltype(a.joint)>;
    constexpr int64_t most = max_cuda_dims<std::remove_const_t<S>>;
    TORCH_CHECK_VALUE(a.in.dims <= most, "z must have at most ", most, " dimensions on the CUDA kernels, got ", a.in.dims,
                      "; impl='triton' has no limit");
    const c10::cuda::CUDAGuard guard(like.device());
    const auto stream = c10::cuda::getCurrentCUDAStream().stream();
    cudaError_t error;
    if constexpr (forward) {
      const Tensor workspace = bytes_of(static_cast<int64_t>(cuda_forward_workspace(a)));
      error = cuda_forward(a, workspace.mutable_data_ptr(), stream);
    } else {
      const Tensor workspace = bytes_of(static_cast<int64_t>(cuda_backward_workspace(a)));
      error = cuda_backward(a, workspace.mutable_data_ptr(), stream);
    }
    TORCH_CHECK(error == cudaSuccess, "total_correlation: the CUDA launch failed: ", cudaGetErrorString(error));
#endif
  } else {
    const CpuKernels& kernels = cpu_kernels();
    constexpr bool single = std::is_same_v<Arguments, Forward<float>> || std::is_same_v<Arguments, Backward<float>>;
    const int64_t size = single ? sizeof(float) : sizeof(double);
    const auto workspace_of = forward ? kernels.forward_workspace : kernels.backward_workspace;
    const Tensor workspace = bytes_of(workspace_of(a.in.batch, a.in.dims, size));
    const auto start = [&] {
      if constexpr (forward) {
        if constexpr (single) return kernels.forward_f32;
        else return kernels.forward_f64;
      } else {
        if constexpr (single) return kernels.backward_f32;
        else return kernels.backward_f64;
      }
    }();
    start(a, workspace.mutable_data_ptr(), run_tasks);
  }
}

template <class S, bool Cuda>
Result run(const Tensor& z, const Tensor& mu, const Tensor& logvar, const Problem& p) {
  const auto number = z.options().dtype(c10::CppTypeToScalarType<S>::value);
  const Result out(fresh<Cuda>({p.batch}, number), fresh<Cuda>({p.batch}, number),
                   fresh<Cuda>({p.dims, p.batch}, number));
  const auto& [value, joint, marginal] = out;
  launch<Cuda>(Forward<S>{describe<S>(z, mu, logvar, p), (1.0 - static_cast<double>(p.dims)) * p.log_weight(),
                          value.template mutable_data_ptr<S>(), joint.template mutable_data_ptr<S>(),
                          marginal.template mutable_data_ptr<S>()},
               z);
  return out;
}

template <bool Cuda>
Result total_correlation(const Tensor& z, const Tensor& mu, const Tensor& logvar, std::optional<int64_t> dataset_size,
                         bool stratified) {
  const Problem p = check(z, mu, logvar, dataset_size, stratified);
  return p.wide ? run<double, Cuda>(z, mu, logvar, p) : run<float, Cuda>(z, mu, logvar, p);
}

template <class S, bool Cuda>
Result run_backward(const Tensor& grad, const Tensor& z, const Tensor& mu, const Tensor& logvar, const Tensor& joint,
                    const Tensor& marginal, const Problem& p, std::array<bool, 3> want) {
  const auto number = joint.options();
  std::array<Tensor, 3> made;
  std::array<S*, 3> to{};
  for (size_t i = 0; i < 3; ++i) {
    made[i] = want[i] ? fresh<Cuda>({p.batch, p.dims}, number) : fresh<Cuda>({0}, number);
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
                                  bool stratified, std::array<bool, 3> want) {
  const Problem p = check(z, mu, logvar, dataset_size, stratified);
  const auto type = p.wide ? at::kDouble : at::kFloat;
  TORCH_CHECK_VALUE(grad.dim() == 1 && grad.size(0) == p.batch, "grad must have shape [", p.batch, "], got ", grad.sizes());
  TORCH_CHECK_VALUE(joint.dim() == 1 && joint.size(0) == p.batch && marginal.dim() == 2 && marginal.size(0) == p.dims &&
                        marginal.size(1) == p.batch && joint.is_contiguous() && marginal.is_contiguous(),
                    "joint and marginal must be what total_correlation returned for these inputs");
  for (const Tensor& x : {grad, joint, marginal})
    TORCH_CHECK_TYPE(x.scalar_type() == type, "grad, joint and marginal must be ", type, ", got ", x.scalar_type());
  return p.wide ? run_backward<double, Cuda>(grad, z, mu, logvar, joint, marginal, p, want)
                : run_backward<float, Cuda>(grad, z, mu, logvar, joint, marginal, p, want);
}

using ForwardOp = Result(const Tensor&, const Tensor&, const Tensor&, std::optional<int64_t>, bool);
using BackwardOp = Result(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                          std::optional<int64_t>, bool, std::array<bool, 3>);

const char* const once = "total_correlation has no second derivative: call backward without create_graph=True";

struct TotalCorrelationBackward : torch::autograd::Node {
  torch::autograd::SavedVariable z, mu, logvar, joint, marginal;
  std::optional<int64_t> dataset_size;
  bool stratified;

  std::string name() const override { return "TotalCorrelationBackward"; }

  void release_variables() override {
    for (auto* saved : {&z, &mu, &logvar, &joint, &marginal}) saved->reset_data();
  }

  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override {
    torch::autograd::variable_list out(3);
    if (!grads[0].defined()) return out;
    const std::array<bool, 3> want{task_should_compute_output(0), task_should_compute_output(1),
                                   task_should_compute_output(2)};
    static const auto op = operator_named<BackwardOp>("bomkern::total_correlation_backward", "");
    const auto made = [&] {
      const auto z_ = z.unpack(), mu_ = mu.unpack(), logvar_ = logvar.unpack();
      const at::AutoDispatchBelowADInplaceOrView below;
      return op.call(grads[0], z_, mu_, logvar_, joint.unpack(), marginal.unpack(), dataset_size, stratified, want);
    }();
    if (want[0]) out[0] = std::get<0>(made);
    if (want[1]) out[1] = std::get<1>(made);
    if (want[2]) out[2] = std::get<2>(made);
    refuse_second_derivative(out, once);
    return out;
  }
};

Result total_correlation_autograd(const Tensor& z, const Tensor& mu, const Tensor& logvar,
                                  std::optional<int64_t> dataset_size, bool stratified) {
  for (const Tensor* x : {&z, &mu, &logvar})
    TORCH_CHECK_NOT_IMPLEMENTED(!torch::autograd::isFwGradDefined(*x),
                                "total_correlation has no forward-mode derivative: use backward()");
  decltype(make_node<TotalCorrelationBackward>()) node;
  if (at::GradMode::is_enabled() && (z.requires_grad() || mu.requires_grad() || logvar.requires_grad())) {
    node = make_node<TotalCorrelationBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(z, mu, logvar));
  }
  static const auto op = operator_named<ForwardOp>("bomkern::total_correlation", "");
  auto out = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return op.call(z, mu, logvar, dataset_size, stratified);
  }();
  if (!node) return out;
  node->z = torch::autograd::SavedVariable(z, false);
  node->mu = torch::autograd::SavedVariable(mu, false);
  node->logvar = torch::autograd::SavedVariable(logvar, false);
  node->joint = torch::autograd::SavedVariable(std::get<1>(out), false);
  node->marginal = torch::autograd::SavedVariable(std::get<2>(out), false);
  node->dataset_size = dataset_size;
  node->stratified = stratified;
  torch::autograd::set_history(std::get<0>(out), node);
  return out;
}

}  // namespace

// The schemas and the fake kernels are on one page: bomkern/_ops.py.
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
  m.impl("total_correlation_backward", torch::autograd::autogradNotImplementedFallback());
}
