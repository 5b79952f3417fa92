// min_goal's backward pass on the GPU: v_b = grad_b / divisor * slope_b to each sample's bottleneck, zero to the rest.
//
// A block writes the columns and the matrix of its samples. Of goals without a batch dimension it leaves partial sums,
// which a second launch adds up in a fixed order; B alone says how many there are, so no device changes the bits.
#pragma once
#include "cuda_forward.h"

namespace bomkern {
namespace BOMKERN_ISA {

template <class S> struct BackwardLaunch {
  Backward<S> a;
  double* partials;                // [sums, blocks]; null where one block has all samples, or one sample all gradient
  bool adjacent;                   // winner, slope and grad can be read four at a time
  int sums;                        // goals without a batch dimension
  uint8_t batch_level[max_goals];  // their indices into a.out
};

// A block's shared memory: for a matrix its samples, for sums those of its warps. No launch has both.
template <class S> struct BackwardShared {
  S* value;         // [threads, rows]
  uint8_t* winner;  // [threads, rows]
  double* sum;      // [sums, warps]
  BOMKERN_HD explicit BackwardShared(unsigned char* bytes)
      : value(reinterpret_cast<S*>(bytes)),
        winner(reinterpret_cast<uint8_t*>(value + blockDim.x * rows)),
        sum(reinterpret_cast<double*>(bytes)) {}
  static size_t bytes(int threads, int sums, bool matrix) {
    return matrix ? threads * rows * (sizeof(S) + sizeof(uint8_t)) : sums * (threads / 32) * sizeof(double);
  }
};

constexpr int sum_threads = 256;

template <class To, class S> BOMKERN_HD To cast(S value, DType dtype) {
  if constexpr (sizeof(To) == 2) {
    return narrow(float(value), dtype == DType::bf16);
  } else {
    return To(value);
  }
}

template <class T> BOMKERN_HD void load_rows(const T* from, int64_t first, T (&v)[rows]) {
  const auto pack = *reinterpret_cast<const Pack<T>*>(from + first);
  for (int r = 0; r < rows; ++r) v[r] = pack.at[r];
}

// The gradient of the loss from above, where it is one for all samples.
template <class S> BOMKERN_HD S grad_of(const Backward<S>& a) { return a.grad[0] / a.divisor; }

// The gradients of this thread's samples and whose they are. Samples past the end are nobody's.
template <class S>
BOMKERN_HD void share_out(const BackwardLaunch<S>& l, const Place& p, S (&value)[rows], uint8_t (&winner)[rows]) {
  const Backward<S>& a = l.a;
  constexpr uint8_t nobody = 255;
  if (a.worst) {
    const int64_t entry = *a.worst, sample = entry / a.goals;
    const S v = grad_of(a) * a.slope[0];
    for (int r = 0; r < rows; ++r) {
      value[r] = v;
      winner[r] = p.row(r) == sample ? uint8_t(entry - sample * a.goals) : nobody;
    }
    return;
  }
  S slope[rows], grad[rows];
  if (l.adjacent && p.inside(rows - 1)) {
    load_rows(a.winner, p.first, winner);
    load_rows(a.slope, p.first, slope);
    if (a.grad_stride) {
      load_rows(a.grad, p.first, grad);
    } else {
      grad[0] = grad[1] = grad[2] = grad[3] = grad_of(a);
    }
  } else {
    const S one = a.grad_stride ? S(0) : grad_of(a);
    for (int r = 0; r < rows; ++r) {
      const int64_t b = p.row(r);
      const bool inside = p.inside(r);
      winner[r] = inside ? a.winner[b] : nobody;
      slope[r] = inside ? a.slope[b] : S(0);
      grad[r] = inside && a.grad_stride ? a.grad[b * a.grad_stride] : one;
    }
  }
  for (int r = 0; r < rows; ++r) value[r] = grad[r] * slope[r];
}

template <class To, class S>
BOMKERN_HD void write_column(const min_goal::Gradient& g, const Place& p, const S (&value)[rows],
                             const uint8_t (&winner)[rows]) {
  To out[rows];
  for (int r = 0; r < rows; ++r) out[r] = winner[r] == g.goal ? cast<To>(value[r], g.dtype) : To(0);
  const bool aligned = reinterpret_cast<uintptr_t>(g.data) % alignof(Pack<To>) == 0;
  store(static_cast<To*>(g.data), out, p, aligned && p.inside(rows - 1));
}

// The block's rows of a [B, K] matrix, 16 bytes a thread and all of them in order.
template <class To, class S>
BOMKERN_HD void write_matrix(const min_goal::Gradient& g, const BackwardShared<S>& s, int64_t begin, int n, int count) {
  constexpr int width = 16 / sizeof(To);
  struct alignas(16) Chunk {
    To at[width];
  };
  To* const out = static_cast<To*>(g.data) + begin * count;
  const bool aligned = reinterpret_cast<uintptr_t>(out) % 16 == 0;
  const unsigned elements = unsigned(n) * count;
  for (unsigned e = threadIdx.x * width; e < elements; e += blockDim.x * width) {
    unsigned row = e / count;
    int goal = int(e - row * count);
    Chunk chunk;
#pragma unroll
    for (int i = 0; i < width; ++i) {
      const bool own = e + i < elements && s.winner[row] == goal;
      chunk.at[i] = own ? cast<To>(s.value[row], g.dtype) : To(0);
      if (++goal == count) goal = 0, ++row;
    }
    if (aligned && e + width <= elements) {
      *reinterpret_cast<Chunk*>(out + e) = chunk;
    } else {
#pragma unroll
      for (int i = 0; i < width; ++i) {
        if (e + i < elements) out[e + i] = chunk.at[i];
      }
    }
  }
}

// Calls write(To()) with the storage type of a dtype.
template <class Write> BOMKERN_HD void with_storage(DType dtype, Write write) {
  switch (dtype) {
    case DType::f32: write(float()); break;
    case DType::f64: write(double()); break;
    default: write(uint16_t());
  }
}

template <class S> BOMKERN_HD void write_sum(const min_goal::Gradient& g, double sum) {
  with_storage(g.dtype, [&](auto to) { *static_cast<decltype(to)*>(g.data) = cast<decltype(to)>(S(sum), g.dtype); });
}

// The goals without a batch dimension: what this block's samples add to each, in double.
template <class S>
BOMKERN_HD void sum_samples(const BackwardLaunch<S>& l, double* shared, const S (&value)[rows],
                            const uint8_t (&winner)[rows]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int i = 0; i < l.sums; ++i) {
    const int goal = l.a.out[l.batch_level[i]].goal;
    double v[rows];
    for (int r = 0; r < rows; ++r) v[r] = winner[r] == goal ? value[r] : S(0);
    const double sum = warp_sum((v[0] + v[1]) + (v[2] + v[3]));
    if (lane == 0) shared[i * warps + warp] = sum;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < l.sums; i += blockDim.x) {
    double sum = 0;
    for (int w = 0; w < warps; ++w) sum += shared[i * warps + w];
    if (l.partials) {
      l.partials[int64_t(i) * gridDim.x + blockIdx.x] = sum;
    } else {
      write_sum<S>(l.a.out[l.batch_level[i]], sum);
    }
  }
}

// The same where one sample is the loss.
template <class S> BOMKERN_HD void sum_one_sample(const BackwardLaunch<S>& l) {
  const int goal = int(*l.a.worst % l.a.goals);
  const S value = grad_of(l.a) * l.a.slope[0];
  for (int i = threadIdx.x; i < l.sums; i += blockDim.x) {
    const min_goal::Gradient& g = l.a.out[l.batch_level[i]];
    write_sum<S>(g, g.goal == goal ? value : S(0));
  }
}

template <class S>
__global__ void __launch_bounds__(max_threads) backward_kernel(const __grid_constant__ BackwardLaunch<S> l) {
  const Backward<S>& a = l.a;
  BOMKERN_SHARED_BYTES(bytes);
  const BackwardShared<S> s(bytes);
  const int64_t begin = int64_t(blockIdx.x) * blockDim.x * rows;
  const Place p{begin + threadIdx.x * rows, a.batch, 1};
  S value[rows];
  uint8_t winner[rows];
  share_out(l, p, value, winner);
  for (int o = 0; o < a.outputs; ++o) {
    const min_goal::Gradient& g = a.out[o];
    if (g.batch_level) continue;
    if (g.goal >= 0) {
      with_storage(g.dtype, [&](auto to) { write_column<decltype(to)>(g, p, value, winner); });
      continue;
    }
    for (int r = 0; r < rows; ++r) {
      s.value[threadIdx.x * rows + r] = value[r];
      s.winner[threadIdx.x * rows + r] = winner[r];
    }
    __syncthreads();
    const int n = int(min(int64_t(blockDim.x) * rows, a.batch - begin));
    with_storage(g.dtype, [&](auto to) { write_matrix<decltype(to)>(g, s, begin, n, a.goals); });
    __syncthreads();  // the next matrix writes the same rows, but into memory still being read
  }
  if (l.sums == 0) return;
  if (a.worst == nullptr) {
    sum_samples(l, s.sum, value, winner);
  } else if (blockIdx.x == 0) {
    sum_one_sample(l);
  }
}

// A block to each goal without a batch dimension, after a grid whose partial sums lie in the workspace.
template <class S>
__global__ void __launch_bounds__(sum_threads) sum_kernel(const __grid_constant__ BackwardLaunch<S> l, int64_t blocks) {
  BOMKERN_SHARED_BYTES(bytes);
  double* const shared = reinterpret_cast<double*>(bytes);  // [warps]
  const double* const partials = l.partials + blockIdx.x * blocks;
  double sum = 0;
#pragma unroll 4
  for (int64_t b = threadIdx.x; b < blocks; b += sum_threads) sum += partials[b];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int w = 1; w < sum_threads / 32; ++w) sum += shared[w];
  write_sum<S>(l.a.out[l.batch_level[blockIdx.x]], sum);
}

}  // namespace BOMKERN_ISA
}  // namespace bomkern
