// total_correlation on the CPU, forward: a tile of rows against all components, one pass.

namespace bomkern {
namespace total_correlation {
namespace BOMKERN_ISA {

// Below this a sum may have lost terms that count to the underflow at 2^-125 (float) or 2^-1022 (double).
template <class S> constexpr S least_sum = sizeof(S) == 4 ? S(0x1p-80) : S(0x1p-900);

// A tile's log-sum-exp in bits over components that come block by block.
template <class S> struct LogSumExp {
  typedef typename Lanes<S>::Vec V;
  V peak[vectors], sum[vectors]{}, seen[vectors]{};

  LogSumExp() {
    for (int r = 0; r < vectors; ++r) peak[r] = splat<V>(-largest<S>);
  }
  void add(const S* values, int n) {
    constexpr int width = Lanes<S>::width, rows = tile_rows<S>;
    V highest[vectors], moved[vectors], power[vectors], total[vectors]{};
    for (int r = 0; r < vectors; ++r) highest[r] = peak[r];
    for (int k = 0; k < n * rows; k += rows) {
      for (int r = 0; r < vectors; ++r) {
        const V v = load<V>(values + k + r * width);
        highest[r] = v > highest[r] ? v : highest[r];
        seen[r] += v;
      }
    }
    for (int k = 0; k < n * rows; k += rows) {
      V v[vectors];
      for (int r = 0; r < vectors; ++r) v[r] = load<V>(values + k + r * width) - highest[r];
      exp2_parts(v, power);
      for (int r = 0; r < vectors; ++r) total[r] += v[r] * power[r];
    }
    for (int r = 0; r < vectors; ++r) moved[r] = peak[r] - highest[r];
    exp2_parts(moved, power);
    for (int r = 0; r < vectors; ++r) {
      sum[r] = sum[r] * (moved[r] * power[r]) + total[r];
      peak[r] = highest[r];
    }
  }
  // A NaN among the values has no maximum: it shows in their plain sum. Nor have infinities alone, which are all there
  // is of a sample too far from every component: -inf, of which backward makes NaN, as of the value.
  V value(int r) const {
    return (seen[r] == seen[r]) & (peak[r] > -largest<S>) ? peak[r] + log2_of(sum[r]) : seen[r];
  }
};

// One dimension's marginal exactly, by its true maximum: for samples so far from every component that the terms vanish.
template <class S>
typename Lanes<S>::Vec far_marginal(const Columns<S>& x, const Weights<S>& weights, int64_t d, int64_t b) {
  typedef typename Lanes<S>::Vec V;
  const V z = load<V>(x.z + d * x.stride + b);
  const auto term = [&](int64_t i) {
    const V u = z - *x.mu(d, i), t = *x.peak(d, i) - u * *x.precision(d, i) * u;
    return weights.stratified ? t + weights.at(b, i) : t;
  };
  V highest = term(0), sum{};
  for (int64_t i = 1; i < x.batch; ++i) {
    const V t = term(i);
    highest = t > highest ? t : highest;
  }
  for (int64_t i = 0; i < x.batch; ++i) sum += exp2_of(term(i) - highest);
  return highest + log2_of(sum);
}

template <class S> void ranges_of(const Columns<S>& x, int64_t b, Range<S>* ranges) {
  typedef typename Lanes<S>::Vec V;
  for (int64_t d = 0; d < x.dims; ++d) {
    const S* z = x.z + d * x.stride + b;
    V high = load<V>(z), low = -high;
    for (int r = 1; r < vectors; ++r) {
      raise(high, load<V>(z + r * Lanes<S>::width));
      raise(low, -load<V>(z + r * Lanes<S>::width));
    }
    ranges[d] = {highest_of<S>(high), highest_of<S>(low)};
  }
}

// sums, ranges: [D] of this tile's own.
template <class S>
void forward_tile(const Forward<S>& a, const Columns<S>& x, typename Lanes<S>::Vec* sums, Range<S>* ranges, int64_t b) {
  typedef typename Lanes<S>::Vec V;
  constexpr int width = Lanes<S>::width, rows = tile_rows<S>;
  const Weights<S> weights(a.in);
  S block[components * rows];
  double shift = 0, base = 0;
  for (int64_t d = 0; d < x.dims; ++d) shift += double(x.shift[d]), base += double(x.base[d]);
  LogSumExp<S> joint;
  ranges_of(x, b, ranges);
  for (int64_t k = 0; k < x.dims * vectors; ++k) sums[k] = V{};
  for (int64_t i = 0; i < x.batch; i += components) {
    const int n = x.batch - i < components ? int(x.batch - i) : components;
    joint_block<S, true>(x, weights, b, i, n, block, sums, ranges);
    joint.add(block, n);
  }
  for (int r = 0; r < vectors; ++r) {
    const int64_t row = b + int64_t(r) * width;
    const int n = x.rows - row < width ? int(x.rows - row) : width;
    if (n <= 0) break;
    Sum<V> marginals;
    for (int64_t d = 0; d < x.dims; ++d) {
      const V sum = sums[d * vectors + r];
      const V log = any(sum < least_sum<S>) ? far_marginal(x, weights, d, row) : log2_of(sum);
      marginals.add(log);
      __builtin_memcpy(a.marginal + d * x.rows + row, &log, n * sizeof(S));
    }
    const V log = joint.value(r);
    marginals.add(-log);
    V out;
    for (int lane = 0; lane < width; ++lane)
      out[lane] = S(a.offset - ln_2 * (double(marginals.high[lane]) + double(marginals.low[lane]) + shift));
    __builtin_memcpy(a.joint + row, &log, n * sizeof(S));
    __builtin_memcpy(a.out + row, &out, n * sizeof(S));
    if (!a.log_q) continue;
    for (int lane = 0; lane < n; ++lane)
      a.log_q[row + lane] = a.density_offset + ln_2 * (double(log[lane]) - shift + base);
  }
}

template <class S> int64_t tiles_of(int64_t rows) { return (rows + tile_rows<S> - 1) / tile_rows<S>; }

// Numbers of a tile's own: sums and ranges of every dimension.
template <class S> int64_t tile_numbers(int64_t dims) {
  return tile_rows<S> * dims + round_up(2 * dims, Columns<S>::line);
}

template <class S> int64_t bytes_of(const Forward<S>& a) {
  const int64_t tiles = tiles_of<S>(a.in.rows) * tile_numbers<S>(a.in.dims);
  return (Columns<S>::numbers(a.in) + tiles) * int64_t(sizeof(S));
}

template <class S> void forward(const Forward<S>& a, void* workspace, Parallel parallel) {
  typedef typename Lanes<S>::Vec V;
  S* numbers = static_cast<S*>(workspace);
  const Columns<S> x(a.in, numbers);
  prepare(a.in, x, parallel);
  S* own = numbers + Columns<S>::numbers(a.in);
  each(parallel, tiles_of<S>(x.rows), [&](int64_t tile) {
    S* at = own + tile * tile_numbers<S>(x.dims);
    forward_tile(a, x, reinterpret_cast<V*>(at), reinterpret_cast<Range<S>*>(at + tile_rows<S> * x.dims),
                 tile * tile_rows<S>);
  });
}

}  // namespace BOMKERN_ISA
}  // namespace total_correlation
}  // namespace bomkern
