// min_goal's forward pass on the GPU: a warp takes 128 samples at a time, and the blocks' sums meet in one of three ways.
//
// One block, or the blocks of one cluster, which read each other's shared memory: a single launch. A larger grid: partial
// results in a workspace, and one block in a second launch. No counter or flag is kept, so that replays of a captured
// graph on several streams share nothing.
#pragma once
#include "cuda_rows.h"

namespace bomkern {
namespace BOMKERN_ISA {

// All samples of this block.
template <class S, bool Scores, bool Stats>
BOMKERN_HD Seen<S> see(const ForwardLaunch<S>& l, Shared<S>& s, double* level, unsigned char* stage) {
  const Forward<S>& a = l.a;
  const int count = a.goals.count, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int goal_bytes = blockDim.x * rows * sizeof(S);
  const int64_t step = int64_t(gridDim.x) * blockDim.x * rows;
  unsigned char* const slot = stage + threadIdx.x * 16;
  Place p;
  p.batch = a.goals.batch;
  p.pitch = l.adjacent ? 1 : 32;
  int64_t first = (int64_t(blockIdx.x) * blockDim.x + warp * 32) * rows;  // of the warp: its loop is uniform
  p.first = first + (l.adjacent ? lane * rows : lane);

  // The first copies travel while the parameters do.
  fetch(a.goals, 0, min(l.group, count), p, l.adjacent, goal_bytes, slot);
  prepare<Scores, Stats>(a, s, level);
  Seen<S> seen;
  for (; first < p.batch; first += step, p.first += step) {
    Worst<S> w;
#pragma unroll
    for (int r = 0; r < rows; ++r) w.deficit[r] = -S(__builtin_inff()), w.x[r] = 0, w.goal[r] = 0;
    for (int begin = 0; begin < count; begin += l.group) {
      const int end = min(begin + l.group, count);
      __pipeline_wait_prior(0);
#pragma unroll 1
      for (int k = begin; k < end; ++k) {
        S x[rows];
        read_slot(slot + (k - begin) * goal_bytes, a.goals.dtype[k], x);
        if constexpr (Scores) {
          meet<LINEAR, true>(k, s.ramp[0], x, w);
        } else {
          switch (a.goals.curve[k]) {
            case HARD: meet<HARD, false>(k, s.ramp[k], x, w); break;
            case BARRIER: meet<BARRIER, false>(k, s.ramp[k], x, w); break;
            default: meet<LINEAR, false>(k, s.ramp[k], x, w);
          }
        }
        if constexpr (Stats) add_level<Scores>(level + warp * count + k, x, p);
      }
      Place next = p;
      if (end == count) next.first += step;
      if (end < count || first + step < p.batch) {
        const int from = end < count ? end : 0;
        fetch(a.goals, from, min(from + l.group, count), next, l.adjacent, goal_bytes, slot);
      }
    }
    settle<Scores>(s, w);
    write_rows<Stats>(a, w, p, l.adjacent && p.inside(rows - 1));
    seen.take(w, p, count);
    if constexpr (Stats) {
#pragma unroll
      for (int r = 0; r < rows; ++r) {
        if (p.inside(r)) atomicAdd(&s.owned[w.goal[r]], 1u);
      }
    }
  }
  return seen;
}

// Writes the results from the partials of `blocks` blocks. `lanes` threads share a goal, 1 or 32.
template <bool Stats, int lanes, class S, class View>
BOMKERN_HD void finish(const Forward<S>& a, const View& view, int blocks) {
  const int count = a.goals.count, lane = threadIdx.x % 32;
  const double batch = double(a.goals.batch);
  if (threadIdx.x < 32) {
    Total t;
    for (int b = lane; b < blocks; b += 32) merge(t, view.total(b));
    merge_warp(t);
    if (lane == 0) {
      if (a.reduction == Reduction::mean) *a.loss = S(t.loss / batch);
      if (a.reduction == Reduction::sum) *a.loss = S(t.loss);
      if (a.reduction == Reduction::min) *a.loss = S(t.worst_loss), *a.slope = S(t.worst_slope), *a.worst = t.worst;
      if (Stats) *a.finite = t.finite;
    }
    if (Stats && a.reduction == Reduction::min) {
      const int taken = int(__shfl_sync(all_lanes, t.worst, 0) % count);
      for (int k = lane; k < count; k += 32) a.share[k] = k == taken;
    }
  }
  if constexpr (Stats) {
    for (int k = threadIdx.x / lanes; k < count; k += blockDim.x / lanes) {
      double level = 0;
      unsigned long long owned = 0;
      for (int b = threadIdx.x % lanes; b < blocks; b += lanes) {
        level += view.level(k, b);
        owned += view.owned(k, b);
      }
      if constexpr (lanes == 32) level = warp_sum(level), owned = warp_sum(owned);
      if (threadIdx.x % lanes == 0) {
        a.level[k] = S(level / batch);
        if (a.reduction != Reduction::min) a.share[k] = S(double(owned) / batch);
      }
    }
  }
}

// The partials of this block, or of its cluster's blocks: other blocks' shared memory is read in place.
template <class S> struct ClusterView {
  Shared<S>* s;
  double* block_level;
  template <class T> static BOMKERN_HD T* of_block(T* p, int block) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    return cooperative_groups::this_cluster().map_shared_rank(p, block);
#else
    return p;
#endif
  }
  static BOMKERN_HD void sync() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (gridDim.x > 1) return cooperative_groups::this_cluster().sync();
#endif
    __syncthreads();
  }
  BOMKERN_HD Total total(int b) const { return *of_block(&s->total, b); }
  BOMKERN_HD double level(int k, int b) const { return *of_block(block_level + k, b); }
  BOMKERN_HD unsigned owned(int k, int b) const { return *of_block(&s->owned[k], b); }
};

struct WorkspaceView {
  Workspace w;
  int blocks;
  BOMKERN_HD Total total(int b) const { return w.total[b]; }
  BOMKERN_HD double level(int k, int b) const { return w.level[int64_t(k) * blocks + b]; }
  BOMKERN_HD unsigned owned(int k, int b) const { return w.owned[int64_t(k) * blocks + b]; }
};

// 64 registers at most in float32, so that a multiprocessor holds 1024 threads of it; float64 needs more.
template <class S, bool Scores, bool Stats>
__global__ void __launch_bounds__(max_threads, sizeof(S) == 4 ? 2 : 1) forward_kernel(const __grid_constant__ ForwardLaunch<S> l) {
  const Forward<S>& a = l.a;
  const int count = a.goals.count, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  BOMKERN_SHARED_BYTES(bytes);
  Shared<S>& s = *reinterpret_cast<Shared<S>*>(bytes);
  double* const level = reinterpret_cast<double*>(bytes + sizeof(Shared<S>));
  const Seen<S> seen =
      see<S, Scores, Stats>(l, s, level, bytes + stage_offset<S>(warps, Stats ? count : 0));
  if (!Stats && a.reduction == Reduction::none) return;

  Total t = seen.total();
  merge_warp(t);
  if (threadIdx.x % 32 == 0) s.warp_total[warp] = t;
  __syncthreads();
  if (warp == 0) {
    t = int(threadIdx.x) < warps ? s.warp_total[threadIdx.x] : Total();
    merge_warp(t);
    if (threadIdx.x == 0) s.total = t;
  }
  if constexpr (Stats) {
    for (int k = threadIdx.x; k < count; k += blockDim.x) {
      for (int i = 1; i < warps; ++i) level[k] += level[i * count + k];
    }
  }
  if (l.partials.total == nullptr) {
    const ClusterView<S> view{&s, level};
    view.sync();
    if (blockIdx.x == 0) finish<Stats, 1>(a, view, gridDim.x);
    if (gridDim.x > 1) view.sync();  // no block may leave while its shared memory is read
    return;
  }
  if (threadIdx.x == 0) l.partials.total[blockIdx.x] = t;
  if constexpr (Stats) {
    for (int k = threadIdx.x; k < count; k += blockDim.x) {
      const int64_t at = int64_t(k) * gridDim.x + blockIdx.x;
      l.partials.level[at] = level[k];
      l.partials.owned[at] = s.owned[k];
    }
  }
}

// One block, after a grid whose partials lie in the workspace.
template <class S, bool Stats>
__global__ void __launch_bounds__(max_threads) finish_kernel(const __grid_constant__ ForwardLaunch<S> l, int blocks) {
  finish<Stats, 32>(l.a, WorkspaceView{l.partials, blocks}, blocks);
}

}  // namespace BOMKERN_ISA
}  // namespace bomkern
