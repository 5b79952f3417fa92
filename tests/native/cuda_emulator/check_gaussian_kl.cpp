// Runs gaussian_kl's CUDA kernels under the emulator against the formula written out in double.
#include "checking.h"

#include "../../../kernels/gaussian_kl/cuda.h"

extern "C" int64_t bomkern_tune_rows(const char* name, int64_t value);
extern "C" int64_t bomkern_tune_gaussian_kl(const char* name, int64_t value);

using namespace bomkern;
using namespace bomkern::gaussian_kl;
using namespace checking;

namespace {

struct Setting {
  int64_t batch, dims, block = 1;
  Layout layout = Layout::plain;
  bool mixed = false;  // any dtypes
  int wanted = 3;      // a bit each: mu, logvar
  bool no_grad = false;
  double rho = 0.3;  // where block > 1
};

double exponential(double v, double* slope) {
  *slope = exp(v > 80 ? 80 : v);
  return v > 80 ? *slope * (1 + v - 80) : *slope;
}

template <class S> Inverse<S> inverse_of(int64_t dims, double rho) {
  if (dims == 1) return {1, 0, 1};
  const double precision = 1 / (1 - rho), shared = precision * rho / (1 - rho + dims * rho);
  return {S(precision), S(shared), S(precision - shared)};
}

template <class S> void check(const Setting& s) {
  if (emu::left_out()) return;
  const DType mu_type = s.mixed ? any_type<S>() : number<S>(), logvar_type = s.mixed ? any_type<S>() : number<S>();
  begin("float%d B=%lld D=%lld block=%lld layout=%d types=%d,%d wanted=%d", int(sizeof(S)) * 8, (long long)s.batch,
        (long long)s.dims, (long long)s.block, int(s.layout), int(mu_type), int(logvar_type), s.wanted);
  Input mu(s.batch, s.dims, mu_type, s.layout), logvar(s.batch, s.dims, logvar_type, s.layout);
  mu.fill([](auto...) { return normal(); });
  logvar.fill([](auto b, auto d) { return (b * 7 + d) % 41 == 0 ? uniform(79, 84) : uniform(-6, 2); });
  if (s.batch > 2) logvar.put(1, s.dims - 1, NAN);
  const int64_t rest = s.dims % s.block ? s.dims % s.block : s.block;  // dimensions of the last block
  if (s.rho == 0) mu.put(0, 0, INFINITY);
  if (rest == 1 && s.block > 1) mu.put(0, s.dims - 1, INFINITY);  // alone, it shares nothing
  const Inputs<S> in{mu.matrix, logvar.matrix, s.batch, s.dims, s.block, inverse_of<S>(s.block, s.rho),
                     inverse_of<S>(rest, s.rho), S(s.block > 1 ? 1.25 : 0)};

  std::vector<double> want(s.batch, double(in.constant)), size(s.batch), want_mu(s.batch * s.dims), want_logvar(want_mu);
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t first = 0; first < s.dims; first += s.block) {
      const int64_t end = std::min(first + s.block, s.dims);
      const Inverse<S> own = inverse_of<S>(end - first, s.rho);
      double sum = 0;
      for (int64_t d = first; own.shared != 0 && d < end; ++d) sum += mu.at(b, d);
      want[b] -= own.shared * sum * sum / 2, size[b] += fabs(own.shared * sum * sum);
      for (int64_t d = first; d < end; ++d) {
        const double m = mu.at(b, d), v = logvar.at(b, d);
        double slope;
        const double e = exponential(v, &slope);
        want[b] += (own.diagonal * (e - 1) - v + own.precision * m * m) / 2, size[b] += fabs(e) + fabs(v) + m * m + 1;
        want_mu[b * s.dims + d] = own.precision * m - own.shared * sum;
        want_logvar[b * s.dims + d] = (own.diagonal * slope - 1) / 2;
      }
    }
  }
  const double epsilon = sizeof(S) == 4 ? 2e-7 : 1e-14;
  Buffer<S> out(s.batch);
  const Forward<S> forward{in, out.data};
  run(forward, 1);
  out.check_guards("out");
  for (int64_t b = 0; b < s.batch; ++b) {
    // exp of a logarithm near 80 is relative to its argument's rounding.
    expect(close(out.data[b], want[b], 4 * epsilon, std::isfinite(size[b]) ? size[b] : 0), "out", b, out.data[b], want[b]);
  }
  if (want[0] == want[0] && s.batch <= 2) expect_same_bits(forward, out);
  if (s.batch < 100) expect_same_bits_elsewhere(forward, out);

  if (s.batch > 4000) {
    expect_same_bits_at(bomkern_tune_rows, "most_row_blocks", 16, 2, forward, out);
    expect_same_bits_at(bomkern_tune_gaussian_kl, "full_blocks", 4, 8, forward, out);
  }

  const Gradients<S> grad(s.batch, below(3));
  Output got_mu(s.batch * s.dims, mu_type), got_logvar(s.batch * s.dims, logvar_type);
  Backward<S> a{in, grad.row(), nullptr, nullptr};
  if (s.no_grad) a.grad = {};
  if (s.wanted & 1) a.grad_mu = got_mu.data();
  if (s.wanted & 2) a.grad_logvar = got_logvar.data();
  run(a, s.wanted ? 1 : 0);
  got_mu.buffer.check_guards("grad_mu"), got_logvar.buffer.check_guards("grad_logvar");
  for (int64_t i = 0; i < s.batch * s.dims; ++i) {
    const double g = s.no_grad ? 0 : grad.at(i / s.dims), m = g * want_mu[i], v = g * want_logvar[i];
    if (s.wanted & 1) expect(close_as(mu_type, got_mu.at(i), m, 8 * epsilon, double(s.block)), "grad_mu", i, got_mu.at(i), m);
    if (s.wanted & 2) expect(close_as(logvar_type, got_logvar.at(i), v, 8 * epsilon, 2), "grad_logvar", i, got_logvar.at(i), v);
  }
}

}  // namespace

int main() {
  for (const int64_t batch : {1, 2, 3, 70}) {
    for (const int64_t dims : {1, 3, 8, 24, 130, 132}) {
      check<float>({batch, dims});
      check<double>({batch, dims});
      check<float>({batch, dims, 1, Layout::plain, true});
    }
  }
  for (const Layout layout : layouts) {
    for (const int64_t dims : {8, 21}) {
      check<float>({5, dims, 1, layout, true});
      check<double>({5, dims, 1, layout, true});
      check<float>({5, dims, dims == 8 ? 4 : 7, layout, true});
    }
  }
  for (const int64_t block : {2, 3, 4, 6, 8, 16, 24, 48}) {  // the pieces of a row, and of a block, are whole or not
    check<float>({9, 48, block});
    check<double>({9, 48, block, Layout::plain, true});
    for (const int64_t dims : {49, 50, 52, 56, 60}) {  // the last block has fewer dimensions, of whole pieces or not
      check<float>({9, dims, block, Layout::plain, dims % 8 != 0});
      check<double>({9, dims, block});
      check<float>({1, dims, block});  // no pitch forbids wide pieces
    }
  }
  for (int wanted = 0; wanted < 4; ++wanted) check<float>({6, 12, wanted % 2 ? 1 : 4, Layout::plain, true, wanted});
  check<float>({4, 12, 1, Layout::plain, false, 3, true});
  check<float>({4, 12, 4, Layout::plain, false, 3, false, 0});  // an infinite mean, and blocks that do not correlate
  check<float>({4, 14, 4, Layout::plain, false, 3, false, 0});
  check<float>({4, 12, 6, Layout::plain, false, 3, false, -0.1});
  check<float>({13000, 4});                // the grid comes round again
  check<float>({13000, 1, 1, Layout::rows_alike});
  check<float>({30, 700, 1});              // a block to a row
  check<float>({1100, 516});               // a warp to a long row
  check<float>({2, 16400});                // of 512 threads
  check<float>({2, 4099});
  check<double>({2, 8300, 1, Layout::plain, true});
  check<float>({2, 5200, 1300});           // prior blocks in a warp, and in a whole block
  check<float>({2, 5200, 5200});
  check<float>({2, 5201, 1300});           // and the last of one dimension
  check<float>({2, 5200, 5000});           // of a part of the whole block's threads
  check<float>({4, 13, 6, Layout::plain, false, 3, false, -0.1});
  check<double>({3, 2600, 2600, Layout::gaps, true});
  expect_other_grids(bomkern_tune_rows, "few_rows", 1024, 30, [] { check<float>({30, 700}); });
  return done("gaussian_kl");
}
