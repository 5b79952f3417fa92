// min_goal on the CPU for one instruction set: a vector of samples at a time, all its goals in registers.
#include "../common/simd.h"
// (simd.h first: score.h is written in its words)
#include "score.h"

#include "min_goal.h"

namespace bomkern {
namespace BOMKERN_ISA {

using min_goal::Backward;
using min_goal::Forward;
using min_goal::Goals;
using min_goal::max_goals;
using min_goal::Partial;
using min_goal::Reduction;

constexpr int block = 512;  // samples of a backward block: its gradients stay in L1 while K columns are written

// Samples [b, b + n) of goal k. Short vectors repeat their last sample, so that the padding is an ordinary value.
template <class S> inline typename Lanes<S>::Vec load_goal(const Goals& g, int k, int64_t b, int n) {
  typedef typename Lanes<S>::Vec V;
  constexpr int width = Lanes<S>::width;
  const void* data = g.data[k];
  const int64_t stride = g.stride[k];
  if (stride == 1 && n == width) {
    if (g.dtype[k] == (sizeof(S) == 4 ? DType::f32 : DType::f64)) return load<V>(static_cast<const S*>(data) + b);
    if constexpr (sizeof(S) == 4) {
      const VecH half = load<VecH>(static_cast<const uint16_t*>(data) + b);
      return g.dtype[k] == DType::bf16 ? bfloat_to_float(half) : half_to_float(half);
    }
  }
  if (stride == 0) return splat<V>(load_one<S>(data, g.dtype[k], 0));
#if !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // the loops set every lane
#endif
  V v;
  if (g.dtype[k] == DType::f32) {
    const float* from = static_cast<const float*>(data) + b * stride;
    for (int i = 0; i < width; ++i) v[i] = from[(i < n ? i : n - 1) * stride];
  } else {
    for (int i = 0; i < width; ++i) v[i] = load_one<S>(data, g.dtype[k], (b + (i < n ? i : n - 1)) * stride);
  }
#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif
  return v;
}

template <class V, class S> struct Worst {
  typename Lanes<S>::Int goal{};
  V deficit, slope;
};

// The bottleneck of one vector of samples; Visit sees every goal's deficit (or key), for the water levels.
template <class S, bool Scores, class Visit>
inline auto find_worst(const Forward<S>& a, const Ramp<S>* ramps, int64_t b, int n, Visit visit) {
  typedef typename Lanes<S>::Vec V;
  Worst<V, S> worst;
  worst.deficit = splat<V>(S(-__builtin_inff()));
  worst.slope = V{};
  for (int k = 0; k < a.goals.count; ++k) {
    const V x = load_goal<S>(a.goals, k, b, n);
    Entry<V> entry{};
    if constexpr (Scores) {
      entry.deficit = key_of<V, S>(x);
    } else {
      entry = entry_of<V, S>(a.goals.curve[k], x, ramps[k]);
    }
    visit(k, entry.deficit);
    const auto replace = worse(entry.deficit, worst.deficit);
    worst.deficit = replace ? entry.deficit : worst.deficit;
    worst.slope = replace ? entry.slope : worst.slope;
    worst.goal = replace ? typename Lanes<S>::Int{} + k : worst.goal;
  }
  const V zero{}, infinity = splat<V>(S(__builtin_inff()));
  const auto finite = (worst.deficit < infinity) & (worst.deficit == worst.deficit);
  if constexpr (Scores) {
    worst.slope = 1 / worst.deficit;  // the key is -score
    worst.deficit = finite ? -log_of(-worst.deficit) : worst.deficit;
  }
  worst.slope = finite ? worst.slope : zero;
  return worst;
}

template <class S, bool Scores, bool Stats>
void forward_rows(const Forward<S>& a, int64_t begin, int64_t end, Partial* out) {
  typedef typename Lanes<S>::Vec V;
  constexpr int width = Lanes<S>::width;
  typedef typename Lanes<S>::Bytes Bytes;
  const int count = a.goals.count;
  Ramp<S> ramps[max_goals];
  Sum<V> levels[Stats ? max_goals : 1], total;
  if constexpr (!Scores) {
    for (int k = 0; k < count; ++k) {
      const S tail = a.params[4 * k + 3];
      ramps[k] = ramp_of(a.params + 4 * k, S(tail > 0 ? __builtin_log(tail) : 0));
    }
  }
  const bool global = a.reduction == Reduction::min;
  bool finite = true;
  S worst_loss = -__builtin_inff(), worst_slope = 0;
  int64_t worst_entry = 0;
  for (int64_t b = begin; b < end; b += width) {
    const int n = end - b < width ? int(end - b) : width;
    typename Lanes<S>::Int lane{}, inside;
    for (int i = 0; i < width; ++i) lane[i] = i;
    inside = lane < n;
    const auto worst = find_worst<S, Scores>(a, ramps, b, n, [&](int k, V d) {
      if constexpr (Stats) {
        V score;
        if constexpr (Scores) {
          score = at_most(d == S(__builtin_inff()) ? V{} : -d, S(1));
        } else {
          score = exp_of(-at_least(d, S(0)));
        }
        levels[k].add(inside ? score : V{});
      }
    });
    const V l = worst.deficit;
    total.add(inside ? l : V{});
    finite &= !any(inside & ((l - l) != 0));
    const Bytes winner = __builtin_convertvector(worst.goal, Bytes);
    if (global) {
      if (any(inside & worse(l, splat<V>(worst_loss)))) {
        for (int i = 0; i < n; ++i) {
          if (!worse(S(l[i]), worst_loss)) continue;
          worst_loss = l[i];
          worst_slope = worst.slope[i];
          worst_entry = (b + i) * count + worst.goal[i];
        }
      }
    } else {
      __builtin_memcpy(a.winner + b, &winner, n);
      __builtin_memcpy(a.slope + b, &worst.slope, n * sizeof(S));
    }
    if (a.reduction == Reduction::none) __builtin_memcpy(a.loss + b, &l, n * sizeof(S));
    if constexpr (Stats) {
      for (int i = 0; i < n; ++i) {
        a.bottleneck[b + i] = winner[i];
        ++out->owned[winner[i]];
      }
    }
  }
  out->loss = total.value();
  out->finite = finite;
  out->worst_loss = worst_loss;
  out->worst_slope = worst_slope;
  out->worst = worst_entry;
  if constexpr (Stats) {
    for (int k = 0; k < count; ++k) out->level[k] = levels[k].value();
  }
}

template <class S> void forward(const Forward<S>& a, int64_t begin, int64_t end, Partial* out) {
  const bool stats = a.bottleneck != nullptr, scores = a.params == nullptr;
  if (stats) {
    for (int k = 0; k < a.goals.count; ++k) out->owned[k] = 0;
  }
  (scores ? (stats ? forward_rows<S, true, true> : forward_rows<S, true, false>)
          : (stats ? forward_rows<S, false, true> : forward_rows<S, false, false>))(a, begin, end, out);
}

inline uint32_t word_of(float value) {
  uint32_t w;
  __builtin_memcpy(&w, &value, 4);
  return w;
}

// Round to nearest, ties to even.
inline uint16_t narrow(float value, bool bfloat) {
  const uint32_t word = word_of(value), sign = (word >> 16) & 0x8000u, size = word & 0x7fffffffu;
  if (bfloat) return size > 0x7f800000u ? 0x7fc0 : uint16_t((word + 0x7fffu + ((word >> 16) & 1)) >> 16);
  if (size >= 0x47800000u) return uint16_t(sign | (size > 0x7f800000u ? 0x7e00u : 0x7c00u));
  if (size < 0x38800000u) {  // subnormal: adding one half lets the adder do the rounding
    float magnitude;
    __builtin_memcpy(&magnitude, &size, 4);
    return uint16_t(sign | (word_of(magnitude + 0.5f) - 0x3f000000u));
  }
  return uint16_t(sign | ((size + 0xc8000fffu + ((size >> 13) & 1)) >> 13));
}

template <class To, class S> To narrow_to(S value, DType dtype) {
  if constexpr (sizeof(To) == 2) {
    return narrow(float(value), dtype == DType::bf16);
  } else {
    return To(value);
  }
}

template <class To, class S>
void write_column(To* out, const S* value, const uint8_t* winner, int goal, int n, DType dtype) {
  const To zero{};
  if constexpr (sizeof(To) == sizeof(S)) {
    for (int i = 0; i < n; ++i) out[i] = winner[i] == goal ? value[i] : zero;
  } else {
    for (int i = 0; i < n; ++i) out[i] = winner[i] == goal ? narrow_to<To>(value[i], dtype) : zero;
  }
}

template <class To, class S>
void write_matrix(To* out, const S* value, const uint8_t* winner, int count, int n, DType dtype) {
  __builtin_memset(out, 0, sizeof(To) * n * count);
  for (int i = 0; i < n; ++i) {
    // A winner that a caller of the op passes may be out of range.
    if (winner[i] < count) out[int64_t(i) * count + winner[i]] = narrow_to<To>(value[i], dtype);
  }
}

// One gradient for samples [b, b + n).
template <class To, class S>
void write_gradient(To* out, const Backward<S>& a, const min_goal::Gradient& g, int64_t b, int n, const S* value,
                    const uint8_t* winner) {
  if (g.goal < 0) {
    write_matrix(out + b * a.goals, value, winner, a.goals, n, g.dtype);
  } else {
    write_column(out + b, value, winner, g.goal, n, g.dtype);
  }
}

// The bottlenecks of samples [b, b + n), and the gradient of the loss there.
template <class S>
const uint8_t* gradients_of(const Backward<S>& a, int64_t b, int n, S* value, uint8_t* scratch) {
  if (a.worst) {  // one entry of the whole batch takes it all
    const int64_t at = *a.worst / a.goals - b;
    for (int i = 0; i < n; ++i) value[i] = i == at ? a.grad[0] * a.slope[0] : S(0);
    __builtin_memset(scratch, int(*a.worst % a.goals), n);
    return scratch;
  }
  if (a.grad_stride == 0) {
    const S grad = a.grad[0] / a.divisor;
    for (int i = 0; i < n; ++i) value[i] = grad * a.slope[b + i];
  } else {
    for (int i = 0; i < n; ++i) value[i] = a.grad[(b + i) * a.grad_stride] / a.divisor * a.slope[b + i];
  }
  return a.winner + b;
}

template <class S> void backward(const Backward<S>& a, int64_t begin, int64_t end, double* batch_level) {
  S value[block];
  uint8_t scratch[block];
  for (int o = 0; o < a.outputs; ++o) batch_level[o] = 0;
  for (int64_t b = begin; b < end; b += block) {
    const int n = end - b < block ? int(end - b) : block;
    const uint8_t* winner = gradients_of(a, b, n, value, scratch);
    for (int o = 0; o < a.outputs; ++o) {
      const min_goal::Gradient& g = a.out[o];
      if (g.batch_level) {
        double sum = 0;
        for (int i = 0; i < n; ++i) sum += winner[i] == g.goal ? double(value[i]) : 0.0;
        batch_level[o] += sum;
        continue;
      }
      switch (g.dtype) {
        case DType::f32: write_gradient(static_cast<float*>(g.data), a, g, b, n, value, winner); break;
        case DType::f64: write_gradient(static_cast<double*>(g.data), a, g, b, n, value, winner); break;
        default: write_gradient(static_cast<uint16_t*>(g.data), a, g, b, n, value, winner);
      }
    }
  }
}

}  // namespace BOMKERN_ISA
}  // namespace bomkern

#define BOMKERN_NAME_OF(isa) #isa
#define BOMKERN_NAME(isa) BOMKERN_NAME_OF(isa)

namespace bomkern {
namespace min_goal {
namespace BOMKERN_ISA {
extern constexpr CpuKernels kernels{
    BOMKERN_NAME(BOMKERN_ISA),
    bomkern::BOMKERN_ISA::forward<float>,
    bomkern::BOMKERN_ISA::forward<double>,
    bomkern::BOMKERN_ISA::backward<float>,
    bomkern::BOMKERN_ISA::backward<double>,
};
}  // namespace BOMKERN_ISA
}  // namespace min_goal
}  // namespace bomkern
