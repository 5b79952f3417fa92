// Shared by total_correlation's GPU kernels: the packed inputs, the term t_bid, the weights, a running log-sum-exp.
//
// C_d of total_correlation.h may be any constant, since it stands once in the joint and once in the marginals. Here it
// makes t 0, on average, for a component's own sample: C_d = mean_i c_id - log2(e) / 2. So the terms that count are
// small, one by one and in the joint's sum over dimensions, and so is their rounding. But C_d is high enough that no
// component's t of its own sample, weight added, is above highest_term: where log-variances spread far, the narrow
// components have the large gradients, which stand on the last digits of that t.
//
// The inputs, of any dtype and strides, are packed once into records of four dimensions that 16-byte copies can move:
//   components: [B, chunks, 3, 4]  mu, a, c - C  of total_correlation.h
//   rows:       [R, chunks, fields, 4]  z, and in backward the marginal
// Dimensions past the last are 0 everywhere: their terms are 0, which no sum over dimensions sees.
#pragma once
#include "../common/cuda_math.h"

#include <cuda_pipeline_primitives.h>

#include "total_correlation.h"

namespace bomkern {
namespace total_correlation {
namespace cuda {

using namespace bomkern::BOMKERN_ISA;  // of cuda_math.h

constexpr unsigned all_lanes = 0xffffffffu;
constexpr int warp_size = 32;
constexpr int width = 4;  // dimensions of a chunk
constexpr int component_fields = 3;
constexpr double half_log2_e = 0.72134752044448170368, ln_2 = 0.69314718055994530942;
constexpr int highest_term = 8;  // a weight's logarithm adds 63 at most, and 2^30 components 30: no sum overflows
constexpr int poly_period = 16;  // one exponential in so many is a polynomial: see forward_block()
constexpr int joint_block = 8;  // groups of dimensions that are added up before they join a row's sum over all
// So many terms are added up one by one before they join a larger sum; whole tiles. The gradients' have both signs, and
// their sums are small beside what was added: longer segments would cost digits.
constexpr int segment = 256, gradient_segment = 32;

// Adjacent rows or components of one thread: 16 bytes.
template <class S> constexpr int owned = 16 / int(sizeof(S));
template <class S> struct alignas(16) Vec {
  S at[owned<S>];
};
template <class S> struct alignas(16) Chunk {
  S at[width];
};

template <class T> BOMKERN_HD T load(const void* from) { return *static_cast<const T*>(from); }
template <class T> BOMKERN_HD void save(void* to, const T& value) { *static_cast<T*>(to) = value; }

template <bool b> struct Constant {
  static constexpr bool value = b;
};

template <class S> struct Packed {
  const S* components;
  const S* rows;
  int chunks;
};

// t_bid from z_bd and component i's values, by the same roundings in every kernel. (a u) u is nearer to the truth than
// the square of sqrt(a) u, which doubles two errors, and a u is what the gradients want.
template <class S> struct Term {
  S u, slope, t;
  BOMKERN_HD Term(S z, S mu, S a, S c) {
    u = z - mu;
    slope = a * u;
    t = fma_of(-slope, u, c);
  }
};

// The stratified weights in bits: added to t, so that backward's q is 1 to the bit in exact_marginal()'s marginals too,
// where one component is all there is.
template <class S> struct Weights {
  S own, next;
  int batch, first;  // at most 2^30, so that what follows fits an int
  BOMKERN_HD S at(int row, int component) const {
    if (component - first == row) return own;
    return component == (row + 1 == batch - first ? 0 : first + row + 1) ? next : S(0);
  }
  // Whether any of the components [from, from + n) is a row's own, or its next, among the rows [row, row + count).
  BOMKERN_HD bool touch(int row, int count, int from, int n) const {
    const int first_of = from - first;  // the row whose own `from` is
    return (first_of <= row + count && first_of + n > row) || (from == 0 && row + count >= batch - first);
  }
};

// A running sum of powers of two that cannot overflow.
template <class S> struct PowerSum {
  S max = -S(sizeof(S) == 4 ? 3e38 : 1e308), sum = 0;  // finite, so that a power of -inf adds 0
  // Adds times * 2^x.
  BOMKERN_HD void add(S x, S times) {
    const S difference = x - max;
    const S e = ex2(difference > 0 ? -difference : difference);
    if (difference > 0) {
      sum = fma_of(sum, e, times);
      max = x;
    } else {
      sum = fma_of(times, e, sum);
    }
  }
};

// Copies `pieces` of 16 bytes, the work of `threads` threads of which this is number `thread`.
BOMKERN_HD void copy_async(void* to, const void* from, int pieces, int thread, int threads) {
#pragma unroll 1
  for (int p = thread; p < pieces; p += threads) {
    __pipeline_memcpy_async(static_cast<uint4*>(to) + p, static_cast<const uint4*>(from) + p, 16);
  }
}

// Adds a thread's sums of this segment to its own places in the workspace.
template <class S, int dims> BOMKERN_HD void flush(S* to, int64_t pitch, S (&sum)[dims][owned<S>], bool first) {
  Vec<S> v[dims] = {};
  if (!first) {
#pragma unroll
    for (int d = 0; d < dims; ++d) v[d] = load<Vec<S>>(to + d * pitch);  // together: one wait
  }
#pragma unroll
  for (int d = 0; d < dims; ++d) {
#pragma unroll
    for (int r = 0; r < owned<S>; ++r) v[d].at[r] += sum[d][r], sum[d][r] = 0;
    save(to + d * pitch, v[d]);
  }
}

}  // namespace cuda
}  // namespace total_correlation
}  // namespace bomkern
