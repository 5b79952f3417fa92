// goal_set_keep: updates the state of a goal set after a step. The record goes into a ring; with spill the goals' averages
// move, and each goal's weight moves towards that of its position among them. No torch here.
#pragma once
#include <math.h>
#include <stdint.h>

#include "../min_goal/min_goal.h"

namespace bomkern {
namespace goal_set {

// S is the type of the record, T that of the state.
template <class S, class T> struct Keep {
  const S* record;  // [size]
  int64_t size;
  T* ring;         // [rows, size]
  int64_t rows;
  int64_t* place;  // one: records ever kept
  int goals;       // 0 without spill, and then the rest is null
  const S* deficit;  // [goals] of this step
  const T* by_order;  // [goals] weights by position, the worst goal's first
  double rate;       // of the moving average
  bool relative;     // whether the weight of a goal beyond its nadir is divided by its average
  double follow;     // part of the way that the weights go, 0 to 1
  T* average;                          // [goals]
  T* multipliers;                      // [goals]
  T *average_before, *multipliers_before;  // the values before this step, to undo it
};

#ifdef __CUDACC__
#define BOMKERN_BOTH __host__ __device__
#else
#define BOMKERN_BOTH
#endif

// Unsigned, so that even an uninitialised place stays inside the ring.
template <class S, class T> BOMKERN_BOTH T* row_of(const Keep<S, T>& a) {
  return a.ring + static_cast<int64_t>(static_cast<uint64_t>(*a.place) % static_cast<uint64_t>(a.rows)) * a.size;
}

// Returns the new average of a goal; a deficit that is not finite leaves it unchanged.
template <class S, class T> BOMKERN_BOTH T moved(const Keep<S, T>& a, int goal) {
  const T before = a.average[goal], step = static_cast<T>(a.deficit[goal]) - before;
  return isfinite(step) ? before + static_cast<T>(a.rate) * step : before;
}

// Returns how many goals are worse; among equals the first counts as worse.
template <class T> BOMKERN_BOTH int position_of(const T* average, int goals, int goal) {
  int worse = 0;
  for (int other = 0; other < goals; ++other)
    worse += average[other] > average[goal] || (average[other] == average[goal] && other < goal);
  return worse;
}

// Returns the weight of a goal before all are divided by their sum, which only the relative ones need.
template <class S, class T> BOMKERN_BOTH T wanted(const Keep<S, T>& a, const T* average, int goal) {
  const T weight = a.by_order[position_of(average, a.goals, goal)];
  return a.relative && average[goal] > 1 ? weight / average[goal] : weight;
}

template <class T> BOMKERN_BOTH T sum_of(const T* weights, int goals) {
  T sum = 0;
  for (int g = 0; g < goals; ++g) sum += weights[g];
  return sum;
}

// Returns the new weight of a goal. A weight that goes all of the way is that of the order to the bit.
template <class S, class T> BOMKERN_BOTH T followed(const Keep<S, T>& a, T before, T weight, T sum) {
  const T target = a.relative ? weight / sum : weight;
  return a.follow < 1 ? before + static_cast<T>(a.follow) * (target - before) : target;
}

template <class S, class T> void keep_on_cpu(const Keep<S, T>& a) {
  T* row = row_of(a);
  for (int64_t i = 0; i < a.size; ++i) row[i] = static_cast<T>(a.record[i]);
  ++*a.place;
  for (int g = 0; g < a.goals; ++g) {
    a.average_before[g] = a.average[g];
    a.multipliers_before[g] = a.multipliers[g];
  }
  T now[min_goal::max_goals], weights[min_goal::max_goals];
  for (int g = 0; g < a.goals; ++g) now[g] = moved(a, g);
  for (int g = 0; g < a.goals; ++g) weights[g] = wanted(a, now, g);
  const T sum = a.relative ? sum_of(weights, a.goals) : T(1);
  for (int g = 0; g < a.goals; ++g) {
    a.average[g] = now[g];
    a.multipliers[g] = followed(a, a.multipliers[g], weights[g], sum);
  }
}

}  // namespace goal_set
}  // namespace bomkern
