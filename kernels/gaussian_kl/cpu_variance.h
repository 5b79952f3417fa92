// Log-variances' exponentials and their slopes, for several vectors at once. Include after cpu_rows.h.

namespace bomkern {
namespace BOMKERN_ISA {

// The slope of e(v) = e^v, above v = 80 its tangent there: finite in float32, whose exp overflows at 88.7. NaN stays NaN.
template <class S, class V, int N> inline void slopes_of(const V (&logvar)[N], V (&slope)[N]) {
  for (int k = 0; k < N; ++k) slope[k] = at_most(logvar[k], S(80));
  exp_all(slope);
}
// e(v) - 1, from v and its slope.
template <class S, class V> inline V less_one(V logvar, V slope) {
  return slope * at_least(logvar - S(79), S(1)) - 1;
}

}  // namespace BOMKERN_ISA
}  // namespace bomkern
