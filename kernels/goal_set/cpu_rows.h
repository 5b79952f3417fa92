// goal_set on the CPU for one instruction set: a block of samples at a time, column by column, all of it in L1.
#include "../common/cpu_rows.h"
// (cpu_rows.h first: score.h is written in its words)
#include "../min_goal/score.h"

#include "goal_set.h"

namespace bomkern {
namespace goal_set {
namespace BOMKERN_ISA {

using namespace bomkern::BOMKERN_ISA;

constexpr int block = 128;       // samples
constexpr int64_t chunk = 4096;  // samples of a task; fixed, so that the order of additions depends on B alone

// A chunk's contribution to the result.
struct Partial {
  double loss, worst_loss;
  int64_t worst;  // sample
  bool finite;
  double share[max_goals], level[max_goals], deficit[max_goals], raw[max_goals], highest[max_goals];
};

// A chunk's running sums.
template <class V> struct Sums {
  Sum<V> loss, share[max_goals], level[max_goals], deficit[max_goals], raw[max_goals];
  V highest[max_goals];
};

// A block's samples. A goal's mean deficit takes the place of its first member's, its weight the place of that.
template <class S> struct Block {
  typedef typename Lanes<S>::Vec V;
  typedef typename Lanes<S>::Int I;
  typedef decltype(I{}[0] + I{}[0]) Index;

  S deficit[max_goals][block], slope[max_goals][block], worst[block], loss[block];
  Index winner[block];
  int64_t first;
  int n;
};

// v in the valid lanes, `other` in the rest.
template <class V> inline V keep(V v, V, All) { return v; }
template <class V> inline V keep(V v, V other, First k) {
  __builtin_memcpy(&other, &v, k.n * sizeof(v[0]));
  return other;
}

template <class V> inline auto is_finite(V v) { return (v - v) == 0; }

template <int curve, class S, class V>
void meet_column(const S* x, int k, const Ramp<S>& ramp, Block<S>& b, Sums<V>& sums) {
  const V lowest = splat<V>(S(-__builtin_inff()));
  Sum<V> raw = sums.raw[k];
  V highest = sums.highest[k];
  for_vectors<S>(b.n, [&](int64_t i, auto lanes) {
    const V v = load_lanes<V>(x + i, lanes);
    const Entry<V> entry = entry_of<V, S>(curve, v, ramp);
    store_lanes(b.deficit[k] + i, entry.deficit, lanes);
    store_lanes(b.slope[k] + i, entry.slope, lanes);
    raw.add(v);
    const V seen = keep(is_finite(v) ? v : lowest, lowest, lanes);
    highest = seen > highest ? seen : highest;
  });
  sums.raw[k] = raw;
  sums.highest[k] = highest;
}

// Deficits and slopes of column k.
template <class S, class V> void meet(const Goals& columns, int k, const Ramp<S>& ramp, Block<S>& b, Sums<V>& sums) {
  const Matrix column{columns.data[k], {0, columns.stride[k]}, columns.dtype[k]};
  S scratch[block];
  const S* x = row_of(column, 0, b.first, b.n, scratch);
  switch (columns.curve[k]) {
    case LINEAR: return meet_column<LINEAR>(x, k, ramp, b, sums);
    case HARD: return meet_column<HARD>(x, k, ramp, b, sums);
    default: return meet_column<BARRIER>(x, k, ramp, b, sums);
  }
}

// The mean deficit of goal g, and whether it is the worst so far.
template <class S, class V> void compare(const Groups& groups, int g, Block<S>& b, Sums<V>& sums) {
  typedef typename Lanes<S>::Int I;
  const int first = groups.first[g], end = groups.first[g + 1];
  const S inverse = S(1) / S(end - first);
  Sum<V> level = sums.level[g], deficit = sums.deficit[g];
  for_vectors<S>(b.n, [&](int64_t i, auto lanes) {
    V d{};
    for (int k = first; k < end; ++k) d += load_lanes<V>(b.deficit[k] + i, lanes) * inverse;
    store_lanes(b.deficit[first] + i, d, lanes);
    level.add(keep(exp_of(-d), V{}, lanes));
    deficit.add(d);
    const V worst = load_lanes<V>(b.worst + i, lanes);
    const auto replace = worse(d, worst);
    store_lanes(b.worst + i, replace ? d : worst, lanes);
    store_lanes(b.winner + i, replace ? I{} + g : load_lanes<I>(b.winner + i, lanes), lanes);
  });
  sums.level[g] = level;
  sums.deficit[g] = deficit;
}

// So far below the worst, in temperatures, a goal's weight is exactly 0: it adds nothing to the sum, and in float32 its
// products would be subnormal numbers. In float64 its own gradient is a normal number down to where its weight is one.
template <class S> constexpr S least_apart = sizeof(S) == 4 ? -69 : -708;

// The weights of goals: all to the worst, or to each by its distance from the worst, or as the multipliers say.
enum class Rule { hard, soft, given };

// The goals whose multiplier is not 0, which alone count in a sample's loss, and each goal's part of the multipliers' sum.
template <class S> struct Given {
  int count = 0, goal[max_goals];
  S part[max_goals];

  explicit Given(const Forward<S>& a) {
    if (a.multipliers == nullptr) return;
    S total = 0;
    for (int g = 0; g < a.groups.count; ++g) total += a.multipliers[g];
    for (int g = 0; g < a.groups.count; ++g) {
      part[g] = a.multipliers[g] / (total > 0 ? total : S(1));
      if (a.multipliers[g] != 0) goal[count++] = g;
    }
  }
};

// Losses and weights, and the gradient of each column, which goes to `weight` [K, B] where that is not null.
template <Rule rule, class S, class V>
void share_out(const Forward<S>& a, const Given<S>& given, S* weight, Block<S>& b, Sums<V>& sums) {
  typedef typename Lanes<S>::Int I;
  const V one = splat<V>(S(1));
  const S mu = *a.temperature, part = a.reduction == Reduction::mean ? S(1) / S(a.columns.batch) : S(1);
  for_vectors<S>(b.n, [&](int64_t i, auto lanes) {
    const V worst = load_lanes<V>(b.worst + i, lanes);
    const I winner = load_lanes<I>(b.winner + i, lanes);
    auto finite = is_finite(worst);
    V loss = worst, inverse = one;
    if constexpr (rule == Rule::given) {
      V total{};
      for (int j = 0; j < given.count; ++j) {
        const int g = given.goal[j];
        total += a.multipliers[g] * load_lanes<V>(b.deficit[a.groups.first[g]] + i, lanes);
      }
      loss = finite ? total : worst;
      finite = is_finite(loss);
    }
    if constexpr (rule == Rule::soft) {
      V total{};
      for (int g = 0; g < a.groups.count; ++g) {
        S* const place = b.deficit[a.groups.first[g]] + i;
        const V apart = (load_lanes<V>(place, lanes) - worst) / mu, hard = winner == g ? one : V{};
        const V term = finite ? (apart < least_apart<S> ? V{} : exp_of(apart)) : hard;
        store_lanes(place, term, lanes);
        total += term;
      }
      loss = finite ? worst + mu * log_of(total) : worst;
      inverse = 1 / total;
    }
    store_lanes(b.loss + i, loss, lanes);
    sums.loss.add(keep(loss, V{}, lanes));
    for (int g = 0; g < a.groups.count; ++g) {
      const int first = a.groups.first[g], end = a.groups.first[g + 1];
      V share = winner == g ? one : V{};
      if constexpr (rule == Rule::given) share = finite ? splat<V>(given.part[g]) : share;
      if constexpr (rule == Rule::soft) share = load_lanes<V>(b.deficit[first] + i, lanes) * inverse;
      sums.share[g].add(keep(share, V{}, lanes));
      if (weight == nullptr) continue;
      if constexpr (rule == Rule::given) share = splat<V>(a.multipliers[g]);
      const V pull = finite ? share * (part / S(end - first)) : V{};
      for (int k = first; k < end; ++k) {
        const V slope = load_lanes<V>(b.slope[k] + i, lanes);  // not finite where another goal's weight is all there is
        store_lanes(weight + k * a.columns.batch + b.first + i, pull == 0 ? V{} : pull * slope, lanes);
      }
    }
  });
}

// The state of each sample, and of the block.
template <class S> void put_rows(const Forward<S>& a, const Block<S>& b, Partial* out) {
  const S* const judged = a.multipliers ? b.loss : b.worst;
  bool finite = true;
  for (int i = 0; i < b.n; ++i) finite &= is_finite(judged[i]);
  out->finite &= finite;
  for (int i = 0; i < b.n; ++i) a.bottleneck[b.first + i] = b.winner[i];
  if (a.reduction == Reduction::none) __builtin_memcpy(a.loss + b.first, b.loss, b.n * sizeof(S));
  if (a.reduction != Reduction::min) return;
  for (int i = 0; i < b.n; ++i) {
    if (!worse(double(b.loss[i]), out->worst_loss)) continue;
    out->worst_loss = b.loss[i];
    out->worst = b.first + i;
  }
}

// Samples [begin, end).
template <class S> void see(const Forward<S>& a, int64_t begin, int64_t end, S* weight, Partial* out) {
  typedef typename Lanes<S>::Vec V;
  const int columns = a.columns.count, goals = a.groups.count;
  const auto weigh = a.multipliers        ? share_out<Rule::given, S, V>
                     : *a.temperature > 0 ? share_out<Rule::soft, S, V>
                                          : share_out<Rule::hard, S, V>;
  const Given<S> given(a);
  Ramp<S> ramps[max_goals];
  Sums<V> sums;
  for (int k = 0; k < columns; ++k) {
    const S tail = a.params[4 * k + 3];
    ramps[k] = ramp_of(a.params + 4 * k, S(tail > 0 ? __builtin_log(tail) : 0));
    sums.highest[k] = splat<V>(S(-__builtin_inff()));
  }
  out->worst_loss = -__builtin_inf();
  out->worst = begin;
  out->finite = true;
  Block<S> b;
  for (b.first = begin; b.first < end; b.first += block) {
    b.n = int(lesser(end - b.first, block));
    for (int i = 0; i < b.n; ++i) b.worst[i] = S(-__builtin_inff()), b.winner[i] = 0;
    for (int k = 0; k < columns; ++k) meet(a.columns, k, ramps[k], b, sums);
    for (int g = 0; g < goals; ++g) compare(a.groups, g, b, sums);
    weigh(a, given, weight, b, sums);
    put_rows(a, b, out);
  }
  out->loss = sums.loss.value();
  for (int g = 0; g < goals; ++g) {
    out->share[g] = sums.share[g].value();
    out->level[g] = sums.level[g].value();
    out->deficit[g] = sums.deficit[g].value();
  }
  for (int k = 0; k < columns; ++k) {
    out->raw[k] = sums.raw[k].value();
    S highest = sums.highest[k][0];
    for (int i = 1; i < Lanes<S>::width; ++i) highest = sums.highest[k][i] > highest ? sums.highest[k][i] : highest;
    out->highest[k] = highest;
  }
}

// Merges `from` into `to`; the samples of `from` come after those of `to`.
inline void merge(Partial& to, const Partial& from, int goals, int columns) {
  to.loss += from.loss;
  to.finite &= from.finite;
  if (worse(from.worst_loss, to.worst_loss)) to.worst_loss = from.worst_loss, to.worst = from.worst;
  for (int g = 0; g < goals; ++g) {
    to.share[g] += from.share[g];
    to.level[g] += from.level[g];
    to.deficit[g] += from.deficit[g];
  }
  for (int k = 0; k < columns; ++k) {
    to.raw[k] += from.raw[k];
    to.highest[k] = from.highest[k] > to.highest[k] ? from.highest[k] : to.highest[k];
  }
}

template <class S> void put_record(const Forward<S>& a, const Partial& all, S loss, double taken, const double* share) {
  const int columns = a.columns.count, goals = a.groups.count;
  const RecordAt at(goals, columns);
  const double batch = double(a.columns.batch);
  for (int g = 0; g < goals; ++g) {
    a.record[at.share + g] = S(share[g] / taken);
    a.record[at.level + g] = S(all.level[g] / batch);
    a.record[at.deficit + g] = S(all.deficit[g] / batch);
  }
  for (int k = 0; k < columns; ++k) {
    a.record[at.raw + k] = S(all.raw[k] / batch);
    a.record[at.highest + k] = S(all.highest[k]);
    a.record[at.ideal + k] = a.params[4 * k];
    a.record[at.slope + k] = a.params[4 * k + 1];
  }
  a.record[at.loss] = loss;
  a.record[at.finite] = S(all.finite);
}

template <class S> void forward(const Forward<S>& a, void* workspace, Parallel parallel) {
  const int64_t batch = a.columns.batch, chunks = ceil_div(batch, chunk);
  const bool global = a.reduction == Reduction::min;
  Partial one;
  Partial* const parts = workspace ? static_cast<Partial*>(workspace) : &one;
  each(parallel, chunks, [&](int64_t c) {
    const int64_t begin = c * chunk, end = lesser(begin + chunk, batch);
    see(a, begin, end, global ? nullptr : a.weight, parts + c);
    for (int k = 0; global && a.weight && k < a.columns.count; ++k)
      __builtin_memset(a.weight + k * batch + begin, 0, (end - begin) * sizeof(S));
  });
  for (int64_t c = 1; c < chunks; ++c) merge(parts[0], parts[c], a.groups.count, a.columns.count);
  const Partial& all = parts[0];
  if (global) {
    Partial taken;
    see(a, all.worst, all.worst + 1, a.weight, &taken);
    *a.loss = S(all.worst_loss);
    return put_record(a, all, *a.loss, 1, taken.share);
  }
  const S loss = S(a.reduction == Reduction::sum ? all.loss : all.loss / double(batch));
  if (a.reduction != Reduction::none) *a.loss = loss;
  put_record(a, all, loss, double(batch), all.share);
}

template <class S> int64_t bytes_of(const Forward<S>& a) {
  const int64_t chunks = ceil_div(a.columns.batch, chunk);
  return chunks > 1 ? chunks * int64_t(sizeof(Partial)) : 0;
}

// A weight of 0 blocks an infinite or NaN incoming gradient.
template <class V> inline V times(V weight, V grad) { return weight == 0 ? V{} : weight * grad; }

// Samples [begin, end) of column k's gradient.
template <class S> void put_column(const Backward<S>& a, int k, int64_t begin, int64_t end, const Gradient& to) {
  typedef typename Lanes<S>::Vec V;
  const S* const weight = a.weight + k * a.batch;
  S scratch[panel], grads[panel];
  for (int64_t b = begin; b < end; b += panel) {
    const int n = int(lesser(end - b, panel));
    S* const out = to.place(b, scratch);
    if (a.grad.stride != 0) {
      const Matrix all{a.grad.data, {0, a.grad.stride}, sizeof(S) == 4 ? DType::f32 : DType::f64};
      const S* const grad = row_of(all, 0, b, n, grads);
      for_vectors<S>(n, [&](int64_t i, auto lanes) {
        store_lanes(out + i, times(load_lanes<V>(weight + b + i, lanes), load_lanes<V>(grad + i, lanes)), lanes);
      });
    } else {
      const V grad = splat<V>(*a.grad.data);
      for_vectors<S>(n, [&](int64_t i, auto lanes) {
        store_lanes(out + i, times(load_lanes<V>(weight + b + i, lanes), grad), lanes);
      });
    }
    to.put(b, n, out);
  }
}

// Rows [begin, end) of the [B, K] matrix.
template <class S> void put_matrix(const Backward<S>& a, int64_t begin, int64_t end, const Gradient& to) {
  S scratch[panel];
  const int64_t rows = panel / a.columns;
  for (int64_t b = begin; b < end; b += rows) {
    const int64_t n = lesser(end - b, rows);
    S* const out = to.place(b * a.columns, scratch);
    for (int k = 0; k < a.columns; ++k) {
      const S* const weight = a.weight + k * a.batch + b;
      for (int64_t i = 0; i < n; ++i) {
        const S w = weight[i];
        out[i * a.columns + k] = w == 0 ? S(0) : w * number_at(a.grad, b + i);
      }
    }
    to.put(b * a.columns, int(n * a.columns), out);
  }
}

// The gradient of a batch-level goal, from samples [begin, end).
template <class S> double sum_column(const Backward<S>& a, int k, int64_t begin, int64_t end) {
  double sum = 0;
  for (int64_t b = begin; b < end; ++b) {
    const double w = a.weight[k * a.batch + b];
    sum += w == 0 ? 0.0 : w * double(number_at(a.grad, b));
  }
  return sum;
}

template <class S> void backward(const Backward<S>& a, void* workspace, Parallel parallel) {
  const int64_t chunks = ceil_div(a.batch, chunk);
  double one[max_goals], *const parts = workspace ? static_cast<double*>(workspace) : one;
  each(parallel, chunks, [&](int64_t c) {
    const int64_t begin = c * chunk, end = lesser(begin + chunk, a.batch);
    for (int o = 0; o < a.outputs; ++o) {
      const Output& out = a.out[o];
      const Gradient to{out.data, out.dtype};
      if (out.batch_level) {
        parts[c * a.outputs + o] = sum_column(a, out.column, begin, end);
      } else if (out.column < 0) {
        put_matrix(a, begin, end, to);
      } else {
        put_column(a, out.column, begin, end, to);
      }
    }
  });
  for (int o = 0; o < a.outputs; ++o) {
    if (!a.out[o].batch_level) continue;
    double sum = 0;
    for (int64_t c = 0; c < chunks; ++c) sum += parts[c * a.outputs + o];
    const Gradient to{a.out[o].data, a.out[o].dtype};
    S scratch, *const out = to.place(0, &scratch);
    *out = S(sum);
    to.put(0, 1, out);
  }
}

template <class S> int64_t bytes_of(const Backward<S>& a) {
  const int64_t chunks = ceil_div(a.batch, chunk);
  return chunks > 1 ? chunks * a.outputs * int64_t(sizeof(double)) : 0;
}

BOMKERN_CPU_OP

}  // namespace BOMKERN_ISA
}  // namespace goal_set
}  // namespace bomkern
