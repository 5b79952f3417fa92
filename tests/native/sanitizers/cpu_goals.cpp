// The CPU kernels of goals: min_goal, goal_set and goal_set_keep.
#include "../../../kernels/goal_set/goal_set.h"
#include "../../../kernels/goal_set/keep.h"
#include "../../../kernels/min_goal/min_goal.h"
#include "driver.h"

KERNELS_OF(min_goal)
KERNELS_OF(goal_set)

namespace driver {
namespace {

using bomkern::min_goal::Goals;
using bomkern::min_goal::Reduction;
constexpr Reduction reductions[] = {Reduction::none, Reduction::mean, Reduction::sum, Reduction::min};

// K goals of a batch in columns of any kind: their own, of a matrix [B, K], with gaps, or one number for all.
struct Table {
  Goals goals{};
  std::vector<std::unique_ptr<Input>> columns;
  std::vector<double> params;

  template <class S> void put_params(const Exact<S>& to) const { std::copy(params.begin(), params.end(), to.data()); }

  template <class S> static Table make(int count, int64_t batch, bool matrix, double low, double high) {
    Table t;
    t.goals.count = count;
    t.goals.batch = batch;
    if (matrix) t.columns.push_back(std::make_unique<Input>(batch, count, any_type<S>(), Layout::plain, low, high));
    for (int k = 0; k < count; ++k) {
      const int kind = matrix ? 3 : below(3);  // its own; a column with gaps; one number
      if (kind < 3) {
        const int64_t rows = kind == 2 ? 1 : batch, apart = kind == 1 ? 3 : 1;
        t.columns.push_back(std::make_unique<Input>(rows, apart, any_type<S>(), Layout::plain, low, high));
      }
      const Matrix& m = t.columns.back()->matrix;
      t.goals.dtype[k] = m.dtype;
      t.goals.data[k] = static_cast<const char*>(m.data) + (matrix ? k * size_of(m.dtype) : 0);
      t.goals.stride[k] = kind == 2 ? 0 : m.stride[0];
      t.goals.curve[k] = uint8_t(below(3));
      const int curve = t.goals.curve[k];
      t.params.insert(t.params.end(), {0.1, 0.8, curve == 1 ? 0.8 : -0.9, curve == 2 ? 0.05 : 0.0});
    }
    return t;
  }
};

const auto& forward_of(const bomkern::min_goal::CpuKernels& k, float) { return k.forward_f32; }
const auto& forward_of(const bomkern::min_goal::CpuKernels& k, double) { return k.forward_f64; }
const auto& backward_of(const bomkern::min_goal::CpuKernels& k, float) { return k.backward_f32; }
const auto& backward_of(const bomkern::min_goal::CpuKernels& k, double) { return k.backward_f64; }

template <class F> void each(Parallel parallel, int64_t tasks, const F& f) {
  parallel(tasks, [](void* state, int64_t task) { (*static_cast<const F*>(state))(task); }, const_cast<F*>(&f));
}

template <class S> void min_goal(int count, int64_t batch, bool matrix, bool scores, bool stats, Reduction reduction) {
  using namespace bomkern::min_goal;
  const Table table = Table::make<S>(count, batch, matrix, scores ? 0.01 : -3, scores ? 1 : 3);
  const Exact<S> params(4 * count);
  table.put_params(params);
  const int64_t ranges = (batch + chunk - 1) / chunk, rows = reduction == Reduction::min ? 1 : batch;
  const bool global = reduction == Reduction::min, by_row = reduction == Reduction::none;
  const Grads<S> grad(by_row ? batch : 1, by_row ? below(3) : 0);
  for_sets(sets(), [&](const CpuKernels& kernels, Parallel parallel, Seen& seen) {
    const Exact<S> loss(by_row ? batch : 0), slope(rows);
    const Exact<uint8_t> winner(global ? 0 : batch);
    const Exact<int64_t> bottleneck(stats ? batch : 0), worst(1);
    Forward<S> a{};
    a.goals = table.goals, a.params = scores ? nullptr : params.data(), a.reduction = reduction;
    a.loss = loss, a.winner = winner, a.slope = slope, a.bottleneck = stats ? bottleneck.data() : nullptr;
    const Exact<Partial> parts(ranges);
    each(parallel, ranges,
         [&](int64_t c) { forward_of(kernels, S())(a, c * chunk, std::min((c + 1) * chunk, batch), parts + c); });
    worst[0] = parts[0].worst;
    if (global) slope[0] = S(parts[0].worst_slope);
    seen.numbers(loss, "min_goal"), seen.numbers(slope, "slope"), seen.whole(winner, "winner");
    seen.whole(bottleneck, "bottleneck");
    for (int64_t c = 0; c < ranges; ++c) expect(!isnan(parts[c].loss), "a range's loss", c);

    std::vector<std::unique_ptr<Output>> outputs;
    Backward<S> back{
        grad.memory, grad.stride, S(2), global ? nullptr : winner.data(), global ? worst.data() : nullptr, slope, batch,
        count,       {},          0};
    for (int k = 0; k < (matrix ? 1 : count); ++k) {
      const bool one = !matrix && table.goals.stride[k] == 0;
      outputs.push_back(std::make_unique<Output>(one ? 0 : matrix ? batch * count : batch, table.goals.dtype[k]));
      back.out[back.outputs++] = {outputs[k]->memory, matrix ? -1 : k, one, table.goals.dtype[k]};
    }
    const Exact<double> sums(ranges * back.outputs);
    each(parallel, ranges, [&](int64_t c) {
      backward_of(kernels, S())(back, c * chunk, std::min((c + 1) * chunk, batch), sums + c * back.outputs);
    });
    for (const auto& output : outputs) output->seen(seen, "min_goal by a goal");
    seen.numbers(sums, "min_goal by batch-level goals");
  });
}

template <class S> void goal_set(int count, int64_t batch, bool matrix, Reduction reduction, int rule) {
  using namespace bomkern::goal_set;
  const Table table = Table::make<S>(count, batch, matrix, -3, 3);
  const Exact<S> params(4 * count), temperature(1);
  table.put_params(params);
  temperature[0] = rule == 1 ? S(0.1) : S(0);
  Groups groups{};
  for (int k = 0; k < count; ++k) {
    if (k == 0 || below(2)) ++groups.count;
    groups.first[groups.count] = uint8_t(k + 1);
  }
  const Exact<S> multipliers(groups.count);
  for (int g = 0; g < groups.count; ++g) multipliers[g] = S(g % 3);
  const bool by_row = reduction == Reduction::none, masked = below(2);
  const Exact<bool> present(count * batch);
  const Exact<S> counts(1 + groups.count + count);
  for (int i = 0; i < count * batch; ++i) present[i] = i < batch || below(3) > 0;  // every sample has a goal
  for (int i = 0; i < 1 + groups.count + count; ++i) counts[i] = S(batch);
  const Grads<S> grad(by_row ? batch : 1, by_row ? below(3) : 0);
  for_sets(sets(), [&](const CpuKernels& kernels, Parallel parallel, Seen& seen) {
    const Exact<S> loss(by_row ? batch : 1), record(3 * groups.count + 4 * count + 2), weight(count * batch);
    const Exact<int64_t> bottleneck(batch);
    call(kernels,
         Forward<S>{table.goals, groups, params, temperature, rule == 2 ? multipliers.data() : nullptr,
                    masked ? present.data() : nullptr, masked ? counts.data() : nullptr, reduction, loss, bottleneck, record,
                    weight},
         parallel);
    for (const auto* x : {&loss, &record, &weight}) seen.numbers(*x, "goal_set");
    seen.whole(bottleneck, "goal_set's bottleneck");
    std::vector<std::unique_ptr<Output>> outputs;
    Backward<S> back{grad.row(), weight, batch, count, {}, 0};
    for (int k = 0; k < (matrix ? 1 : count); ++k) {
      const bool one = !matrix && table.goals.stride[k] == 0;
      outputs.push_back(std::make_unique<Output>(one ? 1 : matrix ? batch * count : batch, table.goals.dtype[k]));
      back.out[back.outputs++] = {outputs[k]->memory, matrix ? -1 : k, one, table.goals.dtype[k]};
    }
    call(kernels, back, parallel);
    for (const auto& output : outputs) output->seen(seen, "goal_set by a goal");
  });
}

// A ring that comes round, with the averages and weights of spill or without.
template <class S, class T> void keep(int goals, bool relative = false, double follow = 1) {
  using namespace bomkern::goal_set;
  ++cases;
  const int size = 3 * goals + 6;
  const Exact<S> record(size), deficit(goals);
  const Exact<T> ring(3 * size), by_order(goals), average(goals), multipliers(goals), before(goals),
      multipliers_before(goals);
  const Exact<int64_t> place(1);
  for (int i = 0; i < size; ++i) record[i] = S(i);
  for (int g = 0; g < goals; ++g) deficit[g] = S(g % 5), by_order[g] = T(g + 1), average[g] = multipliers[g] = T(1);
  place[0] = 0;
  for (int step = 0; step < 4; ++step)
    keep_on_cpu(Keep<S, T>{record, size, ring, 3, place, goals, deficit, by_order, 0.1, relative, follow, average,
                           multipliers, before, multipliers_before});
  Seen seen;
  for (const auto* x : {&ring, &average, &multipliers, &before, &multipliers_before}) seen.numbers(*x, "goal_set_keep");
}

template <class S> void check() {
  for (const int64_t batch : {1, 3, 16, 37, 513, 9000}) {
    for (const int count : {1, 2, 5, 64}) {
      if (batch * count > 50000) continue;
      for (const bool matrix : {false, true}) {
        for (const Reduction reduction : reductions) {
          min_goal<S>(count, batch, matrix, below(2), below(2), reduction);
          goal_set<S>(count, batch, matrix, reduction, below(3));
        }
      }
    }
  }
}

}  // namespace

void check_goals() {
  check<float>();
  check<double>();
  for (const int goals : {0, 1, 7, 64}) {
    keep<float, float>(goals), keep<float, double>(goals), keep<double, float>(goals);
    keep<float, float>(goals, true), keep<float, double>(goals, true, 0.25);
  }
}

}  // namespace driver
