// Active and effective fraction of a code's dimensions from the variances of its columns, and their slopes.
//
// Include after cpu_rows.h. Formulas: active_units.h. D numbers: one thread, in vectors.

namespace bomkern {
namespace BOMKERN_ISA {

template <class S> struct Units {
  S active, effective, total, entropy;
};

// A slope of the sigmoid below this counts as 0: its products with a column's deviations would be subnormal numbers.
template <class S> constexpr S least_slope = sizeof(S) == 4 ? S(0x1p-64) : S(0x1p-512);

template <class V, class S> inline V sigmoid_of(V v, S threshold, S temperature) {
  return 1 / (1 + exp_of((threshold - v) / temperature));
}

template <class S> Units<S> units_of(const S* variance, int64_t dims, S threshold, S temperature) {
  typedef typename Lanes<S>::Vec V;
  Sum<V> active, total, entropy;
  const auto for_all = [&](auto f) {
    for (int64_t d = 0; d < dims; d += panel) {
      for_vectors<S>(int(lesser(dims - d, panel)), [&](int64_t i, auto lanes) {
        typename Lanes<S>::Int lane{};
        for (int k = 0; k < Lanes<S>::width; ++k) lane[k] = k;
        f(load_lanes<V>(variance + d + i, lanes), lane < count_of<Lanes<S>::width>(lanes));
      });
    }
  };
  for_all([&](V v, auto inside) {
    active.add(inside ? sigmoid_of(v, threshold, temperature) : V{});
    total.add(v);  // 0 in the padding
  });
  const S sum = S(total.value()), share = sum == 0 ? S(0) : 1 / sum;
  for_all([&](V v, auto) {
    const V p = v * share;
    entropy.add(p == V{} ? V{} : -p * log_of(p == V{} ? splat<V>(S(1)) : p));
  });
  const S h = S(entropy.value());
  const S effective = sum == 0 ? S(0) : S(__builtin_exp(double(h)) / double(dims));
  return {S(active.value() / double(dims)), effective, sum, h};
}

// Adds the gradient of every variance to slope [D], from two gradients that may be null. Returns false if both are null.
template <class S>
bool add_slopes(const S* variance, int64_t dims, S threshold, S temperature, const S* grad_active,
                const S* grad_effective, S* slope) {
  typedef typename Lanes<S>::Vec V;
  if (!grad_active && !grad_effective) return false;
  const Units<S> units = units_of(variance, dims, threshold, temperature);
  const S active = grad_active ? *grad_active / (temperature * S(dims)) : S(0);
  const S effective = grad_effective && units.total != 0 ? *grad_effective * units.effective / units.total : S(0);
  const S share = units.total == 0 ? S(0) : 1 / units.total;
  for (int64_t d = 0; d < dims; d += panel) {
    for_vectors<S>(int(lesser(dims - d, panel)), [&](int64_t i, auto lanes) {
      const V v = load_lanes<V>(variance + d + i, lanes), s = sigmoid_of(v, threshold, temperature), p = v * share;
      const V spread = p == V{} ? V{} : log_of(p == V{} ? splat<V>(S(1)) : p) + units.entropy;
      V sum = load_lanes<V>(slope + d + i, lanes);
      if (grad_active) sum += active * (s * (1 - s) < least_slope<S> ? V{} : s * (1 - s));
      if (grad_effective) sum -= effective * spread;
      store_lanes(slope + d + i, sum, lanes);
    });
  }
  return true;
}

}  // namespace BOMKERN_ISA
}  // namespace bomkern
