// goal_set's forward pass on the GPU, one launch: a warp takes 128 samples at a time, each column from shared memory.
//
// One block, or a cooperative grid: every block leaves its sums, and after a barrier of the whole grid a warp to each
// number of the record adds them up in a fixed order. No counter is kept, so that replays of a captured graph on several
// streams share nothing.
#pragma once
#include "cuda_goals.h"

namespace bomkern {
namespace goal_set {
namespace cuda {

constexpr int most_threads = 256;

// The blocks' partial results: in the workspace, or in shared memory where there is one block.
template <class S> struct Parts {
  Total* total;  // [blocks]
  double* sums;  // [blocks, 3 G + K], in the order of the record
  S* highest;    // [blocks, K]
};

template <class S> struct ForwardLaunch {
  Forward<S> a;
  Parts<S> parts;  // null where one block has all samples
  int group;       // columns staged at a time
  Access access;
};

BOMKERN_HD constexpr int sums_of(int goals, int columns) { return RecordAt(goals, columns).highest; }

// A block's shared memory; behind it lie its warps' sums, as Parts has them of blocks, and the stage.
template <class S> struct alignas(16) Shared {
  Total total, warp_total[most_threads / 32];
  Ramp<S> ramp[max_goals];
};

template <class S> constexpr size_t stage_offset(int warps, int goals, int columns) {
  const size_t sums = sizeof(double) * RecordAt(goals, columns).highest, highest = sizeof(S) * columns;
  return (sizeof(Shared<S>) + (sums + highest) * warps + 15) / 16 * 16;
}

// One warp's part of a sum: a tree over its 128 numbers, and double from there on.
template <class S> BOMKERN_HD void add(double* to, const S (&v)[rows], const Place& p) {
  S part[rows];
#pragma unroll
  for (int r = 0; r < rows; ++r) part[r] = p.inside(r) ? v[r] : S(0);
  const S sum = warp_sum((part[0] + part[1]) + (part[2] + part[3]));
  if (threadIdx.x % 32 == 0) *to += sum;
}

// The result is in lane 0.
template <class S> BOMKERN_HD S warp_highest(S x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const S other = __shfl_down_sync(all_lanes, x, offset);
    x = other > x ? other : x;
  }
  return x;
}

template <class S> BOMKERN_HD void raise(S* to, const S (&v)[rows], const Place& p) {
  S highest = -S(__builtin_inff());
#pragma unroll
  for (int r = 0; r < rows; ++r) highest = p.inside(r) && finite_of(v[r]) && v[r] > highest ? v[r] : highest;
  highest = warp_highest(highest);
  if (threadIdx.x % 32 == 0 && highest > *to) *to = highest;
}

// A thread's partial results.
template <class S> struct Taken {
  Sum<S> loss;
  S worst_loss = -S(__builtin_inff());
  long long worst = INT64_MAX;
  bool finite = true;

  // `some`: the sample has a goal.
  BOMKERN_HD void take(S l, bool is_finite, bool some, int64_t b) {
    loss.add(l);
    finite = finite && is_finite;
    if (some && worse(l, worst_loss)) worst_loss = l, worst = b;
  }
  BOMKERN_HD Total total() const {
    Total t;
    t.loss = loss.value();
    t.worst_loss = worst_loss;
    t.worst = worst;
    t.finite = finite;
    return t;
  }
};

template <class S, bool masked> struct Kernel {
  const ForwardLaunch<S>& l;
  const Forward<S>& a;
  Shared<S>& s;
  double* sums;  // [warps, 3 G + K]
  S* highest;    // [warps, K]
  unsigned char* stage;
  const RecordAt at;
  const Rule<S, masked> rule;
  const int columns, goals, lane, warp, warps;

  BOMKERN_HD Kernel(const ForwardLaunch<S>& l, unsigned char* bytes)
      : l(l),
        a(l.a),
        s(*reinterpret_cast<Shared<S>*>(bytes)),
        at(l.a.groups.count, l.a.columns.count),
        rule(l.a),
        columns(l.a.columns.count),
        goals(l.a.groups.count),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        warps(blockDim.x / 32) {
    sums = reinterpret_cast<double*>(bytes + sizeof(Shared<S>));
    highest = reinterpret_cast<S*>(sums + warps * at.highest);
    stage = bytes + stage_offset<S>(warps, goals, columns);
  }

  BOMKERN_HD void prepare() {
    for (int k = threadIdx.x; k < columns; k += blockDim.x) {
      const S tail = a.params[4 * k + 3];
      s.ramp[k] = ramp_of(a.params + 4 * k, tail > 0 ? log_of(tail) : S(0));
    }
    for (int i = threadIdx.x; i < warps * at.highest; i += blockDim.x) sums[i] = 0;
    for (int i = threadIdx.x; i < warps * columns; i += blockDim.x) highest[i] = -S(__builtin_inff());
    __syncthreads();
  }

  // Column by column: the record's sums but the shares, and the bottlenecks. `ready`: prepare() has been called.
  BOMKERN_HD void look(const Place& p, unsigned char* slot, int column_bytes, bool& ready, Scan<S, rows, masked>& scan) {
    double* const own = sums + warp * at.highest;
    for (int begin = 0; begin < columns; begin += l.group) {
      const int end = min(begin + l.group, columns);
      fetch(a.columns, begin, end, p, l.access, column_bytes, slot);
      __pipeline_commit();
      if (!ready) prepare();  // while the first copies travel
      ready = true;
      __pipeline_wait_prior(0);
#pragma unroll 1
      for (int k = begin; k < end; ++k) {
        S x[rows], deficit[rows], slope[rows];
        read_slot(slot + (k - begin) * column_bytes, a.columns.dtype[k], x);
        if constexpr (masked) {
          bool here[rows];
          present_at(a, k, p, here);
          S seen[rows];
#pragma unroll
          for (int r = 0; r < rows; ++r) seen[r] = here[r] ? x[r] : -S(__builtin_inff()), x[r] = here[r] ? x[r] : S(0);
          raise(highest + warp * columns + k, seen, p);
        } else {
          raise(highest + warp * columns + k, x, p);
        }
        add(own + at.raw + k, x, p);
        evaluate(a.columns.curve[k], s.ramp[k], x, deficit, slope);
        if (!scan.take(a, k, deficit, p)) continue;
        add(own + at.deficit + scan.g, scan.deficit, p);
        S level[rows];
#pragma unroll
        for (int r = 0; r < rows; ++r) level[r] = scan.there(r) ? level_of(scan.deficit[r]) : S(0);
        add(own + at.level + scan.g, level, p);
        scan.compare(rule);
      }
    }
  }

  // All samples of this block.
  BOMKERN_HD Taken<S> see() {
    const bool adjacent = l.access == Access::adjacent, global = a.reduction == Reduction::min;
    const int column_bytes = blockDim.x * rows * sizeof(S);
    const int64_t step = int64_t(gridDim.x) * blockDim.x * rows;
    unsigned char* const slot = stage + threadIdx.x * 16;
    int64_t first = (int64_t(blockIdx.x) * blockDim.x + warp * 32) * rows;  // of the warp: its loop is uniform
    Samples samples{a.columns, {first + (adjacent ? lane * rows : lane), a.columns.batch, adjacent ? 1 : 32},
                    l.group < columns ? nullptr : slot, column_bytes};
    const Place& p = samples.place;
    Taken<S> taken;
    bool ready = false;
    // Warps without samples come by once too, for the barrier in prepare().
    for (; !ready || first < p.batch; first += step, samples.place.first += step) {
      Scan<S, rows, masked> scan;
      look(p, slot, column_bytes, ready, scan);
      const bool whole = adjacent && p.inside(rows - 1);
      S loss[rows];
      int64_t goal[rows];
#pragma unroll
      for (int r = 0; r < rows; ++r) {
        loss[r] = scan.loss(r, rule), goal[r] = scan.goal[r];
        if (p.inside(r)) taken.take(loss[r], scan.finite(r, rule), scan.some(r), p.row(r));
      }
      if (a.reduction == Reduction::none) store(a.loss, loss, p, whole);
      store(a.bottleneck, goal, p, whole);
      if (!global) {
        share_out(
            a, s.ramp, samples, scan, rule,
            [&](int g, const S(&share)[rows]) { add(sums + warp * at.highest + at.share + g, share, p); },
            [&](int k, const S(&v)[rows]) { store(a.weight + k * p.batch, v, p, whole); });
      } else if (a.weight) {
        const S zero[rows] = {};
        for (int k = 0; k < columns; ++k) store(a.weight + k * p.batch, zero, p, whole);
      }
    }
    return taken;
  }

  // Writes the partial results of this block's warps for finish().
  BOMKERN_HD void leave(const Taken<S>& taken, const Parts<S>& parts) {
    Total t = taken.total();
    merge_warp(t);
    if (lane == 0) s.warp_total[warp] = t;
    __syncthreads();
    if (warp == 0) {
      t = lane < warps ? s.warp_total[lane] : Total();
      merge_warp(t);
      if (lane == 0) parts.total[blockIdx.x] = t;
    }
    for (int i = threadIdx.x; i < at.highest; i += blockDim.x) {
      double sum = 0;
      for (int w = 0; w < warps; ++w) sum += sums[w * at.highest + i];
      parts.sums[int64_t(blockIdx.x) * at.highest + i] = sum;
    }
    for (int k = threadIdx.x; k < columns; k += blockDim.x) {
      S most = highest[k];
      for (int w = 1; w < warps; ++w) most = highest[w * columns + k] > most ? highest[w * columns + k] : most;
      parts.highest[int64_t(blockIdx.x) * columns + k] = most;
    }
  }

  // The one sample that is the loss: its goals' weights, by one thread.
  BOMKERN_HD void take_alone(int64_t b) {
    const Samples samples{a.columns, {b, b + 1, 1}, nullptr, 0};
    Scan<S, 1, masked> scan;
    for (int k = 0; k < columns; ++k) {
      S x[1], deficit[1], slope[1];
      samples.read(k, x);
      evaluate(a.columns.curve[k], s.ramp[k], x, deficit, slope);
      if (scan.take(a, k, deficit, samples.place)) scan.compare(rule);
    }
    share_out(
        a, s.ramp, samples, scan, rule, [&](int g, const S(&share)[1]) { a.record[at.share + g] = share[0]; },
        [&](int k, const S(&v)[1]) { a.weight[k * a.columns.batch + b] = v[0]; });
  }

  // What the sum of number i of the record is divided by.
  BOMKERN_HD double divisor_of(int i) const {
    if constexpr (masked) {
      if (i >= at.raw) return a.counts[1 + goals + i - at.raw];
      if (i >= at.level) return a.counts[1 + (i - at.level) % goals];
    }
    return samples_of<masked>(a);
  }

  // After a barrier of the whole grid.
  BOMKERN_HD void finish(const Parts<S>& parts) {
    const int blocks = gridDim.x;
    const bool global = a.reduction == Reduction::min;
    for (int i = blockIdx.x * warps + warp; i < at.ideal; i += blocks * warps) {
      if (i < at.highest) {
        double sum = 0;
        for (int b = lane; b < blocks; b += 32) sum += parts.sums[int64_t(b) * at.highest + i];
        sum = warp_sum(sum);
        if (lane == 0 && !(global && i < at.level)) a.record[i] = S(sum / divisor_of(i));
      } else {
        S most = -S(__builtin_inff());
        for (int b = lane; b < blocks; b += 32) {
          const S other = parts.highest[int64_t(b) * columns + (i - at.highest)];
          most = other > most ? other : most;
        }
        most = warp_highest(most);
        if (lane == 0) a.record[i] = most;
      }
    }
    if (blockIdx.x > 0 || warp > 0) return;
    for (int k = lane; k < columns; k += 32) {
      a.record[at.ideal + k] = a.params[4 * k];
      a.record[at.slope + k] = a.params[4 * k + 1];
    }
    Total t;
    for (int b = lane; b < blocks; b += 32) merge(t, parts.total[b]);
    merge_warp(t);
    if (lane > 0) return;
    if (masked && global && t.worst == INT64_MAX) t.worst_loss = 0, t.worst = 0;  // no sample has a goal
    const double samples = samples_of<masked>(a);
    const S loss = global ? S(t.worst_loss) : S(a.reduction == Reduction::sum ? t.loss : t.loss / samples);
    if (a.reduction != Reduction::none) *a.loss = loss;
    a.record[at.loss] = loss;
    a.record[at.finite] = S(t.finite);
    if (global) take_alone(t.worst);
  }
};

template <class S, bool masked>
__global__ void __launch_bounds__(most_threads, masked && sizeof(S) == 8 ? 1 : 2) forward_kernel(const __grid_constant__ ForwardLaunch<S> l) {
  BOMKERN_SHARED_BYTES(bytes);
  Kernel<S, masked> kernel(l, bytes);
  const Taken<S> taken = kernel.see();
  // One block's sums take the place of its first warp's, each by the thread that reads it.
  const Parts<S> parts = l.parts.total ? l.parts : Parts<S>{&kernel.s.total, kernel.sums, kernel.highest};
  kernel.leave(taken, parts);
  grid_sync();
  kernel.finish(parts);
}

}  // namespace cuda
}  // namespace goal_set
}  // namespace bomkern
