// The autograd node of the ops, except for min_goal, which has its own: saved tensors, and functions for the gradients.
#pragma once
#include "op.h"

#include <algorithm>
#include <functional>
#include <string>
#include <vector>

namespace bomkern {

// Returns the gradients of the inputs, undefined where not wanted, from the gradients of the results (undefined where there
// is none), the saved tensors, and which inputs want a gradient.
using Pull = std::function<variable_list(const variable_list& grads, const std::vector<Tensor>& kept, const std::vector<bool>& want)>;

// Returns the same gradients in a differentiable form, by the reference (bomkern/dispatch/double_backward.py), from the
// inputs in their graph.
using Again = std::function<variable_list(const variable_list& grads, const std::vector<Tensor>& inputs, const std::vector<bool>& want)>;

// Returns differentiable gradients of the inputs that want one, in the positions of `want`; the others are undefined.
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

// Under torch.func.vjp a backward runs after the level that recorded it has ended. An alias is a tensor of the current level,
// so requires_grad() and gradients are right for it.
inline Tensor unpack(const SavedVariable& one) {
  const Tensor x = one.unpack();
  return x.defined() && at::GradMode::is_enabled() ? at::alias(x) : x;
}

// Returns an `Again` from a function that computes the results again.
template <class Results> Again by_reference(Results results) {
  return [results](const variable_list& grads, const std::vector<Tensor>& inputs, const std::vector<bool>& want) {
    return differentiable_gradients(results(inputs), grads, inputs, want);
  };
}

inline bool any_requires_grad(at::ArrayRef<Tensor> tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const Tensor& x) { return x.defined() && x.requires_grad(); });
}

// torch's older vmap, which is_grads_batched and vectorize use, has no rule for an op that takes or returns lists.
inline void refuse_batched(const variable_list& grads, const char* op) {
  for (const Tensor& grad : grads) {
    TORCH_CHECK_NOT_IMPLEMENTED(!grad.defined() || !is_legacy_batched(grad), op,
                                " takes no batched gradients (is_grads_batched=True, vectorize=True): use torch.func.jacrev");
  }
}

struct OpBackward : Node {
  std::string op;
  std::vector<SavedVariable> saved;
  std::vector<SavedVariable> inputs;  // for a second derivative alone
  Pull pull;
  Again again;
  size_t count = 0;  // inputs that may have a gradient

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

// An op's Autograd kernel: construct it from the differentiable inputs, call run(), then finish().
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

  // Records the node; call it once. `results` are the differentiable outputs, `keep` the tensors that `pull` needs, `given`
  // those that `again` needs, the inputs first. A result in `keep` must be detached: its history would hold this node.
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

// Returns an op's gradients in the form of `Pull`.
template <class... T> variable_list wanted(const std::tuple<T...>& made, const std::vector<bool>& want) {
  variable_list out = std::apply([](const auto&... x) { return variable_list{x...}; }, made);
  for (size_t i = 0; i < out.size(); ++i) {
    if (!want[i]) out[i] = Tensor();
  }
  return out;
}

}  // namespace bomkern
