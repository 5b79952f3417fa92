// One GPU thread's work on R samples: it reads column after column, then gives each goal its weight.
//
// Deficits are not kept: no thread has registers for 64 of them. The weights need each once more, and so does the
// gradient each slope, and both are computed again from the raw value, which is at hand in shared memory.
#pragma once
#include "../common/cuda_columns.h"
#include "../min_goal/cuda_rows.h"

#include "goal_set.h"

namespace bomkern {
namespace goal_set {
namespace cuda {

using namespace bomkern::BOMKERN_ISA;

template <int curve, class S, int R>
BOMKERN_HD void evaluate_as(const Ramp<S>& ramp, const S (&x)[R], S (&deficit)[R], S (&slope)[R]) {
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const Entry<S> entry = entry_of<S, S>(curve, x[r], ramp);
    deficit[r] = entry.deficit, slope[r] = entry.slope;
  }
}

template <class S, int R>
BOMKERN_HD void evaluate(int curve, const Ramp<S>& ramp, const S (&x)[R], S (&deficit)[R], S (&slope)[R]) {
  if (curve == LINEAR) {
    evaluate_as<LINEAR>(ramp, x, deficit, slope);
  } else if (curve == HARD) {
    evaluate_as<HARD>(ramp, x, deficit, slope);
  } else {
    evaluate_as<BARRIER>(ramp, x, deficit, slope);
  }
}

// The samples of a thread, and their raw values: in shared memory where all columns are staged, else in global memory.
struct Samples {
  const Goals& columns;
  Place place;
  const unsigned char* slot;  // null where not staged
  int column_bytes;

  template <class S, int R> BOMKERN_HD void read(int k, S (&x)[R]) const {
    if constexpr (R == rows) {
      if (slot) return read_slot(slot + k * column_bytes, columns.dtype[k], x);
    }
    const Matrix column{columns.data[k], {0, columns.stride[k]}, columns.dtype[k]};
#pragma unroll
    for (int r = 0; r < R; ++r) {
      S value[1];
      load<S, 1>(column, 0, place.nearest(r), value);
      x[r] = value[0];
    }
  }
};

template <class S> BOMKERN_HD S inverse_of(const Groups& groups, int g) {
  return S(1) / S(groups.first[g + 1] - groups.first[g]);
}

// Whether column k is present in each sample.
template <class S, int R> BOMKERN_HD void present_at(const Forward<S>& a, int k, const Place& place, bool (&here)[R]) {
#pragma unroll
  for (int r = 0; r < R; ++r) here[r] = a.present[k * a.columns.batch + place.nearest(r)];
}

// 1 over the number of goal g's members that are present in each sample, or 0 where none is.
template <bool masked, class S, int R>
BOMKERN_HD void inverses_of(const Forward<S>& a, int g, const Place& place, S (&inverse)[R]) {
  if constexpr (masked) {
    int members[R] = {};
    for (int k = a.groups.first[g]; k < a.groups.first[g + 1]; ++k) {
      bool here[R];
      present_at(a, k, place, here);
#pragma unroll
      for (int r = 0; r < R; ++r) members[r] += here[r];
    }
#pragma unroll
    for (int r = 0; r < R; ++r) inverse[r] = members[r] ? S(1) / S(members[r]) : S(0);
  } else {
    const S all = inverse_of<S>(a.groups, g);
#pragma unroll
    for (int r = 0; r < R; ++r) inverse[r] = all;
  }
}

// The samples with a goal, at least 1: what a mean divides by.
template <bool masked, class S> BOMKERN_HD S samples_of(const Forward<S>& a) {
  if constexpr (masked) return *a.counts > 1 ? *a.counts : S(1);
  return S(a.columns.batch);
}

// The rule: mu, or the multipliers and their sum; masked, that over all samples that have a goal, in units of a sample.
template <class S, bool masked> struct Rule {
  S mu, sum = 0;
  const S* multipliers;

  BOMKERN_HD explicit Rule(const Forward<S>& a) : mu(*a.temperature), multipliers(a.multipliers) {
    if (multipliers == nullptr) return;
    for (int g = 0; g < a.groups.count; ++g) sum += masked ? multipliers[g] * a.counts[1 + g] : multipliers[g];
    if constexpr (masked) sum /= samples_of<masked>(a);
    sum = sum > 0 ? sum : S(1);
  }
};

// The worst goal so far of each sample; -1 where masked and there is none yet.
template <class S, int R, bool masked> struct Scan {
  S inverse[masked ? R : 1];  // of the number of goal g's members that are present, 0 for none
  S deficit[R];  // the mean of goal g's members so far
  // M; and where smoothed Z, which is scaled down each time that M rises, or the sum of multipliers times deficits.
  S worst[R], total[R];
  int goal[R], g = 0;

  BOMKERN_HD Scan() {
#pragma unroll
    for (int r = 0; r < R; ++r) deficit[r] = 0, worst[r] = -S(__builtin_inff()), total[r] = 1, goal[r] = masked ? -1 : 0;
  }

  // Column k joins goal g. Says whether that was its last member.
  BOMKERN_HD bool take(const Forward<S>& a, int k, const S (&d)[R], const Place& place) {
    if constexpr (masked) {
      bool here[R];
      present_at(a, k, place, here);
      if (k == a.groups.first[g]) inverses_of<true>(a, g, place, inverse);
#pragma unroll
      for (int r = 0; r < R; ++r) deficit[r] += here[r] ? d[r] * inverse[r] : S(0);
    } else {
      const S all = inverse_of<S>(a.groups, g);
#pragma unroll
      for (int r = 0; r < R; ++r) deficit[r] += d[r] * all;
    }
    return k + 1 == a.groups.first[g + 1];
  }

  // Whether a sample has goal g, or any goal.
  BOMKERN_HD bool there(int r) const {
    if constexpr (masked) return inverse[r] != 0;
    return true;
  }
  BOMKERN_HD bool some(int r) const { return !masked || goal[r] >= 0; }

  // Goal g is complete.
  BOMKERN_HD void compare(const Rule<S, masked>& rule) {
    const S weight = rule.multipliers ? rule.multipliers[g] : S(0);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const bool replace = there(r) && worse(deficit[r], worst[r]);
      if (!there(r)) {
        if (rule.multipliers && g == 0) total[r] = 0;
      } else if (rule.multipliers) {
        total[r] = (g == 0 ? S(0) : total[r]) + (weight == 0 ? S(0) : weight * deficit[r]);
      } else if (rule.mu > 0) {
        const S apart = deficit[r] - worst[r], term = exp_of((replace ? -apart : apart) / rule.mu);
        total[r] = g == 0 || !some(r) ? S(1) : replace ? total[r] * term + 1 : total[r] + term;
      }
      worst[r] = replace ? deficit[r] : worst[r];
      goal[r] = replace ? g : goal[r];
      deficit[r] = 0;
    }
    ++g;
  }

  BOMKERN_HD S loss(int r, const Rule<S, masked>& rule) const {
    if (!some(r)) return 0;
    if (!finite_of(worst[r])) return worst[r];
    if (rule.multipliers) return total[r];
    return rule.mu > 0 ? worst[r] + rule.mu * log_of(total[r]) : worst[r];
  }
  BOMKERN_HD bool finite(int r, const Rule<S, masked>& rule) const {
    if (!some(r)) return true;
    return finite_of(worst[r]) && (rule.multipliers == nullptr || finite_of(total[r]));
  }
};

// Calls take_share(g, weights) for each goal; where a.weight is not null also put(k, gradients) for each column.
template <class S, int R, bool masked, class TakeShare, class Put>
BOMKERN_HD void share_out(const Forward<S>& a, const Ramp<S>* ramps, const Samples& samples, const Scan<S, R, masked>& scan,
                          const Rule<S, masked>& rule, TakeShare take_share, Put put) {
  const S part = a.reduction == Reduction::mean ? S(1) / samples_of<masked>(a) : S(1);
  S sum = rule.sum;
  if constexpr (masked && R == 1) {  // one sample is the loss: the multipliers of its own goals
    if (rule.multipliers) {
      sum = 0;
      for (int g = 0; g < a.groups.count; ++g) {
        S inverse[1];
        inverses_of<true>(a, g, samples.place, inverse);
        if (inverse[0] != 0) sum += rule.multipliers[g];
      }
      sum = sum > 0 ? sum : S(1);
    }
  }
  const auto here = [&](int k, int r) {
    if constexpr (masked) return a.present[k * a.columns.batch + samples.place.nearest(r)];
    return true;
  };
#pragma unroll 1
  for (int g = 0; g < a.groups.count; ++g) {
    const int first = a.groups.first[g], end = a.groups.first[g + 1];
    S inverse[R], share[R], x[R], deficit[R], slope[R], mean[R];
    inverses_of<masked>(a, g, samples.place, inverse);
#pragma unroll
    for (int r = 0; r < R; ++r) share[r] = scan.goal[r] == g, mean[r] = 0;
    if (rule.multipliers) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (scan.finite(r, rule)) share[r] = inverse[r] == 0 ? S(0) : rule.multipliers[g] / sum;
      }
    } else if (rule.mu > 0) {
#pragma unroll 1
      for (int k = first; k < end; ++k) {
        samples.read(k, x);
        evaluate(a.columns.curve[k], ramps[k], x, deficit, slope);
#pragma unroll
        for (int r = 0; r < R; ++r) mean[r] += here(k, r) ? deficit[r] * inverse[r] : S(0);
      }
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (!finite_of(scan.worst[r])) continue;
        share[r] = inverse[r] == 0 ? S(0) : exp_of((mean[r] - scan.worst[r]) / rule.mu) / scan.total[r];
      }
    }
    take_share(g, share);
    if (a.weight == nullptr) continue;
    bool none = true;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (rule.multipliers) share[r] = rule.multipliers[g];
      share[r] = scan.finite(r, rule) ? share[r] * (part * inverse[r]) : S(0);
      none = none && share[r] == 0;
    }
#pragma unroll 1
    for (int k = first; k < end; ++k) {
#pragma unroll
      for (int r = 0; r < R; ++r) slope[r] = 0;
      if (!none) {
        samples.read(k, x);
        evaluate(a.columns.curve[k], ramps[k], x, deficit, slope);
      }
      // A slope that is not finite where the weight is 0 must not make NaN.
#pragma unroll
      for (int r = 0; r < R; ++r) slope[r] = share[r] == 0 || !here(k, r) ? S(0) : share[r] * slope[r];
      put(k, slope);
    }
  }
}

}  // namespace cuda
}  // namespace goal_set
}  // namespace bomkern
