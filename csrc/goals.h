// Checks the goals that PyTorch passes, and describes them for the kernels.
#pragma once
#include "../kernels/min_goal/min_goal.h"
#include "op.h"

namespace bomkern {

using at::TensorList;
using min_goal::Goals;
using min_goal::max_goals;

struct Problem {
  int64_t batch;
  int64_t count;
  bool matrix;  // one [B, K] tensor, not K tensors
  bool wide;    // float64
};

// Makes the same checks as bomkern/common/checks.py for the implementations in Python.
inline Problem check_goals(TensorList goals) {
  TORCH_CHECK_VALUE(!goals.empty(), "goals must name 1 to 64 goals, got an empty sequence");
  Problem p{1, static_cast<int64_t>(goals.size()), goals.size() == 1 && goals[0].dim() == 2, false};
  int64_t first = -1;
  for (int64_t k = 0; k < static_cast<int64_t>(goals.size()); ++k) {
    const Tensor& goal = goals[k];
    const auto type = goal.scalar_type();
    TORCH_CHECK_TYPE(
        is_float(type), "goals[", k, "] must be float16, bfloat16, float32 or float64, got ", type);
    TORCH_CHECK_TYPE(goal.layout() == at::kStrided, "goals[", k, "] must be a dense tensor, got layout ", goal.layout());
    TORCH_CHECK_VALUE(goal.device() == goals[0].device(), "goals[", k, "] is on ", goal.device(), ", goals[0] on ",
                      goals[0].device(), ": move them to one device");
    p.wide |= type == at::kDouble;
    if (p.matrix) {
      p.batch = goal.size(0);
      p.count = goal.size(1);
      continue;
    }
    TORCH_CHECK_VALUE(goal.dim() <= 1, "goals[", k, "] must have shape [B] or [], got ", goal.sizes());
    if (goal.dim() == 0) continue;
    if (first < 0) {
      first = k;
      p.batch = goal.size(0);
    }
    TORCH_CHECK_VALUE(goal.size(0) == p.batch, "goals[", k, "] has ", goal.size(0), " samples, goals[", first, "] has ",
                      p.batch, ": they must be the same");
  }
  TORCH_CHECK_VALUE(p.count >= 1 && p.count <= max_goals, "goals must name 1 to ", max_goals, " goals, got ", p.count);
  TORCH_CHECK_VALUE(p.batch > 0, "goals must hold at least one sample, got B = 0");
  return p;
}

inline Goals describe(TensorList goals, const Problem& p, at::IntArrayRef curves) {
  Goals g;
  g.count = static_cast<int>(p.count);
  g.batch = p.batch;
  for (int k = 0; k < g.count; ++k) {
    const Tensor& goal = goals[p.matrix ? 0 : k];
    const int64_t offset = p.matrix ? k * goal.stride(1) * static_cast<int64_t>(goal.element_size()) : 0;
    g.data[k] = static_cast<const char*>(goal.const_data_ptr()) + offset;
    g.stride[k] = goal.dim() == 0 ? 0 : goal.stride(0);
    g.dtype[k] = dtype_of(goal.scalar_type());
    g.curve[k] = curves.empty() ? 0 : static_cast<uint8_t>(curves[k]);
  }
  return g;
}

// Checks the wanted gradients of a backward op: for each the index of its goal, the dim of its tensor, and its DType.
inline void check_gradients(int64_t count, at::IntArrayRef index, at::IntArrayRef dim, at::IntArrayRef dtype) {
  TORCH_CHECK_VALUE(index.size() <= max_goals && index.size() == dim.size() && index.size() == dtype.size(),
                    "index, dim and dtype must have one entry for each gradient");
  for (size_t i = 0; i < index.size(); ++i) {
    TORCH_CHECK_VALUE(index[i] >= 0 && index[i] < count, "index must be below ", count, ", got ", index[i]);
    TORCH_CHECK_VALUE(dim[i] >= 0 && dim[i] <= 2, "dim must be 0 to 2, got ", dim[i]);
    TORCH_CHECK_VALUE(dim[i] < 2 || dim.size() == 1, "dim must be 2 for one gradient alone, got ", dim);
    TORCH_CHECK_VALUE(dtype[i] >= 0 && dtype[i] < 4, "dtype must be 0 to 3, got ", dtype[i]);
  }
}

inline void check_params(const std::optional<Tensor>& params, at::IntArrayRef curves, const Problem& p, at::Device device) {
  TORCH_CHECK_VALUE(params || curves.empty(), "curves must be empty where params is None, got ", curves);
  if (!params) return;
  TORCH_CHECK_VALUE(static_cast<int64_t>(curves.size()) == p.count, "constraints must be one, or one for each of the ",
                    p.count, " goals, got ", curves.size());
  for (const int64_t curve : curves) TORCH_CHECK_VALUE(curve >= 0 && curve <= 2, "curves must be 0, 1 or 2, got ", curve);
  TORCH_CHECK_VALUE(params->dim() == 2 && params->size(0) == p.count && params->size(1) == 4,
                    "params must have shape [", p.count, ", 4], got ", params->sizes());
  const auto dtype = p.wide ? at::kDouble : at::kFloat;
  TORCH_CHECK_TYPE(params->scalar_type() == dtype, "params must be ", dtype, " for these goals, got ", params->scalar_type());
  TORCH_CHECK_VALUE(params->device() == device, "params is on ", params->device(), ", the goals on ", device, ": move it");
}

}  // namespace bomkern
