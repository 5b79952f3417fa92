// A log-variance's exponential and its slope, number by number; cpu_variance.h is the same for several vectors at once.
//
// Include after simd.h or cuda_math.h, which give exp_of(), splat() and BOMKERN_ISA. V is a number or a vector of them.

namespace bomkern {
namespace BOMKERN_ISA {

template <class V> struct Variance {
  V value, slope;
};

constexpr int variance_limit = 80;

// e^v, above v = 80 its tangent there: finite in float32, whose exp overflows at 88.7. NaN stays NaN.
template <class V, class S> BOMKERN_HD Variance<V> variance_of(V logvar) {
  const V limit = splat<V>(S(variance_limit)), zero = splat<V>(S(0));
  const auto beyond = logvar > limit;
  const V slope = exp_of(beyond ? limit : logvar);
  return {slope + slope * (beyond ? logvar - limit : zero), slope};
}

// Whether the values of all these are exponentials and no more. A NaN is no exception.
template <class S, int R, int W> BOMKERN_HD bool are_ordinary(const S (&logvar)[R][W]) {
  bool beyond = false;
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int i = 0; i < W; ++i) beyond |= logvar[r][i] > S(variance_limit);
  }
  return !beyond;
}

}  // namespace BOMKERN_ISA
}  // namespace bomkern
