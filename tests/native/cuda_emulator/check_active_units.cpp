// Runs active_units' CUDA kernels under the emulator against the formulas written out in double.
#include "columns.h"

#include "../../../kernels/active_units/cuda.h"

extern "C" int64_t bomkern_tune_columns(const char* name, int64_t value);

using namespace bomkern;
using namespace bomkern::active_units;
using namespace checking;

namespace {

template <class S> void check(const Columns& s) {
  if (emu::left_out()) return;
  const DType type = s.mixed ? any_type<S>() : number<S>();
  begin("float%d B=%lld D=%lld layout=%d data=%d type=%d", int(sizeof(S)) * 8, (long long)s.batch, (long long)s.dims,
        int(s.layout), int(s.data), int(type));
  const ColumnInput mu(s, type);
  const Moments want_moments(mu);
  Inputs<S> in{mu.matrix, s.batch, s.dims, S(0.3), S(0.2)};
  const Units want(want_moments.variance, in.threshold, in.temperature);

  Buffer<S> active(1), effective(1), offset(s.dims), variance(s.dims);
  const Forward<S> forward{in, active.data, effective.data, offset.data, variance.data};
  run(forward, 1);
  for (const auto* one : {&active, &effective, &offset, &variance}) one->check_guards("forward");
  want_moments.expect_as(offset.data, variance.data, "mu");
  const double epsilon = sizeof(S) == 4 ? 2e-7 : 1e-14;
  expect(close(active.data[0], want.active, 20 * epsilon, 1), "active", 0, active.data[0], want.active);
  expect(close(effective.data[0], want.effective, 60 * epsilon, 0), "effective", 0, effective.data[0], want.effective);
  expect_same_bits(forward, offset);
  expect_same_bits(forward, variance);
  expect_same_bits_elsewhere(forward, variance);
  expect_same_bits_elsewhere(forward, effective);

  const S by_active = S(uniform(-2, 2)), by_effective = S(uniform(-2, 2));
  for (int given = 0; given < 4; ++given) {
    Output got(s.batch * s.dims, type);
    const Backward<S> a{in, given & 1 ? &by_active : nullptr, given & 2 ? &by_effective : nullptr, offset.data,
                        variance.data, got.data()};
    run(a, 1);
    expect_resident("grad_mu");
    got.buffer.check_guards("grad_mu");
    std::vector<double> slope(s.dims);
    for (int64_t d = 0; d < s.dims; ++d) {
      slope[d] = (given & 1 ? by_active * want.active_slope[d] : 0) + (given & 2 ? by_effective * want.effective_slope[d] : 0);
    }
    want_moments.expect_gradient(got, type, {}, slope, given & 2 ? want.term : 0, sizeof(S) == 4 ? 2e-5 : 1e-11, "grad_mu");
    if (s.batch * s.dims > 20000) break;
  }
}

}  // namespace

int main() {
  for (const int64_t batch : {2, 3, 33, 300}) {
    for (const int64_t dims : {1, 3, 8, 24, 65, 132}) {
      check<float>({batch, dims});
      check<double>({batch, dims});
      check<float>({batch, dims, Layout::plain, Data::plain, true});
    }
  }
  for (const Layout layout : layouts) {
    for (const int64_t dims : {8, 21}) {
      check<float>({37, dims, layout, Data::plain, true});
      check<double>({37, dims, layout, Data::plain, true});
    }
  }
  for (const Data data : {Data::far, Data::constant, Data::some_constant, Data::outlier}) {
    check<float>({700, 40, Layout::plain, data});
    check<float>({50, 12, Layout::transposed, data});
    check<double>({700, 33, Layout::plain, data});
  }
  check<float>({2100, 64});                                      // several slices
  check<float>({2100, 68, Layout::plain, Data::plain, true});
  check<float>({8000, 128, Layout::plain, Data::far});           // as many as there are at most
  check<float>({6000, 3, Layout::gaps});
  check<float>({40, 1300});                                      // several tiles
  check<float>({5, 2000, Layout::plain, Data::some_constant, true});
  check<float>({2, 9001});                                       // more items than blocks
  check<double>({2, 4100});
  for (const int64_t slices : {1, 3}) {
    expect_other_grids(bomkern_tune_columns, "most_slices", 256, slices, [] { check<float>({700, 40}); });
  }
  expect_other_grids(bomkern_tune_columns, "one_slice", 16384, 28000, [] { check<float>({700, 40}); });
  begin("a threshold that slices cannot have");
  const int64_t before = bomkern_tune_columns("most_slices", 257), after = bomkern_tune_columns("most_slices", 0);
  expect(before == 256 && after == 256, "most_slices", 0, after, 256);
  expect(bomkern_tune_columns("no such", 1) == -1, "no such threshold", 0, 0, -1);
  return done("active_units");
}
