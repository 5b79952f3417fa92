// total_correlation's forward pass on the GPU: every exponential once, marginals and joint from the same term.
//
// A thread owns four rows (two in double) of 4 or 8 dimensions, keeps their z and sums in registers, and meets one
// component after another, which come through shared memory by asynchronous copies. Since no t is large, the sums of
// 2^t need no maximum; finish_kernel() redoes those that ended too small to be exact. A thread's part of sum_d t goes
// through shared memory to whoever adds it to the row's joint.
#pragma once
#include "cuda_terms.h"

namespace bomkern {
namespace total_correlation {
namespace cuda {

template <class S> constexpr int max_threads = 2048 / int(sizeof(S));  // each may use 128 registers, or 255
constexpr int finish_threads = 256;

// Shape of a block: `groups` groups of dimensions by `quads` owners of rows; two buffers of `tile` components.
struct Geometry {
  int groups, quads, threads, tile;
};

template <class S> struct ForwardLaunch {
  Forward<S> a;
  Packed<S> in;
  Weights<S> weights;
  Geometry geometry;
  int64_t tiles, splits, split_components;  // tiles of rows times splits of the components: a block each
  int64_t padded_rows;
  const double* centers;  // [chunks * 4] C_d; null without log_q
  S* sums;       // [splits, chunks * 4, padded_rows]: sum_i w 2^t
  S* joint_max;  // [splits, padded_rows]
  S* joint_sum;
};

// Where the pieces of a block's shared memory lie, in elements.
template <class S> struct ForwardShared {
  int record, partials, stage_size, partial_size;
  __host__ __device__ ForwardShared(const Geometry& g, int chunks)
      : record(chunks * component_fields * width),
        partials(g.tile * g.quads * owned<S>),
        stage_size(g.tile * record),
        partial_size(partials * g.groups) {}
  __host__ __device__ int stage(int buffer) const { return buffer * stage_size; }
  __host__ __device__ int partial(int buffer) const { return 2 * stage_size + buffer * partial_size; }
  __host__ __device__ int joint() const { return 2 * (stage_size + partial_size); }
  // The maxima and sums of two PowerSums for each row and component of a tile: of this segment, of those before.
  __host__ __device__ size_t bytes() const { return (joint() + 4 * partials) * sizeof(S); }
};

// Per exponential and thread, sm_90, N = 2, read off the machine code (tools/sass_count.py prints the counts):
//   MUFU 30/32 at 8 issue slots of a scheduler       7.50
//   issue 220/32, the 30 MUFUs among them            6.88    (FMA 174, ALU 7, memory 8, control 1)
//   FMA pipe 174/32, a warp instruction a clock      5.44
//   ALU 7/32, half as wide                           0.44
//   shared memory 28 clocks/32 of the 4 schedulers   3.50
// so the bound is the MUFU's: 16 * 32 / 30 = 17.07 exponentials a clock and multiprocessor, 107% of what ex2 alone
// gives. Outside this loop a barrier of 4 components costs, at D = 128 (16 groups, 8 warps), about 200 instructions in
// each of the two warps that collect() and 35 in every warp: (2 * 200 + 8 * 35) / (8 * 128) = 0.66 slots per
// exponential. A share p of polynomials, 11 instructions instead of one, makes
//   MUFU 8 (1 - p) + 0.06 (the joint's),   issue 7.54 - 10/16 + 10 p,
// equal at p = 0.064: one in 16 it is, where both are as good as full.
template <class S, int N, int period> BOMKERN_HD void forward_block(const ForwardLaunch<S>& l) {
  constexpr int R = owned<S>, dims = N * width;
  const Inputs<S>& in = l.a.in;
  const Geometry& geometry = l.geometry;
  const int tid = threadIdx.x, threads = blockDim.x, T = geometry.tile;
  const int q = tid % geometry.quads, g = tid / geometry.quads;
  const bool works = g < geometry.groups;
  const int block_rows = geometry.quads * R;
  const int64_t split = blockIdx.x / l.tiles, first_row = (blockIdx.x % l.tiles) * block_rows;
  const int64_t begin = split * l.split_components;
  const int count = int(min(l.split_components, in.batch - begin));  // the block's components
  BOMKERN_SHARED_BYTES(bytes);
  S* const memory = reinterpret_cast<S*>(bytes);
  const ForwardShared<S> shared(geometry, l.in.chunks);
  S* const joint = memory + shared.joint();
  for (int e = tid; e < 4 * shared.partials; e += threads) {
    joint[e] = e / shared.partials % 2 == 0 ? PowerSum<S>().max : PowerSum<S>().sum;
  }

  S z[dims][R], sum[dims][R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int64_t row = min(first_row + q * R + r, in.rows - 1);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const auto values = load<Chunk<S>>(l.in.rows + (row * l.in.chunks + (works ? g * N + k : 0)) * width);
#pragma unroll
      for (int d = 0; d < width; ++d) z[k * width + d][r] = values.at[d], sum[k * width + d][r] = 0;
    }
  }
  S* const sums = l.sums + (split * l.in.chunks * width + g * dims) * l.padded_rows + first_row + q * R;

  const auto fetch = [&](int from, int buffer) {
    const int pieces = min(T, count - from) * shared.record * int(sizeof(S)) / 16;
    copy_async(memory + shared.stage(buffer), l.in.components + (begin + from) * shared.record, pieces, tid, threads);
    __pipeline_commit();
  };
  // The joint of the components [from, from + n): a thread adds up what the groups have left of four rows and one
  // component. Each tile it falls to other warps, for they alone would be late at every barrier.
  const int shift = threads - T * geometry.quads % threads;
  int turn = tid;
  const auto collect = [&](int from, int n, int buffer, bool segment_ends) {
    const bool band = in.stratified && l.weights.touch(first_row, block_rows, begin + from, n);
    for (int e = turn; e < n * geometry.quads; e += threads) {
      const S* p = memory + shared.partial(buffer) + e * R;
      Vec<S> total{};
      for (int i = 0; i < geometry.groups; i += joint_block) {
        Vec<S> block{};
        const auto add = [&] {
          const auto part = load<Vec<S>>(p);
#pragma unroll
          for (int r = 0; r < R; ++r) block.at[r] += part.at[r];
          p += shared.partials;
        };
        if (i + joint_block <= geometry.groups) {
#pragma unroll
          for (int k = 0; k < joint_block; ++k) add();
        } else {
#pragma unroll 1
          for (int k = i; k < geometry.groups; ++k) add();
        }
#pragma unroll
        for (int r = 0; r < R; ++r) total.at[r] += block.at[r];
      }
      if (band) {
        const int64_t row = first_row + e % geometry.quads * R, component = begin + from + e / geometry.quads;
#pragma unroll
        for (int r = 0; r < R; ++r) total.at[r] += l.weights.at(row + r, component);
      }
      S* const state = joint + e * R;
      auto most = load<Vec<S>>(state), sum = load<Vec<S>>(state + shared.partials);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        PowerSum<S> now{most.at[r], sum.at[r]};
        now.add(total.at[r], 1);
        if (segment_ends) {
          S* const before = state + 2 * shared.partials + r;
          PowerSum<S> all{before[0], before[shared.partials]};
          all.add(now.max, now.sum);
          before[0] = all.max, before[shared.partials] = all.sum;
          now = PowerSum<S>();
        }
        most.at[r] = now.max, sum.at[r] = now.sum;
      }
      save(state, most), save(state + shared.partials, sum);
    }
    turn += turn < threads - shift ? shift : shift - threads;
  };

  // Meets the components [from, from + n). `banded` says that some weights are not 1.
  const auto meet = [&](int from, int n, int buffer, auto banded) {
    const S* c = memory + shared.stage(buffer) + g * N * (component_fields * width);
    S* partial = memory + shared.partial(buffer) + g * shared.partials + q * R;
#pragma unroll 1
    for (int j = 0; j < n; ++j, c += shared.record, partial += block_rows) {
      S weight[R] = {};
      if constexpr (decltype(banded)::value) {
#pragma unroll
        for (int r = 0; r < R; ++r) weight[r] = l.weights.at(first_row + q * R + r, begin + from + j);
      }
      Vec<S> total;
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const S* const chunk = c + k * (component_fields * width);
        const auto mu = load<Chunk<S>>(chunk), a = load<Chunk<S>>(chunk + width);
        const auto log_scale = load<Chunk<S>>(chunk + 2 * width);
#pragma unroll
        for (int d = 0; d < width; ++d) {
#pragma unroll
          for (int r = 0; r < R; ++r) {
            const int at = k * width + d;
            const S t = Term<S>(z[at][r], mu.at[d], a.at[d], log_scale.at[d]).t;
            total.at[r] = at == 0 ? t : total.at[r] + t;
            const S bits = decltype(banded)::value ? t + weight[r] : t;
            sum[at][r] += (at * R + r) % period == period - 1 ? ex2_fma(bits) : ex2(bits);
          }
        }
      }
      save(partial, total);
    }
  };

  fetch(0, 0);
  for (int from = 0, buffer = 0;; from += T, buffer ^= 1) {
    __pipeline_wait_prior(0);
    __syncthreads();  // the one barrier of a tile: this buffer is full, and nobody reads the other any more
    if (from > 0) collect(from - T, min(T, count - from + T), buffer ^ 1, from % segment == 0);
    if (from >= count) break;
    fetch(from + T, buffer ^ 1);
    const int n = min(T, count - from);
    const bool band = in.stratified && l.weights.touch(first_row, block_rows, begin + from, n);
    if (works && band) meet(from, n, buffer, Constant<true>());
    if (works && !band) meet(from, n, buffer, Constant<false>());
    const bool segment_ends = (from + n) % segment == 0 || from + n == count;
    if (works && segment_ends) flush<S, dims>(sums, l.padded_rows, sum, from < segment);
  }

  __syncthreads();
  for (int row = tid; row < block_rows; row += threads) {
    PowerSum<S> all;
    for (int j = 0; j < T; ++j) {
      for (int half = 0; half < 2; ++half) {
        const S* const state = joint + 2 * half * shared.partials + j * block_rows + row;
        all.add(state[0], state[shared.partials]);
      }
    }
    l.joint_max[split * l.padded_rows + first_row + row] = all.max;
    l.joint_sum[split * l.padded_rows + first_row + row] = all.sum;
  }
}

template <class S, int N>
__global__ void __launch_bounds__(max_threads<S>, 1) forward_kernel(const __grid_constant__ ForwardLaunch<S> l) {
  forward_block<S, N, poly_period>(l);
}

// forward_kernel<float, 2> with another share of polynomials, for bench/tune.py to time.
template <int period>
__global__ void __launch_bounds__(max_threads<float>, 1)
    forward_kernel_of_period(const __grid_constant__ ForwardLaunch<float> l) {
  forward_block<float, 2, period>(l);
}

// log2 sum_i w_i 2^t_i of one row and dimension by a true maximum: a whole warp, each lane with the same arguments.
template <class S> BOMKERN_HD S exact_marginal(const ForwardLaunch<S>& l, int64_t row, int64_t d) {
  const Inputs<S>& in = l.a.in;
  const int64_t record = int64_t(l.in.chunks) * width;
  const int64_t at = d / width * (component_fields * width) + d % width;
  const S z = l.in.rows[row * record + d];
  const auto term = [&](int64_t i) {
    const S* const c = l.in.components + i * (component_fields * record) + at;
    const S t = Term<S>(z, c[0], c[width], c[2 * width]).t;
    return in.stratified ? t + l.weights.at(row, i) : t;
  };
  const int lane = threadIdx.x % warp_size;
  S most = -S(__builtin_inff());
  for (int64_t i = lane; i < in.batch; i += warp_size) most = max(most, term(i));
#pragma unroll
  for (int offset = warp_size / 2; offset > 0; offset /= 2) most = max(most, __shfl_xor_sync(all_lanes, most, offset));
  if (most == -S(__builtin_inff())) return most;
  S sum = 0;
  for (int64_t i = lane; i < in.batch; i += warp_size) sum += ex2(term(i) - most);
  return most + log2(__shfl_sync(all_lanes, warp_sum(sum), 0));
}

// The splits' sums put together: 32 rows a block, a dimension a warp at a time.
template <class S>
__global__ void __launch_bounds__(finish_threads, 1) finish_kernel(const __grid_constant__ ForwardLaunch<S> l) {
  constexpr int warps = finish_threads / warp_size;
  constexpr S too_small = S(8.271806125530277e-25);  // 2^-80: beside it terms below 2^-126, lost or not, do not count
  const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
  const int64_t first = int64_t(blockIdx.x) * warp_size, row = min(first + lane, l.a.in.rows - 1);
  const bool inside = first + lane < l.a.in.rows;
  BOMKERN_SHARED_BYTES(bytes);
  double* const totals = reinterpret_cast<double*>(bytes);  // [warps, 32]

  double total = 0;
#pragma unroll 2
  for (int64_t d = warp; d < l.a.in.dims; d += warps) {
    S sum = 0;
    for (int64_t p = 0; p < l.splits; ++p) sum += l.sums[(p * l.in.chunks * width + d) * l.padded_rows + row];
    S marginal = log2(sum);
    unsigned redo = __ballot_sync(all_lanes, sum < too_small);
    for (int other = 0; redo; ++other, redo >>= 1) {
      if (!(redo & 1)) continue;
      const S exact = exact_marginal(l, min(first + other, l.a.in.rows - 1), d);
      if (lane == other) marginal = exact;
    }
    if (inside) l.a.marginal[d * l.a.in.rows + row] = marginal;
    total += marginal;
  }
  totals[threadIdx.x] = total;
  __syncthreads();
  if (warp != 0) return;
  double center = 0;
  if (l.a.log_q) {
    for (int64_t d = lane; d < l.a.in.dims; d += warp_size) center += l.centers[d];
    center = __shfl_sync(all_lanes, warp_sum(center), 0);
  }
  if (!inside) return;
  for (int w = 1; w < warps; ++w) total += totals[w * warp_size + lane];
  PowerSum<S> all;
  for (int64_t p = 0; p < l.splits; ++p) {
    all.add(l.joint_max[p * l.padded_rows + row], l.joint_sum[p * l.padded_rows + row]);
  }
  const double joint = double(all.max) + double(log2(all.sum));
  l.a.joint[row] = S(joint);
  l.a.out[row] = S(ln_2 * (joint - total) + l.a.offset);
  if (l.a.log_q) l.a.log_q[row] = ln_2 * (joint + center) + l.a.density_offset;
}

}  // namespace cuda
}  // namespace total_correlation
}  // namespace bomkern
