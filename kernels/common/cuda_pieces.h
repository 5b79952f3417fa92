// What the streaming kernels share: W neighbours of a row, read and written by one access where they lie together.
//
// W is 16 bytes' worth of the widest type among an op's matrices: 8 where all are halves, 4 up to float32, 2 up to
// float64; a narrower one beside it takes 8 or 4 bytes, so that a warp's accesses are whole lines all the same. W = 1
// takes any strides and alignment, neighbouring threads neighbouring columns.
#pragma once
#include "cuda_math.h"
#include "dtype.h"

namespace bomkern {
namespace BOMKERN_ISA {

constexpr unsigned whole_warp = 0xffffffffu;

// As read: to be fetched first and widened later, because what waits for one value cannot ask for the next.
template <int W> struct Raw {
  uint4 words;
};
template <> struct Raw<1> {
  uint2 words;
};

BOMKERN_HD int bytes_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

// Columns [column, column + W) of a row.
template <int W> BOMKERN_HD Raw<W> fetch(const Matrix& m, int64_t row, int64_t column) {
  const int size = bytes_of(m.dtype);
  const char* const from =
      static_cast<const char*>(m.data) + (row * m.stride[0] + (W == 1 ? column * m.stride[1] : column)) * size;
  Raw<W> raw{};
  if constexpr (W == 1) {
    if (size == 4) {
      raw.words.x = *reinterpret_cast<const unsigned*>(from);
    } else if (size == 2) {
      raw.words.x = *reinterpret_cast<const uint16_t*>(from);
    } else {
      raw.words = *reinterpret_cast<const uint2*>(from);
    }
  } else if (W == 8 || size * W == 16) {
    raw.words = load_16_bytes(from);
  } else if (W == 4 || size * W == 8) {
    const uint2 half = *reinterpret_cast<const uint2*>(from);
    raw.words.x = half.x, raw.words.y = half.y;
  } else {
    raw.words.x = *reinterpret_cast<const unsigned*>(from);
  }
  return raw;
}

BOMKERN_HD double join(unsigned low, unsigned high) {
  return __longlong_as_double((long long)(low | static_cast<unsigned long long>(high) << 32));
}

template <class S, int W> BOMKERN_HD void widen(const Raw<W>& raw, DType dtype, S (&v)[W]) {
  unsigned word[4] = {raw.words.x, raw.words.y, 0, 0};
  if constexpr (W > 1) word[2] = raw.words.z, word[3] = raw.words.w;
  if (W < 8 && dtype == DType::f32) {
#pragma unroll
    for (int i = 0; i < W; ++i) v[i] = S(__uint_as_float(word[i % 4]));
  } else if (sizeof(S) == 8 && dtype == DType::f64) {
#pragma unroll
    for (int i = 0; i < W; ++i) v[i] = S(join(word[i * 2 % 4], word[i * 2 % 4 + 1]));
  } else if (dtype == DType::bf16) {
#pragma unroll
    for (int i = 0; i < W; ++i) v[i] = S(widen(uint16_t(word[i / 2] >> i % 2 * 16), true));
  } else {
#pragma unroll
    for (int i = 0; i < W; ++i) v[i] = S(widen(uint16_t(word[i / 2] >> i % 2 * 16), false));
  }
}

template <class S, int W> BOMKERN_HD void load(const Matrix& m, int64_t row, int64_t column, S (&v)[W]) {
  widen<S, W>(fetch<W>(m, row, column), m.dtype, v);
}

// Elements [at, at + W) of a vector, where a piece of it may lie unaligned.
template <class S, int W> BOMKERN_HD void load_vector(const S* from, int64_t at, S (&v)[W]) {
#pragma unroll
  for (int i = 0; i < W; ++i) v[i] = from[at + i];
}

template <class S> BOMKERN_HD unsigned halves_of(S low, S high, bool bfloat) {
  return narrow(float(low), bfloat) | unsigned(narrow(float(high), bfloat)) << 16;
}

// Elements [at, at + W) of a contiguous output; rounds to the nearest, ties to even.
template <class S, int W> BOMKERN_HD void store(void* to, DType dtype, int64_t at, const S (&v)[W]) {
  const int size = bytes_of(dtype);
  char* const out = static_cast<char*>(to) + at * size;
  const bool bfloat = dtype == DType::bf16;
  if constexpr (W == 1) {
    if (size == 4) {
      *reinterpret_cast<float*>(out) = float(v[0]);
    } else if (size == 2) {
      *reinterpret_cast<uint16_t*>(out) = narrow(float(v[0]), bfloat);
    } else {
      *reinterpret_cast<double*>(out) = double(v[0]);
    }
  } else if constexpr (W == 8) {
    store_16_bytes(out, uint4{halves_of(v[0], v[1], bfloat), halves_of(v[2], v[3], bfloat),
                              halves_of(v[4], v[5], bfloat), halves_of(v[6], v[7], bfloat)});
  } else if constexpr (W == 4) {
    if (size == 4) {
      store_16_bytes(out, uint4{__float_as_uint(float(v[0])), __float_as_uint(float(v[1])),
                                __float_as_uint(float(v[2])), __float_as_uint(float(v[3]))});
    } else {
      *reinterpret_cast<uint2*>(out) = uint2{halves_of(v[0], v[1], bfloat), halves_of(v[2], v[3], bfloat)};
    }
  } else {
    if (size == 8) {
      const long long low = __double_as_longlong(double(v[0])), high = __double_as_longlong(double(v[1]));
      store_16_bytes(out, uint4{unsigned(low), unsigned(low >> 32), unsigned(high), unsigned(high >> 32)});
    } else if (size == 4) {
      *reinterpret_cast<uint2*>(out) = uint2{__float_as_uint(float(v[0])), __float_as_uint(float(v[1]))};
    } else {
      *reinterpret_cast<unsigned*>(out) = halves_of(v[0], v[1], bfloat);
    }
  }
}

template <class S> BOMKERN_HD S grad_of(const RowGrad<S>& g, int64_t row) {
  return g.data ? g.data[row * g.stride] : S(0);
}

// The sum over a team of threads, in each of them: neighbours within a warp, a power of 2, or the whole block. `shared`
// holds a number a warp. The tree is fixed, so the bits are.
template <class S> BOMKERN_HD S team_sum(S x, int lanes, S* shared) {
  for (int offset = min(lanes, 32) / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(whole_warp, x, offset);
  if (lanes > 32) {
    __syncthreads();  // it may still be read from the last time
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0;
    for (int w = 0; w < int(blockDim.x / 32); ++w) x += shared[w];
  }
  return x;
}

}  // namespace BOMKERN_ISA
}  // namespace bomkern
