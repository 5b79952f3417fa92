// covariance_penalty on the GPU: the kernel of each stage, its number of blocks, and the layout of its workspace.
#include "cuda_columns.h"
#include "cuda_products.h"

namespace bomkern {
namespace covariance_penalty {
namespace cuda {
namespace {

bool valid(int64_t batch, int64_t dims) { return batch >= 2 && batch <= most_batch && dims >= 1; }

// A contiguous matrix of S, or none.
template <class S> Matrix numbers(const S* data, int64_t dims) {
  return {data, {dims, 1}, dtype_of_number<S>};
}

// The launch of a stage, and the bytes of its workspace. lay_out() returns it for pieces of W, and fills in the kernel's
// argument.
struct Grid {
  int64_t blocks = 1;
  int threads = column_threads;
  size_t shared = 0, bytes = 0;
  bool cooperative = false;
};

template <class S> int width_for(const Center<S>& a) {
  return width_of<S>(a.batch, a.dims, {a.z, numbers(a.x, a.dims)});
}
template <class S> int width_for(const Recenter<S>& a) {
  return width_of<S>(a.batch, a.dims, {a.z, numbers(a.x, a.dims), numbers(a.weighted, a.dims)});
}
template <class S> int width_for(const Gram<S>& a) { return width_of<S>(a.side, a.side, {numbers(a.matrix, a.side)}); }
template <class S> int width_for(const Parts<S>& a) {
  return width_of<S>(a.batch, a.dims, {numbers(a.x, a.dims), numbers(a.y, a.dims)});
}
template <class S> int width_for(const Finish<S>& a) {
  return width_of<S>(a.batch, a.dims, {a.z, numbers(a.product, a.dims), numbers(a.more, a.dims),
                                       contiguous(a.to, a.z.dtype, a.dims)});
}

template <class S, int W> Grid lay_out(const Center<S>& a, void* base, CenterLaunch<S>& l) {
  static std::atomic<int> known[16];
  Grid g;
  g.shared = column_shared<S, W>;
  const int64_t places = resident_blocks(center_kernel<S, W>, g.threads, g.shared, known);
  l.a = a;
  l.tiling = merging_tiling_of(a.batch, a.dims, W);
  g.blocks = least(l.tiling.tiles * l.tiling.slices, places);
  g.cooperative = g.blocks > 1;
  Memory memory(base);
  l.parts = memory.take<S>(2 * l.tiling.slices * a.dims);
  g.bytes = memory.bytes();
  return g;
}

template <class S, int W> Grid lay_out(const Recenter<S>& a, void*, RecenterLaunch<S>& l) {
  Grid g;
  const int64_t places = multiprocessors() * most_column_blocks;
  l.a = a;
  l.tiling = tiling_of(a.batch, a.dims, W, places);
  g.blocks = least(l.tiling.tiles * l.tiling.slices, places);
  return g;
}

template <class S, int W> Grid lay_out(const Gram<S>& a, void* base, GramLaunch<S>& l) {
  static std::atomic<int> known[16], known_long[16];
  Grid g;
  l.a = a;
  l.teams = teams_of(a.side, a.side / W, multiprocessors());
  g.threads = l.teams.threads, g.blocks = l.teams.blocks, g.shared = row_shared;
  if (a.out == nullptr) return g;
  auto& of_kernel = g.threads == row_threads ? known : known_long;
  g.blocks = least(g.blocks, resident_blocks(gram_kernel<S, W>, g.threads, g.shared, of_kernel));
  g.cooperative = g.blocks > 1;
  Memory memory(base);
  l.parts = memory.take<double>(g.blocks);
  g.bytes = memory.bytes();
  return g;
}

template <class S, int W> Grid lay_out(const Parts<S>& a, void*, PartsLaunch<S>& l) {
  Grid g;
  l.a = a;
  l.teams = teams_of(a.batch, a.dims / W, multiprocessors());
  g.threads = l.teams.threads, g.blocks = l.teams.blocks, g.shared = row_shared;
  return g;
}

template <class S, int W> Grid lay_out(const Finish<S>& a, void* base, FinishLaunch<S>& l) {
  static std::atomic<int> known[16];
  const bool sums = a.of_mean != 0 || a.of_slope != 0 || a.of_square != 0;
  Grid g;
  g.shared = column_threads * sizeof(Sums<S, W>);
  const int64_t places =
      sums ? resident_blocks(finish_kernel<S, W>, g.threads, g.shared, known) : multiprocessors() * most_column_blocks;
  l.a = a;
  l.tiling = sums ? merging_tiling_of(a.batch, a.dims, W) : tiling_of(a.batch, a.dims, W, places);
  g.blocks = least(l.tiling.tiles * l.tiling.slices, places);
  if (!sums) return g;
  g.cooperative = g.blocks > 1;
  Memory memory(base);
  l.parts = memory.take<S>(3 * l.tiling.slices * a.dims);
  l.mean = memory.take<S>(a.dims);
  l.slope = memory.take<S>(a.dims);
  g.bytes = memory.bytes();
  return g;
}

template <class S> bool valid(const Gram<S>& a) { return a.side >= 1; }
template <class Stage> bool valid(const Stage& a) { return valid(a.batch, a.dims); }

template <class S, int W> struct Kernels {
  static auto of(const Center<S>&) { return center_kernel<S, W>; }
  static auto of(const Recenter<S>&) { return recenter_kernel<S, W>; }
  static auto of(const Gram<S>&) { return gram_kernel<S, W>; }
  static auto of(const Parts<S>&) { return parts_kernel<S, W>; }
  static auto of(const Finish<S>&) { return finish_kernel<S, W>; }
  static CenterLaunch<S> launch(const Center<S>&) { return {}; }
  static RecenterLaunch<S> launch(const Recenter<S>&) { return {}; }
  static GramLaunch<S> launch(const Gram<S>&) { return {}; }
  static PartsLaunch<S> launch(const Parts<S>&) { return {}; }
  static FinishLaunch<S> launch(const Finish<S>&) { return {}; }
};

// Lays a stage out for its width; begin(kernel, grid, l) does something with it.
template <template <class> class Stage, class S, class Begin>
cudaError_t with_layout(const Stage<S>& a, void* workspace, Begin begin) {
  if (!valid(a)) return cudaErrorInvalidValue;
  return with_width<S, false>(width_for(a), [&](auto w) {
    using Of = Kernels<S, decltype(w)::value>;
    auto l = Of::launch(a);
    const Grid g = lay_out<S, decltype(w)::value>(a, workspace, l);
    return begin(Of::of(a), g, l);
  });
}

template <template <class> class Stage, class S> size_t workspace(const Stage<S>& a) {
  size_t bytes = 0;
  with_layout(a, nullptr, [&](auto, const Grid& g, const auto&) { return bytes = g.bytes, cudaSuccess; });
  return bytes;
}

template <template <class> class Stage, class S>
cudaError_t run(const Stage<S>& a, void* workspace, cudaStream_t stream) {
  return with_layout(a, workspace, [&](auto kernel, const Grid& g, const auto& l) {
    if (g.bytes && workspace == nullptr) return cudaErrorInvalidValue;
    return start(kernel, g.blocks, g.threads, g.shared, g.cooperative, stream, l);
  });
}

}  // namespace
}  // namespace cuda

BOMKERN_CUDA_DEFINE(Center)
BOMKERN_CUDA_DEFINE(Recenter)
BOMKERN_CUDA_DEFINE(Gram)
BOMKERN_CUDA_DEFINE(Parts)
BOMKERN_CUDA_DEFINE(Finish)

}  // namespace covariance_penalty
}  // namespace bomkern
