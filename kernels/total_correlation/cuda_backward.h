// total_correlation's backward pass on the GPU, a square of rows and components at a time.
//
// responsibility_kernel() writes (grad_b + grad_log_q_b) p_bi of the square, from sum_d t computed again to the same bits as in forward.
// Then gradient_kernel() runs once for the rows and once for the components, each thread owning one side of the pairs
// and meeting the other through shared memory: every exponential is computed once for each side. collect_kernel() adds
// what the blocks found to the gradients, in a fixed order.
#pragma once
#include "../common/cuda_pieces.h"
#include "cuda_terms.h"

namespace bomkern {
namespace total_correlation {
namespace cuda {

constexpr int square = 2048;        // rows, or components, of a square at most
constexpr int square_padding = 128;  // its sides in memory are multiples of this
constexpr int backward_threads = 256;

// The rows, or components, that a launch covers.
struct Range {
  int64_t begin;
  int count;
};

template <class S> struct ResponsibilityLaunch {
  Backward<S> a;
  Packed<S> in;
  Weights<S> weights;
  Range rows, components;
  int row_tiles;
  S* by_row;        // [rows, square], and the other way round; 0 where there is no row or component
  S* by_component;
};

// A block's tile: 16 x 16 threads of row_count x component_count pairs each.
template <class S, int N> struct ResponsibilityTile {
  static constexpr int row_count = 2 * owned<S>, component_count = owned<S>;
  static constexpr int rows = 16 * row_count, components = 16 * component_count;
  static constexpr int row_size = N * width, record = N * component_fields * width;
  // Eight threads side by side must read from different banks.
  static constexpr int pitch = record * sizeof(S) % 32 == 0 ? record + 16 / int(sizeof(S)) : record;
  static constexpr int stage = rows * row_size + components * pitch;
};

template <class S, int N>
__global__ void __launch_bounds__(backward_threads, 1)
    responsibility_kernel(const __grid_constant__ ResponsibilityLaunch<S> l) {
  using Tile = ResponsibilityTile<S, N>;
  constexpr int piece = 16 / int(sizeof(S)), row_pieces = Tile::row_size / piece, pieces = Tile::record / piece;
  const Inputs<S>& in = l.a.in;
  const int tid = threadIdx.x, x = tid % 16, y = tid / 16;
  const int first_row = int(blockIdx.x) % l.row_tiles * Tile::rows;
  const int first_component = int(blockIdx.x) / l.row_tiles * Tile::components;
  BOMKERN_SHARED_BYTES(bytes);
  S* const memory = reinterpret_cast<S*>(bytes);

  // One group of N chunks of every row and component of the tile. Those past the end repeat the last.
  const auto fetch = [&](int g, S* to) {
    for (int p = tid; p < Tile::rows * row_pieces; p += backward_threads) {
      const int row = p / row_pieces, at = p % row_pieces * piece;
      const int64_t b = l.rows.begin + min(first_row + row, l.rows.count - 1);
      const S* const from = l.in.rows + (b * l.in.chunks + g * N + at / width) * (2 * width) + at % width;
      __pipeline_memcpy_async(to + row * Tile::row_size + at, from, 16);
    }
    S* const records = to + Tile::rows * Tile::row_size;
    for (int p = tid; p < Tile::components * pieces; p += backward_threads) {
      const int component = p / pieces, at = p % pieces * piece;
      const int64_t i = l.components.begin + min(first_component + component, l.components.count - 1);
      const S* const from = l.in.components + (i * l.in.chunks + g * N) * (component_fields * width) + at;
      // Thread x owns neighbours, and its neighbours' components must lie side by side.
      const int place = component % Tile::component_count * 16 + component / Tile::component_count;
      __pipeline_memcpy_async(records + place * Tile::pitch + at, from, 16);
    }
    __pipeline_commit();
  };

  S joint[Tile::component_count][Tile::row_count], block[Tile::component_count][Tile::row_count];
#pragma unroll
  for (int c = 0; c < Tile::component_count; ++c) {
#pragma unroll
    for (int r = 0; r < Tile::row_count; ++r) joint[c][r] = block[c][r] = 0;
  }
  const int groups = l.in.chunks / N;
  fetch(0, memory);
#pragma unroll 1
  for (int g = 0; g < groups; ++g) {
    __pipeline_wait_prior(0);
    __syncthreads();
    if (g + 1 < groups) fetch(g + 1, memory + (g + 1) % 2 * Tile::stage);
    const S* const stage = memory + g % 2 * Tile::stage;
    const S* const records = stage + Tile::rows * Tile::row_size;
    Chunk<S> z[Tile::row_count][N];
#pragma unroll
    for (int r = 0; r < Tile::row_count; ++r) {
#pragma unroll
      for (int k = 0; k < N; ++k) {
        z[r][k] = load<Chunk<S>>(stage + (y * Tile::row_count + r) * Tile::row_size + k * width);
      }
    }
#pragma unroll
    for (int c = 0; c < Tile::component_count; ++c) {
      S part[Tile::row_count];
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const S* const chunk = records + (c * 16 + x) * Tile::pitch + k * (component_fields * width);
        const auto mu = load<Chunk<S>>(chunk), a = load<Chunk<S>>(chunk + width);
        const auto log_scale = load<Chunk<S>>(chunk + 2 * width);
#pragma unroll
        for (int d = 0; d < width; ++d) {
#pragma unroll
          for (int r = 0; r < Tile::row_count; ++r) {
            const S t = Term<S>(z[r][k].at[d], mu.at[d], a.at[d], log_scale.at[d]).t;
            part[r] = k + d == 0 ? t : part[r] + t;
          }
        }
      }
#pragma unroll
      for (int r = 0; r < Tile::row_count; ++r) block[c][r] += part[r];
    }
    if ((g + 1) % joint_block != 0 && g + 1 < groups) continue;
#pragma unroll
    for (int c = 0; c < Tile::component_count; ++c) {
#pragma unroll
      for (int r = 0; r < Tile::row_count; ++r) joint[c][r] += block[c][r], block[c][r] = 0;
    }
  }

  const int row = first_row + y * Tile::row_count, component = first_component + x * Tile::component_count;
#pragma unroll
  for (int r = 0; r < Tile::row_count; ++r) {
    const bool inside = row + r < l.rows.count;
    const int64_t b = l.rows.begin + (inside ? row + r : 0);
    const S* const alone = l.a.grad.data + b * l.a.grad.stride;
    const S grad = l.a.grad_log_q.data ? S(double(*alone) + grad_of(l.a.grad_log_q, b)) : *alone, total = l.a.joint[b];
    Vec<S> v;
#pragma unroll
    for (int c = 0; c < Tile::component_count; ++c) {
      if (in.stratified) joint[c][r] += l.weights.at(b, l.components.begin + component + c);
      const bool both = inside && component + c < l.components.count;
      joint[c][r] = both ? grad * ex2(joint[c][r] - total) : S(0);
      v.at[c] = joint[c][r];
    }
    save(l.by_row + int64_t(row + r) * square + component, v);
  }
#pragma unroll
  for (int c = 0; c < Tile::component_count; ++c) {
#pragma unroll
    for (int r = 0; r < Tile::row_count; r += owned<S>) {
      Vec<S> v;
#pragma unroll
      for (int i = 0; i < owned<S>; ++i) v.at[i] = joint[c][r + i];
      save(l.by_component + int64_t(component + c) * square + row + r, v);
    }
  }
}

// Which side of the pairs the threads own, and which they meet.
enum class Side { rows, components };
template <Side side> constexpr int sum_count = side == Side::rows ? 1 : 2;
template <Side side> constexpr int owned_fields = side == Side::rows ? 2 : component_fields;
template <Side side> constexpr int met_fields = side == Side::rows ? component_fields : 2;

// Blocks of gradient_kernel() on a multiprocessor: two leave each thread 128 registers, which double overruns.
template <class S> constexpr int gradient_blocks = sizeof(S) == 8 ? 1 : 2;

template <class S> struct GradientLaunch {
  Backward<S> a;
  Packed<S> in;
  Weights<S> weights;
  Range owners, met;
  int tiles, slices, slice_chunks, quads;  // a block: one tile of owners, one slice of the chunks, one split of the met
  int split_met;
  int64_t padded_owners;
  const S* responsibility;  // [met, owners], rows of `square`
  S* sums;                  // [splits, sum_count, chunks * 4, padded_owners]
};

// Where the pieces of one element that is met lie in shared memory, in elements of S.
template <class S, Side side> struct MetElement {
  int responsibility, grad, size;
  __host__ __device__ MetElement(int slice_chunks, int quads)
      : responsibility(slice_chunks * met_fields<side> * width),
        grad(responsibility + quads * owned<S>),
        size(grad + (side == Side::components ? owned<S> : 0)) {}
};
constexpr int met_tile = 16;

// Per exponential, sm_90 (tools/sass_count.py): for rows 7.6 instructions and one MUFU, 8 slots, which bounds it: 16
// exponentials a clock and multiprocessor. For components 9.7 instructions: 13.2. So no polynomials here. To add a
// segment's sums to the workspace takes about 60 and 120 instructions each 32 * 16 exponentials: 0.1 and 0.2 more.
template <class S, Side side>
__global__ void __launch_bounds__(backward_threads, gradient_blocks<S>)
    gradient_kernel(const __grid_constant__ GradientLaunch<S> l) {
  constexpr int R = owned<S>, K = sum_count<side>;
  constexpr bool by_rows = side == Side::rows;
  const Inputs<S>& in = l.a.in;
  const int tid = threadIdx.x, lane = tid % warp_size, warp = tid / warp_size, warps = blockDim.x / warp_size;
  const int tile = int(blockIdx.x) % l.tiles, slice = int(blockIdx.x) / l.tiles % l.slices;
  const int split = int(blockIdx.x) / l.tiles / l.slices;
  const int first_chunk = slice * l.slice_chunks, chunks = min(l.slice_chunks, l.in.chunks - first_chunk);
  const int first_owner = tile * l.quads * R, quads = min(l.quads, (l.owners.count - first_owner + R - 1) / R);
  const int q = tid % l.quads, c = tid / l.quads;
  const bool works = c < chunks;
  const int first_met = split * l.split_met, count = min(l.split_met, l.met.count - first_met);
  BOMKERN_SHARED_BYTES(bytes);
  S* const memory = reinterpret_cast<S*>(bytes);
  const MetElement<S, side> element(l.slice_chunks, l.quads);

  // The values that this thread owns: z and the marginal of rows, or mu, a and c of components.
  S mine[owned_fields<side>][width][R], sum[K][width][R], negative_grad[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int64_t owner = l.owners.begin + min(first_owner + q * R + r, l.owners.count - 1);
    const S* const record = (by_rows ? l.in.rows : l.in.components) +
                            (owner * l.in.chunks + first_chunk + (works ? c : 0)) * (owned_fields<side> * width);
#pragma unroll
    for (int f = 0; f < owned_fields<side>; ++f) {
      const auto values = load<Chunk<S>>(record + f * width);
#pragma unroll
      for (int d = 0; d < width; ++d) mine[f][d][r] = values.at[d];
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
#pragma unroll
      for (int d = 0; d < width; ++d) sum[k][d][r] = 0;
    }
    negative_grad[r] = by_rows ? -l.a.grad.data[owner * l.a.grad.stride] : S(0);
  }

  // A warp copies an element: its chunks, its responsibilities, and a row's grad.
  const auto fetch = [&](int from, int buffer) {
    for (int j = warp; j < min(met_tile, count - from); j += warps) {
      S* const to = memory + (buffer * met_tile + j) * element.size;
      const int local = first_met + from + j;
      const int64_t global = l.met.begin + local;
      const S* const records = by_rows ? l.in.components : l.in.rows;
      copy_async(to, records + (global * l.in.chunks + first_chunk) * (met_fields<side> * width),
                 chunks * met_fields<side> * width * int(sizeof(S)) / 16, lane, warp_size);
      copy_async(to + element.responsibility, l.responsibility + int64_t(local) * square + first_owner, quads, lane,
                 warp_size);
      if (!by_rows && lane == 0) {
        __pipeline_memcpy_async(to + element.grad, l.a.grad.data + global * l.a.grad.stride, sizeof(S));
      }
    }
    __pipeline_commit();
  };
  // Meets the elements [from, from + n). `banded` says that some weights are not 1.
  const auto meet = [&](int from, int n, const S* at, auto banded) {
#pragma unroll 1
    for (int j = 0; j < n; ++j, at += element.size) {
      const S* const record = at + c * (met_fields<side> * width);
      const auto p = load<Vec<S>>(at + element.responsibility + q * R);
      const auto first = load<Chunk<S>>(record), second = load<Chunk<S>>(record + width);
      const auto third = load<Chunk<S>>(by_rows ? record + 2 * width : record);
      const S grad = by_rows ? S(0) : -at[element.grad];
      S weight[R] = {};
      if constexpr (decltype(banded)::value) {
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const int64_t owner = l.owners.begin + first_owner + q * R + r, met = l.met.begin + first_met + from + j;
          weight[r] = by_rows ? l.weights.at(owner, met) : l.weights.at(met, owner);
        }
      }
#pragma unroll
      for (int d = 0; d < width; ++d) {
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const S z = by_rows ? mine[0][d][r] : first.at[d], marginal = by_rows ? mine[1][d][r] : second.at[d];
          const S mu = by_rows ? first.at[d] : mine[0][d][r], a = by_rows ? second.at[d] : mine[1][d][r];
          const Term<S> term(z, mu, a, by_rows ? third.at[d] : mine[owned_fields<side> - 1][d][r]);
          const S bits = decltype(banded)::value ? term.t + weight[r] : term.t;
          const S e = fma_of(by_rows ? negative_grad[r] : grad, ex2(bits - marginal), p.at[r]);
          if constexpr (by_rows) {
            sum[0][d][r] = fma_of(e, term.slope, sum[0][d][r]);
          } else {
            sum[0][d][r] = fma_of(e, term.slope, sum[0][d][r]);
            sum[1][d][r] = fma_of(e, fma_of(term.slope, term.u, -S(half_log2_e)), sum[1][d][r]);
          }
        }
      }
    }
  };

  const int64_t plane = int64_t(l.in.chunks) * width * l.padded_owners;
  S* const sums = l.sums + (int64_t(split) * K) * plane + int64_t(first_chunk + c) * width * l.padded_owners +
                  first_owner + q * R;
  fetch(0, 0);
  for (int from = 0, buffer = 0; from < count; from += met_tile, buffer ^= 1) {
    __pipeline_wait_prior(0);
    __syncthreads();
    fetch(from + met_tile, buffer ^ 1);
    if (!works) continue;
    const int n = min(met_tile, count - from);
    const int64_t owner = l.owners.begin + first_owner, met = l.met.begin + first_met + from;
    const bool band = in.stratified && (by_rows ? l.weights.touch(owner, l.quads * R, met, n)
                                                : l.weights.touch(met, n, owner, l.quads * R));
    const S* const at = memory + buffer * met_tile * element.size;
    if (band) {
      meet(from, n, at, Constant<true>());
    } else {
      meet(from, n, at, Constant<false>());
    }
    if ((from + n) % gradient_segment != 0 && from + n != count) continue;
#pragma unroll
    for (int k = 0; k < K; ++k) flush<S, width>(sums + k * plane, l.padded_owners, sum[k], from < gradient_segment);
  }
}

template <class S> struct CollectLaunch {
  Backward<S> a;
  Packed<S> in;
  Range owners;
  int dim_tiles, splits;
  int64_t padded_owners;
  const S* sums;
  bool first;  // else the gradients hold what earlier squares gave
};

constexpr int collect_side = 32;

// A block's 32 owners by 32 dimensions are read with the owners side by side and written with the dimensions so.
template <class S, Side side>
__global__ void __launch_bounds__(backward_threads, 1) collect_kernel(const __grid_constant__ CollectLaunch<S> l) {
  constexpr int K = sum_count<side>;
  constexpr S two_ln_2 = S(1.38629436111989061883);
  const int x = threadIdx.x % collect_side, y = threadIdx.x / collect_side;
  const int first_owner = int(blockIdx.x) / l.dim_tiles * collect_side;
  const int first_dim = int(blockIdx.x) % l.dim_tiles * collect_side;
  BOMKERN_SHARED_BYTES(bytes);
  S* const tile = reinterpret_cast<S*>(bytes);  // [K, 32, 33]
  constexpr int pitch = collect_side + 1, plane = collect_side * pitch;
  const int64_t padded_dims = int64_t(l.in.chunks) * width;
#pragma unroll 1
  for (int d = y; d < collect_side; d += backward_threads / collect_side) {
    if (first_dim + d >= l.a.in.dims || first_owner + x >= l.owners.count) continue;
    S sum[K] = {};
    for (int p = 0; p < l.splits; ++p) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        sum[k] += l.sums[((int64_t(p) * K + k) * padded_dims + first_dim + d) * l.padded_owners + first_owner + x];
      }
    }
    tile[d * pitch + x] = (side == Side::rows ? -two_ln_2 : two_ln_2) * sum[0];
    if constexpr (K == 2) tile[plane + d * pitch + x] = two_ln_2 / 2 * sum[1];
  }
  __syncthreads();
  const int64_t d = first_dim + x;
  if (d >= l.a.in.dims) return;
#pragma unroll 1
  for (int o = y; o < collect_side && first_owner + o < l.owners.count; o += backward_threads / collect_side) {
    const int64_t owner = l.owners.begin + first_owner + o;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      S* const out = side == Side::rows ? l.a.grad_z : k == 0 ? l.a.grad_mu : l.a.grad_logvar;
      if (out == nullptr) continue;
      const S value = tile[k * plane + x * pitch + o];
      S& to = out[owner * l.a.in.dims + d];
      to = l.first ? value : to + value;
    }
  }
}

}  // namespace cuda
}  // namespace total_correlation
}  // namespace bomkern
