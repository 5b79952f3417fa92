// Raw value -> deficit and its slope: the one definition that the CPU's vectors and the GPU's scalars both compile.
//
// Include after simd.h or cuda_math.h, which give log_of(), splat() and BOMKERN_ISA. V is a number or a vector of them;
// the ternary operator selects lane by lane. Formulas: bomkern/constraints.py.

namespace bomkern {
namespace BOMKERN_ISA {

enum Curve : uint8_t { LINEAR = 0, HARD = 1, BARRIER = 2 };

template <class S> struct Ramp {
  S center, right, left, tail, flat, log_tail;
};

template <class S> BOMKERN_HD Ramp<S> ramp_of(const S* p, S log_tail) {
  return {p[0], p[1], p[2], p[3], p[1] == p[2] ? p[1] : S(0), log_tail};
}

template <class V> struct Entry {
  V deficit, slope;
};

// log(1 + y) for y > -1: what 1 + y rounds away comes back as a first-order term.
template <class V> BOMKERN_HD V log1p_of(V y) {
  const V u = y + 1;
  return log_of(u) + (y - (u - 1)) / u;
}

// log(1 + size^2) for size >= 0. Far out size^2 may overflow, and 1 + size^2 is size^2.
template <class V> BOMKERN_HD V log1p_of_square(V size) {
  const V zero = splat<V>(0.0f), infinity = splat<V>(__builtin_inff());
  const auto far = size > 1e8f;
  const V near = far ? zero : size;
  const V d = far ? log_of(far ? size : infinity) * 2 : log1p_of(near * near);
  return size == size ? d : size;
}

template <class V> BOMKERN_HD V quotient_of(V a, V b) { return a / b; }

// The score of a deficit for the record, at most 1: a value that beats its ideal is no better than the ideal.
template <class S> BOMKERN_HD S level_of(S deficit) { return exp_of(deficit < 0 ? S(0) : -deficit); }

// The ramp, as `deficit`, and its slope.
template <class V, class S> BOMKERN_HD Entry<V> ramp_at(V x, const Ramp<S>& p) {
  const V zero = splat<V>(S(0));
  const V u = x - p.center;
  const V side = u < zero ? splat<V>(p.left) : splat<V>(p.right);
  // A flat side is 0 even at infinity, where 0 * inf would be NaN; a NaN stays one.
  return {(side == zero) & (u == u) ? zero : u * side, u == zero ? splat<V>(p.flat) : side};
}

template <class V, class S> BOMKERN_HD Entry<V> entry_of(int curve, V x, const Ramp<S>& p) {
  const V zero = splat<V>(S(0)), infinity = splat<V>(S(__builtin_inff()));
  const Entry<V> ramp = ramp_at<V, S>(x, p);
  const V r = ramp.deficit;
  if (curve == HARD) return {log1p_of_square(r < zero ? -r : r), quotient_of(ramp.slope * 2, r + quotient_of(splat<V>(S(1)), r))};
  V d = r, slope = ramp.slope;
  if (curve == BARRIER) {
    const auto inside = (r <= 1 - p.tail) & (r < S(1));  // 1 - tail may round to 1
    const V y = inside ? -r : zero;
    const auto outside = [&] { return quotient_of(r - 1 + p.tail, splat<V>(p.tail)) - p.log_tail; };
    if constexpr (sizeof(S) == 4) {
      // Outside, the logarithm is of 1. Subtracted there too it has no branch around it, which for floats costs more.
      d = (inside ? zero : outside()) - log1p_of(y);
    } else {
      d = inside ? -log1p_of(y) : outside();
    }
    slope = quotient_of(slope, inside ? y + 1 : splat<V>(p.tail));
  }
  return {d == -infinity ? infinity : d, slope};
}

// For plain scores the kernels compare -score and take one logarithm at the end; a score outside (0, inf) is infeasible.
template <class V, class S> BOMKERN_HD V key_of(V score) {
  const V zero = splat<V>(S(0)), infinity = splat<V>(S(__builtin_inff()));
  return (score > zero) & (score < infinity) ? -score : (score == score ? infinity : score);
}

// NaN is worse than all; otherwise strictly worse, so that the first of equals stays.
template <class V> BOMKERN_HD auto worse(V d, V than) { return (d > than) | ((d != d) & (than == than)); }

}  // namespace BOMKERN_ISA
}  // namespace bomkern
