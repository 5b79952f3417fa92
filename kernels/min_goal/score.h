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

template <class V, class S> BOMKERN_HD Entry<V> entry_of(int curve, V x, const Ramp<S>& p) {
  const V zero = splat<V>(S(0)), infinity = splat<V>(S(__builtin_inff()));
  const V u = x - p.center;
  V slope = u > zero ? splat<V>(p.right) : (u < zero ? splat<V>(p.left) : splat<V>(p.flat));
  // A flat side is 0 even at infinity, where 0 * inf would be NaN; a NaN stays one.
  const V r = (slope == zero) & (u == u) ? zero : u * slope;
  V d = r;
  if (curve == HARD) {
    const V size = r < zero ? -r : r;
    const auto far = size > S(1e8);  // beyond, r * r may overflow and 1 + r * r is r * r
    const V near = far ? zero : size;
    d = far ? log_of(far ? size : infinity) * 2 : log1p_of(near * near);
    d = r == r ? d : r;
    slope = slope * 2 / (r + 1 / r);
  } else if (curve == BARRIER) {
    const auto inside = r <= 1 - p.tail;
    const V y = inside ? -r : zero;
    d = inside ? -log1p_of(y) : (r - 1 + p.tail) / p.tail - p.log_tail;
    slope = slope / (inside ? y + 1 : splat<V>(p.tail));
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
