// total_correlation on the CPU, backward. Chunk of rows by chunk of rows: first the joint weights of all components, which
// take every dimension; then each dimension on its own, so that both gradients are sums within one task.

namespace bomkern {
namespace total_correlation {
namespace BOMKERN_ISA {

constexpr int64_t most_rows = 1024;             // of a chunk: a dimension's rows of it stay in L1
constexpr int64_t most_weights = 4 << 20;       // of a chunk, rows x components
constexpr int64_t components_between_sums = 32;  // summed on their own before they join grad_z, which keeps rounding small

struct Plan {
  int64_t rows;   // of a chunk
  int64_t parts;  // of the components: more than 1 where D alone gives too few tasks
  int64_t components_of_a_part;
};

template <class S> Plan plan_of(const Inputs<S>& in) {
  Plan p;
  const int64_t batch = in.batch, dims = in.dims, padded = round_up(in.rows, tile_rows<S>);
  p.rows = round_up(most_weights / batch + 1, tile_rows<S>);
  p.rows = p.rows < most_rows ? p.rows : most_rows;
  p.rows = p.rows < padded ? p.rows : padded;
  const int64_t wanted = dims < 64 ? (64 + dims - 1) / dims : 1;
  p.components_of_a_part = round_up((batch + wanted - 1) / wanted, components);
  p.parts = (batch + p.components_of_a_part - 1) / p.components_of_a_part;
  return p;
}

template <class S> struct Gradients {
  Plan plan;
  Columns<S> x;
  S* marginal;                // [D, stride]: forward's, padded
  S* z;                       // [parts, D, stride]: the gradients before their constants
  S *mu, *logvar;             // [D, component_stride]
  int64_t component_stride;
  // [stride]; both gradients are 0 in the padding, and so is all that comes of it. The largest is below 2 zero_unit, so that
  // what is multiplied by it is no subnormal number: see unit_of().
  S *grad, *grad_joint;       // dL / dTC_b, and with dL / dlog q(z_b) added
  S *joint;
  S *weights;                 // [B, rows of a chunk]: grad_joint_b p_bi

  static int64_t numbers(const Inputs<S>& in) {
    const Plan p = plan_of(in);
    const int64_t stride = Columns<S>::stride_of(in.rows), components = Columns<S>::stride_of(in.batch);
    return Columns<S>::numbers(in) + stride * (in.dims * (1 + p.parts) + 3) + components * in.dims * 2 + in.batch * p.rows;
  }

  Gradients(const Inputs<S>& in, S* at)
      : plan(plan_of(in)), x(in, at), component_stride(Columns<S>::stride_of(in.batch)) {
    const int64_t column = x.stride * x.dims, component_column = component_stride * x.dims;
    marginal = at + Columns<S>::numbers(in);
    z = marginal + column;
    mu = z + plan.parts * column;
    logvar = mu + component_column;
    grad = logvar + component_column;
    grad_joint = grad + x.stride;
    joint = grad_joint + x.stride;
    weights = joint + x.stride;
  }
};

template <class S> S joint_gradient(const Backward<S>& a, int64_t b) {
  return S(double(number_at(a.grad, b)) + number_at(a.grad_log_q, b));
}

// The power of two at or below the largest finite |grad| of both kinds, from 2^-60 to 2^126: what gradients are in units of
// until the end, whatever the loss was multiplied by.
template <class S> S unit_of(const Backward<S>& a) {
  S highest = 0;
  for (int64_t b = 0; b < a.in.rows; ++b) {
    const S both[] = {number_at(a.grad, b), joint_gradient(a, b)};
    for (const S grad : both) {
      const S size = grad < 0 ? -grad : grad;
      highest = size > highest && size <= largest<S> ? size : highest;
    }
  }
  S unit = 1;
  while (unit * 2 <= highest && unit < S(0x1p126)) unit *= 2;
  while (unit > highest && unit > S(0x1p-60)) unit /= 2;
  return unit;
}

template <class S> void gather(const Backward<S>& a, const Gradients<S>& g, S unit, Parallel parallel) {
  const int64_t rows = g.x.rows, stride = g.x.stride, components = g.component_stride;
  const S scale = S(zero_unit) / unit;
  for (int64_t b = 0; b < stride; ++b) {
    g.grad[b] = b < rows ? number_at(a.grad, b) * scale : S(0);
    g.grad_joint[b] = b < rows ? joint_gradient(a, b) * scale : S(0);
    g.joint[b] = a.joint[b < rows ? b : rows - 1];
  }
  each(parallel, g.x.dims, [&](int64_t d) {
    S* to = g.marginal + d * stride;
    __builtin_memcpy(to, a.marginal + d * rows, rows * sizeof(S));
    for (int64_t b = rows; b < stride; ++b) to[b] = to[rows - 1];
    __builtin_memset(g.mu + d * components, 0, components * sizeof(S));
    __builtin_memset(g.logvar + d * components, 0, components * sizeof(S));
    for (int64_t part = 0; part < g.plan.parts; ++part)
      __builtin_memset(g.z + (part * g.x.dims + d) * stride, 0, stride * sizeof(S));
  });
}

// grad_joint_b p_bi for a tile of rows from b on, into column `at` of the chunk's weights.
template <class S> void joint_weights(const Gradients<S>& g, const Weights<S>& weights, int64_t b, int64_t at) {
  typedef typename Lanes<S>::Vec V;
  constexpr int width = Lanes<S>::width, rows = tile_rows<S>;
  S block[components * rows];
  for (int64_t i = 0; i < g.x.batch; i += components) {
    const int n = g.x.batch - i < components ? int(g.x.batch - i) : components;
    joint_block<S, false>(g.x, weights, b, i, n, block, nullptr, nullptr);
    for (int r = 0; r < vectors; ++r) {
      const V grad = load<V>(g.grad_joint + b + r * width), joint = load<V>(g.joint + b + r * width);
      for (int k = 0; k < n; ++k) {
        V p[1] = {load<V>(block + k * rows + r * width) - joint}, power[1];
        exp2_parts<Low::zero>(p, power);
        store(g.weights + (i + k) * g.plan.rows + at + r * width, p[0] * (power[0] * grad));
      }
    }
  }
}

template <class V> struct Sums {
  V shift{}, stretch{}, all{};  // of e y, e y u and e: e = grad_joint_b p_bi - grad_b q_bi, u = mu_i - z_b, y = a_i u
};

// One dimension of one component against rows [from, to) of the chunk that starts at row b; both sides of every term.
template <class S, bool Weighted>
inline void pull(const Gradients<S>& g, const Weights<S>& weights, int64_t d, int64_t i, int64_t b, int64_t from,
                 int64_t to, S* grad_z, Sums<typename Lanes<S>::Vec>& sums) {
  typedef typename Lanes<S>::Vec V;
  constexpr int width = Lanes<S>::width, rows = tile_rows<S>;
  const int64_t column = d * g.x.stride;
  const V m = splat<V>(*g.x.mu(d, i)), precision = splat<V>(*g.x.precision(d, i)), c = splat<V>(*g.x.peak(d, i));
  const S *z = g.x.z + column + b, *marginal = g.marginal + column + b, *grad = g.grad + b;
  const S* p = g.weights + i * g.plan.rows;
  Sums<V> local = sums;
  for (int64_t k = from; k < to; k += rows) {
    V u[vectors], y[vectors], q[vectors], power[vectors];
    for (int r = 0; r < vectors; ++r) u[r] = m - load<V>(z + k + r * width);
    for (int r = 0; r < vectors; ++r) y[r] = u[r] * precision;
    for (int r = 0; r < vectors; ++r) q[r] = c - y[r] * u[r];
    if constexpr (Weighted) {
      for (int r = 0; r < vectors; ++r) q[r] += weights.at(b + k + int64_t(r) * width, i);
    }
    for (int r = 0; r < vectors; ++r) q[r] -= load<V>(marginal + k + r * width);
    exp2_parts<Low::zero>(q, power);
    for (int r = 0; r < vectors; ++r) power[r] *= load<V>(grad + k + r * width);
    for (int r = 0; r < vectors; ++r) q[r] = load<V>(p + k + r * width) - q[r] * power[r];
    for (int r = 0; r < vectors; ++r) local.all += q[r];
    for (int r = 0; r < vectors; ++r) q[r] *= y[r];
    for (int r = 0; r < vectors; ++r) store(grad_z + k + r * width, load<V>(grad_z + k + r * width) + q[r]);
    for (int r = 0; r < vectors; ++r) local.shift += q[r];
    for (int r = 0; r < vectors; ++r) local.stretch += q[r] * u[r];
  }
  sums = local;
}

template <class S> S lanes_of(typename Lanes<S>::Vec v) {
  S sum = 0;
  for (int lane = 0; lane < Lanes<S>::width; ++lane) sum += v[lane];
  return sum;
}

struct Rows {
  int64_t begin, end;
};

// Whole tiles of the chunk's rows [b, b + n) that hold all in which component i weighs other than 1.
template <class S> Rows weighted_rows(const Weights<S>& weights, int64_t i, int64_t b, int64_t n) {
  constexpr int rows = tile_rows<S>;
  if (!weights.touch(b, int(n), i, 1)) return {0, 0};
  if (i == 0) return {0, n};  // its rows are the first and the last of the batch
  const int64_t own = weights.first + b;  // of the chunk's first row
  const int64_t begin = i - 1 > own ? (i - 1 - own) / rows * rows : 0, end = round_up(i + 1 - own, rows);
  return {begin, end < n ? end : n};
}

// One dimension of components [begin, end) against the chunk of n rows that starts at row b.
template <class S>
void pull_dimension(const Gradients<S>& g, const Weights<S>& weights, int64_t d, int64_t begin, int64_t end, int64_t b,
                    int64_t n, S* grad_z) {
  typedef typename Lanes<S>::Vec V;
  constexpr int width = Lanes<S>::width;
  S part[most_rows];
  for (int64_t first = begin; first < end; first += components_between_sums) {
    const int64_t last = first + components_between_sums < end ? first + components_between_sums : end;
    __builtin_memset(part, 0, n * sizeof(S));
    for (int64_t i = first; i < last; ++i) {
      Sums<V> sums;
      const Rows special = weighted_rows(weights, i, b, n);
      pull<S, false>(g, weights, d, i, b, 0, special.begin, part, sums);
      pull<S, true>(g, weights, d, i, b, special.begin, special.end, part, sums);
      pull<S, false>(g, weights, d, i, b, special.end, n, part, sums);
      const int64_t at = d * g.component_stride + i;
      g.mu[at] += lanes_of<S>(sums.shift);
      g.logvar[at] += S(ln_2) * lanes_of<S>(sums.stretch) - S(0.5) * lanes_of<S>(sums.all);
    }
    for (int64_t k = 0; k < n; k += width) store(grad_z + k, load<V>(grad_z + k) + load<V>(part + k));
  }
}

// To [count, D], dimensions [d, d + n); f(k, b) is the value.
template <class S, class F> void transpose_back(S* to, int64_t count, int64_t dims, int64_t d, int n, F f) {
  if (!to) return;
  for (int64_t b = 0; b < count; ++b) {
    for (int64_t k = d; k < d + n; ++k) to[b * dims + k] = f(k, b);
  }
}

template <class S> void scatter(const Backward<S>& a, const Gradients<S>& g, S unit, Parallel parallel) {
  const int64_t batch = g.x.batch, dims = g.x.dims, stride = g.x.stride, components = g.component_stride;
  each(parallel, (dims + dims_of_a_task - 1) / dims_of_a_task, [&](int64_t task) {
    const int64_t d = task * dims_of_a_task;
    const int n = dims - d < dims_of_a_task ? int(dims - d) : dims_of_a_task;
    transpose_back(a.grad_z, g.x.rows, dims, d, n, [&](int64_t k, int64_t b) {
      S sum = 0;
      for (int64_t part = 0; part < g.plan.parts; ++part) sum += g.z[(part * dims + k) * stride + b];
      return S(2 * ln_2) * sum * unit;
    });
    transpose_back(a.grad_mu, batch, dims, d, n, [&](int64_t k, int64_t i) {
      return S(-2 * ln_2) * g.mu[k * components + i] * unit;
    });
    transpose_back(a.grad_logvar, batch, dims, d, n, [&](int64_t k, int64_t i) { return g.logvar[k * components + i] * unit; });
  });
}

template <class S> int64_t bytes_of(const Backward<S>& a) {
  return Gradients<S>::numbers(a.in) * int64_t(sizeof(S));
}

template <class S> void backward(const Backward<S>& a, void* workspace, Parallel parallel) {
  const Gradients<S> g(a.in, static_cast<S*>(workspace));
  const Weights<S> weights(a.in);
  const int64_t padded = round_up(g.x.rows, tile_rows<S>), dims = g.x.dims, step = g.plan.components_of_a_part;
  const S unit = unit_of(a);
  prepare(a.in, g.x, parallel);
  gather(a, g, unit, parallel);
  for (int64_t b = 0; b < padded; b += g.plan.rows) {
    const int64_t n = padded - b < g.plan.rows ? padded - b : g.plan.rows;
    each(parallel, n / tile_rows<S>, [&](int64_t tile) {
      joint_weights(g, weights, b + tile * tile_rows<S>, tile * tile_rows<S>);
    });
    each(parallel, dims * g.plan.parts, [&](int64_t task) {
      const int64_t d = task % dims, part = task / dims, begin = part * step;
      const int64_t end = begin + step < g.x.batch ? begin + step : g.x.batch;
      pull_dimension(g, weights, d, begin, end, b, n, g.z + (part * dims + d) * g.x.stride + b);
    });
  }
  scatter(a, g, unit, parallel);
}

}  // namespace BOMKERN_ISA
}  // namespace total_correlation
}  // namespace bomkern
