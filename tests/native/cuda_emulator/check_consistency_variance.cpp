// Runs consistency_variance's CUDA kernels under the emulator against the formula written out in double.
#include "checking.h"

#include "../../../kernels/consistency_variance/cuda.h"

extern "C" int64_t bomkern_tune_rows(const char* name, int64_t value);

using namespace bomkern;
using namespace bomkern::consistency_variance;
using namespace checking;

namespace {

struct Setting {
  int views;
  int64_t batch, dims;
  Layout layout = Layout::plain;
  bool mixed = false;  // any dtypes
  double mean = 0;
  unsigned wanted = 0xffff;  // a bit a view
  bool no_grad = false, several = false;  // several: each view its own layout
};

template <class S> void check(const Setting& s) {
  if (emu::left_out()) return;
  begin("float%d V=%d B=%lld D=%lld layout=%d mixed=%d mean=%g wanted=%x", int(sizeof(S)) * 8, s.views,
        (long long)s.batch, (long long)s.dims, int(s.layout), s.mixed, s.mean, s.wanted);
  const double correction = s.views > 2 ? 1.5 : 1;
  std::vector<std::unique_ptr<Input>> view;
  Inputs<S> in{};
  in.views = s.views, in.batch = s.batch, in.dims = s.dims;
  in.scale = S(1 / ((s.views - correction) * double(s.dims)));
  for (int v = 0; v < s.views; ++v) {
    const DType type = s.mixed ? any_type<S>() : number<S>();
    const Layout layout = s.several ? layouts[below(std::size(layouts))] : s.layout;
    view.push_back(std::make_unique<Input>(s.batch, s.dims, type, layout));
    view[v]->fill([&](auto b, auto) { return s.mean + normal() + (v == 0 && b % 3 == 1 ? 50 : 0); });
    in.view[v] = view[v]->matrix;
  }
  std::vector<double> want(s.batch), slope(s.views * s.batch * s.dims), size(s.batch);
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t d = 0; d < s.dims; ++d) {
      double mean = 0;
      for (int v = 0; v < s.views; ++v) mean += view[v]->at(b, d) / s.views;
      for (int v = 0; v < s.views; ++v) {
        const double u = view[v]->at(b, d) - mean;
        want[b] += double(in.scale) * u * u;
        size[b] = std::max(size[b], fabs(u));
        slope[(v * s.batch + b) * s.dims + d] = 2 * double(in.scale) * u;
      }
    }
  }
  const double epsilon = sizeof(S) == 4 ? 2e-7 : 1e-14;
  Buffer<S> out(s.batch);
  const Forward<S> forward{in, out.data};
  run(forward, 1);
  out.check_guards("out");
  for (int64_t b = 0; b < s.batch; ++b) {
    // Squares and their mean cancel by a factor of V at most.
    expect(close(out.data[b], want[b], epsilon * 2 * s.views, 1e-30), "out", b, out.data[b], want[b]);
  }
  expect_same_bits(forward, out);
  if (s.batch < 100) expect_same_bits_elsewhere(forward, out);

  if (s.batch > 4000) expect_same_bits_at(bomkern_tune_rows, "most_row_blocks", 16, 1, forward, out);

  const Gradients<S> grad(s.batch, below(3));
  Backward<S> a{in, grad.row()};
  if (s.no_grad) a.grad = {};
  std::vector<std::unique_ptr<Output>> got;
  unsigned wanted = 0;
  for (int v = 0; v < s.views; ++v) {
    got.push_back(std::make_unique<Output>(s.batch * s.dims, in.view[v].dtype));
    if (s.wanted >> v & 1) a.out[v] = got[v]->data(), wanted |= 1u << v;
  }
  run(a, wanted ? 1 : 0);
  for (int v = 0; v < s.views; ++v) {
    got[v]->buffer.check_guards("gradient");
    for (int64_t i = 0; i < s.batch * s.dims; ++i) {
      const int64_t b = i / s.dims;
      const double g = s.no_grad ? 0 : grad.at(b), x = got[v]->at(i), y = g * slope[v * s.batch * s.dims + i];
      if (!(wanted >> v & 1)) break;
      expect(close_as(in.view[v].dtype, x, y, 4 * epsilon, fabs(2 * in.scale * g) * size[b]), "gradient", i, x, y);
    }
  }
}

}  // namespace

int main() {
  for (const int views : {2, 3, 8, 9, 16}) {
    for (const int64_t dims : {1, 7, 8, 40, 132}) {
      check<float>({views, 5, dims});
      check<double>({views, 5, dims});
      check<float>({views, 70, dims, Layout::plain, true});
    }
  }
  for (const Layout layout : layouts) {
    for (const int64_t dims : {8, 11}) {
      check<float>({4, 6, dims, layout, true});
      check<double>({11, 3, dims, layout, true});
    }
  }
  for (int i = 0; i < 6; ++i) check<float>({5, 4, 16, Layout::plain, true, 0, 0xffff, false, true});
  for (const unsigned wanted : {0u, 1u, 4u, 0x300u, 0xfffeu}) {
    check<float>({10, 4, 8, Layout::plain, wanted == 4, 0, wanted});
  }
  check<float>({3, 4, 8, Layout::plain, false, 0, 0xffff, true});
  check<float>({4, 40, 64, Layout::plain, false, 1e4});
  check<float>({2, 13000, 4});    // the grid comes round again
  check<float>({3, 20, 700});     // a block to a row
  check<float>({2, 1100, 516});  // a warp to a long row
  check<float>({2, 2, 16400});    // of 512 threads
  check<double>({2, 2, 4097});
  expect_other_grids(bomkern_tune_rows, "few_rows", 1024, 20, [] { check<float>({3, 20, 700}); });
  return done("consistency_variance");
}
