// Shared by CPU kernels that stream over rows: rows of any layout as vectors, gradients of any float type.
#include "simd.h"

#include "parallel.h"

namespace bomkern {
namespace BOMKERN_ISA {

constexpr int panel = 512;  // columns at a time: what is kept of them stays in L1

// parallel_for over any callable.
template <class F> void each(Parallel parallel, int64_t tasks, const F& f) {
  parallel(tasks, [](void* state, int64_t task) { (*static_cast<const F*>(state))(task); }, const_cast<F*>(&f));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t n, int64_t step) { return ceil_div(n, step) * step; }

// Calls f(first, last) for ranges of rows, each about 64 KB of float32.
template <class F> void each_rows(Parallel parallel, int64_t batch, int64_t dims, const F& f) {
  const int64_t rows = greater(16384 / dims, 1);
  each(parallel, ceil_div(batch, rows), [&](int64_t task) { f(task * rows, lesser((task + 1) * rows, batch)); });
}

// The valid lanes of a vector: all, or the first few; loads set the others to 0.
struct All {};
struct First {
  int n;
};
template <class V, class S> inline V load_lanes(const S* from, All) { return load<V>(from); }
template <class V, class S> inline V load_lanes(const S* from, First k) {
  V v{};
  __builtin_memcpy(&v, from, k.n * sizeof(S));
  return v;
}
template <class S, class V> inline void store_lanes(S* to, V v, All) { store(to, v); }
template <class S, class V> inline void store_lanes(S* to, V v, First k) { __builtin_memcpy(to, &v, k.n * sizeof(S)); }

template <int width> constexpr int count_of(All) { return width; }
template <int width> constexpr int count_of(First k) { return k.n; }

// Calls f(i, lanes) for the vectors of `count` numbers.
template <class S, class F> inline void for_vectors(int64_t count, F f) {
  constexpr int64_t width = Lanes<S>::width;  // 64 bits as every index, which spares extensions
  int64_t i = 0;
  for (; i + width <= count; i += width) f(i, All{});
  if (i < count) f(i, First{int(count - i)});
}

// Calls f(i, lanes, group) for `count` numbers in groups of four adjacent vectors, then for single vectors. Four independent
// chains keep the units busy. group.size is a constant.
template <int n> struct Group {
  static constexpr int size = n;
};
template <class S, class F> inline void for_groups(int64_t count, F f) {
  constexpr int64_t width = Lanes<S>::width;
  int64_t i = 0;
  for (; i + 4 * width <= count; i += 4 * width) f(i, All{}, Group<4>{});
  for_vectors<S>(count - i, [&](int64_t k, auto lanes) { f(i + k, lanes, Group<1>{}); });
}
template <class S, class V, int N> inline void load_group(const S* from, V (&to)[N], auto lanes) {
  for (int k = 0; k < N; ++k) to[k] = load_lanes<V>(from + k * Lanes<S>::width, lanes);
}
template <class S, class V, int N> inline void store_group(S* to, const V (&from)[N], auto lanes) {
  for (int k = 0; k < N; ++k) store_lanes(to + k * Lanes<S>::width, from[k], lanes);
}

// Returns columns [d, d + n) of a row, n at most a panel: in place, or converted into `scratch`.
template <class S> inline const S* row_of(const Matrix& m, int64_t b, int64_t d, int n, S* scratch) {
  const int64_t first = b * m.stride[0] + d * m.stride[1];
  if (m.stride[1] == 1) {
    if (m.dtype == (sizeof(S) == 4 ? DType::f32 : DType::f64)) return static_cast<const S*>(m.data) + first;
    if constexpr (sizeof(S) == 4) {
      if (m.dtype != DType::f64) {
        const uint16_t* from = static_cast<const uint16_t*>(m.data) + first;
        const auto convert = [&](auto widened) {
          for_vectors<S>(n, [&](int64_t i, auto lanes) {
            store_lanes(scratch + i, widened(load_lanes<VecH>(from + i, lanes)), lanes);
          });
        };
        // Outside the loop, because the compiler cannot know that the stores leave m.dtype alone.
        if (m.dtype == DType::bf16) {
          convert([](VecH half) { return bfloat_to_float(half); });
        } else {
          convert([](VecH half) { return half_to_float(half); });
        }
        return scratch;
      }
    }
  }
  for (int i = 0; i < n; ++i) scratch[i] = load_one<S>(m.data, m.dtype, first + i * m.stride[1]);
  return scratch;
}

inline float number_at(const RowGrad<float>& g, int64_t b) { return g.data ? g.data[b * g.stride] : 0.0f; }
inline double number_at(const RowGrad<double>& g, int64_t b) { return g.data ? g.data[b * g.stride] : 0.0; }

// The sum of a group's vectors, so that a running sum has one dependency for each group.
template <class V, int N> inline V total_of(const V (&v)[N]) {
  if constexpr (N == 4) return (v[0] + v[1]) + (v[2] + v[3]);
  return v[0];
}

// The sum of a vector's lanes, by halves.
template <class V> inline auto sum_of(V v) {
  const auto first = v[0];
  typedef decltype(first + first) S;
  if constexpr (sizeof(V) == 2 * sizeof(S)) {
    return first + v[1];
  } else {
    typedef S Half __attribute__((vector_size(sizeof(V) / 2)));
    Half half[2];
    __builtin_memcpy(half, &v, sizeof v);
    return sum_of(half[0] + half[1]);
  }
}

// Round to nearest, ties to even.
inline VecH float_to_half(VecF v) {
#if defined(BOMKERN_AVX512)
  return (VecH)_mm512_maskz_cvtps_ph(all_lanes, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__x86_64__) && BOMKERN_VECTOR_BYTES == 32
  return (VecH)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#endif
  const VecU word = bits<VecU>(v), sign = (word >> 16) & 0x8000u, size = word & 0x7fffffffu;
  const VecU normal = (size + 0xc8000fffu + ((size >> 13) & 1)) >> 13;
  // Below the least normal half, adding one half lets the adder do the rounding.
  const VecU tiny = bits<VecU>(bits<VecF>(size) + 0.5f) - 0x3f000000u;
  const VecU huge = size > 0x7f800000u ? VecU{} + 0x7e00u : VecU{} + 0x7c00u;
  const VecU magnitude = size < 0x38800000u ? tiny : (size >= 0x47800000u ? huge : normal);
  return __builtin_convertvector(sign | magnitude, VecH);
}
inline VecH float_to_bfloat(VecF v) {
  const VecU word = bits<VecU>(v), rounded = (word + 0x7fffu + ((word >> 16) & 1)) >> 16;
  return __builtin_convertvector((word & 0x7fffffffu) > 0x7f800000u ? VecU{} + 0x7fc0u : rounded, VecH);
}

// A gradient to write: [B, D], contiguous, of any float type; null where it is not wanted.
struct Gradient {
  void* data;
  DType dtype;

  template <class S> bool direct() const { return dtype == (sizeof(S) == 4 ? DType::f32 : DType::f64); }

  // Returns where to compute numbers [at, at + n): in place, or in `scratch`, from which put() converts them.
  template <class S> S* place(int64_t at, S* scratch) const { return direct<S>() ? static_cast<S*>(data) + at : scratch; }
  template <class S> void put(int64_t at, int n, const S* scratch) const {
    if (direct<S>()) return;
    if constexpr (sizeof(S) == 4) {
      if (dtype != DType::f64) {
        uint16_t* to = static_cast<uint16_t*>(data) + at;
        const auto convert = [&](auto narrowed) {
          for_vectors<S>(n, [&](int64_t i, auto lanes) {
            store_lanes(to + i, narrowed(load_lanes<VecF>(scratch + i, lanes)), lanes);
          });
        };
        if (dtype == DType::bf16) return convert([](VecF v) { return float_to_bfloat(v); });
        return convert([](VecF v) { return float_to_half(v); });
      }
    }
    for (int i = 0; i < n; ++i) put_one(at + i, scratch[i]);
  }

 private:
  // A float64 beside narrower inputs: rare.
  void put_one(int64_t i, double value) const {
    if (dtype == DType::f64) {
      static_cast<double*>(data)[i] = value;
    } else if (dtype == DType::f32) {
      static_cast<float*>(data)[i] = float(value);
    } else {
      const VecF v = splat<VecF>(float(value));
      static_cast<uint16_t*>(data)[i] = (dtype == DType::bf16 ? float_to_bfloat(v) : float_to_half(v))[0];
    }
  }
};

}  // namespace BOMKERN_ISA
}  // namespace bomkern

#define BOMKERN_NAME_OF(isa) #isa
#define BOMKERN_NAME(isa) BOMKERN_NAME_OF(isa)
// Defines `kernels` inside an op's namespace for one instruction set, from its forward, backward, and their bytes_of. It is
// constexpr, so that loading the library runs no code, which the CPU may not support.
#define BOMKERN_CPU_OP                                                                                   \
  extern constexpr CpuKernels kernels{                                                                   \
      BOMKERN_NAME(BOMKERN_ISA),                                                                         \
      forward<float>,                                                                                    \
      forward<double>,                                                                                   \
      backward<float>,                                                                                   \
      backward<double>,                                                                                  \
      [](const Forward<float>& a) { return bytes_of(a); },                                               \
      [](const Forward<double>& a) { return bytes_of(a); },                                              \
      [](const Backward<float>& a) { return bytes_of(a); },                                              \
      [](const Backward<double>& a) { return bytes_of(a); },                                             \
  };
