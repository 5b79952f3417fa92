// Log-variances' exponentials and their slopes, for several vectors at once. Include after cpu_rows.h.

namespace bomkern {
namespace BOMKERN_ISA {

// e^v, above v = 80 its tangent there: finite in float32, whose exp overflows at 88.7. NaN stays NaN.
template <class S, class V, int N> inline void slopes_of(const V (&logvar)[N], V (&slope)[N]) {
  for (int k = 0; k < N; ++k) slope[k] = at_most(logvar[k], S(80));
  exp_all(slope);
}
template <class S, class V, int N> inline void variances_of(const V (&logvar)[N], V (&value)[N]) {
  slopes_of<S>(logvar, value);
  for (int k = 0; k < N; ++k) value[k] += value[k] * at_least(logvar[k] - S(80), S(0));
}

}  // namespace BOMKERN_ISA
}  // namespace bomkern
