// min_goal's backward pass on the GPU: v_b = grad_b / divisor * slope_b to each sample's bottleneck, zero to the rest.
//
// Blocks [0, tiles) write the columns and the matrix of their samples; each block after them sums one batch-level goal.
#pragma once
#include "cuda_forward.h"

namespace bomkern {
namespace BOMKERN_ISA {

template <class S> struct BackwardLaunch {
  Backward<S> a;
  int64_t tiles;
  bool adjacent;                   // winner, slope and grad can be read four at a time
  uint8_t batch_level[max_goals];  // indices into a.out
};

template <class S> struct BackwardShared {
  S value[max_threads * rows];
  uint8_t winner[max_threads * rows];
  double sum[max_threads / 32];
};

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

// The gradients of this thread's samples and whose they are. Samples past the end are nobody's.
template <class S>
BOMKERN_HD void share_out(const BackwardLaunch<S>& l, const Place& p, S (&value)[rows], uint8_t (&winner)[rows]) {
  const Backward<S>& a = l.a;
  constexpr uint8_t nobody = 255;
  if (a.worst) {
    const int64_t entry = *a.worst, sample = entry / a.goals;
    const S v = a.grad[0] / a.divisor * a.slope[0];
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
      for (int r = 0; r < rows; ++r) grad[r] = a.grad[0];
    }
  } else {
    for (int r = 0; r < rows; ++r) {
      const int64_t b = p.row(r);
      const bool inside = p.inside(r);
      winner[r] = inside ? a.winner[b] : nobody;
      slope[r] = inside ? a.slope[b] : S(0);
      grad[r] = inside ? a.grad[b * a.grad_stride] : S(0);
    }
  }
  for (int r = 0; r < rows; ++r) value[r] = grad[r] / a.divisor * slope[r];
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

// One goal without a batch dimension: its samples' gradients are added up by this block alone.
template <class S>
BOMKERN_HD void sum_batch(const BackwardLaunch<S>& l, const min_goal::Gradient& g, BackwardShared<S>& s) {
  Sum<S> sum;
  Place p{threadIdx.x * int64_t(rows), l.a.batch, 1};
#pragma unroll 2
  for (; p.first < p.batch; p.first += blockDim.x * rows) {
    S value[rows];
    uint8_t winner[rows];
    share_out(l, p, value, winner);
    for (int r = 0; r < rows; ++r) sum.add(winner[r] == g.goal ? value[r] : S(0));
  }
  const double part = warp_sum(sum.value());
  if (threadIdx.x % 32 == 0) s.sum[threadIdx.x / 32] = part;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double total = 0;
  for (int i = 0; i < int(blockDim.x / 32); ++i) total += s.sum[i];
  with_storage(g.dtype, [&](auto to) { *static_cast<decltype(to)*>(g.data) = cast<decltype(to)>(S(total), g.dtype); });
}

template <class S>
__global__ void __launch_bounds__(max_threads) backward_kernel(const __grid_constant__ BackwardLaunch<S> l) {
  const Backward<S>& a = l.a;
  BOMKERN_SHARED_BYTES(bytes);
  BackwardShared<S>& s = *reinterpret_cast<BackwardShared<S>*>(bytes);
  if (blockIdx.x >= l.tiles) return sum_batch(l, a.out[l.batch_level[blockIdx.x - l.tiles]], s);

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
}

}  // namespace BOMKERN_ISA
}  // namespace bomkern
