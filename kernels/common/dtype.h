// Float types of inputs, in the order of FLOATS in bomkern/common/checks.py. No torch here.
#pragma once
#include <stdint.h>

namespace bomkern {

enum class DType : uint8_t { f16, bf16, f32, f64 };

// A [rows, columns] input as it lies: any strides (in elements), any float type.
struct Matrix {
  const void* data;
  int64_t stride[2];
  DType dtype;
};

// A gradient by sample as it lies; null where there is none, which counts as 0. stride 0: an expanded scalar.
template <class S> struct RowGrad {
  const S* data;
  int64_t stride;
};

}  // namespace bomkern
