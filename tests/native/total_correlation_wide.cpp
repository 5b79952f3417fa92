// total_correlation's CPU kernels on 64-byte vectors, as AVX-512 compiles them, against those on 16-byte ones, on any
// CPU: the compiler takes the wide vectors apart. Prints the largest difference, relative to the largest value.
#define BOMKERN_VECTOR_BYTES 64
#define BOMKERN_ISA wide
#include "../../kernels/total_correlation/cpu.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <vector>

namespace bomkern::total_correlation::baseline {
extern const CpuKernels kernels;
}

using namespace bomkern;
using namespace bomkern::total_correlation;

static void serial(int64_t tasks, void (*run)(void*, int64_t), void* state) {
  for (int64_t task = 0; task < tasks; ++task) run(state, task);
}

template <class S> struct Results {
  std::vector<S> out, joint, marginal, z, mu, logvar;
  std::vector<double> log_q;
};

template <class S> static Results<S> run(const CpuKernels& kernels, const Inputs<S>& in) {
  const int64_t batch = in.batch, size = in.batch * in.dims;
  const auto numbers = [](int64_t n) { return std::vector<S>(n, S(NAN)); };
  Results<S> r{numbers(batch), numbers(batch), numbers(size), numbers(size), numbers(size), numbers(size)};
  const auto bytes = [](int64_t n) { return aligned_alloc(64, (n + 63) / 64 * 64); };
  r.log_q.assign(batch, NAN);
  std::vector<S> grad(batch);
  std::vector<double> of_log_q(batch);
  for (int64_t b = 0; b < batch; ++b) grad[b] = S(b % 3) - S(0.5), of_log_q[b] = double(b % 4);
  const auto start = [&](const auto& a) {
    void* const workspace = bytes(kernels.bytes(a));
    kernels.run(a, workspace, serial);
    free(workspace);
  };
  start(Forward<S>{in, 0.0, 0.0, r.out.data(), r.log_q.data(), r.joint.data(), r.marginal.data()});
  start(Backward<S>{in, {grad.data(), 1}, {of_log_q.data(), 1}, r.joint.data(), r.marginal.data(), r.z.data(), r.mu.data(), r.logvar.data()});
  return r;
}

template <class S> static double difference(const std::vector<S>& a, const std::vector<S>& b) {
  double most = 0, size = 1;
  for (size_t i = 0; i < a.size(); ++i) {
    const double d = fabs(double(a[i]) - double(b[i]));
    most = d > most || d != d ? d : most;
    size = fmax(size, fabs(double(b[i])));
  }
  return most / size;
}

template <class S> static double compare(int64_t batch, int64_t dims, bool stratified, double spread) {
  std::vector<S> z(batch * dims), mu(z), logvar(z);
  srand48(batch * 100 + dims);
  for (size_t i = 0; i < z.size(); ++i) {
    mu[i] = S(4 * drand48() - 2);
    logvar[i] = S(spread * (drand48() - 0.5) - 1);
    z[i] = mu[i] + S(exp(logvar[i] / 2) * 3 * (drand48() - 0.5));
  }
  const DType type = sizeof(S) == 4 ? DType::f32 : DType::f64;
  const auto matrix = [&](const std::vector<S>& x) { return Matrix{x.data(), {dims, 1}, type}; };
  const Inputs<S> in{matrix(z), matrix(mu), matrix(logvar), batch, batch, dims, 0, stratified,
                     S(stratified ? 0.1 : 1), S(stratified ? 0.9 : 1)};
  const CpuKernels& a = total_correlation::wide::kernels;
  const CpuKernels& b = total_correlation::baseline::kernels;
  const Results<S> x = run(a, in), y = run(b, in);
  double most = 0;
  for (auto member : {&Results<S>::out, &Results<S>::z, &Results<S>::mu, &Results<S>::logvar}) {
    const double d = difference(x.*member, y.*member);
    most = d > most || d != d ? d : most;
  }
  const double d = difference(x.log_q, y.log_q);
  return d > most || d != d ? d : most;
}

int main() {
  double single = 0, twice = 0;
  const auto worse = [](double a, double b) { return b > a || b != b ? b : a; };
  for (const int64_t batch : {1, 2, 63, 64, 65, 200})
    for (const int64_t dims : {1, 7, 33, 70})
      for (const bool stratified : {false, true})
        for (const double spread : {1.0, 40.0}) {
          if (stratified && batch == 1) continue;
          single = worse(single, compare<float>(batch, dims, stratified, spread));
          twice = worse(twice, compare<double>(batch, dims, stratified, spread));
        }
  printf("%.3g %.3g\n", single, twice);
}
