// Float types of inputs, in the order of FLOATS in bomkern/common/checks.py. No torch here.
#pragma once
#include <stdint.h>

namespace bomkern {

enum class DType : uint8_t { f16, bf16, f32, f64 };

// A [rows, columns] input of any strides (in elements) and any float type.
struct Matrix {
  const void* data;
  int64_t stride[2];
  DType dtype;
};

// A gradient for each sample; null counts as 0. A stride of 0 means an expanded scalar.
template <class S> struct RowGrad {
  const S* data;
  int64_t stride;
};

}  // namespace bomkern
