// Types of tensors and new tensors, for every op.
#pragma once
#include "../kernels/common/dtype.h"

#include <torch_headers.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace bomkern {

inline DType dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kHalf: return DType::f16;
    case at::kBFloat16: return DType::bf16;
    case at::kFloat: return DType::f32;
    default: return DType::f64;
  }
}

constexpr at::ScalarType types[] = {at::kHalf, at::kBFloat16, at::kFloat, at::kDouble};  // by DType

inline bool is_float(at::ScalarType type) {
  return type == at::kFloat || type == at::kHalf || type == at::kBFloat16 || type == at::kDouble;
}

// The first write to new memory costs a page fault for each 4 KB, several times the cost of computing a large result. With
// pages of 2 MB, which Linux mostly gives only on request, the faults cost little.
inline void ask_for_huge_pages(const Tensor& x) {
#if defined(__linux__)
  constexpr size_t least = 4 << 20, page = 4096;
  if (x.nbytes() < least) return;
  const auto begin = (reinterpret_cast<uintptr_t>(x.mutable_data_ptr()) + page - 1) / page * page;
  // NOLINTNEXTLINE(performance-no-int-to-ptr): the address of the next page has to be computed
  madvise(reinterpret_cast<void*>(begin), x.nbytes() - page, MADV_HUGEPAGE);  // only advice
#endif
}

// Calls the CPU's allocator directly: a small call makes a dozen tensors, and dispatch is most of the cost of each.
template <bool Cuda> Tensor fresh(at::IntArrayRef size, const at::TensorOptions& options) {
  if constexpr (Cuda) {
    return at::empty(size, options);
  } else {
    Tensor x = cpu_empty(size, options);
    ask_for_huge_pages(x);
    return x;
  }
}

// Returns a contiguous gradient of x, or a tensor without elements where none is wanted.
template <bool Cuda> Tensor fresh_like(const Tensor& x, bool want) {
  return want ? fresh<Cuda>(x.sizes(), x.options()) : fresh<Cuda>({0}, x.options());
}
inline void* data_of(const Tensor& x, bool want) { return want ? x.mutable_data_ptr() : nullptr; }

// Calls f with a zero of the type of the arithmetic.
template <class F> void with_number(bool wide, const F& f) {
  if (wide) {
    f(0.0);
  } else {
    f(0.0f);
  }
}

}  // namespace bomkern
