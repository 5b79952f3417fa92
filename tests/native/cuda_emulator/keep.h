// Checks goal_set_keep under the emulator against its definition, for check_goal_set.cpp.
#pragma once
#include <algorithm>

#include "checking.h"

#include "../../../kernels/goal_set/cuda.h"

namespace checking {

using bomkern::goal_set::cuda_run;
using bomkern::goal_set::Keep;

// Checks the record, the ring and the weights after a few steps against both written out; a tie goes to the first.
template <class S, class T>
void check_keep(int goals, int size, int64_t rows, bool spill, bool relative = false, double follow = 1) {
  begin("keep float%d float%d goals=%d size=%d rows=%lld spill=%d relative=%d follow=%g", int(sizeof(S)) * 8,
        int(sizeof(T)) * 8, goals, size, (long long)rows, spill, relative, follow);
  const int G = spill ? goals : 0;
  Buffer<S> record(size), deficit(G);
  Buffer<T> ring(rows * size), by_order(G), average(G), multipliers(G), average_before(G), multipliers_before(G);
  Buffer<int64_t> place(1);
  *place.data = 0;
  for (int g = 0; g < G; ++g) by_order.data[g] = T(1) / T(g + 1), average.data[g] = 0, multipliers.data[g] = T(0.5);
  const Keep<S, T> a{record.data,  size,         ring.data,        rows,
                     place.data,   G,            deficit.data,     by_order.data,
                     0.25,         relative,     follow,           average.data,
                     multipliers.data,           average_before.data, multipliers_before.data};
  for (int step = 0; step < 5; ++step) {
    for (int i = 0; i < size; ++i) record.data[i] = S(normal());
    std::vector<double> was(G), weighed(G), want(G);
    for (int g = 0; g < G; ++g) {
      deficit.data[g] = g % 7 == 3 ? S(NAN) : S(g % 5 == 4 ? 1 : (relative ? 20 : 1) * normal());
      was[g] = average.data[g], weighed[g] = multipliers.data[g];
      const T moved = T(deficit.data[g]) - average.data[g];
      want[g] = std::isfinite(moved) ? was[g] + 0.25 * moved : was[g];
    }
    expect(cuda_run(a, cudaStream_t()) == cudaSuccess, "launch", step, 0, 1);
    expect(*place.data == step + 1, "place", 0, double(*place.data), step + 1);
    for (int i = 0; i < size; ++i) {
      const double got = ring.data[step % rows * size + i];
      expect(got == double(T(record.data[i])), "ring", i, got, record.data[i]);
    }
    std::vector<double> weights(G);
    double sum = 0;
    for (int g = 0; g < G; ++g) {
      int worse = 0;
      for (int h = 0; h < G; ++h)
        worse += average.data[h] > average.data[g] || (average.data[h] == average.data[g] && h < g);
      weights[g] = by_order.data[worse] / (relative ? std::max(1.0, double(average.data[g])) : 1.0);
      sum += weights[g];
    }
    for (int g = 0; g < G; ++g) {
      expect(close(average.data[g], want[g], 1e-6, 1), "average", g, average.data[g], want[g]);
      const double weight = weighed[g] + follow * ((relative ? weights[g] / sum : weights[g]) - weighed[g]);
      const bool exact = !relative && follow == 1;
      expect(exact ? multipliers.data[g] == weights[g] : close(multipliers.data[g], weight, 1e-6, 1), "multipliers", g,
             multipliers.data[g], weight);
      expect(average_before.data[g] == was[g] && multipliers_before.data[g] == weighed[g], "before", g, 0, 1);
    }
  }
  ring.check_guards("ring"), average.check_guards("average"), multipliers.check_guards("multipliers");
  average_before.check_guards("average_before"), multipliers_before.check_guards("multipliers_before");
}

template <class S, class T> void check_keeps() {
  check_keep<S, T>(1, 9, 1, true);
  check_keep<S, T>(9, 65, 3, true);
  check_keep<S, T>(64, 450, 4, true);
  check_keep<S, T>(9, 65, 3, false);
  check_keep<S, T>(13, 65, 3, true, true);
  check_keep<S, T>(64, 65, 3, true, true, 0.2);
  check_keep<S, T>(2, 9, 3, true, false, 0.5);
}

}  // namespace checking
