// A log-variance's exponential and its slope, number by number; cpu_variance.h is the same for several vectors at once.
//
// Include after simd.h or cuda_math.h, which give exp_of(), splat() and BOMKERN_ISA. V is a number or a vector of them.

namespace bomkern {
namespace BOMKERN_ISA {

template <class V> struct Variance {
  V value, slope;
};

// e^v, above v = 80 its tangent there: finite in float32, whose exp overflows at 88.7. NaN stays NaN.
template <class V, class S> BOMKERN_HD Variance<V> variance_of(V logvar) {
  const V limit = splat<V>(S(80)), zero = splat<V>(S(0));
  const auto beyond = logvar > limit;
  const V slope = exp_of(beyond ? limit : logvar);
  return {slope + slope * (beyond ? logvar - limit : zero), slope};
}

}  // namespace BOMKERN_ISA
}  // namespace bomkern
