// Shared by the checks of the emulated kernels: data in any layout, poisoned outputs with guards, comparison, launches.
#pragma once
#include "emulator.h"

#include "../../../kernels/common/dtype.h"

#include <stdarg.h>

namespace checking {

using bomkern::DType;
using bomkern::Matrix;

inline std::mt19937 engine(21);
inline int below(int n) { return int(engine() % unsigned(n)); }
inline double uniform(double low, double high) { return low + (high - low) * (engine() / 4294967296.0); }
inline double normal() { return sqrt(-2 * log(uniform(1e-9, 1))) * cos(6.283185307179586 * uniform(0, 1)); }

inline int failures = 0;
inline char current[256];
inline void expect(bool good, const char* what, int64_t at, double got, double want) {
  if (good || ++failures > 20) return;
  fprintf(stderr, "%s: %s[%lld] is %.9g, want %.9g\n", current, what, (long long)at, got, want);
}

// Names a case, and runs its threads in another order than the last one.
inline void begin(const char* format, ...) {
  static int number = 0;
  emu::machine.order = emu::Order(++number % 3);
  va_list list;
  va_start(list, format);
  const int used = snprintf(current, sizeof current, "case %d: ", number);
  vsnprintf(current + used, sizeof current - used, format, list);
  va_end(list);
}
inline int done(const char* op) {
  if (failures) return fprintf(stderr, "%d failures\n", failures), 1;
  return printf("%s: the emulated CUDA kernels agree with the definition\n", op), 0;
}

// n values behind 16-byte alignment; all is NaN before, and a guard lies on both sides.
template <class T> struct Buffer {
  std::vector<unsigned char> bytes;
  T* data;
  size_t n;
  explicit Buffer(size_t n) : bytes(n * sizeof(T) + 96, 0xff), n(n) {
    data = reinterpret_cast<T*>((uintptr_t(bytes.data()) + 32 + 15) / 16 * 16);
    forbid_around();
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { emu::permit(bytes.data(), bytes.size()); }
  void forbid_around() const {
    const unsigned char *const begin = reinterpret_cast<unsigned char*>(data), *const end = begin + n * sizeof(T);
    emu::forbid(bytes.data(), begin - bytes.data());
    emu::forbid(end, bytes.data() + bytes.size() - end);
  }
  void check_guards(const char* what) const {
    emu::permit(bytes.data(), bytes.size());
    const unsigned char* const before = reinterpret_cast<unsigned char*>(data) - 16;
    const unsigned char* const after = reinterpret_cast<unsigned char*>(data + n);
    for (int i = 0; i < 16; ++i) expect(before[i] == 0xff && after[i] == 0xff, what, i, -1, 0);
    forbid_around();
  }
};

inline int size_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

inline double read(const void* data, DType dtype, int64_t at) {
  switch (dtype) {
    case DType::f64: return static_cast<const double*>(data)[at];
    case DType::f32: return static_cast<const float*>(data)[at];
    case DType::bf16: return __bfloat162float({static_cast<const uint16_t*>(data)[at]});
    default: return __half2float({static_cast<const uint16_t*>(data)[at]});
  }
}
inline void write(void* data, DType dtype, int64_t at, double x) {
  switch (dtype) {
    case DType::f64: static_cast<double*>(data)[at] = x; break;
    case DType::f32: static_cast<float*>(data)[at] = float(x); break;
    case DType::bf16: static_cast<uint16_t*>(data)[at] = __float2bfloat16_rn(float(x)).bits; break;
    default: static_cast<uint16_t*>(data)[at] = __float2half_rn(float(x)).bits;
  }
}

// spaced: rows 16 elements further apart than they are long, padded: one.
enum class Layout { plain, transposed, gaps, rows_alike, columns_alike, reversed, misaligned, spaced, padded };
constexpr Layout layouts[] = {Layout::plain,    Layout::transposed, Layout::gaps,   Layout::rows_alike, Layout::columns_alike,
                              Layout::reversed, Layout::misaligned, Layout::spaced, Layout::padded};

template <class S> DType number() { return sizeof(S) == 8 ? DType::f64 : DType::f32; }
// Any type that arithmetic in S takes.
template <class S> DType any_type() { return DType(below(sizeof(S) == 8 ? 4 : 3)); }

// A [B, D] input somewhere in memory.
struct Input {
  Matrix matrix;
  int64_t batch, dims;

  Input(int64_t batch, int64_t dims, DType dtype, Layout layout) : batch(batch), dims(dims) {
    int64_t row = dims, column = 1;
    if (layout == Layout::transposed) row = 1, column = batch;
    if (layout == Layout::gaps) column = 2, row = 2 * dims + 3;
    if (layout == Layout::spaced) row = dims + 16;
    if (layout == Layout::padded) row = dims + 1;
    if (layout == Layout::rows_alike) row = 0;
    if (layout == Layout::columns_alike) row = 3, column = 0;
    if (layout == Layout::reversed) row = -dims, column = -1;
    const int64_t low = std::min<int64_t>(0, (batch - 1) * row) + std::min<int64_t>(0, (dims - 1) * column);
    const int64_t high = std::max<int64_t>(0, (batch - 1) * row) + std::max<int64_t>(0, (dims - 1) * column);
    const int64_t skip = layout == Layout::misaligned ? 1 : 0;
    memory_.assign((high - low + 1 + skip) * size_of(dtype) + 32, 0xff);
    const uintptr_t base = (uintptr_t(memory_.data()) + 15) / 16 * 16;
    matrix = {reinterpret_cast<void*>(base + (skip - low) * size_of(dtype)), {row, column}, dtype};
    const unsigned char* const begin = reinterpret_cast<unsigned char*>(base + skip * size_of(dtype));
    const unsigned char* const end = begin + (high - low + 1) * size_of(dtype);
    emu::forbid(memory_.data(), begin - memory_.data());
    emu::forbid(end, memory_.data() + memory_.size() - end);
  }
  Input(const Input&) = delete;
  ~Input() { emu::permit(memory_.data(), memory_.size()); }
  int64_t place(int64_t b, int64_t d) const { return b * matrix.stride[0] + d * matrix.stride[1]; }
  void put(int64_t b, int64_t d, double x) { write(const_cast<void*>(matrix.data), matrix.dtype, place(b, d), x); }
  double at(int64_t b, int64_t d) const { return read(matrix.data, matrix.dtype, place(b, d)); }
  template <class Make> Input& fill(Make make) {
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t d = 0; d < dims; ++d) put(b, d, make(b, d));
    }
    return *this;
  }

 private:
  std::vector<unsigned char> memory_;
};

// A contiguous output of any type, all NaN before.
struct Output {
  DType dtype;
  Buffer<unsigned char> buffer;
  Output(int64_t n, DType dtype) : dtype(dtype), buffer(n * size_of(dtype)) {}
  void* data() { return buffer.data; }
  double at(int64_t i) const { return read(buffer.data, dtype, i); }
};

// Gradients by sample, `stride` apart; 0 is one for all.
template <class S> struct Gradients {
  Buffer<S> buffer;
  int64_t stride;
  Gradients(int64_t batch, int64_t stride) : buffer(stride * (batch - 1) + 1), stride(stride) {
    for (size_t i = 0; i < buffer.n; ++i) buffer.data[i] = S(uniform(-2, 2));
  }
  double at(int64_t b) const { return buffer.data[b * stride]; }
  bomkern::RowGrad<S> row() const { return {buffer.data, stride}; }
};

// Half a unit in the last place of what rounds to this type, beside the arithmetic's own error.
inline double rounding(DType t) { return t == DType::bf16 ? 0x1p-8 : t == DType::f16 ? 0x1p-11 : t == DType::f32 ? 0x1p-24 : 0; }

// Both NaN, the same infinity, or close on the scale of what was added up.
inline bool close(double got, double want, double tolerance, double scale) {
  if (want != want) return got != got;
  if (std::isinf(want)) return got == want;
  return fabs(got - want) <= tolerance * (scale + fabs(want));
}
inline bool close_as(DType t, double got, double want, double tolerance, double scale) {
  if (t == DType::f16 && fabs(want) > 65000) return fabs(got) > 64000;
  const double subnormal = t == DType::f16 ? 0x1p-24 : 0;
  return close(got, want, tolerance, scale) || fabs(got - want) <= rounding(t) * fabs(want) + tolerance * scale + subnormal;
}

// Runs one call, and checks its number of launches and the guards of its workspace.
template <class Arguments> void run(const Arguments& a, int launches) {
  Buffer<unsigned char> workspace(cuda_workspace(a));
  const int before = emu::machine.launches;
  const cudaError_t error = cuda_run(a, workspace.n ? workspace.data : nullptr, nullptr);
  expect(error == cudaSuccess, "error", 0, error, 0);
  expect(emu::machine.launches - before == launches, "launches", 0, emu::machine.launches - before, launches);
  workspace.check_guards("workspace");
}

// Expects that the last launch had no more blocks than the device holds at once.
inline void expect_resident(const char* what) {
  const int most = emu::machine.multiprocessors * emu::machine.resident, blocks = int(emu::machine.grid_dim.x);
  expect(blocks <= most, what, 0, blocks, most);
}

template <class Arguments, class T>
void expect_bits_again(const Arguments& a, Buffer<T>& output, const char* what, int launches = 1) {
  const std::vector<T> first(output.data, output.data + output.n);
  memset(output.data, 0xff, output.n * sizeof(T));
  run(a, launches);
  expect(memcmp(first.data(), output.data, output.n * sizeof(T)) == 0, what, 0, 1, 0);
}

// Expects the same bits in `output` from a second run.
template <class Arguments, class T> void expect_same_bits(const Arguments& a, Buffer<T>& output, int launches = 1) {
  emu::machine.order = emu::Order((int(emu::machine.order) + 1) % 3);
  expect_bits_again(a, output, "bits of a second run", launches);
}

// Expects the same bits from a device of another size.
template <class Arguments, class T> void expect_same_bits_elsewhere(const Arguments& a, Buffer<T>& output) {
  const int here = emu::machine.multiprocessors;
  emu::machine.multiprocessors = 7;
  expect_bits_again(a, output, "bits on a device of another size");
  emu::machine.multiprocessors = here;
}

// Sets a threshold of a launch plan, as a bench does (cuda_tune.h).
using Setter = int64_t (*)(const char*, int64_t);

template <class Work> int64_t blocks_of(Work work) {
  const int64_t before = emu::machine.blocks;
  work();
  return emu::machine.blocks - before;
}

// With another value of a threshold, `work` launches other grids; what it checks must hold all the same.
template <class Work> void expect_other_grids(Setter set, const char* name, int64_t now, int64_t value, Work work) {
  emu::every_case = true;
  const int64_t usual = blocks_of(work), before = set(name, value), other = blocks_of(work), last = set(name, now);
  emu::every_case = false;
  begin("threshold %s", name);
  expect(before == now, "its value", 0, before, now);
  expect(last == value, "what it was set to", 0, last, value);
  expect(other != usual, "blocks", 0, other, usual);
}

// Expects the same bits in `output` at another value of a threshold that no sum depends on.
template <class Arguments, class T>
void expect_same_bits_at(Setter set, const char* name, int64_t now, int64_t value, const Arguments& a,
                         Buffer<T>& output) {
  expect_other_grids(set, name, now, value, [&] { expect_bits_again(a, output, "bits at another threshold"); });
}

}  // namespace checking
