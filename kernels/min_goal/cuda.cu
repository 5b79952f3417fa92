// min_goal on the GPU: which kernel, how many blocks, how many launches.
#include "cuda.h"

#include <atomic>

#include "../common/cuda_tune.h"
#include "cuda_backward.h"

namespace bomkern {
namespace BOMKERN_ISA {
namespace {

// Up to `one_block` samples, spreading the work would cost more than it saves. Up to one turn of all threads of a cluster,
// or of a block where there are no clusters, a second launch would, by count: a turn of 16 warps issues some 6,000
// instructions a scheduler, 3 to 4 us. A grid's warps, almost alone, take half of that, and the launch some 2.5 us.
// Eight blocks is the largest cluster that every GPU grants.
int64_t one_block = 1024, one_block_without_clusters = 2048, one_cluster = 16384;
int64_t least_grid_threads = 64, most_grid_threads = 256;
constexpr int cluster_blocks = 8;

struct Device {
  int code;  // the architecture this file's code was compiled for, as in __CUDA_ARCH__ / 10
  int multiprocessors;
};

// The code that the driver loaded decides, not the device: PTX for 8.0 also runs on a 9.0, without clusters.
cudaError_t device_of(Device* device) {
  static std::atomic<int> known[64];
  int id = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&id);
  if (error != cudaSuccess) return error;
  int packed = id < 64 ? known[id].load(std::memory_order_relaxed) : 0;
  if (packed == 0) {
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(forward_kernel<float, false, false>));
    if (error != cudaSuccess) return error;
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, id);
    if (error != cudaSuccess) return error;
    packed = multiprocessors << 16 | attributes.ptxVersion;
    if (id < 64) known[id].store(packed, std::memory_order_relaxed);
  }
  *device = {packed & 0xffff, packed >> 16};
  return cudaSuccess;
}

struct Plan {
  int64_t blocks;
  int threads;
  bool cluster, workspace;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Enough threads for a block's share of the batch, at most max_threads, which loop over the rest.
int threads_for(int64_t samples) {
  return int(min(ceil_div(samples, warp_rows), int64_t(max_threads / 32))) * 32;
}

// Threads of a grid's blocks: blocks stay small until every multiprocessor has four.
int grid_threads_for(int64_t batch, int multiprocessors) {
  int threads = int(least_grid_threads);
  while (threads < most_grid_threads && ceil_div(batch, threads * rows) > int64_t(multiprocessors) * 4) threads *= 2;
  return threads;
}

template <class S> Plan plan_of(const Device& device, int64_t batch, Reduction reduction, bool stats) {
  const bool clusters = device.code >= 90;
  if (reduction == Reduction::none && !stats) {
    return {min(ceil_div(batch, 128 * rows), int64_t(device.multiprocessors) * 8), 128, false, false};
  }
  if (batch <= (clusters ? one_block : one_block_without_clusters)) return {1, threads_for(batch), false, false};
  if (clusters && batch <= one_cluster) {
    return {cluster_blocks, threads_for(ceil_div(batch, cluster_blocks)), true, false};
  }
  const int threads = grid_threads_for(batch, device.multiprocessors);
  const int together = (sizeof(S) == 4 ? 768 : 512) / threads;  // blocks that a multiprocessor has registers for
  return {min(ceil_div(batch, threads * rows), int64_t(device.multiprocessors) * together), threads, false, true};
}

size_t workspace_bytes(const Plan& plan, int goals, bool stats) {
  return plan.workspace ? plan.blocks * (sizeof(Total) + (stats ? goals * (sizeof(double) + sizeof(unsigned)) : 0)) : 0;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared, bool cluster,
                   cudaStream_t stream, const Arguments&... arguments) {
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {unsigned(cluster_blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cluster ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...), last = cudaGetLastError();
  return error != cudaSuccess ? error : last;
}

bool aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

bool is_half(DType t) { return t == DType::f16 || t == DType::bf16; }

// Neighbours, where four of them are one aligned piece everywhere.
template <class S> Access access_of(const Forward<S>& a) {
  bool adjacent = aligned(a.bottleneck, 16), halves = true;
  if (a.reduction == Reduction::none) adjacent &= aligned(a.loss, 16);
  if (a.reduction != Reduction::min) adjacent &= aligned(a.slope, 16) && aligned(a.winner, 4);
  for (int k = 0; k < a.goals.count; ++k) {
    const bool half = is_half(a.goals.dtype[k]);
    const int64_t stride = a.goals.stride[k];
    adjacent &= stride == 0 || (stride == 1 && aligned(a.goals.data[k], half ? 8 : 16));
    halves &= half;
  }
  return adjacent ? Access::adjacent : halves ? Access::halves : Access::apart;
}

template <class S> size_t workspace(const Forward<S>& a) {
  Device device;
  if (device_of(&device) != cudaSuccess) return 0;  // run() returns the error
  const bool stats = a.bottleneck != nullptr;
  return workspace_bytes(plan_of<S>(device, a.goals.batch, a.reduction, stats), a.goals.count, stats);
}

template <class S> cudaError_t run(const Forward<S>& a, void* workspace, cudaStream_t stream) {
  const bool scores = a.params == nullptr, stats = a.bottleneck != nullptr;
  const int count = a.goals.count;
  const int64_t batch = a.goals.batch;
  if (batch < 1 || count < 1 || count > max_goals) return cudaErrorInvalidValue;
  Device device;
  const cudaError_t error = device_of(&device);
  if (error != cudaSuccess) return error;
  const Plan plan = plan_of<S>(device, batch, a.reduction, stats);
  if (plan.workspace && workspace == nullptr) return cudaErrorInvalidValue;

  ForwardLaunch<S> l{};
  l.a = a;
  l.access = access_of(a);
  if (plan.workspace) {
    l.partials.total = static_cast<Total*>(workspace);
    l.partials.level = reinterpret_cast<double*>(l.partials.total + plan.blocks);
    l.partials.owned = reinterpret_cast<unsigned*>(l.partials.level + (stats ? plan.blocks * count : 0));
  }
  // The stage: small where several blocks share a multiprocessor, and with all the rest below the 48 KB of any block.
  const int goal_bytes = plan.threads * rows * int(sizeof(S));
  const int stage = plan.cluster || plan.blocks == 1 ? 32768 : 16384;
  l.group = min(count, max(1, stage / goal_bytes));
  const size_t shared = stage_offset<S>(plan.threads / 32, stats ? count : 0) + size_t(l.group) * goal_bytes;

  const auto kernel = scores ? (stats ? forward_kernel<S, true, true> : forward_kernel<S, true, false>)
                             : (stats ? forward_kernel<S, false, true> : forward_kernel<S, false, false>);
  const cudaError_t first = launch(kernel, plan.blocks, plan.threads, shared, plan.cluster, stream, l);
  if (first != cudaSuccess || !plan.workspace) return first;
  return launch(stats ? finish_kernel<S, true> : finish_kernel<S, false>, 1, stats ? max_threads : 32, 0, false, stream,
                l, int(plan.blocks));
}

// Where there are sums: one block up to a turn of max_threads, else small blocks, which reach more multiprocessors.
template <class S> struct BackwardPlan {
  BackwardLaunch<S> l{};
  int threads;
  int64_t blocks;
  bool partials, matrix = false;

  explicit BackwardPlan(const Backward<S>& a) {
    l.a = a;
    for (int o = 0; o < a.outputs; ++o) {
      if (a.out[o].batch_level) l.batch_level[l.sums++] = uint8_t(o);
      matrix |= a.out[o].goal < 0;
    }
    const bool whole = l.sums > 0 && a.worst == nullptr && a.batch <= max_threads * rows;
    threads = whole ? threads_for(a.batch) : min(128, threads_for(a.batch));
    blocks = a.worst && l.sums == a.outputs ? 1 : ceil_div(a.batch, threads * rows);
    partials = l.sums > 0 && a.worst == nullptr && blocks > 1;
  }
  size_t bytes() const { return partials ? l.sums * blocks * sizeof(double) : 0; }
};

template <class S> bool valid(const Backward<S>& a) { return a.batch >= 1 && a.outputs >= 0 && a.outputs <= max_goals; }

template <class S> size_t workspace(const Backward<S>& a) { return valid(a) ? BackwardPlan<S>(a).bytes() : 0; }

template <class S> cudaError_t run(const Backward<S>& a, void* workspace, cudaStream_t stream) {
  if (!valid(a)) return cudaErrorInvalidValue;
  if (a.outputs == 0) return cudaSuccess;
  BackwardPlan<S> plan(a);
  if (plan.partials && workspace == nullptr) return cudaErrorInvalidValue;
  plan.l.partials = plan.partials ? static_cast<double*>(workspace) : nullptr;
  plan.l.adjacent = a.worst == nullptr && aligned(a.slope, 16) && aligned(a.winner, 4) &&
                    (a.grad_stride == 0 || (a.grad_stride == 1 && aligned(a.grad, 16)));
  const size_t shared = BackwardShared<S>::bytes(plan.threads, plan.l.sums, plan.matrix);
  const cudaError_t first = launch(backward_kernel<S>, plan.blocks, plan.threads, shared, false, stream, plan.l);
  if (first != cudaSuccess || !plan.partials) return first;
  return launch(sum_kernel<S>, plan.l.sums, sum_threads, sum_threads / 32 * sizeof(double), false, stream, plan.l,
                plan.blocks);
}

}  // namespace
}  // namespace BOMKERN_ISA

namespace min_goal {

BOMKERN_CUDA_OP

}  // namespace min_goal
}  // namespace bomkern

// See cuda_tune.h.
BOMKERN_EXPORT int64_t bomkern_tune_min_goal(const char* name, int64_t value) {
  using namespace bomkern::cuda;
  return tune({{"one_block", &one_block},
               {"one_block_without_clusters", &one_block_without_clusters},
               {"one_cluster", &one_cluster},
               {"least_grid_threads", &least_grid_threads},
               {"most_grid_threads", &most_grid_threads}},
              name, value);
}
