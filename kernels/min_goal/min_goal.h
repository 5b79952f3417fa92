// min_goal: l_b = max_k d_kb, forward and backward: the arguments of the kernels. No torch here.
#pragma once
#include "../common/dtype.h"

namespace bomkern {
namespace min_goal {

constexpr int max_goals = 64;
enum class Reduction : int { none, mean, sum, min };

// K columns of B values. Passed by value to a launch: 1.2 KB, so that no table of pointers has to reach the device.
struct Goals {
  const void* data[max_goals];
  int64_t stride[max_goals];  // in elements from one sample to the next; 0 for a batch-level goal
  DType dtype[max_goals];
  uint8_t curve[max_goals];
  int count;
  int64_t batch;
};

// S is float, or double where any goal is double. Stats pointers are null where no stats are wanted.
template <class S> struct Forward {
  Goals goals;
  const S* params;  // [K, 4] center, right, left, tail; null where the goals are scores
  Reduction reduction;
  S* loss;             // [B] for none, else one
  uint8_t* winner;     // [B] the bottleneck; unused for min
  int64_t* worst;      // for min: one, sample * K + goal
  S* slope;            // [B] d loss_b / d winner, 0 where loss_b is not finite; one for min
  int64_t* bottleneck; // [B]
  S* share;            // [K]
  S* level;            // [K]
  bool* finite;        // one
};

// One gradient to write: column `goal` of the batch, or a [B, K] matrix (goal = -1), or a batch-level sum.
struct Gradient {
  void* data;
  int goal;
  bool batch_level;
  DType dtype;
};

template <class S> struct Backward {
  const S* grad;
  int64_t grad_stride;  // 1 for reduction none, 0 for a scalar
  S divisor;            // B for mean, else 1
  const uint8_t* winner;
  const int64_t* worst;  // for min, else null
  const S* slope;
  int64_t batch;
  int goals;
  Gradient out[max_goals];
  int outputs;
};

// The contribution of a range of samples. The ranges depend on B alone and are added in order, so the bits do not depend on
// the number of threads.
struct Partial {
  double loss;
  double worst_loss;
  double worst_slope;
  int64_t worst;  // sample * K + goal
  bool finite;
  double level[max_goals];
  int64_t owned[max_goals];
};

constexpr int64_t chunk = 4096;

struct CpuKernels {
  const char* name;
  void (*forward_f32)(const Forward<float>&, int64_t begin, int64_t end, Partial*);
  void (*forward_f64)(const Forward<double>&, int64_t begin, int64_t end, Partial*);
  // batch_level: one double per output, this range's part of a batch-level gradient.
  void (*backward_f32)(const Backward<float>&, int64_t begin, int64_t end, double* batch_level);
  void (*backward_f64)(const Backward<double>&, int64_t begin, int64_t end, double* batch_level);
};

// The widest instruction set this CPU has of those compiled in.
const CpuKernels& cpu_kernels();

}  // namespace min_goal
}  // namespace bomkern
