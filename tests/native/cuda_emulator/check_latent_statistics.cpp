// Runs latent_statistics' CUDA kernels under the emulator against the formulas written out in double.
#include "columns.h"

#include "../../../kernels/latent_statistics/cuda.h"

extern "C" int64_t bomkern_tune_columns(const char* name, int64_t value);

using namespace bomkern;
using namespace bomkern::latent_statistics;
using namespace checking;

namespace {

struct Setting : Columns {
  int wanted = 7;        // a bit each: z, mu, logvar
  unsigned given = 511;  // a bit for each of the nine gradients
};

double exponential(double v, double* slope) {
  *slope = exp(v > 80 ? 80 : v);
  return v > 80 ? *slope * (1 + v - 80) : *slope;
}

template <class S> std::vector<S> gradients(int64_t n) {
  std::vector<S> g(n);
  for (S& one : g) one = S(uniform(-2, 2));
  return g;
}

template <class S> void check(const Setting& s) {
  if (emu::left_out()) return;
  const auto type = [&] { return s.mixed ? any_type<S>() : number<S>(); };
  const DType z_type = type(), mu_type = type(), logvar_type = type();
  begin("float%d B=%lld D=%lld layout=%d data=%d types=%d,%d,%d wanted=%d given=%x", int(sizeof(S)) * 8,
        (long long)s.batch, (long long)s.dims, int(s.layout), int(s.data), int(z_type), int(mu_type), int(logvar_type),
        s.wanted, s.given);
  const int64_t B = s.batch, D = s.dims;
  const ColumnInput z(s, z_type), mu(s, mu_type);
  Input logvar(B, D, logvar_type, s.layout);
  logvar.fill([](auto b, auto d) { return (b * 7 + d) % 97 == 0 ? uniform(79, 84) : uniform(-6, 2); });
  const Moments z_moments(z), mu_moments(mu);
  const Inputs<S> in{z.matrix, mu.matrix, logvar.matrix, B, D, S(0.3), S(0.2)};
  const Units units(mu_moments.variance, in.threshold, in.temperature);
  const double epsilon = sizeof(S) == 4 ? 2e-7 : 1e-14;

  Buffer<S> row[3] = {Buffer<S>(B), Buffer<S>(B), Buffer<S>(B)};
  Buffer<S> column[6] = {Buffer<S>(D), Buffer<S>(D), Buffer<S>(D), Buffer<S>(D), Buffer<S>(D), Buffer<S>(D)};
  Buffer<S> one[2] = {Buffer<S>(1), Buffer<S>(1)};
  const Forward<S> forward{in, row[0].data, row[1].data, row[2].data, column[0].data, column[1].data, column[2].data,
                           column[3].data, one[0].data, one[1].data, column[4].data, column[5].data};
  run(forward, 1);
  for (const auto& x : row) x.check_guards("a row's");
  for (const auto& x : column) x.check_guards("a column's");
  for (const auto& x : one) x.check_guards("one's");
  for (int64_t b = 0; b < B; ++b) {
    double want[3] = {}, size[3] = {};
    for (int64_t d = 0; d < D; ++d) {
      double slope;
      const double m = mu.at(b, d), v = logvar.at(b, d), e = exponential(v, &slope);
      want[0] += (m * m + e - 1 - v) / 2, size[0] += m * m + e + 1 + fabs(v);
      want[1] += v / D, size[1] += fabs(v) / D;
      want[2] += v * v / D, size[2] += v * v / D;
    }
    for (int k = 0; k < 3; ++k) expect(close(row[k].data[b], want[k], 4 * epsilon, size[k]), "a row's", b, row[k].data[b], want[k]);
  }
  z_moments.expect_as(column[4].data, column[1].data, "z");
  mu_moments.expect_as(column[5].data, column[3].data, "mu");
  for (int64_t d = 0; d < D; ++d) {
    for (int k = 0; k < 2; ++k) {
      const Moments& m = k ? mu_moments : z_moments;
      const double want = m.x.at(0, d) + m.offset[d], got = column[2 * k].data[d];
      expect(close(got, want, 5 * epsilon, m.spread[d]), "a mean", d, got, want);
    }
  }
  expect(close(one[0].data[0], units.active, 20 * epsilon, 1), "active", 0, one[0].data[0], units.active);
  expect(close(one[1].data[0], units.effective, 60 * epsilon, 0), "effective", 0, one[1].data[0], units.effective);
  if (B * D < 5000) expect_same_bits(forward, row[0]), expect_same_bits(forward, column[1]);
  if (B * D < 5000 || B == 2100) {
    expect_same_bits_elsewhere(forward, row[0]);
    for (const int k : {1, 3}) expect_same_bits_elsewhere(forward, column[k]);
    expect_same_bits_elsewhere(forward, one[1]);
  }

  const Gradients<S> kl(B, below(3)), mean(B, below(3)), square(B, 1);
  const auto z_mean = gradients<S>(D), z_variance = gradients<S>(D), mu_mean = gradients<S>(D), mu_variance = gradients<S>(D);
  const S active = S(uniform(-2, 2)), effective = S(uniform(-2, 2));
  const auto has = [&](int i) { return s.given >> i & 1; };
  Backward<S> a{in};
  if (has(0)) a.kl = kl.row();
  if (has(1)) a.logvar_mean = mean.row();
  if (has(2)) a.logvar_square = square.row();
  if (has(3)) a.z_mean = z_mean.data();
  if (has(4)) a.z_variance = z_variance.data();
  if (has(5)) a.mu_mean = mu_mean.data();
  if (has(6)) a.mu_variance = mu_variance.data();
  if (has(7)) a.active = &active;
  if (has(8)) a.effective = &effective;
  a.z_offset = column[4].data, a.mu_offset = column[5].data, a.variance = column[3].data;
  Output got_z(B * D, z_type), got_mu(B * D, mu_type), got_logvar(B * D, logvar_type);
  if (s.wanted & 1) a.grad_z = got_z.data();
  if (s.wanted & 2) a.grad_mu = got_mu.data();
  if (s.wanted & 4) a.grad_logvar = got_logvar.data();
  run(a, s.wanted ? 1 : 0);
  expect_resident("backward");
  for (const Output* x : {&got_z, &got_mu, &got_logvar}) x->buffer.check_guards("a gradient");

  const double tolerance = sizeof(S) == 4 ? 2e-5 : 1e-11;
  const auto as_double = [&](bool given, const std::vector<S>& x) {
    return given ? std::vector<double>(x.begin(), x.end()) : std::vector<double>(D);
  };
  if (s.wanted & 1) {
    z_moments.expect_gradient(got_z, z_type, as_double(has(3), z_mean), as_double(has(4), z_variance), 0, tolerance, "grad_z");
  }
  if (s.wanted & 2) {
    std::vector<double> slope = as_double(has(6), mu_variance);
    for (int64_t d = 0; d < D; ++d) {
      slope[d] += (has(7) ? active * units.active_slope[d] : 0) + (has(8) ? effective * units.effective_slope[d] : 0);
    }
    mu_moments.expect_gradient(got_mu, mu_type, as_double(has(5), mu_mean), slope, has(8) ? units.term : 0, tolerance, "grad_mu",
                               [&](int64_t b, int64_t d) { return has(0) ? kl.at(b) * mu.at(b, d) : 0.0; });
  }
  for (int64_t i = 0; i < B * D && s.wanted & 4; ++i) {
    const int64_t b = i / D;
    const double v = logvar.at(b, i % D);
    double slope;
    exponential(v, &slope);
    const double of_kl = has(0) ? kl.at(b) * (slope - 1) / 2 : 0, of_mean = has(1) ? mean.at(b) / D : 0;
    const double of_square = has(2) ? square.at(b) * 2 * v / D : 0, want = of_kl + of_mean + of_square;
    expect(close_as(logvar_type, got_logvar.at(i), want, 8 * epsilon, 2 + fabs(of_kl) + fabs(of_mean) + fabs(of_square)),
           "grad_logvar", i, got_logvar.at(i), want);
  }
}

}  // namespace

int main() {
  for (const int64_t batch : {2, 5, 70}) {
    for (const int64_t dims : {1, 3, 8, 24, 65, 132}) {
      check<float>({{batch, dims}});
      check<double>({{batch, dims, Layout::plain, Data::plain, dims % 2 == 0}});
      check<float>({{batch, dims, Layout::plain, Data::plain, true}});
    }
  }
  for (const Layout layout : layouts) {
    for (const int64_t dims : {8, 21}) {
      check<float>({{37, dims, layout, Data::plain, true}});
      check<double>({{37, dims, layout, Data::plain, true}});
    }
  }
  for (const Data data : {Data::far, Data::constant, Data::some_constant, Data::outlier}) {
    check<float>({{700, 40, Layout::plain, data}});
    check<double>({{700, 33, Layout::plain, data}});
  }
  for (int wanted = 0; wanted < 8; ++wanted) check<float>({{6, 12, Layout::plain, Data::plain, true}, wanted});
  for (int i = 0; i < 9; ++i) {  // each alone, and each left out
    check<float>({{6, 12}, 7, 1u << i});
    check<float>({{6, 12}, 7, 511u ^ 1u << i});
  }
  check<float>({{6, 12}, 7, 0});
  check<float>({{2100, 64}});                                    // several slices
  check<float>({{2100, 72, Layout::plain, Data::plain, true}});
  check<float>({{40, 1300}});                                    // several tiles, whose row sums meet
  check<float>({{300, 300, Layout::transposed, Data::some_constant, true}});
  check<float>({{2, 9001}});                                     // more items than blocks
  check<double>({{3, 4100}});
  for (const int64_t slices : {1, 3}) {
    expect_other_grids(bomkern_tune_columns, "most_slices", 256, slices, [] { check<float>({{700, 40}}); });
  }
  expect_other_grids(bomkern_tune_columns, "one_slice", 16384, 28000, [] { check<float>({{700, 40}}); });
  return done("latent_statistics");
}
