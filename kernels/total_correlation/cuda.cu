// total_correlation on the GPU: which shape of block, how many blocks, how the workspace is laid out, which launches.
#include "cuda.h"

#include <array>
#include <cmath>

#include "../common/cuda_tune.h"
#include "cuda_backward.h"
#include "cuda_forward.h"
#include "cuda_prepare.h"

namespace bomkern {
namespace total_correlation {
namespace cuda {
namespace {

constexpr size_t plain_shared = 49152;              // what any launch gets
constexpr size_t most_shared = 101376;              // what every GPU since 8.0 gives where asked
constexpr int64_t split_bytes = int64_t(64) << 20;  // the most that splits of a grid may take of the workspace

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  if (shared > plain_shared) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...), last = cudaGetLastError();
  return error != cudaSuccess ? error : last;
}

int multiprocessors() {
  int id = 0, count = 0;
  if (cudaGetDevice(&id) != cudaSuccess) return 1;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, id) != cudaSuccess) return 1;
  return max(count, 1);
}

// Allocates pieces of the workspace; with a null base it only counts their bytes.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<unsigned char*>(base)) {}
  template <class S> S* take(int64_t count) {
    S* const piece = base_ ? reinterpret_cast<S*>(base_ + bytes_) : nullptr;
    bytes_ += (size_t(count) * sizeof(S) + 15) / 16 * 16;
    return piece;
  }
  size_t bytes() const { return bytes_; }

 private:
  unsigned char* base_;
  size_t bytes_ = 0;
};

// Chunks of dimensions in a thread: two, unless padding to whole pairs would cost more than it saves.
template <class S> int thread_chunks(int64_t dims) {
  return sizeof(S) == 8 || (dims < 36 && (dims - 1) % 8 < 4) ? 1 : 2;
}

template <class S> int chunks_of(int64_t dims) {
  const int n = thread_chunks<S>(dims);
  return int(ceil_div(dims, width * n)) * n;
}

// fixed_steps: what a block does beside its steps, counted in them. shortest_split: the steps of a block at least.
int64_t fixed_steps = 32, shortest_split = 16, most_splits = 32;

// How many ways to split `length` steps of a block among blocks that repeat its fixed work, so that `tiles` such blocks
// come out evenly on `slots` places. Each way takes `bytes` of workspace.
int64_t splits_of(int64_t tiles, int64_t length, int64_t slots, int64_t bytes) {
  int64_t best = 1, best_cost = INT64_MAX;
  for (int64_t s = 1; s <= most_splits; ++s) {
    if (s > 1 && (ceil_div(length, s) < shortest_split || s * bytes > split_bytes)) break;
    const int64_t cost = ceil_div(tiles * s, slots) * (ceil_div(length, s) + fixed_steps);
    if (cost < best_cost) best = s, best_cost = cost;
  }
  return best;
}

template <class S> Weights<S> weights_of(const Inputs<S>& in) {
  return {S(std::log2(double(in.own))), S(std::log2(double(in.next))), int(in.batch), int(in.first)};
}

template <class S> PackLaunch<S> pack_of(const Inputs<S>& in, const S* marginal, bool centers, Workspace& workspace) {
  PackLaunch<S> l{};
  l.in = in;
  l.weights = weights_of(in);
  l.marginal = marginal;
  l.chunks = chunks_of<S>(in.dims);
  l.slice_rows = max(int64_t(64), ceil_div(in.batch, 256));
  l.slices = int(ceil_div(in.batch, l.slice_rows));
  l.dim_blocks = int(ceil_div(int64_t(l.chunks) * width, pack_dims));
  const int64_t padded = int64_t(l.chunks) * width;
  l.columns = workspace.take<Column<S>>(l.slices * padded);
  if (centers) l.centers = workspace.take<double>(padded);
  l.components = workspace.take<S>(in.batch * padded * component_fields);
  l.rows = workspace.take<S>(in.rows * padded * (marginal ? 2 : 1));
  return l;
}

template <class S> cudaError_t pack(const PackLaunch<S>& l, cudaStream_t stream) {
  const int64_t blocks = int64_t(l.slices) * l.dim_blocks;
  const size_t shared = pack_threads * sizeof(Column<S>);
  const cudaError_t error = launch(column_kernel<S>, blocks, pack_threads, shared, stream, l);
  return error != cudaSuccess ? error : launch(pack_kernel<S>, blocks, pack_threads, shared, stream, l);
}

template <class S> bool valid(const Inputs<S>& in) {
  return in.rows >= 1 && in.first >= 0 && in.rows <= in.batch - in.first && in.batch <= 1 << 30 && in.dims >= 1 &&
         in.dims <= max_cuda_dims<S>;
}

template <class S> size_t shared_of(const Geometry& g, int chunks) { return ForwardShared<S>(g, chunks).bytes(); }

// Full blocks where there are rows for them; as many components a barrier as two blocks' shared memory allows.
template <class S> Geometry geometry_of(int64_t rows, int chunks, int n) {
  Geometry g{};
  g.groups = chunks / n;
  const int threads = g.groups <= 64 ? 256 : max_threads<S>;
  g.quads = int(min(int64_t(max(threads / g.groups, 1)), ceil_div(rows, owned<S>)));
  g.threads = int(ceil_div(g.groups * g.quads, warp_size)) * warp_size;
  g.tile = 4;
  while (g.tile > 2 && shared_of<S>(g, chunks) > plain_shared) g.tile /= 2;
  while (g.tile > 1 && shared_of<S>(g, chunks) > most_shared) g.tile /= 2;
  return g;
}

template <class S> struct ForwardPlan {
  PackLaunch<S> pack;
  ForwardLaunch<S> l;
  int n;
  size_t bytes;

  ForwardPlan(const Forward<S>& a, void* memory) : l{} {
    Workspace workspace(memory);
    const int64_t rows = a.in.rows, batch = a.in.batch;
    pack = pack_of<S>(a.in, nullptr, a.log_q, workspace);
    n = thread_chunks<S>(a.in.dims);
    l.a = a;
    l.in = {pack.components, pack.rows, pack.chunks};
    l.weights = weights_of(a.in);
    l.centers = pack.centers;
    l.geometry = geometry_of<S>(rows, pack.chunks, n);
    l.tiles = ceil_div(rows, l.geometry.quads * owned<S>);
    l.padded_rows = l.tiles * l.geometry.quads * owned<S>;
    const int64_t sums = int64_t(pack.chunks) * width * l.padded_rows;
    const int together = max_threads<S> / l.geometry.threads;  // blocks that a multiprocessor has registers for
    const int64_t splits = splits_of(l.tiles, batch, int64_t(multiprocessors()) * together, sums * int64_t(sizeof(S)));
    l.split_components = ceil_div(ceil_div(batch, splits), l.geometry.tile) * l.geometry.tile;
    l.splits = ceil_div(batch, l.split_components);
    l.sums = workspace.take<S>(l.splits * sums);
    l.joint_max = workspace.take<S>(l.splits * l.padded_rows);
    l.joint_sum = workspace.take<S>(l.splits * l.padded_rows);
    bytes = workspace.bytes();
  }
};

// One exponential in so many of forward_kernel<float, 2> is a polynomial.
int64_t period = poly_period;

// Its kernel, null where there is none. Those beside poly_period's are there only where bench/tune.py is to time them
// (NVCC_APPEND_FLAGS=-DBOMKERN_TUNE): a library that people install would compile and carry them for nothing.
auto kernel_of_period(int64_t period) -> void (*)(ForwardLaunch<float>) {
  if (period == poly_period) return forward_kernel<float, 2>;
#if defined(BOMKERN_TUNE)
  if (period == 8) return forward_kernel_of_period<8>;
  if (period == 10) return forward_kernel_of_period<10>;
  if (period == 32) return forward_kernel_of_period<32>;
#endif
  return nullptr;
}

template <class S> size_t workspace(const Forward<S>& a) {
  return valid(a.in) ? ForwardPlan<S>(a, nullptr).bytes : 0;
}

template <class S> cudaError_t run(const Forward<S>& a, void* workspace, cudaStream_t stream) {
  if (!valid(a.in) || workspace == nullptr) return cudaErrorInvalidValue;
  const ForwardPlan<S> plan(a, workspace);
  const ForwardLaunch<S>& l = plan.l;
  const size_t shared = shared_of<S>(l.geometry, l.in.chunks);
  if (shared > most_shared) return cudaErrorInvalidValue;
  cudaError_t error = pack(plan.pack, stream);
  if (error != cudaSuccess) return error;
  auto kernel = forward_kernel<S, 1>;
  if constexpr (sizeof(S) == 4) {
    if (plan.n == 2) kernel = kernel_of_period(period);
  }
  error = launch(kernel, l.tiles * l.splits, l.geometry.threads, shared, stream, l);
  if (error != cudaSuccess) return error;
  return launch(finish_kernel<S>, ceil_div(a.in.rows, warp_size), finish_threads, finish_threads * sizeof(double),
                stream, l);
}

// One side's gradients in one square: the shape of its blocks, and where they leave their sums.
template <class S, Side side> struct GradientPlan {
  GradientLaunch<S> l{};
  int threads, splits;
  size_t shared;
  int64_t sums;

  GradientPlan(const Backward<S>& a, const Packed<S>& in, int owners, int met) {
    constexpr int most_chunks = 8, most_quads = 64;  // what of one element fits into shared memory
    l.a = a;
    l.in = in;
    l.weights = weights_of(a.in);
    l.slices = int(ceil_div(in.chunks, most_chunks));
    l.slice_chunks = int(ceil_div(in.chunks, l.slices));
    l.quads = int(min(int64_t(min(backward_threads / l.slice_chunks, most_quads)), ceil_div(owners, owned<S>)));
    threads = int(ceil_div(l.slice_chunks * l.quads, warp_size)) * warp_size;
    l.tiles = int(ceil_div(owners, l.quads * owned<S>));
    l.padded_owners = int64_t(l.tiles) * l.quads * owned<S>;
    const int64_t one = int64_t(in.chunks) * width * l.padded_owners * sum_count<side>;
    const int64_t slots = int64_t(multiprocessors()) * gradient_blocks<S> * (backward_threads / threads);
    const int64_t ways = splits_of(int64_t(l.tiles) * l.slices, met, slots, one * int64_t(sizeof(S)));
    l.split_met = int(ceil_div(ceil_div(met, ways), met_tile)) * met_tile;
    splits = int(ceil_div(met, l.split_met));
    sums = one * splits;
    shared = 2 * met_tile * MetElement<S, side>(l.slice_chunks, l.quads).size * sizeof(S);
  }

  cudaError_t run(const Range& owners, const Range& met, const S* responsibility, S* memory, bool first,
                  cudaStream_t stream) {
    l.owners = owners;
    l.met = met;
    l.responsibility = responsibility;
    l.sums = memory;
    const int64_t blocks = int64_t(l.tiles) * l.slices * splits;
    const cudaError_t error = launch(gradient_kernel<S, side>, blocks, threads, shared, stream, l);
    if (error != cudaSuccess) return error;
    CollectLaunch<S> c{};
    c.a = l.a;
    c.in = l.in;
    c.owners = owners;
    c.dim_tiles = int(ceil_div(l.a.in.dims, collect_side));
    c.splits = splits;
    c.padded_owners = l.padded_owners;
    c.sums = memory;
    c.first = first;
    const size_t tile = 2 * collect_side * (collect_side + 1) * sizeof(S);
    return launch(collect_kernel<S, side>, ceil_div(owners.count, collect_side) * c.dim_tiles, backward_threads, tile,
                  stream, c);
  }
};

template <class S> struct BackwardPlan {
  PackLaunch<S> pack;
  Packed<S> in;
  int row_side, component_side;  // of a square
  int64_t sums;
  S *by_row, *by_component, *memory;
  size_t bytes;

  BackwardPlan(const Backward<S>& a, void* base) {
    Workspace workspace(base);
    pack = pack_of<S>(a.in, a.marginal, false, workspace);
    in = {pack.components, pack.rows, pack.chunks};
    row_side = int(min(a.in.rows, int64_t(square)));
    component_side = int(min(a.in.batch, int64_t(square)));
    by_row = workspace.take<S>(ceil_div(row_side, square_padding) * square_padding * square);
    by_component = workspace.take<S>(ceil_div(component_side, square_padding) * square_padding * square);
    sums = 0;
    for (const int rows : sizes(a.in.rows, row_side)) {
      for (const int components : sizes(a.in.batch, component_side)) {
        if (a.grad_z) sums = max(sums, GradientPlan<S, Side::rows>(a, in, rows, components).sums);
        if (a.grad_mu || a.grad_logvar) {
          sums = max(sums, GradientPlan<S, Side::components>(a, in, components, rows).sums);
        }
      }
    }
    memory = workspace.take<S>(sums);
    bytes = workspace.bytes();
  }

  // The part of `count` rows or components in a square: a full side, or the rest.
  static std::array<int, 2> sizes(int64_t count, int side) {
    return {side, count % side ? int(count % side) : side};
  }
};

template <class S>
cudaError_t responsibilities(const BackwardPlan<S>& plan, const Backward<S>& a, Range rows, Range components,
                             cudaStream_t stream) {
  const auto run = [&](auto tile, auto kernel) {
    ResponsibilityLaunch<S> l{};
    l.a = a;
    l.in = plan.in;
    l.weights = weights_of(a.in);
    l.rows = rows;
    l.components = components;
    l.row_tiles = int(ceil_div(rows.count, tile.rows));
    l.by_row = plan.by_row;
    l.by_component = plan.by_component;
    const int64_t blocks = l.row_tiles * ceil_div(components.count, tile.components);
    return launch(kernel, blocks, backward_threads, 2 * tile.stage * sizeof(S), stream, l);
  };
  if constexpr (sizeof(S) == 4) {
    if (thread_chunks<S>(a.in.dims) == 2) return run(ResponsibilityTile<S, 2>(), responsibility_kernel<S, 2>);
  }
  return run(ResponsibilityTile<S, 1>(), responsibility_kernel<S, 1>);
}

template <class S> size_t workspace(const Backward<S>& a) {
  const bool wanted = a.grad_z || a.grad_mu || a.grad_logvar;
  return wanted && valid(a.in) ? BackwardPlan<S>(a, nullptr).bytes : 0;
}

template <class S> cudaError_t run(const Backward<S>& a, void* workspace, cudaStream_t stream) {
  const bool rows_wanted = a.grad_z, components_wanted = a.grad_mu || a.grad_logvar;
  if (!rows_wanted && !components_wanted) return cudaSuccess;
  if (!valid(a.in) || workspace == nullptr) return cudaErrorInvalidValue;
  const BackwardPlan<S> plan(a, workspace);
  cudaError_t error = pack(plan.pack, stream);
  for (int64_t b = 0; b < a.in.rows && error == cudaSuccess; b += plan.row_side) {
    const Range rows{b, int(min(int64_t(plan.row_side), a.in.rows - b))};
    for (int64_t i = 0; i < a.in.batch && error == cudaSuccess; i += plan.component_side) {
      const Range components{i, int(min(int64_t(plan.component_side), a.in.batch - i))};
      error = responsibilities(plan, a, rows, components, stream);
      if (error == cudaSuccess && rows_wanted) {
        GradientPlan<S, Side::rows> side(a, plan.in, rows.count, components.count);
        error = side.run(rows, components, plan.by_component, plan.memory, i == 0, stream);
      }
      if (error == cudaSuccess && components_wanted) {
        GradientPlan<S, Side::components> side(a, plan.in, components.count, rows.count);
        error = side.run(components, rows, plan.by_row, plan.memory, b == 0, stream);
      }
    }
  }
  return error;
}

}  // namespace
}  // namespace cuda

BOMKERN_CUDA_OP

}  // namespace total_correlation
}  // namespace bomkern

// See cuda_tune.h.
BOMKERN_EXPORT int64_t bomkern_tune_total_correlation(const char* name, int64_t value) {
  using namespace bomkern::total_correlation::cuda;
  return tune({{"fixed_steps", &fixed_steps},
               {"shortest_split", &shortest_split},
               {"most_splits", &most_splits},
               {"poly_period", &period, [](int64_t p) { return kernel_of_period(p) != nullptr; }}},
              name, value);
}
