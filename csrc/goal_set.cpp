// goal_set: argument checks, autograd and dispatch. The arithmetic is in kernels/goal_set/.
#include <torch_headers.h>

#include "../kernels/goal_set/goal_set.h"
#include "autograd.h"
#include "checks.h"
#include "goals.h"
#include "launch.h"
#include "route.h"

#include <cstring>

#ifdef BOMKERN_CUDA
#include "../kernels/goal_set/cuda.h"
#endif

namespace {

using namespace bomkern::goal_set;
using at::IntArrayRef;
using at::Tensor;
using at::TensorList;
using bomkern::DType;
using bomkern::fresh;
using bomkern::Problem;

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // loss, bottleneck, record, weight

void check_groups(IntArrayRef groups, const Problem& p) {
  TORCH_CHECK_VALUE(static_cast<int64_t>(groups.size()) == p.count, "groups must have one entry for each of the ", p.count,
                    " columns, got ", groups.size());
  int64_t before = 0;
  for (size_t k = 0; k < groups.size(); ++k) {
    const bool counts_up = groups[k] == before || (k > 0 && groups[k] == before + 1);
    TORCH_CHECK_VALUE(counts_up, "groups must count up from 0 by 0 or 1, got ", groups);
    before = groups[k];
  }
}

void check_temperature(const Tensor& temperature, const Tensor& params) {
  TORCH_CHECK_VALUE(temperature.dim() == 0, "temperature must have shape [], got ", temperature.sizes());
  TORCH_CHECK_TYPE(temperature.scalar_type() == params.scalar_type(), "temperature must be ", params.scalar_type(),
                   " as params, got ", temperature.scalar_type());
  TORCH_CHECK_VALUE(temperature.device() == params.device(), "temperature is on ", temperature.device(), ", params on ",
                    params.device(), ": move it");
}

void check_multipliers(const Tensor& multipliers, int64_t goals, const Tensor& params) {
  TORCH_CHECK_VALUE(multipliers.dim() == 1 && multipliers.size(0) == goals, "multipliers must have shape [", goals, "], got ",
                    multipliers.sizes());
  TORCH_CHECK_TYPE(multipliers.scalar_type() == params.scalar_type(), "multipliers must be ", params.scalar_type(),
                   " as params, got ", multipliers.scalar_type());
  TORCH_CHECK_VALUE(multipliers.device() == params.device(), "multipliers is on ", multipliers.device(), ", params on ",
                    params.device(), ": move it");
}

void check_present(const std::optional<Tensor>& present, const std::optional<Tensor>& counts, int64_t goals, const Problem& p,
                   const Tensor& params) {
  TORCH_CHECK_VALUE(present.has_value() == counts.has_value(), "present and counts must be given together: see "
                    "bomkern.reference.counts_of");
  if (!present) return;
  TORCH_CHECK_TYPE(present->scalar_type() == at::kBool, "present must be torch.bool, got ", present->scalar_type());
  TORCH_CHECK_VALUE(present->dim() == 2 && present->size(0) == p.count && present->size(1) == p.batch,
                    "present must have shape [", p.count, ", ", p.batch, "], got ", present->sizes());
  const int64_t size = 1 + goals + p.count;
  TORCH_CHECK_VALUE(counts->dim() == 1 && counts->size(0) == size, "counts must have shape [", size, "], got ",
                    counts->sizes());
  TORCH_CHECK_TYPE(counts->scalar_type() == params.scalar_type(), "counts must be ", params.scalar_type(),
                   " as params, got ", counts->scalar_type());
  TORCH_CHECK_VALUE(present->device() == params.device(), "present is on ", present->device(), ", params on ",
                    params.device(), ": move it");
  TORCH_CHECK_VALUE(counts->device() == params.device(), "counts is on ", counts->device(), ", params on ", params.device(),
                    ": move it");
}

Groups describe(IntArrayRef groups) {
  Groups out{};
  for (size_t k = 0; k < groups.size(); ++k) out.first[groups[k] + 1] = static_cast<uint8_t>(k + 1);
  out.count = static_cast<int>(groups.back() + 1);
  return out;
}

template <bool Cuda>
Result goal_set(TensorList goals, const Tensor& params, IntArrayRef curves, IntArrayRef groups, const Tensor& temperature,
                int64_t reduction, const std::optional<Tensor>& multipliers, bool save, int64_t /* route */,
                const std::optional<Tensor>& present, const std::optional<Tensor>& counts) {
  const Problem p = bomkern::check_goals(goals);
  bomkern::check_params(params, curves, p, goals[0].device());
  check_groups(groups, p);
  check_temperature(temperature, params);
  TORCH_CHECK_VALUE(reduction >= 0 && reduction <= 3, "reduction must be 0 to 3, got ", reduction);
  const auto number = params.options();
  const Groups owners = describe(groups);
  if (multipliers) check_multipliers(*multipliers, owners.count, params);
  check_present(present, counts, owners.count, p, params);
  const auto mode = static_cast<Reduction>(reduction);
  const Tensor loss = mode == Reduction::none ? fresh<Cuda>({p.batch}, number) : fresh<Cuda>({}, number);
  const Tensor bottleneck = fresh<Cuda>({p.batch}, number.dtype(at::kLong));
  const Tensor record = fresh<Cuda>({RecordAt(owners.count, static_cast<int>(p.count)).finite + 1}, number);
  const Tensor weight = save ? fresh<Cuda>({p.count, p.batch}, number) : fresh<Cuda>({0}, number);
  const auto table = params.expect_contiguous();
  // These keep the memory alive for the kernel.
  const Tensor given = multipliers ? multipliers->contiguous() : Tensor();
  const Tensor mask = present ? present->contiguous() : Tensor(), number_of = present ? counts->contiguous() : Tensor();
  bomkern::with_number(p.wide, [&](auto zero) {
    using S = decltype(zero);
    const Forward<S> a{bomkern::describe(goals, p, curves), owners, table->const_data_ptr<S>(), temperature.const_data_ptr<S>(),
                       multipliers ? given.const_data_ptr<S>() : nullptr, present ? mask.const_data_ptr<bool>() : nullptr,
                       present ? number_of.const_data_ptr<S>() : nullptr, mode, loss.mutable_data_ptr<S>(),
                       bottleneck.mutable_data_ptr<int64_t>(), record.mutable_data_ptr<S>(),
                       save ? weight.mutable_data_ptr<S>() : nullptr};
    bomkern::launch<Cuda>("goal_set", cpu_kernels(), a, goals[0]);
  });
  return {loss, bottleneck, record, weight};
}

// For each wanted gradient: index of its goal (0 for the [B, K] matrix), dim of that goal's tensor, and its DType.
template <bool Cuda>
std::vector<Tensor> goal_set_backward(const Tensor& grad, const Tensor& weight, IntArrayRef index, IntArrayRef dim,
                                      IntArrayRef dtype) {
  const auto type = weight.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble, "weight must be Float or Double, got ", type);
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.is_contiguous(),
                    "weight must be [K, B] and contiguous, as goal_set returns it with save=True, got ", weight.sizes());
  const int64_t count = weight.size(0), batch = weight.size(1);
  TORCH_CHECK_TYPE(grad.scalar_type() == type, "grad must be ", type, ", got ", grad.scalar_type());
  TORCH_CHECK_VALUE(grad.dim() == 0 || (grad.dim() == 1 && grad.size(0) == batch), "grad must have shape [] or [", batch,
                    "], got ", grad.sizes());
  TORCH_CHECK_VALUE(count <= max_goals, "weight must have at most ", max_goals, " columns, got ", count);
  bomkern::check_gradients(count, index, dim, dtype);
  const int64_t sizes[] = {batch, count};
  std::vector<Tensor> grads;
  grads.reserve(index.size());
  for (size_t i = 0; i < index.size(); ++i)
    grads.push_back(fresh<Cuda>(IntArrayRef(sizes, dim[i]), weight.options().dtype(bomkern::types[dtype[i]])));
  bomkern::with_number(type == at::kDouble, [&](auto zero) {
    using S = decltype(zero);
    Backward<S> a{{grad.const_data_ptr<S>(), grad.dim() == 0 ? 0 : grad.stride(0)},
                  weight.const_data_ptr<S>(), batch, static_cast<int>(count), {}, static_cast<int>(index.size())};
    for (size_t i = 0; i < index.size(); ++i)
      a.out[i] = {grads[i].mutable_data_ptr(), dim[i] == 2 ? -1 : static_cast<int>(index[i]), dim[i] == 0,
                  static_cast<DType>(dtype[i])};
    bomkern::launch<Cuda>("goal_set_backward", cpu_kernels(), a, weight);
  });
  return grads;
}

using ForwardOp = Result(TensorList, const Tensor&, IntArrayRef, IntArrayRef, const Tensor&, int64_t,
                        const std::optional<Tensor>&, bool, int64_t, const std::optional<Tensor>&,
                        const std::optional<Tensor>&);
using BackwardOp = std::vector<Tensor>(const Tensor&, const Tensor&, IntArrayRef, IntArrayRef, IntArrayRef);

using ReferenceOp = Tensor(TensorList, const Tensor&, IntArrayRef, IntArrayRef, const Tensor&, int64_t,
                           const std::optional<Tensor>&, const std::optional<Tensor>&, const std::optional<Tensor>&);

// Copies params, temperature, multipliers and counts into one vector: a GoalSet changes them in place after its forward, before a
// second derivative reads them.
Tensor copy_of(const Tensor& params, const Tensor& temperature, const std::optional<Tensor>& multipliers,
               const std::optional<Tensor>& counts) {
  const at::AutoDispatchBelowADInplaceOrView below;
  c10::SmallVector<Tensor, 4> parts{params, temperature};
  if (multipliers) parts.push_back(*multipliers);
  if (counts) parts.push_back(*counts);
  bool plain = true;
  for (const Tensor& x : parts) plain = plain && x.is_cpu() && bomkern::has_plain_values(x) && x.is_contiguous();
  if (!plain) {
    for (Tensor& x : parts) x = x.reshape({-1});
    return at::cat(parts);
  }
  int64_t count = 0;
  for (const Tensor& x : parts) count += x.numel();
  const Tensor out = fresh<false>({count}, params.options());  // dispatch would dominate the time
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  for (const Tensor& x : parts) {
    std::memcpy(to, x.const_data_ptr(), x.nbytes());
    to += x.nbytes();
  }
  return out;
}

Result goal_set_autograd(TensorList goals, const Tensor& params, IntArrayRef curves, IntArrayRef groups,
                         const Tensor& temperature, int64_t reduction,
                         const std::optional<Tensor>& multipliers, bool save, int64_t route,
                         const std::optional<Tensor>& present, const std::optional<Tensor>& counts) {
  static const auto op = bomkern::operator_named<ForwardOp>("bomkern::goal_set", "");
  static const auto back = bomkern::operator_named<BackwardOp>("bomkern::goal_set_backward", "");
  const bomkern::Differentiable autograd("goal_set", goals);
  const Result out = autograd.run(
      [&] { return op.call(goals, params, curves, groups, temperature, reduction, multipliers, save || autograd.wanted(), 0,
                           present, counts); });
  if (!autograd.wanted()) return out;
  using Numbers = c10::SmallVector<int64_t, 16>;
  Numbers dims, dtypes;
  for (const Tensor& goal : goals) {
    dims.push_back(goal.dim());
    dtypes.push_back(static_cast<int64_t>(bomkern::dtype_of(goal.scalar_type())));
  }
  std::shared_ptr<bomkern::Owners> owners;
  if (route && goals[0].dim() < 2) {
    owners = std::make_shared<bomkern::Owners>(route, groups);
    owners->watch(std::get<2>(out).narrow(0, 0, groups.back() + 1));  // the record begins with the shares
  }
  const auto pull = [dims, dtypes, owners](const auto& grads, const auto& kept, const auto& want) {
    bomkern::refuse_batched(grads, "goal_set");
    Numbers index, dim, dtype;
    for (size_t k = 0; k < dims.size(); ++k) {
      if (!want[k] || (owners && !owners->holds(k))) continue;
      index.push_back(static_cast<int64_t>(k));
      dim.push_back(dims[k]);
      dtype.push_back(dtypes[k]);
    }
    if (index.empty()) return bomkern::variable_list(dims.size());
    const auto made = back.call(grads[0], kept[0], index, dim, dtype);
    bomkern::variable_list gradients(dims.size());
    for (size_t i = 0; i < index.size(); ++i) gradients[index[i]] = made[i];
    return gradients;
  };
  std::vector<Tensor> given(goals.begin(), goals.end());
  given.push_back(copy_of(params, temperature, multipliers, counts));
  if (present) given.push_back(*present);
  const std::vector<int64_t> shapes(curves.begin(), curves.end()), members(groups.begin(), groups.end());
  const auto again = [shapes, members, reduction, owners, given_weights = multipliers.has_value(), masked = present.has_value(),
                      n = goals.size()](
                         const auto& grads, const auto& inputs, auto want) {
    static const auto reference = bomkern::operator_named<ReferenceOp>("bomkern::goal_set_reference", "");
    for (size_t k = 0; k < n; ++k) want[k] = want[k] && (!owners || owners->holds(k));
    const Tensor& settings = inputs[n];
    const auto columns = static_cast<int64_t>(shapes.size()), count = members.back() + 1;
    const auto table = settings.narrow(0, 0, 4 * columns).view({columns, 4}), mu = settings.select(0, 4 * columns);
    const auto weights = given_weights ? std::optional(settings.narrow(0, 4 * columns + 1, count)) : std::nullopt;
    const int64_t after = 4 * columns + 1 + (given_weights ? count : 0);
    const auto mask = masked ? std::optional(inputs[n + 1]) : std::nullopt;
    const auto numbers = masked ? std::optional(settings.narrow(0, after, 1 + count + columns)) : std::nullopt;
    const TensorList columns_of(inputs.data(), n);
    const Tensor loss = reference.call(columns_of, table, shapes, members, mu, reduction, weights, mask, numbers);
    return bomkern::differentiable_gradients({loss}, grads, inputs, want);
  };
  autograd.finish({std::get<0>(out)}, {std::get<3>(out)}, pull, given, again);
  return out;
}

}  // namespace

// The schemas of all ops are on one page: bomkern/dispatch/schemas.py.
TORCH_LIBRARY_IMPL(bomkern, CPU, m) {
  m.impl("goal_set", goal_set<false>);
  m.impl("goal_set_backward", goal_set_backward<false>);
}

#ifdef BOMKERN_CUDA
TORCH_LIBRARY_IMPL(bomkern, CUDA, m) {
  m.impl("goal_set", goal_set<true>);
  m.impl("goal_set_backward", goal_set_backward<true>);
}
#endif

TORCH_LIBRARY_IMPL(bomkern, Autograd, m) {
  m.impl("goal_set", goal_set_autograd);
  m.impl("goal_set_backward", bomkern::no_derivative());
}
