// Every private C++ name of torch that bomkern uses. For a new torch read this file, and bomkern/common/torch_internals/
// for Python.
//
// A name is private if it lies in torch/csrc, in a namespace impl, detail, native or functorch, behind the dispatcher
// (at::cpu, at::cuda, c10::Dispatcher), or is one of its keys. No other file of csrc/ may use one;
// tests/dispatch/test_torch_internals.py checks that. The compiler reports here a name that a torch lacks.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/empty_cpu_dispatch.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#ifdef BOMKERN_CUDA
#include <ATen/ops/mm_cuda_dispatch.h>
#endif

#include <memory>
#include <string>
#include <type_traits>
#include <utility>

#ifdef __linux__
extern "C" __attribute__((weak)) int MKL_Set_Num_Threads_Local(int);  // torch's own; null where it has another library
#else
constexpr int (*MKL_Set_Num_Threads_Local)(int) = nullptr;
#endif

namespace bomkern {

using at::Tensor;

// Autograd. The public torch::autograd::Function costs several times as much on small tensors, and takes no lists of
// tensors.
using torch::autograd::collect_next_edges;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::set_history;
using torch::autograd::variable_list;

// torch 2.11 counts references to nodes with std::shared_ptr, later releases intrusively.
using NodePtr = std::decay_t<decltype(std::declval<Tensor>().grad_fn())>;

template <class T, class... Args> auto make_node(Args&&... args) {
  if constexpr (std::is_same_v<NodePtr, std::shared_ptr<Node>>) {
    return std::make_shared<T>(std::forward<Args>(args)...);
  } else {
    return c10::make_intrusive<T>(std::forward<Args>(args)...);
  }
}

// Returns differentiable gradients of `results` by `inputs`, undefined where there is none.
inline variable_list gradients(const variable_list& results, const variable_list& inputs, const variable_list& grads) {
  return torch::autograd::grad(results, inputs, grads, /*retain_graph=*/true, /*create_graph=*/true, /*allow_unused=*/true);
}

// Whether x has a tangent of forward mode.
inline bool has_tangent(const Tensor& x) { return torch::autograd::isFwGradDefined(x); }

// The Autograd kernel of an op without a derivative.
inline torch::CppFunction no_derivative() { return torch::autograd::autogradNotImplementedFallback(); }

// The dispatcher. torch's tutorials look up their own ops in the same way.
template <class Function> auto operator_named(const char* name, const char* overload) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Function>();
}

// Whether x is a Python tensor, such as a fake tensor, which may have no values.
inline bool is_python(const Tensor& x) { return x.key_set().has(c10::DispatchKey::Python); }

// Whether x is a batch of torch's older vmap, which is_grads_batched=True and vectorize=True use.
inline bool is_legacy_batched(const Tensor& x) { return x.key_set().has(c10::DispatchKey::Batched); }

// Whether x's memory holds its values: x is neither a Python tensor nor wrapped by a transform.
inline bool has_plain_values(const Tensor& x) {
  constexpr c10::DispatchKeySet without{c10::DispatchKey::Python, c10::DispatchKey::Functionalize,
                                        c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::FuncTorchBatched};
  return !x.key_set().has_any(without);
}

// Kernels of torch without the dispatcher, which takes most of a small call's time and may apply autocast. The public names
// are at::empty, at::mm_out and at::addmm_out.
inline Tensor cpu_empty(at::IntArrayRef size, const at::TensorOptions& options) { return at::cpu::empty(size, options); }
inline void cpu_mm_out(Tensor& out, const Tensor& a, const Tensor& b) { at::cpu::mm_out(out, a, b); }
inline void cpu_addmm_out(Tensor& out, const Tensor& a, const Tensor& b) { at::cpu::addmm_out(out, out, a, b); }
#ifdef BOMKERN_CUDA
inline void cuda_mm_out(Tensor& out, const Tensor& a, const Tensor& b) { at::cuda::mm_out(out, a, b); }
#endif

// Sets the number of threads for this thread's products in MKL, and returns the previous one. Does nothing and returns 0
// where torch uses another library.
inline int set_product_threads(int threads) { return MKL_Set_Num_Threads_Local ? MKL_Set_Num_Threads_Local(threads) : 0; }

// The current stream of a GPU, also in a build without CUDA's headers. The public at::accelerator::getCurrentStream assumes
// the process's accelerator, which may not be CUDA.
inline c10::Stream current_stream(c10::Device device) {
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device);
}

}  // namespace bomkern
