// What every op's bridge needs: tensors' types and fresh tensors.
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

// A large result is memory that the system has just handed out: touching it first costs a page fault each 4 KB, several
// times what computing it does. As 2 MB pages, which Linux mostly gives only to those who ask, it costs little.
inline void ask_for_huge_pages(const Tensor& x) {
#if defined(__linux__)
  constexpr size_t least = 4 << 20, page = 4096;
  if (x.nbytes() < least) return;
  const auto begin = (reinterpret_cast<uintptr_t>(x.mutable_data_ptr()) + page - 1) / page * page;
  // NOLINTNEXTLINE(performance-no-int-to-ptr): the next page's address can only be computed
  madvise(reinterpret_cast<void*>(begin), x.nbytes() - page, MADV_HUGEPAGE);  // advice: where refused, nothing is lost
#endif
}

// Straight to the CPU's allocator: a small call makes a dozen tensors, and dispatch is most of what each costs.
template <bool Cuda> Tensor fresh(at::IntArrayRef size, const at::TensorOptions& options) {
  if constexpr (Cuda) {
    return at::empty(size, options);
  } else {
    Tensor x = cpu_empty(size, options);
    ask_for_huge_pages(x);
    return x;
  }
}

// A gradient of x, contiguous, or no elements where it is not wanted.
template <bool Cuda> Tensor fresh_like(const Tensor& x, bool want) {
  return want ? fresh<Cuda>(x.sizes(), x.options()) : fresh<Cuda>({0}, x.options());
}
inline void* data_of(const Tensor& x, bool want) { return want ? x.mutable_data_ptr() : nullptr; }

// f with a number of the type that the arithmetic is done in.
template <class F> void with_number(bool wide, const F& f) {
  if (wide) {
    f(0.0);
  } else {
    f(0.0f);
  }
}

}  // namespace bomkern
