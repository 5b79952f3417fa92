// Shared by both directions of total_correlation on the CPU, for one instruction set. Lanes of a vector are rows.
#include "../common/cpu_rows.h"

#include "total_correlation.h"

namespace bomkern {
namespace total_correlation {
namespace BOMKERN_ISA {

using namespace bomkern::BOMKERN_ISA;

constexpr int vectors = 4;        // of rows in a tile: each broadcast of a component serves them all
constexpr int components = 64;    // in a block: its joint terms, components x rows, stay in L1
constexpr int dims_at_once = 64;  // summed on their own before they join the joint's total, which keeps rounding small
constexpr int dims_of_a_task = 16;  // where inputs are transposed: a row's share of them is one line
constexpr double log2_e = 1.4426950408889634, ln_2 = 0.6931471805599453;

template <class S> constexpr S largest = sizeof(S) == 4 ? S(__FLT_MAX__) : S(__DBL_MAX__);
template <class S> constexpr int tile_rows = vectors * Lanes<S>::width;

// The highest value and minus the lowest of a dimension, over a block of components or a tile of rows.
template <class S> struct Range {
  S high, low;
};

// The lower bound of t for a block of components in one dimension.
template <class S> struct Bounds {
  Range<S> mu;
  S precision, fall;  // the highest a; the highest C_d - c

  bool hold(const Range<S>& z) const {
    const S right = z.high + mu.low, left = mu.high + z.low, reach = right > left ? right : left;
    return fall + precision * reach * reach < 125;
  }
};

// Per lane, then over the lanes; NaN is passed over.
template <class V> inline void raise(V& high, V v) { high = v > high ? v : high; }
template <class S, class V> inline S highest_of(V v) {
  S high = v[0];
  for (int lane = 1; lane < Lanes<S>::width; ++lane) high = v[lane] > high ? v[lane] : high;
  return high;
}

// The inputs as the kernels want them. Rows past R and components past B repeat the last one: padding is an ordinary value.
template <class S> struct Columns {
  int64_t rows, batch, dims, stride;
  S* z;  // [D, stride]; the stride is no power of two, which would put all dimensions of a row into a few lines of a cache
  // [blocks of components, D, 3, components]: mu, a and c - C_d in the order in which a tile of rows reads them.
  S* parameters;
  Bounds<S>* bounds;  // [blocks of components, D]
  // [D] minus what t is for a component's own sample, on average: added to the joint, it keeps the terms that count small
  // and so their rounding. Forward takes the total off again.
  S* shift;
  S* base;  // [D] C_d

  static constexpr int64_t line = 64 / int64_t(sizeof(S));
  static int64_t stride_of(int64_t rows) { return round_up(rows, tile_rows<S>) + line; }
  static int64_t numbers(const Inputs<S>& in) {
    const int64_t padded = round_up(in.batch, components), dims = in.dims;
    return dims * stride_of(in.rows) + 3 * dims * padded + round_up(4 * dims * padded / components, line) +
           2 * round_up(dims, line);
  }

  Columns(const Inputs<S>& in, S* at) : rows(in.rows), batch(in.batch), dims(in.dims), stride(stride_of(in.rows)), z(at) {
    parameters = z + dims * stride;
    const int64_t blocks = round_up(batch, components) / components;
    S* after = parameters + 3 * dims * components * blocks;
    bounds = reinterpret_cast<Bounds<S>*>(after);
    shift = after + round_up(4 * dims * blocks, line);
    base = shift + round_up(dims, line);
  }
  S* mu(int64_t d, int64_t i) const {
    return parameters + (i / components * dims + d) * 3 * components + i % components;
  }
  S* precision(int64_t d, int64_t i) const { return mu(d, i) + components; }
  S* peak(int64_t d, int64_t i) const { return mu(d, i) + 2 * components; }
};

// Dimensions [d, d + n) of an input to where place(d, b) says, for b up to `padded`: whole lines at a time.
template <class S, class Place>
void transpose(const Matrix& from, int64_t count, int64_t padded, int64_t d, int n, Place place) {
  constexpr int line = int(Columns<S>::line);
  const bool plain = from.dtype == (sizeof(S) == 4 ? DType::f32 : DType::f64);
  const S* values = static_cast<const S*>(from.data);
  for (int64_t b = 0; b < padded; b += line) {
    int64_t row[line];
    for (int j = 0; j < line; ++j) row[j] = (b + j < count ? b + j : count - 1) * from.stride[0];
    for (int64_t k = d; k < d + n; ++k) {
      S* to = place(k, b);
      const int64_t column = k * from.stride[1];
      if (plain) {
        for (int j = 0; j < line; ++j) to[j] = values[row[j] + column];
      } else {
        for (int j = 0; j < line; ++j) to[j] = load_one<S>(from.data, from.dtype, row[j] + column);
      }
    }
  }
}

// One dimension's precisions and peaks from its log-variances (where the peaks will be), and its shift.
template <class S> void precisions_of(const Columns<S>& x, int64_t d) {
  typedef typename Lanes<S>::Vec V;
  constexpr int width = Lanes<S>::width;
  const V least = splat<V>(S(-__builtin_inff()));
  V top = least, bottom = least;
  Sum<V> sum;
  const auto for_each_block = [&](auto f) {
    for (int64_t i = 0; i < x.batch; i += components) f(i, x.precision(d, i), x.peak(d, i));
  };
  for_each_block([&](int64_t, S* precision, S* peak) {
    for (int k = 0; k < components; k += width) {
      const V logvar = load<V>(peak + k), c = logvar * S(-log2_e / 2);
      store(precision + k, exp_of(-logvar) * S(log2_e / 2));
      store(peak + k, c);
      raise(top, c);
      raise(bottom, -c);
      sum.add(c);
    }
  });
  const S highest = highest_of<S>(top), lowest = -highest_of<S>(bottom);
  // C_d: the middle keeps the logarithms small, and so their rounding; but gradients are largest where a component is
  // narrowest, and its own terms must stay small too.
  const S middle = (highest + lowest) / 2, base = middle > highest - 8 ? middle : highest - 8;
  for_each_block([&](int64_t i, S* precision, S* peak) {
    const S* mu = x.mu(d, i);
    V high = least, low = least, steepest = least, fall = least;
    for (int k = 0; k < components; k += width) {
      const V m = load<V>(mu + k), c = load<V>(peak + k) - base;
      store(peak + k, c);
      raise(high, m);
      raise(low, -m);
      raise(steepest, load<V>(precision + k));
      raise(fall, -c);
    }
    x.bounds[i / components * x.dims + d] = {{highest_of<S>(high), highest_of<S>(low)}, highest_of<S>(steepest),
                                             highest_of<S>(fall)};
  });
  // The padding counts too: the mean need not be exact.
  x.base[d] = base;
  x.shift[d] = S(log2_e / 2 - (sum.value() / double(round_up(x.batch, components)) - double(base)));
}

template <class S> void prepare(const Inputs<S>& in, const Columns<S>& to, Parallel parallel) {
  const int64_t padded = round_up(in.batch, components);
  each(parallel, (in.dims + dims_of_a_task - 1) / dims_of_a_task, [&](int64_t task) {
    const int64_t d = task * dims_of_a_task;
    const int n = in.dims - d < dims_of_a_task ? int(in.dims - d) : dims_of_a_task;
    transpose<S>(in.z, in.rows, to.stride, d, n, [&](int64_t k, int64_t b) { return to.z + k * to.stride + b; });
    transpose<S>(in.mu, in.batch, padded, d, n, [&](int64_t k, int64_t i) { return to.mu(k, i); });
    transpose<S>(in.logvar, in.batch, padded, d, n, [&](int64_t k, int64_t i) { return to.peak(k, i); });
    for (int64_t k = d; k < d + n; ++k) precisions_of(to, k);
  });
}

// The stratified weights: component first + b is row b's own, and the one after it its next.
template <class S> struct Weights {
  typedef typename Lanes<S>::Vec V;
  S own, next;  // in bits: added to t, so that where one component is all there is, backward's q is 1 to the bit
  int64_t rows, batch, first;
  bool stratified;

  explicit Weights(const Inputs<S>& in)
      : own(S(__builtin_log2(double(in.own)))),
        next(S(__builtin_log2(double(in.next)))),
        rows(in.rows),
        batch(in.batch),
        first(in.first),
        stratified(in.stratified) {}

  // Whether any of the components [i, i + n) weighs other than 1 in any of the rows [b, b + m).
  bool touch(int64_t b, int m, int64_t i, int64_t n) const {
    const int64_t own = first + b;
    return stratified && ((i < own + m + 1 && own < i + n) || (i == 0 && own + m >= batch));
  }
  // Those of component i in the rows from b on.
  V at(int64_t b, int64_t i) const {
    V w{};
    for (int lane = 0; lane < Lanes<S>::width; ++lane) {
      const int64_t mine = first + b + lane;
      w[lane] = mine == i ? own : (mine + 1 == batch ? 0 : mine + 1) == i ? next : S(0);
    }
    return w;
  }
  // f(row, component, weight) for the pairs in rows [b, b + m) x components [i, i + n) that do not weigh 1.
  template <class F> void visit(int64_t b, int m, int64_t i, int64_t n, F f) const {
    if (!touch(b, m, i, n)) return;
    for (int64_t row = b; row < b + m && row < rows; ++row) {
      const int64_t mine = first + row, after = mine + 1 == batch ? 0 : mine + 1;
      if (mine >= i && mine < i + n) f(row, mine, own);
      if (after >= i && after < i + n) f(row, after, next);
    }
  }
};

// One dimension of rows x components: adds every t to `joint` [n, rows], and with Marginals every w 2^t to sum.
// Bounded: no t is below -125. No running maximum: t <= 8 by construction. A term costs 15 vector instructions, 10 of
// them in exp2_parts.
template <class S, bool Marginals, bool Weighted, bool Bounded>
inline void add_terms(const Columns<S>& x, const Weights<S>& weights, int64_t d, int64_t b, int64_t i, int n, S* joint,
                      typename Lanes<S>::Vec* sum) {
  typedef typename Lanes<S>::Vec V;
  constexpr int width = Lanes<S>::width;
  const S *mu = x.mu(d, i), *precision = x.precision(d, i), *peak = x.peak(d, i), *z = x.z + d * x.stride + b;
  V total[vectors];
  for (int r = 0; r < vectors; ++r) total[r] = V{};
  for (int k = 0; k < n; ++k) {
    const V m = splat<V>(mu[k]), a = splat<V>(precision[k]), c = splat<V>(peak[k]);
    S* out = joint + k * tile_rows<S>;
    V u[vectors], t[vectors], power[vectors];
    for (int r = 0; r < vectors; ++r) u[r] = m - load<V>(z + r * width);  // this way round, z stays in memory
    for (int r = 0; r < vectors; ++r) t[r] = u[r] * a;
    for (int r = 0; r < vectors; ++r) t[r] = c - t[r] * u[r];
    for (int r = 0; r < vectors; ++r) store(out + r * width, load<V>(out + r * width) + t[r]);
    if constexpr (!Marginals) continue;
    if constexpr (Weighted) {
      for (int r = 0; r < vectors; ++r) t[r] += weights.at(b + int64_t(r) * width, i + k);
    }
    exp2_parts<Bounded ? Low::bounded : Low::floor>(t, power);
    for (int r = 0; r < vectors; ++r) total[r] += t[r] * power[r];
  }
  if constexpr (Marginals) {
    for (int r = 0; r < vectors; ++r) sum[r] += total[r];
  }
}

// A block of the joint's logarithms, [n, rows], weights included; with Marginals also adds to `sums` [D, rows], and wants
// the range [D] of z over the tile. The same order of operations in both directions, so that backward's terms cancel
// against forward's to the bit.
template <class S, bool Marginals>
void joint_block(const Columns<S>& x, const Weights<S>& weights, int64_t b, int64_t i, int n, S* joint,
                 typename Lanes<S>::Vec* sums, const Range<S>* rows_of) {
  typedef typename Lanes<S>::Vec V;
  constexpr int rows = tile_rows<S>, width = Lanes<S>::width;
  S part[components * rows];
  const bool weighted = Marginals && weights.touch(b, rows, i, n);
  for (int64_t first = 0; first < x.dims; first += dims_at_once) {
    const int64_t last = first + dims_at_once < x.dims ? first + dims_at_once : x.dims;
    S* to = first ? part : joint;
    S shift = 0;
    for (int64_t d = first; d < last; ++d) shift += x.shift[d];
    for (int k = 0; k < n * rows; k += width) store(to + k, splat<V>(shift));
    for (int64_t d = first; d < last; ++d) {
      if constexpr (!Marginals) {
        add_terms<S, false, false, false>(x, weights, d, b, i, n, to, nullptr);
      } else {
        const bool bounded = x.bounds[i / components * x.dims + d].hold(rows_of[d]);
        (weighted  ? add_terms<S, true, true, false>
         : bounded ? add_terms<S, true, false, true>
                   : add_terms<S, true, false, false>)(x, weights, d, b, i, n, to, sums + d * vectors);
      }
    }
    if (!first) continue;
    for (int k = 0; k < n * rows; k += width) store(joint + k, load<V>(joint + k) + load<V>(part + k));
  }
  weights.visit(b, rows, i, n, [&](int64_t row, int64_t component, S w) {
    joint[(component - i) * rows + (row - b)] += w;
  });
}

}  // namespace BOMKERN_ISA
}  // namespace total_correlation
}  // namespace bomkern
