// Parallel loops of the CPU kernels. No torch here.
#pragma once
#include <stdint.h>

namespace bomkern {

// Calls run(state, 0) to run(state, tasks - 1), in any order, on any number of threads. The tasks depend on the shape alone,
// so the bits do not depend on the number of threads.
typedef void (*Parallel)(int64_t tasks, void (*run)(void* state, int64_t task), void* state);

// An op's CPU kernels for one instruction set: Forward<S> and Backward<S> are its arguments, S float or double.
template <template <class> class Forward, template <class> class Backward> struct CpuOp {
  const char* name;
  void (*forward_f32)(const Forward<float>&, void* workspace, Parallel);
  void (*forward_f64)(const Forward<double>&, void* workspace, Parallel);
  void (*backward_f32)(const Backward<float>&, void* workspace, Parallel);
  void (*backward_f64)(const Backward<double>&, void* workspace, Parallel);
  // Bytes at `workspace`, aligned to 64, for these arguments.
  int64_t (*forward_bytes_f32)(const Forward<float>&);
  int64_t (*forward_bytes_f64)(const Forward<double>&);
  int64_t (*backward_bytes_f32)(const Backward<float>&);
  int64_t (*backward_bytes_f64)(const Backward<double>&);

  void run(const Forward<float>& a, void* workspace, Parallel p) const { forward_f32(a, workspace, p); }
  void run(const Forward<double>& a, void* workspace, Parallel p) const { forward_f64(a, workspace, p); }
  void run(const Backward<float>& a, void* workspace, Parallel p) const { backward_f32(a, workspace, p); }
  void run(const Backward<double>& a, void* workspace, Parallel p) const { backward_f64(a, workspace, p); }
  int64_t bytes(const Forward<float>& a) const { return forward_bytes_f32(a); }
  int64_t bytes(const Forward<double>& a) const { return forward_bytes_f64(a); }
  int64_t bytes(const Backward<float>& a) const { return backward_bytes_f32(a); }
  int64_t bytes(const Backward<double>& a) const { return backward_bytes_f64(a); }
};

}  // namespace bomkern
