// One autograd node for every op: it keeps tensors, and a function that makes their gradients.
#pragma once
#include "op.h"

#include <algorithm>
#include <functional>
#include <string>
#include <vector>

namespace bomkern {

// From the gradients of the results (undefined where there is none), the tensors kept, and which inputs want one: the
// gradients of the inputs, undefined where not wanted.
using Pull = std::function<variable_list(const variable_list& grads, const std::vector<Tensor>& kept, const std::vector<bool>& want)>;

// The gradients of the inputs as `Pull` gives them, by the reference (bomkern/dispatch/double_backward.py) and differentiable themselves; from
// the inputs in their graph.
using Again = std::function<variable_list(const variable_list& grads, const std::vector<Tensor>& inputs, const std::vector<bool>& want)>;

// The gradients by `inputs` of which one is wanted, themselves differentiable, in the places of `want`.
inline variable_list differentiable_gradients(const variable_list& results, const variable_list& grads,
                                              const std::vector<Tensor>& inputs, const std::vector<bool>& want) {
  variable_list out(want.size()), by, from, given;
  for (size_t i = 0; i < want.size(); ++i) {
    if (want[i]) by.push_back(inputs[i]);
  }
  for (size_t i = 0; i < results.size(); ++i) {
    if (!grads[i].defined() || !results[i].requires_grad()) continue;
    from.push_back(results[i]);
    given.push_back(grads[i]);
  }
  if (from.empty() || by.empty()) return out;
  const auto made = gradients(from, by, given);
  for (size_t i = 0, at = 0; i < want.size(); ++i) {
    if (want[i]) out[i] = made[at++];
  }
  return out;
}

// Under torch.func.vjp a backward runs when the level that recorded it is gone: whether something requires grad, and
// gradients by it, are then to be asked of an alias, which is a tensor of the level that is there.
inline Tensor unpack(const SavedVariable& one) {
  const Tensor x = one.unpack();
  return x.defined() && at::GradMode::is_enabled() ? at::alias(x) : x;
}

// An `Again` from a function that makes the results again.
template <class Results> Again by_reference(Results results) {
  return [results](const variable_list& grads, const std::vector<Tensor>& inputs, const std::vector<bool>& want) {
    return differentiable_gradients(results(inputs), grads, inputs, want);
  };
}

inline bool any_requires_grad(at::ArrayRef<Tensor> tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const Tensor& x) { return x.defined() && x.requires_grad(); });
}

// torch's older vmap, which is_grads_batched and vectorize ask for, has no rule for an op that takes or gives lists.
inline void refuse_batched(const variable_list& grads, const char* op) {
  for (const Tensor& grad : grads) {
    TORCH_CHECK_NOT_IMPLEMENTED(!grad.defined() || !is_legacy_batched(grad), op,
                                " takes no batched gradients (is_grads_batched=True, vectorize=True): use torch.func.jacrev");
  }
}

struct OpBackward : Node {
  std::string op;
  std::vector<SavedVariable> saved;
  std::vector<SavedVariable> inputs;  // for a second derivative alone: no other backward reads them
  Pull pull;
  Again again;
  size_t count = 0;  // of the inputs that may have a gradient

  std::string name() const override { return "bomkern::" + op + "_backward"; }

  void release_variables() override {
    for (auto& one : saved) one.reset_data();
    for (auto& one : inputs) one.reset_data();
  }

 protected:
  variable_list apply(variable_list&& grads) override {
    bool any = false;
    for (const Tensor& grad : grads) any |= grad.defined();
    if (!any) return variable_list(count);
    std::vector<bool> want(count);
    for (size_t i = 0; i < count; ++i) want[i] = task_should_compute_output(i);
    if (at::GradMode::is_enabled()) {
      const auto given = unpacked(inputs);
      if (any_requires_grad(grads) || any_requires_grad(given)) return again(grads, given, want);
    }
    const auto kept = unpacked(saved);
    const at::AutoDispatchBelowADInplaceOrView below;
    return pull(grads, kept, want);
  }

 private:
  static std::vector<Tensor> unpacked(const std::vector<SavedVariable>& all) {
    std::vector<Tensor> out;
    out.reserve(all.size());
    for (const auto& one : all) out.push_back(unpack(one));
    return out;
  }
};

// What an op's Autograd kernel does: `run` calls the op below autograd, with whether there will be a gradient; `results`
// are those of its outputs that have one; `keep` are the tensors that `pull` needs.
class Differentiable {
 public:
  Differentiable(const char* op, at::TensorList inputs) {
    bool wanted = false;
    for (const Tensor& x : inputs) {
      wanted |= x.requires_grad();
      TORCH_CHECK_NOT_IMPLEMENTED(!has_tangent(x), op, " has no forward-mode derivative: use backward()");
    }
    if (!wanted || !at::GradMode::is_enabled()) return;
    node_ = make_node<OpBackward>();
    node_->op = op;
    node_->count = inputs.size();
    node_->set_next_edges(collect_next_edges(inputs));
  }

  bool wanted() const { return static_cast<bool>(node_); }

  template <class Run> auto run(const Run& run) const {
    const at::AutoDispatchBelowADInplaceOrView below;
    return run();
  }

  // Call once, after run(). An output among `keep` is kept detached: its history would hold the node that holds it. `given`:
  // what `again` needs, the inputs first.
  void finish(const std::vector<Tensor>& results, at::TensorList keep, Pull pull, at::TensorList given, Again again) const {
    if (!node_) return;
    for (const Tensor& x : keep) node_->saved.emplace_back(x, false);
    for (const Tensor& x : given) node_->inputs.emplace_back(x, false);
    node_->pull = std::move(pull);
    node_->again = std::move(again);
    set_history(results, node_);
  }

 private:
  decltype(make_node<OpBackward>()) node_;
};

inline std::optional<Tensor> maybe(const Tensor& x) { return x.defined() ? std::optional(x) : std::nullopt; }

// An op's gradients as `Pull` returns them.
template <class... T> variable_list wanted(const std::tuple<T...>& made, const std::vector<bool>& want) {
  variable_list out = std::apply([](const auto&... x) { return variable_list{x...}; }, made);
  for (size_t i = 0; i < out.size(); ++i) {
    if (!want[i]) out[i] = Tensor();
  }
  return out;
}

}  // namespace bomkern
