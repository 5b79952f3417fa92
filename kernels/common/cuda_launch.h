// Launches of the streaming kernels: the width of pieces, the number of blocks, cooperative or not. Host code.
#pragma once
#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

#include <atomic>
#include <initializer_list>

#include "dtype.h"

namespace bomkern {
namespace cuda {

constexpr int64_t most_batch = int64_t(1) << 31;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The smallest power of 2 that is at least n, at most `most`.
inline int power_of_2(int64_t n, int most) {
  int p = 1;
  while (p < most && p < n) p *= 2;
  return p;
}

// The logarithm of a power of 2.
inline int log2_of(int power) {
  int n = 0;
  while (power >> n > 1) ++n;
  return n;
}

inline int size_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

// A contiguous [B, D] result, or one that is not wanted where data is null.
inline Matrix contiguous(void* data, DType dtype, int64_t dims) { return {data, {dims, 1}, dtype}; }
template <class S> constexpr DType dtype_of_number = sizeof(S) == 4 ? DType::f32 : DType::f64;

// Elements of a piece (cuda_pieces.h) that all these matrices can be read and written by; each row is `run` elements one
// after another, or several such runs. What is null is left out.
template <class S> int width_of(int64_t batch, int64_t run, const Matrix* matrices, size_t count) {
  int widest = 2;
  for (size_t i = 0; i < count; ++i) {
    const Matrix& m = matrices[i];
    if (m.data && size_of(m.dtype) > widest) widest = size_of(m.dtype);
  }
  const int width = sizeof(S) == 8 ? 2 : 16 / widest;
  if (run % width) return 1;
  for (size_t i = 0; i < count; ++i) {
    const Matrix& m = matrices[i];
    if (m.data == nullptr) continue;
    const int64_t bytes = width * size_of(m.dtype), pitch = batch > 1 ? m.stride[0] * size_of(m.dtype) : 0;
    if (m.stride[1] != 1 || pitch % bytes || reinterpret_cast<uintptr_t>(m.data) % bytes) return 1;
  }
  return width;
}
template <class S> int width_of(int64_t batch, int64_t run, std::initializer_list<Matrix> matrices) {
  return width_of<S>(batch, run, matrices.begin(), matrices.size());
}

// Calls run(W) with the width as a constant. Without Halves the width is never 8, because some matrix is wider.
template <int W> struct Width {
  static constexpr int value = W;
};
template <class S, bool Halves = true, class Run> cudaError_t with_width(int width, Run run) {
  if (width == 1) return run(Width<1>());
  if constexpr (sizeof(S) == 8) {
    return run(Width<2>());
  } else {
    if constexpr (Halves) {
      if (width == 8) return run(Width<8>());
    }
    return run(Width<4>());
  }
}

inline int multiprocessors() {
  int id = 0, count = 0;
  if (cudaGetDevice(&id) != cudaSuccess) return 1;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, id) != cudaSuccess) return 1;
  return count > 1 ? count : 1;
}

// Returns how many blocks of a kernel the device can hold at once, the limit of a grid-wide barrier. `known` caches it for
// each kernel on the first devices, because the query takes longer than a launch.
template <class... Parameters>
int64_t resident_blocks(void (*kernel)(Parameters...), int threads, size_t shared, std::atomic<int> (&known)[16]) {
  int id = 0, each = 0;
  if (cudaGetDevice(&id) != cudaSuccess) return 1;
  int blocks = id < 16 ? known[id].load(std::memory_order_relaxed) : 0;
  if (blocks == 0) {
    if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared) != cudaSuccess) return 1;
    blocks = each > 0 ? each * multiprocessors() : 1;
    if (id < 16) known[id].store(blocks, std::memory_order_relaxed);
  }
  return blocks;
}

template <class... Parameters, class... Arguments>
cudaError_t start(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared, bool cooperative,
                  cudaStream_t stream, const Arguments&... arguments) {
  if (blocks < 1 || blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cooperative ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...), last = cudaGetLastError();
  return error != cudaSuccess ? error : last;
}

// Allocates pieces of the workspace; with a null base it only counts their bytes.
class Memory {
 public:
  explicit Memory(void* base) : base_(static_cast<unsigned char*>(base)) {}
  template <class T> T* take(int64_t count) {
    T* const piece = base_ ? reinterpret_cast<T*>(base_ + bytes_) : nullptr;
    bytes_ += (size_t(count) * sizeof(T) + 15) / 16 * 16;
    return piece;
  }
  size_t bytes() const { return bytes_; }

 private:
  unsigned char* base_;
  size_t bytes_ = 0;
};

}  // namespace cuda
}  // namespace bomkern
