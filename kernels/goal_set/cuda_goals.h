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

// The rule: mu, or the multipliers and their sum.
template <class S> struct Rule {
  S mu, sum = 0;
  const S* multipliers;

  BOMKERN_HD explicit Rule(const Forward<S>& a) : mu(*a.temperature), multipliers(a.multipliers) {
    if (multipliers == nullptr) return;
    for (int g = 0; g < a.groups.count; ++g) sum += multipliers[g];
    sum = sum > 0 ? sum : S(1);
  }
};

// The worst goal so far of each sample.
template <class S, int R> struct Scan {
  S deficit[R];  // the mean of goal g's members so far
  // M; and where smoothed Z, which is scaled down each time that M rises, or the sum of multipliers times deficits.
  S worst[R], total[R];
  int goal[R], g = 0;

  BOMKERN_HD Scan() {
#pragma unroll
    for (int r = 0; r < R; ++r) deficit[r] = 0, worst[r] = -S(__builtin_inff()), total[r] = 1, goal[r] = 0;
  }

  // Column k joins goal g. Says whether that was its last member.
  BOMKERN_HD bool take(const Groups& groups, int k, const S (&d)[R]) {
    const S inverse = inverse_of<S>(groups, g);
#pragma unroll
    for (int r = 0; r < R; ++r) deficit[r] += d[r] * inverse;
    return k + 1 == groups.first[g + 1];
  }

  // Goal g is complete.
  BOMKERN_HD void compare(const Rule<S>& rule) {
    const S weight = rule.multipliers ? rule.multipliers[g] : S(0);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const bool replace = worse(deficit[r], worst[r]);
      if (rule.multipliers) {
        total[r] = (g == 0 ? S(0) : total[r]) + (weight == 0 ? S(0) : weight * deficit[r]);
      } else if (rule.mu > 0) {
        const S apart = deficit[r] - worst[r], term = exp_of((replace ? -apart : apart) / rule.mu);
        total[r] = g == 0 ? S(1) : replace ? total[r] * term + 1 : total[r] + term;
      }
      worst[r] = replace ? deficit[r] : worst[r];
      goal[r] = replace ? g : goal[r];
      deficit[r] = 0;
    }
    ++g;
  }

  BOMKERN_HD S loss(int r, const Rule<S>& rule) const {
    if (!finite_of(worst[r])) return worst[r];
    if (rule.multipliers) return total[r];
    return rule.mu > 0 ? worst[r] + rule.mu * log_of(total[r]) : worst[r];
  }
  BOMKERN_HD bool finite(int r, const Rule<S>& rule) const {
    return finite_of(worst[r]) && (rule.multipliers == nullptr || finite_of(total[r]));
  }
};

// Calls take_share(g, weights) for each goal; where a.weight is not null also put(k, gradients) for each column.
template <class S, int R, class TakeShare, class Put>
BOMKERN_HD void share_out(const Forward<S>& a, const Ramp<S>* ramps, const Samples& samples, const Scan<S, R>& scan,
                          const Rule<S>& rule, TakeShare take_share, Put put) {
  const S part = a.reduction == Reduction::mean ? S(1) / S(a.columns.batch) : S(1);
#pragma unroll 1
  for (int g = 0; g < a.groups.count; ++g) {
    const int first = a.groups.first[g], end = a.groups.first[g + 1];
    const S inverse = inverse_of<S>(a.groups, g);
    S share[R], x[R], deficit[R], slope[R], mean[R];
#pragma unroll
    for (int r = 0; r < R; ++r) share[r] = scan.goal[r] == g, mean[r] = 0;
    if (rule.multipliers) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (scan.finite(r, rule)) share[r] = rule.multipliers[g] / rule.sum;
      }
    } else if (rule.mu > 0) {
#pragma unroll 1
      for (int k = first; k < end; ++k) {
        samples.read(k, x);
        evaluate(a.columns.curve[k], ramps[k], x, deficit, slope);
#pragma unroll
        for (int r = 0; r < R; ++r) mean[r] += deficit[r] * inverse;
      }
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (finite_of(scan.worst[r])) share[r] = exp_of((mean[r] - scan.worst[r]) / rule.mu) / scan.total[r];
      }
    }
    take_share(g, share);
    if (a.weight == nullptr) continue;
    bool none = true;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (rule.multipliers) share[r] = rule.multipliers[g];
      share[r] = scan.finite(r, rule) ? share[r] * (part * inverse) : S(0);
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
      for (int r = 0; r < R; ++r) slope[r] = share[r] == 0 ? S(0) : share[r] * slope[r];
      put(k, slope);
    }
  }
}

}  // namespace cuda
}  // namespace goal_set
}  // namespace bomkern
