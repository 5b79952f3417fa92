// One GPU thread's work on four samples: it fetches the raw values, reads goal after goal, and writes the result.
//
// Raw values come through shared memory by asynchronous copies (cp.async), each thread staging what it alone will read:
// a whole group of goals is in flight at once, of any mixture of dtypes and strides, and costs no register.
#pragma once
#include "../common/cuda_math.h"
// (cuda_math.h first: score.h is written in its words)
#include "score.h"

#include <cooperative_groups.h>
#include <cuda_pipeline_primitives.h>

#include "min_goal.h"

namespace bomkern {
namespace BOMKERN_ISA {

using min_goal::Backward;
using min_goal::Forward;
using min_goal::Goals;
using min_goal::max_goals;
using min_goal::Reduction;

constexpr int rows = 4;  // samples of a thread
constexpr int warp_rows = 32 * rows;
constexpr int max_threads = 512;
constexpr unsigned all_lanes = 0xffffffffu;

// The totals of a thread, a warp or a block.
struct Total {
  double loss = 0, worst_loss = -__builtin_inf(), worst_slope = 0;
  long long worst = INT64_MAX;  // sample * K + goal
  int finite = 1;
};

// Where a thread's four samples lie: neighbours, for accesses of 16 bytes, or 32 apart, for small ones that coalesce.
enum class Access : int { adjacent, apart, halves };  // halves: apart, and every goal a half type

// The partial results of a grid's blocks in device memory.
struct Workspace {
  Total* total;     // [blocks]
  double* level;    // [K, blocks]
  unsigned* owned;  // [K, blocks]
};

template <class S> struct ForwardLaunch {
  Forward<S> a;
  Workspace partials;  // null where the blocks are one cluster and finish the work themselves
  int group;           // goals staged at a time
  Access access;
};

// A block's shared memory; behind it lie the water levels, double [warps, K], and the stage, [group, threads, rows].
template <class S> struct alignas(16) Shared {
  Total warp_total[max_threads / 32];
  Total total;
  Ramp<S> ramp[max_goals];
  unsigned owned[max_goals];
  uint8_t curve[max_goals];
};

template <class S> constexpr size_t stage_offset(int warps, int levels) {
  return (sizeof(Shared<S>) + sizeof(double) * warps * levels + 15) / 16 * 16;
}

BOMKERN_HD bool finite_of(float d) { return d - d == 0; }
BOMKERN_HD bool finite_of(double d) { return d - d == 0; }

BOMKERN_HD void merge(Total& t, const Total& other) {
  t.loss += other.loss;
  t.finite &= other.finite;
  const bool both_nan = t.worst_loss != t.worst_loss && other.worst_loss != other.worst_loss;
  const bool equal = t.worst_loss == other.worst_loss || both_nan;
  if (worse(other.worst_loss, t.worst_loss) || (equal && other.worst < t.worst)) {
    t.worst_loss = other.worst_loss;
    t.worst_slope = other.worst_slope;
    t.worst = other.worst;
  }
}

// The result is in lane 0.
BOMKERN_HD void merge_warp(Total& t) {
#pragma unroll 1
  for (int offset = 16; offset > 0; offset /= 2) {
    Total other;
    other.loss = __shfl_down_sync(all_lanes, t.loss, offset);
    other.worst_loss = __shfl_down_sync(all_lanes, t.worst_loss, offset);
    other.worst_slope = __shfl_down_sync(all_lanes, t.worst_slope, offset);
    other.worst = __shfl_down_sync(all_lanes, t.worst, offset);
    other.finite = __shfl_down_sync(all_lanes, t.finite, offset);
    merge(t, other);
  }
}

// The samples of a thread: first, first + pitch, ...
struct Place {
  int64_t first, batch;
  int pitch;
  BOMKERN_HD int64_t row(int r) const { return first + r * pitch; }
  BOMKERN_HD bool inside(int r) const { return row(r) < batch; }
  BOMKERN_HD int64_t nearest(int r) const { return inside(r) ? row(r) : batch - 1; }
};

// Strided halves are smaller than an asynchronous copy can be: ordinary loads, those of two goals in flight at once.
BOMKERN_HD void fetch_halves(const Goals& g, int begin, int end, const Place& p, int goal_bytes, unsigned char* slot) {
  constexpr int together = 2;
#pragma unroll 1
  for (int k = begin; k < end; k += together, slot += together * goal_bytes) {
    Pack<uint16_t> v[together];
#pragma unroll
    for (int j = 0; j < together; ++j) {
      const int goal = min(k + j, end - 1);
      const uint16_t* const data = static_cast<const uint16_t*>(g.data[goal]);
      for (int r = 0; r < rows; ++r) v[j].at[r] = data[p.nearest(r) * g.stride[goal]];
    }
#pragma unroll
    for (int j = 0; j < together; ++j) {
      if (k + j < end) *reinterpret_cast<Pack<uint16_t>*>(slot + j * goal_bytes) = v[j];
    }
  }
}

// Starts the copies of goals [begin, end) of this thread's samples. Samples past the end repeat the last one.
BOMKERN_HD void fetch(const Goals& g, int begin, int end, const Place& p, Access access, int goal_bytes,
                      unsigned char* slot) {
  const int plane = blockDim.x * 16;  // 8-byte values take two planes of 16 bytes a thread
  if (p.first >= p.batch) return;
  if (access == Access::halves) return fetch_halves(g, begin, end, p, goal_bytes, slot);
  const bool whole = access == Access::adjacent && p.inside(rows - 1);
#pragma unroll 1
  for (int k = begin; k < end; ++k, slot += goal_bytes) {
    const char* const data = static_cast<const char*>(g.data[k]);
    const int64_t stride = g.stride[k];
    if (whole && stride == 1 && g.dtype[k] == DType::f32) {  // nearly always: the shortest way first
      __pipeline_memcpy_async(slot, data + p.first * 4, 16);
      continue;
    }
    const int size = g.dtype[k] == DType::f64 ? 8 : g.dtype[k] == DType::f32 ? 4 : 2;
    if (whole && stride == 1) {
      const char* const from = data + p.first * size;
      if (size == 2) {
        __pipeline_memcpy_async(slot, from, 8);
      } else {
        __pipeline_memcpy_async(slot, from, 16);
        if (size == 8) __pipeline_memcpy_async(slot + plane, from + 16, 16);
      }
    } else if (size == 2) {
      fetch_halves(g, k, k + 1, p, goal_bytes, slot);
    } else {
      const int64_t pitch = stride * size;
#pragma unroll 1
      for (int r = 0; r < rows; ++r) {
        const char* const from = data + p.nearest(r) * pitch;
        if (size == 4) {
          __pipeline_memcpy_async(slot + r * 4, from, 4);
        } else {
          __pipeline_memcpy_async(slot + r / 2 * plane + r % 2 * 8, from, 8);
        }
      }
    }
  }
}

template <class S> BOMKERN_HD void read_slot(const unsigned char* slot, DType dtype, S (&x)[rows]) {
  if (dtype == DType::f32) {
    const auto p = *reinterpret_cast<const Pack<float>*>(slot);
    for (int r = 0; r < rows; ++r) x[r] = p.at[r];
  } else if (sizeof(S) == 8 && dtype == DType::f64) {
    const auto low = *reinterpret_cast<const double2*>(slot);
    const auto high = *reinterpret_cast<const double2*>(slot + blockDim.x * 16);
    x[0] = low.x, x[1] = low.y, x[2] = high.x, x[3] = high.y;
  } else {
    const auto p = *reinterpret_cast<const Pack<uint16_t>*>(slot);
    for (int r = 0; r < rows; ++r) x[r] = widen(p.at[r], dtype == DType::bf16);
  }
}

// The bottleneck so far of each sample: its deficit (or key) and its raw value, of which the slope is made at the end.
template <class S> struct Worst {
  S deficit[rows], x[rows];
  int goal[rows];
};

// Leaves the deficits in x.
template <int curve, bool Scores, class S> BOMKERN_HD void meet(int k, const Ramp<S>& ramp, S (&x)[rows], Worst<S>& w) {
#pragma unroll
  for (int r = 0; r < rows; ++r) {
    S d;
    if constexpr (Scores) {
      d = key_of<S, S>(x[r]);
    } else {
      d = entry_of<S, S>(curve, x[r], ramp).deficit;
    }
    const bool replace = worse(d, w.deficit[r]);
    w.deficit[r] = replace ? d : w.deficit[r];
    w.x[r] = replace ? x[r] : w.x[r];
    w.goal[r] = replace ? k : w.goal[r];
    x[r] = d;
  }
}

// The slope of entry_of(), for lanes whose curves differ: all go through the same instructions.
template <class S> BOMKERN_HD S slope_of(int curve, S x, const Ramp<S>& ramp) {
  const Entry<S> at = ramp_at<S, S>(x, ramp);
  const S r = at.deficit, inverse = quotient_of(S(1), r);
  const S over = curve == HARD ? at.slope * 2 : at.slope;
  const S barrier = r <= 1 - ramp.tail && r < 1 ? 1 - r : ramp.tail;
  return quotient_of(over, curve == HARD ? r + inverse : curve == BARRIER ? barrier : S(1));
}

// Turns the deficits into losses and the raw values into slopes.
template <bool Scores, class S> BOMKERN_HD void settle(const Shared<S>& s, Worst<S>& w) {
#pragma unroll
  for (int r = 0; r < rows; ++r) {
    const S d = w.deficit[r];
    const bool finite = finite_of(d);
    S slope;
    if constexpr (Scores) {
      slope = 1 / d;  // the key is -score
      w.deficit[r] = finite ? -log_of(-d) : d;
    } else {
      slope = slope_of(s.curve[w.goal[r]], w.x[r], s.ramp[w.goal[r]]);
    }
    w.x[r] = finite ? slope : S(0);
  }
}

template <class T> BOMKERN_HD void store(T* out, const T (&v)[rows], const Place& p, bool whole) {
  if (whole) {
    Pack<T> pack;
    for (int r = 0; r < rows; ++r) pack.at[r] = v[r];
    store_pack(out + p.first, pack);
  } else {
    for (int r = 0; r < rows; ++r) {
      if (p.inside(r)) out[p.row(r)] = v[r];
    }
  }
}

// Writes what is kept of each sample; `whole` says that the four lie in one aligned piece.
template <bool Stats, class S>
BOMKERN_HD void write_rows(const Forward<S>& a, const Worst<S>& w, const Place& p, bool whole) {
  if (a.reduction == Reduction::none) store(a.loss, w.deficit, p, whole);
  if (a.reduction != Reduction::min) {
    const uint8_t winner[rows] = {uint8_t(w.goal[0]), uint8_t(w.goal[1]), uint8_t(w.goal[2]), uint8_t(w.goal[3])};
    store(a.winner, winner, p, whole);
    store(a.slope, w.x, p, whole);
  }
  if constexpr (Stats) {
    const int64_t winner[rows] = {w.goal[0], w.goal[1], w.goal[2], w.goal[3]};
    store(a.bottleneck, winner, p, whole);
  }
}

// One thread's total over its samples: their sum, or for `min` the worst of them.
template <class S> struct Seen {
  Sum<S> loss;
  S worst_loss = -S(__builtin_inff()), worst_slope = 0;
  long long worst = INT64_MAX;
  bool finite = true;

  BOMKERN_HD void take(const Worst<S>& w, const Place& p) {
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      if (!p.inside(r)) break;
      loss.add(w.deficit[r]);
      finite = finite && finite_of(w.deficit[r]);
    }
  }
  BOMKERN_HD void take_worst(const Worst<S>& w, const Place& p, int count) {
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      if (!p.inside(r)) break;
      finite = finite && finite_of(w.deficit[r]);
      if (worse(w.deficit[r], worst_loss)) {
        worst_loss = w.deficit[r];
        worst_slope = w.x[r];
        worst = p.row(r) * count + w.goal[r];
      }
    }
  }
  BOMKERN_HD Total total() const {
    Total t;
    t.loss = loss.value(), t.worst_loss = worst_loss, t.worst_slope = worst_slope, t.worst = worst, t.finite = finite;
    return t;
  }
};

// Parameters into shared memory, counters to 0.
template <bool Scores, bool Stats, class S> BOMKERN_HD void prepare(const Forward<S>& a, Shared<S>& s, double* level) {
  const int count = a.goals.count;
  for (int k = threadIdx.x; k < count; k += blockDim.x) {
    s.owned[k] = 0;
    s.curve[k] = a.goals.curve[k];
    if constexpr (!Scores) {
      const S tail = a.params[4 * k + 3];
      s.ramp[k] = ramp_of(a.params + 4 * k, tail > 0 ? log_of(tail) : S(0));
    }
  }
  if constexpr (Stats) {
    for (int i = threadIdx.x; i < count * int(blockDim.x / 32); i += blockDim.x) level[i] = 0;
  }
  __syncthreads();
}

// One warp's part of one goal's water level: a tree over its 128 scores, and double from there on.
template <bool Scores, class S> BOMKERN_HD void add_level(double* level, const S (&d)[rows], const Place& p) {
  S score[rows];
#pragma unroll
  for (int r = 0; r < rows; ++r) {
    S value;
    if constexpr (Scores) {
      value = d[r] == S(__builtin_inff()) ? S(0) : d[r] < -1 ? S(1) : -d[r];
    } else {
      value = level_of(d[r]);
    }
    score[r] = p.inside(r) ? value : S(0);
  }
  const S sum = warp_sum((score[0] + score[1]) + (score[2] + score[3]));
  if (threadIdx.x % 32 == 0) *level += sum;
}

}  // namespace BOMKERN_ISA
}  // namespace bomkern
