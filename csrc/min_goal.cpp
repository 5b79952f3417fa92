// min_goal: argument checks, its own autograd node, and dispatch. The arithmetic is in kernels/min_goal/.
#include <torch_headers.h>

#include "autograd.h"
#include "checks.h"
#include "goals.h"
#include "launch.h"
#include "min_goal_cpu.h"
#include "route.h"

#ifdef BOMKERN_CUDA
#include "../kernels/min_goal/cuda.h"
#endif

namespace {

using at::Tensor;
using at::TensorList;
using namespace bomkern::min_goal;
using bomkern::check_goals;
using bomkern::check_params;
using bomkern::describe;
using bomkern::DType;
using bomkern::dtype_of;
using bomkern::fresh;
using bomkern::make_node;
using bomkern::operator_named;
using bomkern::Owners;
using bomkern::Problem;
using bomkern::SavedVariable;
using bomkern::types;
using bomkern::variable_list;

// (loss, winner, slope); with stats also (bottleneck, share, level, finite).
using Result = std::tuple<Tensor, Tensor, Tensor>;
using StatsResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class S, bool Cuda> struct Call {
  Forward<S> args{};
  Tensor loss, winner, slope, bottleneck, share, level, finite, params;

  Call(TensorList goals, const std::optional<Tensor>& p, at::IntArrayRef curves, Reduction reduction, bool stats,
       const Problem& problem) {
    check_params(p, curves, problem, goals[0].device());
    const auto number = goals[0].options().dtype(c10::CppTypeToScalarType<S>::value);
    const bool global = reduction == Reduction::min;
    const int64_t rows = global ? 1 : problem.batch;
    args.goals = describe(goals, problem, curves);
    args.reduction = reduction;
    if (p) {
      params = p->contiguous();
      args.params = params.template const_data_ptr<S>();
    }
    loss = reduction == Reduction::none ? fresh<Cuda>({problem.batch}, number) : fresh<Cuda>({}, number);
    winner = fresh<Cuda>({rows}, number.dtype(global ? at::kLong : at::kByte));
    slope = fresh<Cuda>({rows}, number);
    args.loss = loss.template mutable_data_ptr<S>();
    args.slope = slope.template mutable_data_ptr<S>();
    if (global) {
      args.worst = winner.template mutable_data_ptr<int64_t>();
    } else {
      args.winner = winner.template mutable_data_ptr<uint8_t>();
    }
    if (!stats) return;
    bottleneck = fresh<Cuda>({problem.batch}, number.dtype(at::kLong));
    share = fresh<Cuda>({problem.count}, number);
    level = fresh<Cuda>({problem.count}, number);
    finite = fresh<Cuda>({}, number.dtype(at::kBool));
    args.bottleneck = bottleneck.template mutable_data_ptr<int64_t>();
    args.share = share.template mutable_data_ptr<S>();
    args.level = level.template mutable_data_ptr<S>();
    args.finite = finite.template mutable_data_ptr<bool>();
  }
};

template <class S, bool Cuda>
Call<S, Cuda> run(TensorList goals, const std::optional<Tensor>& params, at::IntArrayRef curves, int64_t reduction, bool stats,
            const Problem& problem) {
  Call<S, Cuda> call(goals, params, curves, static_cast<Reduction>(reduction), stats, problem);
  if constexpr (Cuda) {
    bomkern::launch<true>("min_goal", cpu_kernels(), call.args, goals[0]);
  } else {
    run_cpu(call.args);
  }
  return call;
}

void check_reduction(int64_t reduction) {
  TORCH_CHECK_VALUE(reduction >= 0 && reduction <= 3, "reduction must be 0 to 3, got ", reduction);
}

template <bool Cuda>
Result min_goal(TensorList goals, const std::optional<Tensor>& params, at::IntArrayRef curves, int64_t reduction,
                int64_t /* route */) {
  const Problem p = check_goals(goals);
  check_reduction(reduction);
  const auto result = [](const auto& call) { return Result(call.loss, call.winner, call.slope); };
  return p.wide ? result(run<double, Cuda>(goals, params, curves, reduction, false, p))
                : result(run<float, Cuda>(goals, params, curves, reduction, false, p));
}

template <bool Cuda>
StatsResult min_goal_stats(TensorList goals, const std::optional<Tensor>& params, at::IntArrayRef curves,
                           int64_t reduction, int64_t /* route */) {
  const Problem p = check_goals(goals);
  check_reduction(reduction);
  const auto result = [](const auto& c) {
    return StatsResult(c.loss, c.winner, c.slope, c.bottleneck, c.share, c.level, c.finite);
  };
  return p.wide ? result(run<double, Cuda>(goals, params, curves, reduction, true, p))
                : result(run<float, Cuda>(goals, params, curves, reduction, true, p));
}

// For each wanted gradient: index of its goal (0 for the [B, K] matrix), dim of that goal's tensor, and its DType.
template <class S, bool Cuda>
std::vector<Tensor> run_backward(const Tensor& grad, const Tensor& winner, const Tensor& slope, int64_t batch,
                                 int64_t count, at::IntArrayRef index, at::IntArrayRef dim,
                                 at::IntArrayRef dtype, Reduction reduction) {
  Backward<S> a{};
  a.grad = grad.const_data_ptr<S>();
  a.grad_stride = grad.dim() == 0 ? 0 : grad.stride(0);
  a.divisor = reduction == Reduction::mean ? static_cast<S>(batch) : S(1);
  if (reduction == Reduction::min) {
    a.worst = winner.const_data_ptr<int64_t>();
  } else {
    a.winner = winner.const_data_ptr<uint8_t>();
  }
  a.slope = slope.const_data_ptr<S>();
  a.batch = batch;
  a.goals = static_cast<int>(count);
  a.outputs = static_cast<int>(index.size());
  std::vector<Tensor> grads;
  grads.reserve(index.size());
  for (size_t i = 0; i < index.size(); ++i) {
    const auto options = slope.options().dtype(types[dtype[i]]);
    const int64_t sizes[] = {batch, count};
    grads.push_back(fresh<Cuda>(at::IntArrayRef(sizes, dim[i]), options));
    a.out[i] = {grads[i].mutable_data_ptr(), dim[i] == 2 ? -1 : static_cast<int>(index[i]), dim[i] == 0,
                static_cast<DType>(dtype[i])};
  }
  if constexpr (Cuda) {
    bomkern::launch<true>("min_goal_backward", cpu_kernels(), a, slope);
    return grads;
  }
  const auto backward = backward_of(cpu_kernels(), S{});
  const int64_t ranges = chunks_of(batch);
  std::vector<double> sums(ranges * a.outputs);
  at::parallel_for(0, ranges, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      backward(a, c * chunk, std::min((c + 1) * chunk, batch), sums.data() + c * a.outputs);
  });
  for (int o = 0; o < a.outputs; ++o) {
    if (!a.out[o].batch_level) continue;
    double sum = 0;
    for (int64_t c = 0; c < ranges; ++c) sum += sums[c * a.outputs + o];
    grads[o].copy_(at::scalar_tensor(sum, at::kDouble));  // fill_ would raise where a narrower dtype has only inf
  }
  return grads;
}

// Checks what forward saved, and which gradients are wanted.
void check_backward(const Tensor& grad, const Tensor& winner, const Tensor& slope, int64_t batch, int64_t count,
                    at::IntArrayRef index, at::IntArrayRef dim, at::IntArrayRef dtype, int64_t reduction) {
  check_reduction(reduction);
  const auto mode = static_cast<Reduction>(reduction);
  const auto type = slope.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble, "slope must be Float or Double, got ", type);
  TORCH_CHECK_VALUE(batch > 0, "batch must be at least 1, got ", batch);
  TORCH_CHECK_VALUE(count >= 1 && count <= max_goals, "goals must be 1 to ", max_goals, ", got ", count);
  const int64_t rows = mode == Reduction::min ? 1 : batch;
  bomkern::check_kept("winner", winner, {rows}, mode == Reduction::min ? at::kLong : at::kByte);
  bomkern::check_kept("slope", slope, {rows}, type);
  bomkern::check_given("grad", grad, mode == Reduction::none ? at::IntArrayRef(batch) : at::IntArrayRef(), type);
  bomkern::check_gradients(count, index, dim, dtype);
}

template <bool Cuda>
std::vector<Tensor> min_goal_backward(const Tensor& grad, const Tensor& winner, const Tensor& slope, int64_t batch,
                                      int64_t count, at::IntArrayRef index, at::IntArrayRef dim,
                                      at::IntArrayRef dtype, int64_t reduction) {
  check_backward(grad, winner, slope, batch, count, index, dim, dtype, reduction);
  const auto code = static_cast<Reduction>(reduction);
  return slope.scalar_type() == at::kDouble
      ? run_backward<double, Cuda>(grad, winner, slope, batch, count, index, dim, dtype, code)
      : run_backward<float, Cuda>(grad, winner, slope, batch, count, index, dim, dtype, code);
}

using ForwardOp = Result(TensorList, const std::optional<Tensor>&, at::IntArrayRef, int64_t, int64_t);
using StatsOp = StatsResult(TensorList, const std::optional<Tensor>&, at::IntArrayRef, int64_t, int64_t);
using BackwardOp = std::vector<Tensor>(const Tensor&, const Tensor&, const Tensor&, c10::SymInt, int64_t,
                                       at::IntArrayRef, at::IntArrayRef, at::IntArrayRef, int64_t);

using ReferenceOp = Tensor(TensorList, const std::optional<Tensor>&, at::IntArrayRef, int64_t);

struct MinGoalBackward : bomkern::Node {
  SavedVariable winner, slope;
  // For a second derivative alone.
  std::vector<SavedVariable> goals;
  std::optional<SavedVariable> params;
  c10::SmallVector<int64_t, 16> curves;
  c10::SymInt batch;
  int64_t count, reduction;
  c10::SmallVector<int64_t, 16> dims;
  c10::SmallVector<int64_t, 16> dtypes;
  Owners owners;

  std::string name() const override { return "MinGoalBackward"; }

  void release_variables() override {
    winner.reset_data();
    slope.reset_data();
    for (auto& goal : goals) goal.reset_data();
    if (params) params->reset_data();
  }

  // Returns differentiable gradients, by the reference, for the goals in `index`.
  variable_list differentiable(const variable_list& grads, at::IntArrayRef index,
                                                const std::vector<Tensor>& inputs) const {
    static const auto op = operator_named<ReferenceOp>("bomkern::min_goal_reference", "");
    const auto table = params ? std::optional(bomkern::unpack(*params)) : std::nullopt;
    std::vector<bool> want(goals.size(), false);
    for (const int64_t k : index) want[k] = true;
    return bomkern::differentiable_gradients({op.call(inputs, table, curves, reduction)}, grads, inputs, want);
  }

 protected:
  variable_list apply(variable_list&& grads) override {
    variable_list out(dims.size());
    if (!grads[0].defined()) return out;
    c10::SmallVector<int64_t, 16> index, dim, dtype;
    for (size_t k = 0; k < dims.size(); ++k) {
      if (!task_should_compute_output(k) || !owners.holds(k)) continue;
      index.push_back(static_cast<int64_t>(k));
      dim.push_back(dims[k]);
      dtype.push_back(dtypes[k]);
    }
    if (index.empty()) return out;
    if (at::GradMode::is_enabled()) {
      std::vector<Tensor> inputs;
      inputs.reserve(goals.size());
      for (const auto& goal : goals) inputs.push_back(bomkern::unpack(goal));
      if (bomkern::any_requires_grad(grads) || bomkern::any_requires_grad(inputs)) return differentiable(grads, index, inputs);
    }
    bomkern::refuse_batched(grads, "min_goal_loss");
    const auto saved_winner = winner.unpack(), saved_slope = slope.unpack();
    static const auto op = operator_named<BackwardOp>("bomkern::min_goal_backward", "");
    const auto values = [&] {
      const at::AutoDispatchBelowADInplaceOrView below;
      return op.call(grads[0], saved_winner, saved_slope, batch, count, index, dim, dtype, reduction);
    }();
    for (size_t i = 0; i < index.size(); ++i) out[index[i]] = values[i];
    return out;
  }
};

template <class Op>
auto with_history(const Op& op, TensorList goals, const std::optional<Tensor>& params, at::IntArrayRef curves,
                  int64_t reduction, int64_t route) {
  bool wanted = false;
  for (const Tensor& goal : goals) {
    wanted |= goal.requires_grad();
    TORCH_CHECK_NOT_IMPLEMENTED(!bomkern::has_tangent(goal),
                                "min_goal_loss has no forward-mode derivative: use backward()");
  }
  decltype(make_node<MinGoalBackward>()) node;
  if (wanted && at::GradMode::is_enabled()) {
    node = make_node<MinGoalBackward>();
    node->set_next_edges(bomkern::collect_next_edges(goals));
  }
  auto out = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return op.call(goals, params, curves, reduction, route);
  }();
  if (!node) return out;
  const bool matrix = goals.size() == 1 && goals[0].dim() == 2;
  node->batch = 1;
  for (const Tensor& goal : goals) {
    node->dims.push_back(goal.dim());
    node->dtypes.push_back(static_cast<int64_t>(dtype_of(goal.scalar_type())));
    if (goal.dim() > 0) node->batch = goal.sym_size(0);
    node->goals.emplace_back(goal, false);
  }
  node->count = matrix ? goals[0].size(1) : static_cast<int64_t>(goals.size());
  node->reduction = reduction;
  node->curves.assign(curves.begin(), curves.end());
  if (params) node->params.emplace(*params, false);
  node->winner = SavedVariable(std::get<1>(out), false);
  node->slope = SavedVariable(std::get<2>(out), false);
  if (route && !matrix) {
    node->owners = Owners(route, {});
    if constexpr (std::tuple_size_v<decltype(out)> > 3) {
      node->owners.watch(std::get<4>(out));
    } else {
      node->owners.watch_winners(std::get<1>(out), node->count);
    }
  }
  bomkern::set_history(std::get<0>(out), node);
  return out;
}

StatsResult min_goal_stats_autograd(TensorList goals, const std::optional<Tensor>& params, at::IntArrayRef curves,
                                    int64_t reduction, int64_t route) {
  static const auto op = operator_named<StatsOp>("bomkern::min_goal", "stats");
  return with_history(op, goals, params, curves, reduction, route);
}

Result min_goal_autograd(TensorList goals, const std::optional<Tensor>& params, at::IntArrayRef curves,
                         int64_t reduction, int64_t route) {
  static const auto op = operator_named<ForwardOp>("bomkern::min_goal", "");
  if (route && !goals.empty() && goals[0].is_cuda()) {  // the shares are copied to the host
    const auto out = min_goal_stats_autograd(goals, params, curves, reduction, route);
    return {std::get<0>(out), std::get<1>(out), std::get<2>(out)};
  }
  return with_history(op, goals, params, curves, reduction, route);
}

}  // namespace

// The schemas of all ops are on one page: bomkern/dispatch/schemas.py.
TORCH_LIBRARY_IMPL(bomkern, CPU, m) {
  m.impl("min_goal", min_goal<false>);
  m.impl("min_goal.stats", min_goal_stats<false>);
  m.impl("min_goal_backward", min_goal_backward<false>);
}

#ifdef BOMKERN_CUDA
TORCH_LIBRARY_IMPL(bomkern, CUDA, m) {
  m.impl("min_goal", min_goal<true>);
  m.impl("min_goal.stats", min_goal_stats<true>);
  m.impl("min_goal_backward", min_goal_backward<true>);
}
#endif

TORCH_LIBRARY_IMPL(bomkern, Autograd, m) {
  m.impl("min_goal", min_goal_autograd);
  m.impl("min_goal.stats", min_goal_stats_autograd);
  m.impl("min_goal_backward", bomkern::no_derivative());
}
