// Shared by the streaming kernels: W adjacent numbers of a row, read and written by one access where they are contiguous.
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

template <DType type> struct Type {
  static constexpr DType value = type;
};

BOMKERN_HD int bytes_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

template <int Bytes, int W> BOMKERN_HD void fetch_bytes(const char* from, Raw<W>& raw) {
  if constexpr (Bytes == 16) {
    raw.words = load_16_bytes(from);
  } else if constexpr (Bytes == 8) {
    const uint2 words = *reinterpret_cast<const uint2*>(from);
    raw.words.x = words.x, raw.words.y = words.y;
  } else if constexpr (Bytes == 4) {
    raw.words.x = *reinterpret_cast<const unsigned*>(from);
  } else {
    raw.words.x = *reinterpret_cast<const uint16_t*>(from);
  }
}

// The first n of R pieces that lie `pitch` bytes apart; the others are 0.
template <int Bytes, int W, int R>
BOMKERN_HD void fetch_bytes(const char* from, int64_t pitch, int n, Raw<W> (&raw)[R]) {
#pragma unroll
  for (int r = 0; r < R; ++r) {
    raw[r] = Raw<W>{};
    if (r < n) fetch_bytes<Bytes>(from + r * pitch, raw[r]);
  }
}

// Columns [column, column + W) of the rows `row`, row + step, .., the first n of R: the type is asked for once.
template <int W, int R>
BOMKERN_HD void fetch_rows(const Matrix& m, int64_t row, int64_t step, int64_t column, int n, Raw<W> (&raw)[R]) {
  const int size = bytes_of(m.dtype);
  const char* const from =
      static_cast<const char*>(m.data) + (row * m.stride[0] + (W == 1 ? column * m.stride[1] : column)) * size;
  const int64_t pitch = step * m.stride[0] * size;
  if constexpr (W == 1) {
    if (size == 4) {
      fetch_bytes<4>(from, pitch, n, raw);
    } else if (size == 2) {
      fetch_bytes<2>(from, pitch, n, raw);
    } else {
      fetch_bytes<8>(from, pitch, n, raw);
    }
  } else if (W == 8 || size * W == 16) {
    fetch_bytes<16>(from, pitch, n, raw);
  } else if (W == 4 || size * W == 8) {
    fetch_bytes<8>(from, pitch, n, raw);
  } else {
    fetch_bytes<4>(from, pitch, n, raw);
  }
}

template <int W> BOMKERN_HD Raw<W> fetch(const Matrix& m, int64_t row, int64_t column) {
  Raw<W> raw[1];
  fetch_rows<W>(m, row, 0, column, 1, raw);
  return raw[0];
}

BOMKERN_HD double join(unsigned low, unsigned high) {
  return __longlong_as_double((long long)(low | static_cast<unsigned long long>(high) << 32));
}

template <DType type, class S, int W> BOMKERN_HD void widen_from(const Raw<W>& raw, S (&v)[W]) {
  unsigned word[4] = {raw.words.x, raw.words.y, 0, 0};
  if constexpr (W > 1) word[2] = raw.words.z, word[3] = raw.words.w;
#pragma unroll
  for (int i = 0; i < W; ++i) {
    if constexpr (type == DType::f32) {
      v[i] = S(__uint_as_float(word[i % 4]));
    } else if constexpr (type == DType::f64) {
      v[i] = S(join(word[i * 2 % 4], word[i * 2 % 4 + 1]));
    } else {
      v[i] = S(widen(uint16_t(word[i / 2] >> i % 2 * 16), type == DType::bf16));
    }
  }
}

// R pieces of one type, asked for once.
template <class S, int W, int R> BOMKERN_HD void widen_rows(const Raw<W> (&raw)[R], DType dtype, S (&v)[R][W]) {
  const auto all_from = [&](auto type) {
#pragma unroll
    for (int r = 0; r < R; ++r) widen_from<decltype(type)::value>(raw[r], v[r]);
  };
  if (W < 8 && dtype == DType::f32) {
    all_from(Type<DType::f32>());
  } else if (sizeof(S) == 8 && dtype == DType::f64) {
    all_from(Type<DType::f64>());
  } else if (dtype == DType::bf16) {
    all_from(Type<DType::bf16>());
  } else {
    all_from(Type<DType::f16>());
  }
}

template <class S, int W> BOMKERN_HD void widen(const Raw<W>& raw, DType dtype, S (&v)[W]) {
  const Raw<W> one[1] = {raw};
  S wide[1][W];
  widen_rows<S, W>(one, dtype, wide);
#pragma unroll
  for (int i = 0; i < W; ++i) v[i] = wide[0][i];
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
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    if (offset < lanes) x += __shfl_xor_sync(whole_warp, x, offset);
  }
  if (lanes > 32) {
    __syncthreads();  // it may still be read from the last time
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0;
    for (int w = 0; w < int(blockDim.x / 32); ++w) x += shared[w];
  }
  return x;
}

// Sums over a team of `lanes` neighbours, a power of 2 up to 32: of R rows, N numbers each. Calls write(r, sums) in one
// lane for each row. Where there are lanes for it the rows part: half the lanes go on with half of them, so that what is
// exchanged halves too. Each sum has the bits of team_sum().
template <class S, int R, int N, class Write> BOMKERN_HD void sum_rows(S (&x)[R][N], int lanes, Write write) {
  const int lane = threadIdx.x & (lanes - 1);
  if (lanes < R) {
#pragma unroll
    for (int offset = R / 2; offset > 0; offset /= 2) {
      if (offset >= lanes) continue;
#pragma unroll
      for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int k = 0; k < N; ++k) x[r][k] += __shfl_xor_sync(whole_warp, x[r][k], offset);
      }
    }
    if (lane != 0) return;
#pragma unroll
    for (int r = 0; r < R; ++r) write(r, x[r]);
    return;
  }
  int share = lanes, row = 0;  // lanes of a row
#pragma unroll
  for (int rows = R / 2; rows > 0; rows /= 2) {
    share /= 2;
    const bool upper = lane & share;
    row += upper ? rows : 0;
#pragma unroll
    for (int r = 0; r < rows; ++r) {
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const S own = upper ? x[r + rows][k] : x[r][k], others = upper ? x[r][k] : x[r + rows][k];
        x[r][k] = own + __shfl_xor_sync(whole_warp, others, share);
      }
    }
  }
#pragma unroll
  for (int offset = 16 / R; offset > 0; offset /= 2) {
    if (offset >= share) continue;
#pragma unroll
    for (int k = 0; k < N; ++k) x[0][k] += __shfl_xor_sync(whole_warp, x[0][k], offset);
  }
  if ((lane & (share - 1)) == 0) write(row, x[0]);
}

}  // namespace BOMKERN_ISA
}  // namespace bomkern
