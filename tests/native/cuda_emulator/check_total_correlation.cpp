// Runs total_correlation's CUDA kernels under the emulator against the formula written out in double.
#include "checking.h"

#include <sys/mman.h>

#include "../../../kernels/total_correlation/cuda.h"

extern "C" int64_t bomkern_tune_total_correlation(const char* name, int64_t value);

using namespace bomkern;
using namespace bomkern::total_correlation;
using checking::begin;
using checking::below;
using checking::Buffer;
using checking::current;
using checking::expect;
using checking::normal;
using checking::size_of;
using checking::uniform;

namespace {

enum class Data { plain, wide, narrow, far, duplicates, nan_z, nan_mu, nan_logvar };

struct Setting {
  int64_t batch, dims;
  Data data = Data::plain;
  bool stratified = false, layout = false;  // layout: any strides, any dtypes
  int gradients = 7;                        // a bit each: z, mu, logvar
  int64_t some_rows = 0, first = 0;         // 0 rows: all
  int64_t rows() const { return some_rows ? some_rows : batch; }
};

// Bytes before a page that nobody may touch: a read past the end ends the check.
class Fenced {
 public:
  explicit Fenced(size_t bytes) : size_((bytes + page - 1) / page * page + page) {
    void* const base = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) emu::fail("no memory");
    base_ = static_cast<unsigned char*>(base);
    memset(base_, 0xff, size_ - page);
    if (mprotect(base_ + size_ - page, page, PROT_NONE) != 0) emu::fail("a page that cannot be protected");
    data = base_ + size_ - page - bytes;
  }
  Fenced(const Fenced&) = delete;
  ~Fenced() { munmap(base_, size_); }
  unsigned char* data;

 private:
  static constexpr size_t page = 65536;  // a multiple of any system's
  size_t size_;
  unsigned char* base_;
};

// A [count, D] input somewhere in memory, and the values that were stored there.
struct Input {
  std::unique_ptr<Fenced> memory;
  std::vector<double> value;
  Matrix matrix;

  Input(const Setting& s, DType dtype, int64_t count) : value(count * s.dims) {
    const int64_t gap = s.layout ? 1 + below(3) : 1;
    const bool transposed = s.layout && below(2);
    matrix.stride[0] = transposed ? gap : s.dims * gap + (s.layout ? below(3) : 0);
    matrix.stride[1] = transposed ? count * gap : gap;
    matrix.dtype = dtype;
    const int64_t last = (count - 1) * matrix.stride[0] + (s.dims - 1) * matrix.stride[1];
    memory = std::make_unique<Fenced>((last + 1) * size_of(dtype));
    matrix.data = memory->data;
  }
  void put(int64_t b, int64_t d, int64_t dims, double x) {
    const int64_t at = b * matrix.stride[0] + d * matrix.stride[1];
    const float f = float(x);
    double& stored = value[b * dims + d];
    if (matrix.dtype == DType::f64) {
      reinterpret_cast<double*>(memory->data)[at] = stored = x;
    } else if (matrix.dtype == DType::f32) {
      reinterpret_cast<float*>(memory->data)[at] = f, stored = f;
    } else {
      const bool bf = matrix.dtype == DType::bf16;
      const uint16_t half = bf ? __float2bfloat16_rn(f).bits : __float2half_rn(f).bits;
      reinterpret_cast<uint16_t*>(memory->data)[at] = half;
      stored = bf ? __bfloat162float({half}) : __half2float({half});
    }
  }
};

template <class S> struct Problem {
  Setting s;
  Input z, mu, logvar;
  Inputs<S> in{};
  double offset = 0, density_offset = 0, own = 1, next = 1, log_weight = 0;

  static DType dtype(const Setting& s) {
    return s.layout ? DType(below(sizeof(S) == 8 ? 4 : 3)) : sizeof(S) == 8 ? DType::f64 : DType::f32;
  }
  explicit Problem(const Setting& s)
      : s(s), z(s, dtype(s), s.rows()), mu(s, dtype(s), s.batch), logvar(s, dtype(s), s.batch) {
    for (int64_t b = 0; b < s.batch; ++b) {
      for (int64_t d = 0; d < s.dims; ++d) {
        const double m = normal(), far = s.data == Data::far && (b % 3 == 0 || d % 5 == 1) ? 30 + uniform(0, 10) : 0;
        double lv = s.data == Data::wide ? uniform(-30, 20) : uniform(-2, 0.5), deviation = exp(lv / 2);
        // From dimension to dimension wider, and the samples of the first lie between all components.
        if (s.data == Data::narrow) lv = -30 + 50 * (d + uniform(0, 1)) / s.dims, deviation = 0.6;
        mu.put(b, d, s.dims, m), logvar.put(b, d, s.dims, lv);
        const double sample = m + deviation * normal() + far;
        const int64_t row = b - s.first;
        if (row >= 0 && row < s.rows()) z.put(row, d, s.dims, sample);
      }
    }
    for (int64_t d = 0; d < s.dims && s.data == Data::duplicates; ++d) {
      for (int64_t b = 1; b < s.batch; ++b) {
        mu.put(b, d, s.dims, mu.value[d]), logvar.put(b, d, s.dims, logvar.value[d]);
        if (b % 2 && b < s.rows()) z.put(b, d, s.dims, z.value[d]);
      }
    }
    const int64_t b = s.batch / 2, d = s.dims / 2;
    if (s.data == Data::nan_z) z.put(s.rows() / 2, d, s.dims, NAN);
    if (s.data == Data::nan_mu) mu.put(b, d, s.dims, NAN);
    if (s.data == Data::nan_logvar) logvar.put(b, d, s.dims, NAN);
    in.z = z.matrix, in.mu = mu.matrix, in.logvar = logvar.matrix;
    in.rows = s.rows(), in.batch = s.batch, in.first = s.first, in.dims = s.dims, in.stratified = s.stratified;
    log_weight = -log(double(s.batch));
    if (s.stratified) {
      const double m = double(s.batch - 1), n = 10 * m + 3;
      own = m / n, next = (n - m) / n, log_weight = -log(m);
    }
    in.own = S(own), in.next = S(next);
    offset = double(1 - s.dims) * log_weight;
    density_offset = log_weight - double(s.dims) * log(6.283185307179586) / 2;
  }
};

// The definition, in double.
struct Truth {
  std::vector<double> out, log_q, grad[3], size[3];  // size: the gradients' terms added up without their signs

  // upstream: the gradients of out. of_joint: the same with those of log_q added.
  template <class S>
  Truth(const Problem<S>& p, const std::vector<double>& upstream, const std::vector<double>& of_joint)
      : out(p.s.rows()), log_q(out) {
    const int64_t R = p.s.rows(), B = p.s.batch, D = p.s.dims;
    for (int k = 0; k < 3; ++k) grad[k].assign((k == 0 ? R : B) * D, 0), size[k] = grad[k];
    std::vector<double> l(B * D), joint(B);
    const double log_2_pi = log(6.283185307179586);
    for (int64_t b = 0; b < R; ++b) {
      const int64_t own = p.s.first + b;
      double most = -INFINITY, sum = 0, marginals = 0;
      std::vector<double> top(D, -INFINITY), total(D, 0.0), w(B);
      for (int64_t i = 0; i < B; ++i) {
        w[i] = !p.s.stratified ? 0 : log(i == own ? p.own : i == (own + 1) % B ? p.next : 1);
        joint[i] = w[i];
        for (int64_t d = 0; d < D; ++d) {
          const double lv = p.logvar.value[i * D + d], u = p.z.value[b * D + d] - p.mu.value[i * D + d];
          const double t = -0.5 * (u * u * exp(-lv) + lv + log_2_pi);
          l[i * D + d] = t + w[i], joint[i] += t;
          top[d] = l[i * D + d] <= top[d] ? top[d] : l[i * D + d];  // NaN too
        }
        most = joint[i] <= most ? most : joint[i];
      }
      for (int64_t i = 0; i < B; ++i) sum += exp(joint[i] - most);
      const double lse = most + log(sum);
      for (int64_t d = 0; d < D; ++d) {
        for (int64_t i = 0; i < B; ++i) total[d] += exp(l[i * D + d] - top[d]);
        total[d] = top[d] + log(total[d]);
        marginals += total[d];
      }
      // The common weight stands once in the joint, and once in each marginal.
      out[b] = lse - marginals + p.offset;
      log_q[b] = lse + p.log_weight;
      for (int64_t i = 0; i < B; ++i) {
        for (int64_t d = 0; d < D; ++d) {
          const double lv = p.logvar.value[i * D + d], u = p.z.value[b * D + d] - p.mu.value[i * D + d];
          const double p = exp(joint[i] - lse), q = exp(l[i * D + d] - total[d]);
          const double a = of_joint[b] * p - upstream[b] * q, slope = fabs(u) * exp(-lv);
          const double most = fabs(of_joint[b]) * p + fabs(upstream[b]) * q;
          grad[0][b * D + d] -= a * u * exp(-lv);
          grad[1][i * D + d] += a * u * exp(-lv);
          grad[2][i * D + d] += 0.5 * a * (u * u * exp(-lv) - 1);
          size[0][b * D + d] += most * slope, size[1][i * D + d] += most * slope;
          size[2][i * D + d] += 0.5 * most * (u * u * exp(-lv) + 1);
        }
      }
    }
  }
};

// Whether both are NaN or infinite, or are close on the scale of the terms.
bool close_or_unbounded(double got, double want, double tolerance, double scale) {
  if (!std::isfinite(want)) return !std::isfinite(got);
  return fabs(got - want) <= tolerance * (scale + fabs(want));
}

template <class S> void check(const Setting& s) {
  if (emu::left_out()) return;
  begin("float%d B=%lld D=%lld data=%d stratified=%d layout=%d R=%lld first=%lld", int(sizeof(S)) * 8, (long long)s.batch,
        (long long)s.dims, int(s.data), s.stratified, s.layout, (long long)s.rows(), (long long)s.first);
  const Problem<S> p(s);
  const int stride = below(3), other_stride = below(3);
  const bool parts = below(2);
  const int64_t rows = s.rows();
  Buffer<S> upstream(stride * (rows - 1) + 1);
  Buffer<double> of_log_q(other_stride * (rows - 1) + 1);
  std::vector<double> grad(rows), of_joint(rows);
  for (size_t i = 0; i < upstream.n; ++i) upstream.data[i] = S(uniform(-2, 2));
  for (size_t i = 0; i < of_log_q.n; ++i) of_log_q.data[i] = uniform(-2, 2);
  for (int64_t b = 0; b < rows; ++b) {
    of_joint[b] = grad[b] = upstream.data[b * stride];
    if (parts) of_joint[b] += of_log_q.data[b * other_stride];
  }
  const Truth truth(p, grad, of_joint);

  Buffer<S> out(rows), joint(rows), marginal(rows * s.dims);
  Buffer<double> log_q(parts ? rows : 1);
  const Forward<S> a{p.in,     p.offset,   p.density_offset, out.data, parts ? log_q.data : nullptr,
                     joint.data, marginal.data};
  Buffer<unsigned char> workspace(cuda_workspace(a));
  cudaError_t error = cuda_run(a, workspace.data, nullptr);
  expect(error == cudaSuccess, "forward's error", 0, error, 0);
  workspace.check_guards("forward's workspace");
  out.check_guards("out"), log_q.check_guards("log_q"), joint.check_guards("joint"), marginal.check_guards("marginal");
  // The rounding of t is a relative error of the largest exponents, which far and wide data have.
  const auto exponents_of = [](Data data) {
    switch (data) {
      case Data::wide: return 100.0;
      case Data::narrow: return 1e13;
      case Data::far: return 3e3;
      case Data::duplicates: return 300.0;
      default: return 30.0;
    }
  };
  const double exponents = exponents_of(s.data);
  const double epsilon = sizeof(S) == 4 ? 2e-7 : 1e-14, tolerance = 4 * epsilon;
  for (int64_t b = 0; b < rows; ++b) {
    expect(close_or_unbounded(out.data[b], truth.out[b], tolerance, exponents + s.dims), "out", b, out.data[b], truth.out[b]);
    if (parts) {
      expect(close_or_unbounded(log_q.data[b], truth.log_q[b], tolerance, exponents + s.dims), "log_q", b, log_q.data[b],
             truth.log_q[b]);
    }
    if (s.data == Data::nan_mu || s.data == Data::nan_logvar || (s.data == Data::nan_z && b == rows / 2)) {
      expect(out.data[b] != out.data[b], "NaN in out", b, out.data[b], NAN);
    }
  }

  Buffer<S> got[3] = {Buffer<S>(rows * s.dims), Buffer<S>(s.batch * s.dims), Buffer<S>(s.batch * s.dims)};
  Backward<S> back{p.in, {upstream.data, stride}, {parts ? of_log_q.data : nullptr, other_stride}, joint.data, marginal.data,
                   nullptr, nullptr, nullptr};
  if (s.gradients & 1) back.grad_z = got[0].data;
  if (s.gradients & 2) back.grad_mu = got[1].data;
  if (s.gradients & 4) back.grad_logvar = got[2].data;
  Buffer<unsigned char> more(cuda_workspace(back));
  error = cuda_run(back, more.data, nullptr);
  expect(error == cudaSuccess, "backward's error", 0, error, 0);
  more.check_guards("backward's workspace");
  // Where log-variances spread, gradients of 1e12 lie beside others of 1e-4: each is held to the size of its own terms.
  // Those of exponents beyond 64 bits do not count there, unless one component is all there is, which must be exact.
  const bool spread = s.data == Data::wide || s.data == Data::narrow;
  const char* const name[] = {"grad_z", "grad_mu", "grad_logvar"};
  for (int k = 0; k < 3; ++k) {
    got[k].check_guards(name[k]);
    if (!(s.gradients >> k & 1)) continue;
    double scale = 0;
    for (const double g : truth.grad[k]) scale = std::max(scale, std::isfinite(g) ? fabs(g) : 0);
    for (size_t i = 0; i < got[k].n; ++i) {
      const double x = got[k].data[i], y = truth.grad[k][i];
      const bool good = spread ? fabs(x - y) <= tolerance * 64 * (1 + truth.size[k][i])
                               : close_or_unbounded(x, y, tolerance * exponents, 1 + scale);
      expect(good, name[k], i, x, y);
    }
  }
}

// Checks another value of a threshold on a device so small that the splits come out uneven.
void check_threshold(const char* name, int64_t now, int64_t value) {
  const int here = emu::machine.multiprocessors;
  emu::machine.multiprocessors = 1;
  checking::expect_other_grids(bomkern_tune_total_correlation, name, now, value,
                               [] { check<float>({600, 2, Data::plain, true}); });
  emu::machine.multiprocessors = here;
}

// One exponential in so many is a polynomial: other kernels, whose marginals differ in their last bits, and no more.
void check_periods() {
  snprintf(current, sizeof current, "poly_period");
  const auto set = [](int64_t period) { return bomkern_tune_total_correlation("poly_period", period); };
  const Problem<float> p({.batch = 20, .dims = 40});
  Buffer<float> out(20), joint(20), marginal(20 * 40);
  const Forward<float> a{p.in, p.offset, p.density_offset, out.data, nullptr, joint.data, marginal.data};
  Buffer<unsigned char> workspace(cuda_workspace(a));
  const auto marginals = [&] {
    expect(cuda_run(a, workspace.data, nullptr) == cudaSuccess, "error", 0, 1, 0);
    return std::vector<float>(marginal.data, marginal.data + marginal.n);
  };
  const std::vector<float> usual = marginals();
  for (const int64_t period : {7, 8, 10, 32}) {
#if defined(BOMKERN_TUNE)
    const bool there = period != 7;
#else
    const bool there = false;  // a library that people install has one kernel
#endif
    expect(set(period) == 16, "what it was", period, 0, 16);
    expect(set(0) == (there ? period : 16), "what it is", period, double(set(0)), there ? double(period) : 16);
    expect((marginals() != usual) == there, "marginals as with 16", period, there, !there);
    if (there) check<float>({.batch = 20, .dims = 40, .stratified = true});
    if (there) check<float>({.batch = 33, .dims = 130, .data = Data::wide});
    set(16);
  }
}

// Sizes that cannot be served touch no memory.
template <class S> void check_refusal(int64_t dims, int64_t batch, int64_t rows, int64_t first = 0) {
  snprintf(current, sizeof current, "refusal: B=%lld D=%lld R=%lld first=%lld", (long long)batch, (long long)dims,
           (long long)rows, (long long)first);
  Forward<S> a{};
  Backward<S> b{};
  a.in.batch = batch, a.in.dims = dims, a.in.rows = rows, a.in.first = first;
  b.in = a.in;
  S gradient = 0;
  b.grad_z = &gradient;
  uint4 workspace;
  emu::machine.launches = 0;
  expect(cuda_workspace(a) == 0 && cuda_workspace(b) == 0, "workspace", 0, 1, 0);
  expect(cuda_run(a, &workspace, nullptr) == cudaErrorInvalidValue, "forward's error", 0, 0, 1);
  expect(cuda_run(b, &workspace, nullptr) == cudaErrorInvalidValue, "backward's error", 0, 0, 1);
  expect(emu::machine.launches == 0, "launches", 0, emu::machine.launches, 0);
}

}  // namespace

int main() {
  for (const int64_t batch : {1, 2, 3, 33, 70}) {
    for (const int64_t dims : {1, 3, 8, 17, 130}) {
      check<float>({batch, dims});
      check<double>({batch, dims});
      if (batch > 1) check<float>({batch, dims, Data::plain, true, true});
    }
  }
  for (const Data data :
       {Data::wide, Data::narrow, Data::far, Data::duplicates, Data::nan_z, Data::nan_mu, Data::nan_logvar}) {
    for (const bool stratified : {false, true}) {
      check<float>({37, 10, data, stratified});
      check<double>({37, 10, data, stratified, true});
    }
  }
  for (int gradients = 0; gradients < 8; ++gradients) check<float>({40, 6, Data::plain, false, true, gradients});
  check<float>({600, 2, Data::plain, true});      // several segments and splits
  check<float>({2060, 1, Data::plain, true});     // four squares of the backward pass
  check<float>({20, 600, Data::plain, true});     // blocks of 512 threads
  check<double>({9, 300, Data::far, true, true});
  check<float>({5, max_cuda_dims<float>});  // one component a barrier, and more shared memory than is granted unasked
  check<double>({3, max_cuda_dims<double>});
  for (const bool stratified : {false, true}) {
    for (const int64_t dims : {1, 8, 17, 130}) {
      for (const auto& [rows, first] : {std::pair(1, 0), {1, 41}, {1, 69}, {33, 0}, {33, 20}, {33, 37}, {69, 1}}) {
        check<float>({.batch = 70, .dims = dims, .stratified = stratified, .some_rows = rows, .first = first});
        check<double>({70, dims, Data::plain, stratified, true, 7, rows, first});
      }
    }
    for (const Data data :
         {Data::wide, Data::narrow, Data::far, Data::duplicates, Data::nan_z, Data::nan_mu, Data::nan_logvar}) {
      check<float>({.batch = 37, .dims = 10, .data = data, .stratified = stratified, .some_rows = 11, .first = 26});
    }
    for (int gradients = 0; gradients < 8; ++gradients) {
      check<float>({40, 6, Data::plain, stratified, true, gradients, 9, 3});
    }
    check<float>({2, 3, Data::plain, stratified, false, 7, 1, 1});
    check<float>({600, 2, Data::plain, stratified, false, 7, 1, 599});      // z ends long before the components
    check<float>({600, 3, Data::far, stratified, true, 7, 90, 440});        // several segments and splits
    check<float>({2060, 1, Data::plain, stratified, false, 7, 20, 2035});   // two squares side by side
    check<float>({2300, 1, Data::plain, stratified, false, 7, 2051, 249});  // four of different sizes
    check<double>({5, max_cuda_dims<double>, Data::plain, stratified, false, 7, 2, 3});
  }
  check_refusal<float>(max_cuda_dims<float> + 1, 1, 1);
  check_refusal<double>(3, (int64_t(1) << 30) + 1, 4);
  check_refusal<float>(3, 8, 0);
  check_refusal<float>(3, 8, 9);
  check_refusal<float>(3, 8, 4, 5);
  check_refusal<float>(3, 8, 4, -1);
  check_threshold("fixed_steps", 32, 1);
  check_threshold("shortest_split", 16, 400);
  check_threshold("most_splits", 32, 1);
  check_periods();
  return checking::done("total_correlation");
}
