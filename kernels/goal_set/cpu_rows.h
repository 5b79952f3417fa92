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

// Lanes of a mask, all ones where the column is present.
template <class S> inline typename Lanes<S>::Int present_lanes(const bool* from, All) {
  return __builtin_convertvector(load<typename Lanes<S>::Bytes>(from), typename Lanes<S>::Int) != 0;
}
template <class S> inline typename Lanes<S>::Int present_lanes(const bool* from, First k) {
  typename Lanes<S>::Bytes bytes{};
  __builtin_memcpy(&bytes, from, k.n);
  return __builtin_convertvector(bytes, typename Lanes<S>::Int) != 0;
}

// The samples with a goal, at least 1: what a mean divides by.
template <class S> inline S samples_of(const Forward<S>& a) {
  return a.present ? (*a.counts > 1 ? *a.counts : S(1)) : S(a.columns.batch);
}

// A block's samples. A goal's mean deficit takes the place of its first member's, its weight the place of that.
template <class S, bool masked> struct Block {
  typedef typename Lanes<S>::Vec V;
  typedef typename Lanes<S>::Int I;
  typedef decltype(I{}[0] + I{}[0]) Index;

  S deficit[max_goals][block], slope[max_goals][block], worst[block], loss[block];
  S members[masked ? max_goals : 1][masked ? block : 1];  // of each goal, those that are present
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

template <int curve, bool masked, class S, class V>
void meet_column(const S* x, const bool* present, int k, const Ramp<S>& ramp, Block<S, masked>& b, Sums<V>& sums) {
  const V lowest = splat<V>(S(-__builtin_inff()));
  Sum<V> raw = sums.raw[k];
  V highest = sums.highest[k];
  for_vectors<S>(b.n, [&](int64_t i, auto lanes) {
    V v = load_lanes<V>(x + i, lanes);
    const Entry<V> entry = entry_of<V, S>(curve, v, ramp);
    store_lanes(b.deficit[k] + i, entry.deficit, lanes);
    store_lanes(b.slope[k] + i, entry.slope, lanes);
    if constexpr (masked) {
      const auto here = present_lanes<S>(present + i, lanes);
      const V least = here ? v : lowest;
      v = here ? v : V{};
      raw.add(v);
      const V seen = keep(is_finite(least) ? least : lowest, lowest, lanes);
      highest = seen > highest ? seen : highest;
      return;
    }
    raw.add(v);
    const V seen = keep(is_finite(v) ? v : lowest, lowest, lanes);
    highest = seen > highest ? seen : highest;
  });
  sums.raw[k] = raw;
  sums.highest[k] = highest;
}

// Deficits and slopes of column k.
template <bool masked, class S, class V>
void meet(const Forward<S>& a, int k, const Ramp<S>& ramp, Block<S, masked>& b, Sums<V>& sums) {
  const Goals& columns = a.columns;
  const bool* const present = masked ? a.present + k * columns.batch + b.first : nullptr;
  const Matrix column{columns.data[k], {0, columns.stride[k]}, columns.dtype[k]};
  S scratch[block];
  const S* x = row_of(column, 0, b.first, b.n, scratch);
  switch (columns.curve[k]) {
    case LINEAR: return meet_column<LINEAR>(x, present, k, ramp, b, sums);
    case HARD: return meet_column<HARD>(x, present, k, ramp, b, sums);
    default: return meet_column<BARRIER>(x, present, k, ramp, b, sums);
  }
}

// The mean deficit of goal g, and whether it is the worst so far.
template <bool masked, class S, class V>
void compare(const Forward<S>& a, int g, Block<S, masked>& b, Sums<V>& sums) {
  typedef typename Lanes<S>::Int I;
  const int first = a.groups.first[g], end = a.groups.first[g + 1];
  const S inverse = S(1) / S(end - first);
  Sum<V> level = sums.level[g], deficit = sums.deficit[g];
  for_vectors<S>(b.n, [&](int64_t i, auto lanes) {
    V d{};
    const V worst = load_lanes<V>(b.worst + i, lanes);
    I replace;
    if constexpr (masked) {
      const V one = splat<V>(S(1));
      const bool* const present = a.present + b.first + i;
      V members{};
      for (int k = first; k < end; ++k) members += present_lanes<S>(present + k * a.columns.batch, lanes) ? one : V{};
      const V part = one / (members == 0 ? one : members);
      for (int k = first; k < end; ++k) {
        const auto here = present_lanes<S>(present + k * a.columns.batch, lanes);
        d += here ? load_lanes<V>(b.deficit[k] + i, lanes) * part : V{};
      }
      store_lanes(b.members[g] + i, members, lanes);
      level.add(keep(members == 0 ? V{} : exp_of(-at_least(d, S(0))), V{}, lanes));
      replace = worse(d, worst) & (members != 0);
    } else {
      for (int k = first; k < end; ++k) d += load_lanes<V>(b.deficit[k] + i, lanes) * inverse;
      level.add(keep(exp_of(-at_least(d, S(0))), V{}, lanes));
      replace = worse(d, worst);
    }
    store_lanes(b.deficit[first] + i, d, lanes);
    deficit.add(d);
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

// The goals whose multiplier is not 0, which alone count in a sample's loss, and each goal's part of the multipliers' sum;
// masked, of the sum over all samples that have the goal, in units of a sample.
template <class S> struct Given {
  int count = 0, goal[max_goals];
  S part[max_goals];

  explicit Given(const Forward<S>& a) {
    if (a.multipliers == nullptr) return;
    S total = 0;
    for (int g = 0; g < a.groups.count; ++g) total += a.multipliers[g] * (a.present ? a.counts[1 + g] : S(1));
    const S samples = a.present ? samples_of(a) : S(1);
    for (int g = 0; g < a.groups.count; ++g) {
      part[g] = a.multipliers[g] * samples / (total > 0 ? total : S(1));
      if (a.multipliers[g] != 0) goal[count++] = g;
    }
  }
};

// Losses and weights, and the gradient of each column, which goes to `weight` [K, B] where that is not null.
template <Rule rule, bool masked, class S, class V>
void share_out(const Forward<S>& a, const Given<S>& given, S* weight, Block<S, masked>& b, Sums<V>& sums) {
  typedef typename Lanes<S>::Int I;
  const V one = splat<V>(S(1));
  const S mu = *a.temperature, part = a.reduction == Reduction::mean ? S(1) / samples_of(a) : S(1);
  for_vectors<S>(b.n, [&](int64_t i, auto lanes) {
    const V worst = load_lanes<V>(b.worst + i, lanes);
    const I winner = load_lanes<I>(b.winner + i, lanes);
    auto finite = is_finite(worst);
    V loss = worst, inverse = one;
    [[maybe_unused]] V multipliers = one;  // of the goals that one sample has, where it alone is the loss
    if constexpr (rule == Rule::given) {
      V total{};
      for (int j = 0; j < given.count; ++j) {
        const int g = given.goal[j];
        total += a.multipliers[g] * load_lanes<V>(b.deficit[a.groups.first[g]] + i, lanes);
      }
      loss = finite ? total : worst;
      finite = is_finite(loss);
      if constexpr (masked) {
        V sum{};
        for (int g = 0; g < a.groups.count; ++g)
          sum += load_lanes<V>(b.members[g] + i, lanes) == 0 ? V{} : splat<V>(a.multipliers[g]);
        multipliers = sum > 0 ? sum : one;
      }
    }
    if constexpr (rule == Rule::soft) {
      V total{};
      for (int g = 0; g < a.groups.count; ++g) {
        S* const place = b.deficit[a.groups.first[g]] + i;
        const V apart = (load_lanes<V>(place, lanes) - worst) / mu, hard = winner == g ? one : V{};
        V term = finite ? (apart < least_apart<S> ? V{} : exp_of(apart)) : hard;
        if constexpr (masked) term = load_lanes<V>(b.members[g] + i, lanes) == 0 ? V{} : term;
        store_lanes(place, term, lanes);
        total += term;
      }
      loss = finite ? worst + mu * log_of(total) : worst;
      if constexpr (masked) total = total == 0 ? one : total;
      inverse = 1 / total;
    }
    if constexpr (masked) {
      loss = winner < 0 ? V{} : loss;
      store_lanes(b.worst + i, winner < 0 ? V{} : worst, lanes);
    }
    store_lanes(b.loss + i, loss, lanes);
    sums.loss.add(keep(loss, V{}, lanes));
    for (int g = 0; g < a.groups.count; ++g) {
      const int first = a.groups.first[g], end = a.groups.first[g + 1];
      V share = winner == g ? one : V{};
      [[maybe_unused]] V members = one;
      if constexpr (masked) members = load_lanes<V>(b.members[g] + i, lanes);
      if constexpr (rule == Rule::given && masked) {
        const V own = a.reduction == Reduction::min ? a.multipliers[g] / multipliers : splat<V>(given.part[g]);
        share = finite ? (members == 0 ? V{} : own) : share;
      } else if constexpr (rule == Rule::given) {
        share = finite ? splat<V>(given.part[g]) : share;
      }
      if constexpr (rule == Rule::soft) share = load_lanes<V>(b.deficit[first] + i, lanes) * inverse;
      sums.share[g].add(keep(share, V{}, lanes));
      if (weight == nullptr) continue;
      if constexpr (rule == Rule::given) share = splat<V>(a.multipliers[g]);
      V pull = finite ? share * (part / S(end - first)) : V{};
      if constexpr (masked) pull = finite ? share * (part / (members == 0 ? one : members)) : V{};
      for (int k = first; k < end; ++k) {
        if constexpr (masked) {
          const auto here = present_lanes<S>(a.present + k * a.columns.batch + b.first + i, lanes);
          const V own = here ? pull : V{}, slope = load_lanes<V>(b.slope[k] + i, lanes);
          store_lanes(weight + k * a.columns.batch + b.first + i, own == 0 ? V{} : own * slope, lanes);
          continue;
        }
        const V slope = load_lanes<V>(b.slope[k] + i, lanes);  // not finite where another goal's weight is all there is
        store_lanes(weight + k * a.columns.batch + b.first + i, pull == 0 ? V{} : pull * slope, lanes);
      }
    }
  });
}

// The state of each sample, and of the block.
template <class S, bool masked> void put_rows(const Forward<S>& a, const Block<S, masked>& b, Partial* out) {
  const S* const judged = a.multipliers ? b.loss : b.worst;
  bool finite = true;
  for (int i = 0; i < b.n; ++i) finite &= is_finite(judged[i]);
  out->finite &= finite;
  for (int i = 0; i < b.n; ++i) a.bottleneck[b.first + i] = b.winner[i];
  if (a.reduction == Reduction::none) __builtin_memcpy(a.loss + b.first, b.loss, b.n * sizeof(S));
  if (a.reduction != Reduction::min) return;
  for (int i = 0; i < b.n; ++i) {
    if (masked && b.winner[i] < 0) continue;
    if (!worse(double(b.loss[i]), out->worst_loss)) continue;
    out->worst_loss = b.loss[i];
    out->worst = b.first + i;
  }
}

// Samples [begin, end).
template <bool masked, class S> void see_as(const Forward<S>& a, int64_t begin, int64_t end, S* weight, Partial* out) {
  typedef typename Lanes<S>::Vec V;
  const int columns = a.columns.count, goals = a.groups.count;
  const auto weigh = a.multipliers        ? share_out<Rule::given, masked, S, V>
                     : *a.temperature > 0 ? share_out<Rule::soft, masked, S, V>
                                          : share_out<Rule::hard, masked, S, V>;
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
  Block<S, masked> b;
  for (b.first = begin; b.first < end; b.first += block) {
    b.n = int(lesser(end - b.first, block));
    for (int i = 0; i < b.n; ++i) b.worst[i] = S(-__builtin_inff()), b.winner[i] = masked ? -1 : 0;
    for (int k = 0; k < columns; ++k) meet(a, k, ramps[k], b, sums);
    for (int g = 0; g < goals; ++g) compare(a, g, b, sums);
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

template <class S> void see(const Forward<S>& a, int64_t begin, int64_t end, S* weight, Partial* out) {
  a.present ? see_as<true>(a, begin, end, weight, out) : see_as<false>(a, begin, end, weight, out);
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
    const double samples = a.present ? double(a.counts[1 + g]) : batch;
    a.record[at.level + g] = S(all.level[g] / samples);
    a.record[at.deficit + g] = S(all.deficit[g] / samples);
  }
  for (int k = 0; k < columns; ++k) {
    a.record[at.raw + k] = S(all.raw[k] / (a.present ? double(a.counts[1 + goals + k]) : batch));
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
    const bool none = a.present && all.worst_loss == -__builtin_inf();
    *a.loss = none ? S(0) : S(all.worst_loss);
    return put_record(a, all, *a.loss, 1, taken.share);
  }
  const double samples = double(samples_of(a));
  const S loss = S(a.reduction == Reduction::sum ? all.loss : all.loss / samples);
  if (a.reduction != Reduction::none) *a.loss = loss;
  put_record(a, all, loss, samples, all.share);
}

template <class S> int64_t bytes_of(const Forward<S>& a) {
  const int64_t chunks = ceil_div(a.columns.batch, chunk);
  return chunks > 1 ? chunks * int64_t(sizeof(Partial)) : 0;
}

}  // namespace BOMKERN_ISA
}  // namespace goal_set
}  // namespace bomkern

#include "cpu_backward.h"

namespace bomkern {
namespace goal_set {
namespace BOMKERN_ISA {

BOMKERN_CPU_OP

}  // namespace BOMKERN_ISA
}  // namespace goal_set
}  // namespace bomkern
