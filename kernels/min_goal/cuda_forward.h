// min_goal's forward pass on the GPU: a warp takes 128 samples at a time, and what the blocks saw meets in one place.
//
// One block, or the blocks of one cluster, which read each other's shared memory: a single launch. A larger grid:
// partial results in a workspace, and one block in a second launch. No counter or flag is kept, so that replays of a
// captured graph on several streams share nothing.
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
  const bool adjacent = l.access == Access::adjacent;
  const int64_t step = int64_t(gridDim.x) * blockDim.x * rows;
  unsigned char* const slot = stage + threadIdx.x * 16;
  Place p;
  p.batch = a.goals.batch;
  p.pitch = adjacent ? 1 : 32;
  int64_t first = (int64_t(blockIdx.x) * blockDim.x + warp * 32) * rows;  // of the warp: its loop is uniform
  p.first = first + (adjacent ? lane * rows : lane);

  Seen<S> seen;
  // Warps without samples come by once too, for the barrier in prepare().
  for (bool ready = false; !ready || first < p.batch; first += step, p.first += step) {
    Worst<S> w;
#pragma unroll
    for (int r = 0; r < rows; ++r) w.deficit[r] = -S(__builtin_inff()), w.x[r] = 0, w.goal[r] = 0;
    for (int begin = 0; begin < count; begin += l.group) {
      const int end = min(begin + l.group, count);
      fetch(a.goals, begin, end, p, l.access, goal_bytes, slot);
      __pipeline_commit();
      if (!ready) prepare<Scores, Stats>(a, s, level);  // while the first copies travel
      ready = true;
      __pipeline_wait_prior(0);
#pragma unroll 1
      for (int k = begin; k < end; ++k) {
        const DType dtype = a.goals.dtype[k];
        const int curve = a.goals.curve[k];
        const Ramp<S> ramp = s.ramp[k];
        S x[rows];
        read_slot(slot + (k - begin) * goal_bytes, dtype, x);
        if (Scores || curve == LINEAR) {
          meet<LINEAR, Scores>(k, ramp, x, w);
        } else if (curve == HARD) {
          meet<HARD, Scores>(k, ramp, x, w);
        } else {
          meet<BARRIER, Scores>(k, ramp, x, w);
        }
        if constexpr (Stats) add_level<Scores>(level + warp * count + k, x, p);
      }
    }
    settle<Scores>(s, w);
    write_rows<Stats>(a, w, p, adjacent && p.inside(rows - 1));
    if (a.reduction == Reduction::min) {
      seen.take_worst(w, p, count);
    } else {
      seen.take(w, p);
    }
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

// The explicit 1 lets the compiler use all registers it wants; without it, it stops at 64 and spills.
template <class S, bool Scores, bool Stats>
__global__ void __launch_bounds__(max_threads, 1) forward_kernel(const __grid_constant__ ForwardLaunch<S> l) {
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
