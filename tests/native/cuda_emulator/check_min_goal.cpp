// Runs min_goal's CUDA kernels under the emulator against the CPU implementation, over random inputs and every mode.
#include "emulator.h"

#include "../../../kernels/common/cuda_math.h"
#include "../../../kernels/min_goal/cuda.h"

namespace bomkern {
namespace min_goal {
namespace baseline {
extern const CpuKernels kernels;
}
}  // namespace min_goal
}  // namespace bomkern

extern "C" int64_t bomkern_tune_min_goal(const char* name, int64_t value);

using namespace bomkern;
using namespace bomkern::min_goal;

namespace {

std::mt19937 engine(20);
int below(int n) { return int(engine() % unsigned(n)); }
bool chance(double p) { return engine() < p * 4294967296.0; }
double uniform(double low, double high) { return low + (high - low) * (engine() / 4294967296.0); }

int failures = 0;
char current[256];
void expect(bool good, const char* what, int64_t at, double got, double want) {
  if (good || ++failures > 20) return;
  fprintf(stderr, "%s: %s[%lld] is %.9g, want %.9g\n", current, what, (long long)at, got, want);
}

bool close(double a, double b, double tolerance) {
  if (a != a || b != b) return a != a && b != b;
  return a == b || fabs(a - b) <= tolerance * (1 + fmax(fabs(a), fabs(b)));
}

// n values that start at a multiple of 64 bytes plus `shift` values; all is NaN before, and a guard lies on both sides.
template <class T> struct Buffer {
  std::unique_ptr<unsigned char[]> bytes;
  T* data;
  size_t n;
  explicit Buffer(size_t n, int shift = 0) : bytes(new unsigned char[n * sizeof(T) + 256 + shift * sizeof(T)]), n(n) {
    memset(bytes.get(), 0xff, n * sizeof(T) + 256 + shift * sizeof(T));
    const uintptr_t start = (uintptr_t(bytes.get()) + 64 + 63) / 64 * 64;
    data = reinterpret_cast<T*>(start) + shift;
  }
  void check_guards(const char* what) const {
    const unsigned char* const before = reinterpret_cast<unsigned char*>(data) - 16;
    const unsigned char* const after = reinterpret_cast<unsigned char*>(data + n);
    for (int i = 0; i < 16; ++i) expect(before[i] == 0xff && after[i] == 0xff, what, i, -1, 0);
  }
};

int size_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

void put(unsigned char* to, DType dtype, double value) {
  const float f = float(value);
  uint16_t half = dtype == DType::f16 ? __float2half_rn(f).bits : __float2bfloat16_rn(f).bits;
  if (dtype == DType::f64) memcpy(to, &value, 8);
  if (dtype == DType::f32) memcpy(to, &f, 4);
  if (size_of(dtype) == 2) memcpy(to, &half, 2);
}

double get(const void* data, DType dtype, int64_t i) {
  const auto* half = static_cast<const uint16_t*>(data);
  switch (dtype) {
    case DType::f64: return static_cast<const double*>(data)[i];
    case DType::f32: return static_cast<const float*>(data)[i];
    case DType::f16: return __half2float({half[i]});
    default: return __bfloat162float({half[i]});
  }
}

enum class Layout { columns, mixed, matrix, misaligned };

struct Setting {
  int64_t batch;
  int count;
  Reduction reduction;
  bool scores, stats;
  Layout layout;
};

template <class S> DType any_dtype() { return DType(below(sizeof(S) == 8 ? 4 : 3)); }

template <class S> struct Problem {
  Goals goals{};
  std::vector<Buffer<unsigned char>> memory;
  Buffer<S> params;
  Setting s;

  explicit Problem(const Setting& s) : params(4 * s.count), s(s) {
    goals.count = s.count;
    goals.batch = s.batch;
    const DType native = sizeof(S) == 8 ? DType::f64 : DType::f32;
    const DType common = s.layout == Layout::mixed || chance(0.5) ? any_dtype<S>() : native;
    const int size = size_of(common);
    if (s.layout == Layout::matrix) memory.emplace_back(s.batch * s.count * size, 0);
    for (int k = 0; k < s.count; ++k) {
      goals.dtype[k] = common;
      goals.curve[k] = uint8_t(below(3));
      goals.stride[k] = s.layout == Layout::matrix ? s.count : 1;
      if (s.layout == Layout::matrix) {
        goals.data[k] = memory[0].data + k * size;
      } else {
        if (s.layout == Layout::mixed) {
          goals.dtype[k] = any_dtype<S>();
          goals.stride[k] = chance(0.3) ? 0 : 1 + 2 * chance(0.2) * (chance(0.5) ? 1 : 3);
        } else if (chance(0.2)) {
          goals.stride[k] = 0;
        }
        const int own = size_of(goals.dtype[k]), shift = s.layout == Layout::misaligned ? own * below(4) : 0;
        memory.emplace_back((goals.stride[k] * (s.batch - 1) + 1) * own, shift);
        goals.data[k] = memory.back().data;
      }
      fill(k);
      set_ramp(k);
    }
  }

  void fill(int k) {
    const double special[] = {0, -0.0, INFINITY, -INFINITY, NAN, 1e30, -1e30, 1e-30, 1e5, -5};
    const bool with_special = chance(0.3), coarse = chance(0.5);
    for (int64_t b = 0; b < (goals.stride[k] == 0 ? 1 : s.batch); ++b) {
      double x = s.scores ? uniform(1e-3, 1) : uniform(-1, 4);
      if (coarse) x = ceil(x * 4) / 4;
      if (with_special && chance(0.01)) x = special[below(10)];
      auto* to = const_cast<unsigned char*>(static_cast<const unsigned char*>(goals.data[k]));
      put(to + b * goals.stride[k] * size_of(goals.dtype[k]), goals.dtype[k], x);
    }
  }

  void set_ramp(int k) {
    const bool same = chance(0.5);  // so that goals tie
    const double right = same ? 1 : uniform(0.2, 2), center = same ? 0.5 : uniform(-1, 1);
    const int side = goals.curve[k] == 0 ? below(3) : 0;
    S* p = params.data + 4 * k;
    p[0] = S(center);
    p[1] = S(side == 1 ? 0 : right);
    p[2] = S(goals.curve[k] == 0 ? (side == 0 ? right : side == 1 ? -right : 0) : same ? -1 : -uniform(0.2, 2));
    p[3] = S(goals.curve[k] == 2 ? 0.05 : 0);
  }
};

template <class S> struct Output {
  Buffer<S> loss, slope, share, level;
  Buffer<uint8_t> winner;
  Buffer<int64_t> worst, bottleneck;
  Buffer<bool> finite;
  Forward<S> a{};

  explicit Output(const Problem<S>& p, int shift = 0)
      : loss(p.s.reduction == Reduction::none ? p.s.batch : 1, shift),
        slope(p.s.reduction == Reduction::min ? 1 : p.s.batch, shift),
        share(p.s.count),
        level(p.s.count),
        winner(p.s.batch, shift),
        worst(1),
        bottleneck(p.s.batch, shift),
        finite(1) {
    a.goals = p.goals;
    a.params = p.s.scores ? nullptr : p.params.data;
    a.reduction = p.s.reduction;
    a.loss = loss.data, a.slope = slope.data, a.winner = winner.data, a.worst = worst.data;
    if (p.s.stats) a.bottleneck = bottleneck.data, a.share = share.data, a.level = level.data, a.finite = finite.data;
  }
  void check_guards() const {
    loss.check_guards("loss"), slope.check_guards("slope"), share.check_guards("share"), level.check_guards("level");
    winner.check_guards("winner"), worst.check_guards("worst"), bottleneck.check_guards("bottleneck");
    finite.check_guards("finite");
  }
};

template <class S> void run_cpu(const Forward<S>& a) {
  Partial part;
  if constexpr (sizeof(S) == 4) {
    baseline::kernels.forward_f32(a, 0, a.goals.batch, &part);
  } else {
    baseline::kernels.forward_f64(a, 0, a.goals.batch, &part);
  }
  const double batch = double(a.goals.batch);
  const bool global = a.reduction == Reduction::min;
  if (global) *a.loss = S(part.worst_loss), *a.slope = S(part.worst_slope), *a.worst = part.worst;
  if (a.reduction == Reduction::mean) *a.loss = S(part.loss / batch);
  if (a.reduction == Reduction::sum) *a.loss = S(part.loss);
  if (!a.bottleneck) return;
  *a.finite = part.finite;
  for (int k = 0; k < a.goals.count; ++k) {
    a.level[k] = S(part.level[k] / batch);
    a.share[k] = S(global ? part.worst % a.goals.count == k : double(part.owned[k]) / batch);
  }
}

template <class S> void check_forward(const Problem<S>& p, const Output<S>& cpu, const Output<S>& gpu) {
  const Setting& s = p.s;
  const double tolerance = sizeof(S) == 4 ? 3e-6 : 1e-12;
  const bool global = s.reduction == Reduction::min;
  int64_t differ = 0;  // samples whose two worst goals are equal but for rounding
  if (!global) {
    for (int64_t b = 0; b < s.batch; ++b) {
      const bool same = gpu.winner.data[b] == cpu.winner.data[b];
      const S got = gpu.slope.data[b], want = cpu.slope.data[b];
      differ += !same;
      expect(!same || close(got, want, tolerance), "slope", b, got, want);
    }
    if (s.stats) {
      for (int64_t b = 0; b < s.batch; ++b) {
        const int64_t got = gpu.bottleneck.data[b], want = gpu.winner.data[b];
        expect(got == want, "bottleneck", b, got, want);
      }
    }
    expect(differ * 100 <= s.batch, "winners that differ", differ, 0, 0);
  }
  for (size_t i = 0; i < gpu.loss.n; ++i)
    expect(close(gpu.loss.data[i], cpu.loss.data[i], 2 * tolerance), "loss", i, gpu.loss.data[i], cpu.loss.data[i]);
  if (global) {
    // Rounding may prefer another entry of the same loss, but not where the loss is infinite or NaN.
    const int64_t got = *gpu.worst.data, want = *cpu.worst.data;
    differ = got != want;
    expect(!differ || isfinite(*gpu.loss.data), "worst", 0, got, want);
    expect(differ || close(*gpu.slope.data, *cpu.slope.data, tolerance), "slope", 0, *gpu.slope.data, *cpu.slope.data);
  }
  if (s.stats) {
    expect(*gpu.finite.data == *cpu.finite.data, "finite", 0, *gpu.finite.data, *cpu.finite.data);
    for (int k = 0; k < s.count; ++k) {
      expect(close(gpu.level.data[k], cpu.level.data[k], tolerance), "level", k, gpu.level.data[k], cpu.level.data[k]);
      const double slack = global ? differ : double(differ) / s.batch;
      const S got = gpu.share.data[k], want = cpu.share.data[k];
      expect(fabs(got - want) <= slack + 1e-7, "share", k, got, want);
    }
  }
  gpu.check_guards();
}

template <class S> void check_backward(const Problem<S>& p, const Output<S>& forward) {
  const Setting& s = p.s;
  const bool global = s.reduction == Reduction::min, each = s.reduction == Reduction::none;
  Buffer<S> grad(each ? 2 * s.batch : 1, chance(0.3));
  for (size_t i = 0; i < grad.n; ++i) grad.data[i] = S(uniform(-2, 2));
  Backward<S> a{};
  a.grad = grad.data;
  a.grad_stride = each ? below(3) : 0;
  a.divisor = s.reduction == Reduction::mean ? S(s.batch) : S(1);
  a.winner = global ? nullptr : forward.winner.data;
  a.worst = global ? forward.worst.data : nullptr;
  a.slope = forward.slope.data;
  a.batch = s.batch;
  a.goals = s.count;
  std::vector<Buffer<unsigned char>> cpu, gpu;
  const auto add = [&](int goal, bool batch_level, DType dtype, int64_t n) {
    cpu.emplace_back(n * size_of(dtype), 0);
    gpu.emplace_back(n * size_of(dtype), chance(0.2) ? size_of(dtype) : 0);
    a.out[a.outputs++] = {nullptr, goal, batch_level, dtype};
  };
  if (s.layout == Layout::matrix) add(-1, false, p.goals.dtype[0], s.batch * s.count);
  for (int k = 0; k < s.count && s.layout != Layout::matrix; ++k) {
    const bool batch_level = p.goals.stride[k] == 0;
    if (!chance(0.15)) add(k, batch_level, p.goals.dtype[k], batch_level ? 1 : s.batch);
  }
  Backward<S> on_gpu = a;
  for (int o = 0; o < a.outputs; ++o) a.out[o].data = cpu[o].data, on_gpu.out[o].data = gpu[o].data;
  double sums[max_goals];
  if constexpr (sizeof(S) == 4) {
    baseline::kernels.backward_f32(a, 0, s.batch, sums);
  } else {
    baseline::kernels.backward_f64(a, 0, s.batch, sums);
  }
  const int sum_outputs = int(std::count_if(a.out, a.out + a.outputs, [](const Gradient& g) { return g.batch_level; }));
  const int launches = (a.outputs > 0) + (sum_outputs > 0 && !global && s.batch > 2048);
  const auto run = [&] {
    Buffer<unsigned char> workspace(cuda_workspace(on_gpu));
    emu::machine.launches = 0;
    const cudaError_t error = cuda_run(on_gpu, workspace.n ? workspace.data : nullptr, nullptr);
    const int launched = emu::machine.launches;
    expect(error == cudaSuccess && launched == launches, "backward launches", 0, launched, launches);
    expect((workspace.n > 0) == (launches == 2), "backward workspace", 0, double(workspace.n), launches);
    workspace.check_guards("backward workspace");
  };
  run();
  for (int o = 0; o < a.outputs; ++o) {
    const DType dtype = a.out[o].dtype;
    if (a.out[o].batch_level) put(cpu[o].data, dtype, sums[o]);
    const double rounding = dtype == DType::bf16 ? 8e-3 : dtype == DType::f16 ? 1e-3 : 1e-6;
    const double tolerance = a.out[o].batch_level ? rounding : 0;
    for (int64_t i = 0; i < int64_t(cpu[o].n) / size_of(dtype); ++i) {
      const double got = get(gpu[o].data, dtype, i), want = get(cpu[o].data, dtype, i);
      expect(close(got, want, tolerance), "gradient", i, got, want);
    }
    gpu[o].check_guards("gradient");
  }
  // The same bits on a device of another size, in another order of turns.
  std::vector<std::vector<unsigned char>> first;
  for (const auto& out : gpu) first.emplace_back(out.data, out.data + out.n), memset(out.data, 0xff, out.n);
  emu::machine.order = emu::Order((int(emu::machine.order) + 1) % 3);
  emu::machine.multiprocessors = 23 - emu::machine.multiprocessors;
  run();
  for (int o = 0; o < a.outputs; ++o)
    expect(memcmp(first[o].data(), gpu[o].data, gpu[o].n) == 0, "bits of a second gradient", o, 1, 0);
}

template <class S> void check(const Setting& s) {
  if (emu::left_out()) return;
  static int number = 0;
  emu::machine.order = emu::Order(++number % 3);
  emu::machine.architecture = chance(0.75) ? 90 : 80;
  emu::machine.multiprocessors = chance(0.5) ? 3 : 20;
  snprintf(current, sizeof current, "case %d: float%d B=%lld K=%d reduction=%d scores=%d stats=%d layout=%d sm_%d",
           number, int(sizeof(S)) * 8, (long long)s.batch, s.count, int(s.reduction), s.scores, s.stats, int(s.layout),
           emu::machine.architecture);
  const Problem<S> p(s);
  Output<S> cpu(p), gpu(p, s.layout == Layout::misaligned ? below(3) : 0);
  run_cpu(cpu.a);
  const size_t bytes = cuda_workspace(gpu.a);
  Buffer<unsigned char> workspace(bytes);
  emu::machine.launches = 0;
  const cudaError_t error = cuda_run(gpu.a, workspace.data, nullptr);
  const int launches = bytes ? 2 : 1, launched = emu::machine.launches;
  expect(error == cudaSuccess && launched == launches, "forward launches", 0, launched, launches);
  const bool plain = s.reduction == Reduction::none && !s.stats;
  const char* const threshold = emu::machine.architecture >= 90 ? "one_cluster" : "one_block_without_clusters";
  const int64_t one_launch = bomkern_tune_min_goal(threshold, 0);
  expect((bytes == 0) == (plain || s.batch <= one_launch), "workspace", 0, double(bytes), 0);
  workspace.check_guards("workspace");
  check_forward(p, cpu, gpu);
  check_backward(p, cpu);
}

// Every 1013th float from -1 on, and what is beside them.
void check_log1p() {
  snprintf(current, sizeof current, "log1p");
  const auto one = [](uint32_t word) {
    float y;
    memcpy(&y, &word, sizeof y);
    const float got = bomkern::cuda::log1p_of(y), want = float(log1p(double(y)));
    const bool good = want == want && !std::isinf(want) ? fabs(got - log1p(double(y))) <= nextafterf(fabsf(want), INFINITY) - fabsf(want)
                                                       : memcmp(&got, &want, sizeof got) == 0 || (got != got && want != want);
    expect(good, "log1p", word, got, want);
  };
  for (uint32_t word = 0; word < 0x7f800000u; word += 1013) one(word);
  for (uint32_t word = 0x80000000u; word < 0xbf800000u; word += 1013) one(word);
  for (const uint32_t word : {0x7f800000u, 0x7fc00000u, 0xffc00000u, 0xbf800000u, 0xbf7fffffu, 0x7f7fffffu, 1u, 0x80000001u}) one(word);
}

template <class S> void check_modes(int64_t batch, int count) {
  for (int mode = 0; mode < 16; ++mode) {
    check<S>({batch, count, Reduction(mode % 4), mode / 4 % 2 == 1, mode / 8 == 1, Layout(below(4))});
  }
}

}  // namespace

int main() {
  check_log1p();
  for (const int batch : {1, 2, 31, 64, 127, 129, 512, 1000, 1025, 2047, 4099}) {
    check_modes<float>(batch, 1 + below(12));
    check_modes<double>(batch, 1 + below(12));
  }
  check_modes<float>(300, 64);
  check_modes<double>(1100, 64);
  for (const int64_t batch : {9001, 16384, 16385, 65541}) {
    check<float>({batch, 3, Reduction::mean, false, true, Layout::columns});
    check<float>({batch, 2, Reduction::min, true, true, Layout::mixed});
    check<double>({batch, 3, Reduction::none, false, false, Layout::matrix});
    check<float>({batch, 2, Reduction::sum, true, false, Layout::columns});
  }
  // Thresholds that a bench sets: grids of batches that are else one cluster's.
  expect(bomkern_tune_min_goal("one_cluster", 1100) == 16384, "one_cluster", 0, 0, 16384);
  expect(bomkern_tune_min_goal("most_grid_threads", 128) == 256, "most_grid_threads", 0, 0, 256);
  expect(bomkern_tune_min_goal("no such", 1) == -1, "no such threshold", 0, 0, -1);
  check_modes<float>(3000, 5);
  if (failures) return fprintf(stderr, "%d failures\n", failures), 1;
  return puts("min_goal: the emulated CUDA kernels agree with the CPU implementation"), 0;
}
