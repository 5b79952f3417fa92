// The checks of bomkern/common/checks.py for [B, D] inputs, for the implementations in C++.
#pragma once
#include "op.h"

#include <cmath>
#include <initializer_list>
#include <string>
#include <utility>

namespace bomkern {

struct Shape {
  int64_t batch, dims;
  bool wide;  // float64

  at::ScalarType type() const { return wide ? at::kDouble : at::kFloat; }
};

using Named = std::pair<std::string_view, const Tensor&>;

inline void check_matrix(std::string_view name, const Tensor& x, std::string_view first, const Tensor& model) {
  const auto type = x.scalar_type();
  TORCH_CHECK_TYPE(is_float(type), name, " must be float16, bfloat16, float32 or float64, got ", type);
  TORCH_CHECK_TYPE(x.layout() == at::kStrided, name, " must be a dense tensor, got layout ", x.layout());
  TORCH_CHECK_VALUE(x.device() == model.device(), name, " is on ", x.device(), ", ", first, " on ", model.device(),
                    ": move them to one device");
  TORCH_CHECK_VALUE(x.dim() == 2, name, " must have shape [B, D], got ", x.sizes());
  TORCH_CHECK_VALUE(x.sizes() == model.sizes(), name, " must have the shape of ", first, ", ", model.sizes(), ", got ",
                    x.sizes());
}

// Checks that all tensors are [B, D] with B >= `least` on one device, and returns their common shape.
inline Shape check_matrices(int64_t least, std::initializer_list<Named> given) {
  const auto& [first, model] = *given.begin();
  bool wide = false;
  for (const auto& [name, x] : given) {
    check_matrix(name, x, first, model);
    wide |= x.scalar_type() == at::kDouble;
  }
  const Shape shape{model.size(0), model.size(1), wide};
  TORCH_CHECK_VALUE(shape.batch > 0 && shape.dims > 0, first,
                    " must hold at least one sample of at least one dimension, got shape ", model.sizes());
  TORCH_CHECK_VALUE(shape.batch >= least, first, " must hold at least ", least, " samples, which a variance needs, got ",
                    shape.batch);
  return shape;
}

// Checks an argument that a backward op takes beside the inputs of forward.
inline void check_given(std::string_view name, const Tensor& x, at::IntArrayRef size, at::ScalarType type) {
  TORCH_CHECK_VALUE(x.sizes() == size, name, " must have shape ", size, ", got ", x.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == type, name, " must be ", type, ", got ", x.scalar_type());
}

// Checks a tensor that forward saved.
inline void check_kept(std::string_view name, const Tensor& x, at::IntArrayRef size, at::ScalarType type) {
  check_given(name, x, size, type);
  TORCH_CHECK_VALUE(x.is_contiguous(), name, " must be contiguous, as forward returned it");
}

inline void check_units(double threshold, double temperature) {
  TORCH_CHECK_VALUE(std::isfinite(threshold), "threshold must be finite, got ", threshold);
  TORCH_CHECK_VALUE(temperature > 0 && std::isfinite(temperature), "temperature must be positive and finite, got ",
                    temperature);
}

}  // namespace bomkern
