// goal_set: the bottleneck rule of groups of goals, hard or smoothed, and a record of the step. No torch here.
//
// D_bg is the mean deficit of goal g's members, M_b = max_g D_bg. Hard (mu <= 0): l_b = M_b, all weight to the
// bottleneck. Smoothed: with e_bg = exp((D_bg - M_b) / mu) and Z_b = sum_g e_bg, l_b = M_b + mu log Z_b, weights
// e_bg / Z_b. With multipliers lambda_g >= 0: l_b = sum_g lambda_g D_bg over those that are not 0, weights lambda_g, in
// the record lambda_g / sum lambda (0 where all are 0). Where M_b is not finite, l_b = M_b, and the bottleneck has all the
// weight in the record but no gradient; with multipliers likewise where l_b alone is not.
//
// Masked: D_bg is the mean over the members that are present in sample b. A goal without one is absent there: max and sums
// leave it out. A sample without a goal has loss 0 and bottleneck -1, and is in no mean.
#pragma once
#include "../common/parallel.h"
#include "../min_goal/min_goal.h"

namespace bomkern {
namespace goal_set {

using min_goal::Goals;
using min_goal::max_goals;
using min_goal::Reduction;

// Which columns are a goal's members: those from first[g] up to first[g + 1].
struct Groups {
  int count;
  uint8_t first[max_goals + 1];
};

// Where the parts of a record begin; see reference.record_parts.
struct RecordAt {
  int share = 0, level, deficit, raw, highest, ideal, slope, loss, finite;
  constexpr RecordAt(int goals, int columns)
      : level(goals),
        deficit(2 * goals),
        raw(3 * goals),
        highest(raw + columns),
        ideal(highest + columns),
        slope(ideal + columns),
        loss(slope + columns),
        finite(loss + 1) {}
};

// S is float, or double where any column is double.
template <class S> struct Forward {
  Goals columns;
  Groups groups;
  const S* params;       // [K, 4] center, right, left, tail
  const S* temperature;  // mu, one
  const S* multipliers;  // [G], or null
  const bool* present;   // [K, B], or null where all columns are
  const S* counts;       // with `present`: the samples with a goal, those with each goal [G], those with each column [K]
  Reduction reduction;
  S* loss;              // [B] for none, else one
  int64_t* bottleneck;  // [B]
  S* record;            // [3 G + 4 K + 2]
  S* weight;            // [K, B] d loss / d column; null where not wanted
};

// One gradient to write: a column [B], a batch-level goal's sum, or the [B, K] matrix of all columns (column = -1).
struct Output {
  void* data;
  int column;
  bool batch_level;
  DType dtype;
};

template <class S> struct Backward {
  RowGrad<S> grad;
  const S* weight;  // [K, B], contiguous
  int64_t batch;
  int columns;  // K
  Output out[max_goals];
  int outputs;
};

typedef CpuOp<Forward, Backward> CpuKernels;

// The widest instruction set this CPU has of those compiled in.
const CpuKernels& cpu_kernels();

}  // namespace goal_set
}  // namespace bomkern
