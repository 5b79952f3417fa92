// Runs covariance_penalty's CUDA stages under the emulator, put together by cuda_steps.h around plain matrix products,
// against the definition written out in double.
#include "columns.h"

#include "../../../kernels/covariance_penalty/cuda_steps.h"

extern "C" int64_t bomkern_tune_columns(const char* name, int64_t value);

using namespace bomkern;
using namespace bomkern::covariance_penalty;
using namespace checking;

namespace {

// Matrices whose products are triple loops; the stages' launches are counted by run().
template <class S> struct PlainLibrary {
  struct Array {
    std::shared_ptr<Buffer<S>> buffer;
    int64_t rows = 0, columns = 0;
    bool transposed = false;
    double at(int64_t i, int64_t j) const { return buffer->data[transposed ? j * rows + i : i * columns + j]; }
  };
  mutable std::vector<std::shared_ptr<Buffer<S>>> made;

  Array empty(int64_t rows, int64_t columns) const {
    made.push_back(std::make_shared<Buffer<S>>(rows * columns));
    return {made.back(), rows, columns};
  }
  S* data(const Array& array) const { return array.buffer->data; }
  Array transposed(const Array& array) const { return {array.buffer, array.columns, array.rows, !array.transposed}; }
  Array product(const Array& a, const Array& b) const {
    const Array out = empty(a.rows, b.columns);
    for (int64_t i = 0; i < a.rows; ++i) {
      for (int64_t j = 0; j < b.columns; ++j) {
        double sum = 0;
        for (int64_t k = 0; k < a.columns; ++k) sum += a.at(i, k) * b.at(k, j);
        out.buffer->data[i * b.columns + j] = S(sum);
      }
    }
    return out;
  }
  template <class Stage> void run(const Stage& a) const { checking::run(a, 1); }
};

// The definition: the parts, their mean, and the gradient of sum_b g_b part_b by z, through C and the deviations.
struct Truth {
  std::vector<double> part, grad, x, second;
  double mean = 0, largest = 0;
  std::vector<bool> constant;

  Truth(const Input& z, const std::vector<double>& g, bool normalize, double epsilon) {
    const int64_t B = z.batch, D = z.dims;
    const Moments moments(z);
    std::vector<double> inverse(D, 1.0), c(D * D), y(B * D), weighted(D * D), h(B * D);
    x.resize(B * D), part.resize(B), grad.resize(B * D), constant.resize(D);
    for (int64_t d = 0; d < D; ++d) {
      const double deviation = sqrt(moments.variance[d]);
      constant[d] = deviation <= epsilon * fabs(z.at(0, d) + moments.offset[d]);
      if (normalize) inverse[d] = constant[d] ? 0 : 1 / deviation;
      for (int64_t b = 0; b < B; ++b) x[b * D + d] = (z.at(b, d) - z.at(0, d) - moments.offset[d]) * inverse[d];
    }
    // C without its diagonal, and its gradient: both symmetric.
    const double scale = double(B) / (B - 1) / D;
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t i = 0; i < D; ++i) {
        for (int64_t j = 0; j < D; ++j) {
          if (i == j) continue;
          c[i * D + j] += x[b * D + i] * x[b * D + j] / (B - 1);
          weighted[i * D + j] += scale * g[b] * x[b * D + i] * x[b * D + j];
        }
      }
    }
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t d = 0; d < D; ++d) {
        double through = 0;
        for (int64_t i = 0; i < D; ++i) {
          y[b * D + d] += x[b * D + i] * c[i * D + d];
          through += x[b * D + i] * weighted[i * D + d];
        }
        part[b] += scale * x[b * D + d] * y[b * D + d];
        h[b * D + d] = 2 * scale * g[b] * y[b * D + d] + 2 * through / (B - 1);
      }
      mean += part[b] / B;
    }
    for (int64_t d = 0; d < D; ++d) {
      double sum = 0, along = 0;
      for (int64_t b = 0; b < B; ++b) sum += h[b * D + d], along += h[b * D + d] * x[b * D + d];
      for (int64_t b = 0; b < B; ++b) {
        double v = h[b * D + d] - sum / B;
        if (normalize) v -= along * x[b * D + d] / (B - 1);
        grad[b * D + d] = inverse[d] * v;
        largest = std::max(largest, fabs(inverse[d] * h[b * D + d]));
      }
    }
    second = c;
  }
};

// The bits of the first stage and of the last are those of a device of another size, whatever a bench sets.
template <class S>
void expect_same_elsewhere(const Steps<S, PlainLibrary<S>>& steps, const bomkern::RowGrad<S>& grad, bool normalize,
                           const Buffer<S>& offset, const Output& gradient) {
  const int here = emu::machine.multiprocessors;
  emu::machine.multiprocessors = 7;
  const int64_t column_blocks = bomkern_tune_columns("most_column_blocks", 0);
  for (const int64_t blocks : {int64_t(1), column_blocks}) {
    bomkern_tune_columns("most_column_blocks", blocks);
    Buffer<S> out(gradient.buffer.n), own_offset(offset.n), inverse(offset.n);
    Output own(gradient.buffer.n / size_of(gradient.dtype), gradient.dtype);
    const auto saved = steps.forward(normalize, true, out.data, own_offset.data, inverse.data);
    steps.backward(grad, saved, own_offset.data, inverse.data, normalize, true, own.data());
    const bool same = memcmp(own_offset.data, offset.data, offset.n * sizeof(S)) == 0 &&
                      memcmp(own.buffer.data, gradient.buffer.data, gradient.buffer.n) == 0;
    expect(same, "bits on a device of another size", 0, 1, 0);
  }
  emu::machine.multiprocessors = here;
}

template <class S> void check(const Columns& s) {
  if (emu::left_out()) return;
  const DType type = s.mixed ? any_type<S>() : number<S>();
  const int64_t B = s.batch, D = s.dims;
  const ColumnInput z(s, type);
  for (int kind = 0; kind < 6; ++kind) {
    const bool normalize = kind % 2, per_sample = kind < 4, alike = kind / 2 != 0;
    begin("float%d B=%lld D=%lld layout=%d data=%d type=%d normalize=%d per_sample=%d alike=%d", int(sizeof(S)) * 8,
          (long long)B, (long long)D, int(s.layout), int(s.data), int(type), normalize, per_sample, alike);
    const Gradients<S> given(B, alike ? 0 : 2);
    std::vector<double> g(B);
    for (int64_t b = 0; b < B; ++b) g[b] = per_sample ? given.at(b) : given.at(0) / B;
    const double epsilon = sizeof(S) == 4 ? 1.1920928955078125e-7 : 2.220446049250313e-16;
    const Truth truth(z, g, normalize, epsilon);

    const PlainLibrary<S> library;
    const Steps<S, PlainLibrary<S>> steps(library, z.matrix, B, D);
    Buffer<S> out(per_sample ? B : 1), offset(D), inverse(D);
    const auto saved = steps.forward(normalize, per_sample, out.data, offset.data, inverse.data);
    Output got(B * D, type);
    steps.backward(given.row(), saved, offset.data, inverse.data, normalize, per_sample, got.data());
    if (per_sample) expect_same_elsewhere(steps, given.row(), normalize, offset, got);

    for (const auto* one : {&out, &offset, &inverse}) one->check_guards("an output");
    for (const auto& one : library.made) one->check_guards("a temporary");
    got.buffer.check_guards("grad_z");
    double most = 0, widest = 0, second = 0;
    for (const double p : truth.part) most = std::max(most, fabs(p));
    for (const double x : truth.x) widest = std::max(widest, fabs(x));
    for (const double c : truth.second) second = std::max(second, fabs(c));
    // Where D > B, what is subtracted is as large as a diagonal: sums of squares squared.
    const double tolerance = 40 * epsilon, size = D > B ? most + widest * widest * widest * widest : most + 1e-6;
    for (size_t b = 0; b < out.n; ++b) {
      const double want = per_sample ? truth.part[b] : truth.mean;
      expect(close(out.data[b], want, tolerance, size), "out", b, out.data[b], want);
    }
    for (int64_t d = 0; d < D; ++d) {
      if (normalize) expect((inverse.data[d] == 0) == truth.constant[d], "inverse", d, inverse.data[d], truth.constant[d]);
      if (!normalize) expect(inverse.data[d] == 1, "inverse", d, inverse.data[d], 1);
    }
    for (int64_t i = 0; i < D * D && D <= B; ++i) {
      const double c = saved.second.buffer->data[i];
      expect(close(c, truth.second[i], tolerance, second) && (i % (D + 1) || c == 0), "second", i, c, truth.second[i]);
    }
    const double cube = D > B ? widest * widest * widest * 2 / B : 0;
    for (int64_t i = 0; i < B * D; ++i) {
      const bool good = close_as(type, got.at(i), truth.grad[i], tolerance, truth.largest + cube + 1e-6);
      expect(good, "grad_z", i, got.at(i), truth.grad[i]);
      if (normalize && truth.constant[i % D]) expect(got.at(i) == 0, "a constant column's gradient", i, got.at(i), 0);
    }
  }
}

// Normalized columns whose squares overflow: NaN, and no 0 that hides it.
template <class S> void check_overflow(int64_t B, int64_t D) {
  Input z(B, D, number<S>(), Layout::plain);
  z.fill([](int64_t, int64_t) { return (sizeof(S) == 4 ? 1e25 : 1e200) * normal(); });
  for (const bool per_sample : {false, true}) {
    begin("overflow float%d B=%lld D=%lld per_sample=%d", int(sizeof(S)) * 8, (long long)B, (long long)D, per_sample);
    const PlainLibrary<S> library;
    const Steps<S, PlainLibrary<S>> steps(library, z.matrix, B, D);
    Buffer<S> out(per_sample ? B : 1), offset(D), inverse(D);
    steps.forward(true, per_sample, out.data, offset.data, inverse.data);
    for (size_t b = 0; b < out.n; ++b) expect(out.data[b] != out.data[b], "out", b, out.data[b], NAN);
  }
}

}  // namespace

int main() {
  for (const int64_t batch : {2, 3, 33}) {
    for (const int64_t dims : {1, 2, 5, 8, 33, 40}) {
      check<float>({batch, dims});
      check<double>({batch, dims, Layout::plain, Data::plain, dims % 2 == 0});
      check<float>({batch, dims, Layout::plain, Data::plain, true});
    }
  }
  for (const Layout layout : {Layout::transposed, Layout::gaps, Layout::reversed, Layout::misaligned, Layout::spaced, Layout::padded}) {
    check<float>({20, 12, layout, Data::plain, true});
    check<double>({9, 12, layout, Data::plain, true});
  }
  check<float>({9, 6, Layout::rows_alike});
  check<float>({9, 6, Layout::columns_alike});
  for (const Data data : {Data::far, Data::constant, Data::some_constant}) {
    check<float>({30, 9, Layout::plain, data});
    check<float>({6, 12, Layout::plain, data});
    check<double>({30, 8, Layout::plain, data});
  }
  check<float>({600, 36});   // several slices
  check<float>({9000, 16});  // and more than merge at once
  check<float>({150, 132});  // and tiles
  check<float>({3, 700});    // a block to a row
  for (const int64_t dims : {1, 5, 33}) check_overflow<float>(20, dims), check_overflow<double>(20, dims);
  const auto several_slices = [] { check<float>({600, 36}); };
  expect_other_grids(bomkern_tune_columns, "most_column_blocks", 8, 2, several_slices);
  expect_other_grids(bomkern_tune_columns, "most_slices", 256, 3, several_slices);
  expect_other_grids(bomkern_tune_columns, "one_slice", 16384, 600 * 36, several_slices);
  return done("covariance_penalty");
}
