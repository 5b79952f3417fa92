// Shared by the checks of kernels along columns: data, and the definitions in double.
#pragma once
#include "checking.h"

namespace checking {

enum class Data { plain, far, constant, some_constant, outlier };

struct Columns {
  int64_t batch, dims;
  Layout layout = Layout::plain;
  Data data = Data::plain;
  bool mixed = false;  // any dtypes
};

// constant: 0 too. far: mean 1e4 and deviation 1. outlier: the same, its first row 0.
struct ColumnInput : Input {
  ColumnInput(const Columns& s, DType type) : Input(s.batch, s.dims, type, s.layout) {
    fill([&](int64_t b, int64_t d) {
      const bool constant = s.data == Data::constant || (s.data == Data::some_constant && d % 3 == 1);
      if (constant) return d % 4 == 3 ? 0 : d % 2 ? 0.1 : 3e4 + 0.1 * d;
      if (s.data == Data::outlier && b == 0) return 0.0;
      return (s.data == Data::far || s.data == Data::outlier ? 1e4 : 0.5) + (0.2 + d % 5 * 0.3) * normal();
    });
  }
};

// The means less the first values, and the unbiased variances.
struct Moments {
  const Input& x;
  std::vector<double> offset, variance, spread;  // spread: the largest difference from the first value

  explicit Moments(const Input& x) : x(x), offset(x.dims), variance(x.dims), spread(x.dims) {
    for (int64_t d = 0; d < x.dims; ++d) {
      const double first = x.at(0, d);
      for (int64_t b = 0; b < x.batch; ++b) {
        offset[d] += (x.at(b, d) - first) / x.batch, spread[d] = std::max(spread[d], fabs(x.at(b, d) - first));
      }
      for (int64_t b = 0; b < x.batch; ++b) {
        const double u = x.at(b, d) - first - offset[d];
        variance[d] += u * u / (x.batch - 1);
      }
      if (spread[d] == 0) offset[d] = variance[d] = 0;
    }
  }
  template <class S> void expect_as(const S* offsets, const S* variances, const char* what) const {
    const double epsilon = sizeof(S) == 4 ? 2e-7 : 1e-14;
    for (int64_t d = 0; d < x.dims; ++d) {
      expect(fabs(offsets[d] - offset[d]) <= 10 * epsilon * spread[d], what, d, offsets[d], offset[d]);
      expect(fabs(variances[d] - variance[d]) <= 20 * epsilon * variance[d], what, d, variances[d], variance[d]);
    }
  }
  // Gradients by the mean (or none) and by the variance, whose terms are `least` before they cancel, and what rows add,
  // row(b, d), which may be left out.
  template <class Row = double (*)(int64_t, int64_t)>
  void expect_gradient(const Output& got, DType type, const std::vector<double>& by_mean,
                       const std::vector<double>& by_variance, double least, double tolerance, const char* what,
                       Row row = [](int64_t, int64_t) { return 0.0; }) const {
    double largest = least;
    for (const double v : by_variance) largest = std::max(largest, fabs(v));
    for (int64_t i = 0; i < x.batch * x.dims; ++i) {
      const int64_t b = i / x.dims, d = i % x.dims;
      const double slope = by_variance.empty() ? 0 : by_variance[d] * 2 / (x.batch - 1);
      const double size = largest * 2 / (x.batch - 1) * spread[d];
      const double mean = by_mean.empty() ? 0 : by_mean[d] / x.batch, more = row(b, d);
      const double want = mean + more + slope * (x.at(b, d) - x.at(0, d) - offset[d]);
      expect(close_as(type, got.at(i), want, tolerance, size + fabs(mean) + fabs(more)), what, i, got.at(i), want);
    }
  }
};

// Active and effective units, and their gradients by the variances.
struct Units {
  double active = 0, effective = 0, term = 0;  // term: of the gradient of `effective`, before two of them cancel
  std::vector<double> active_slope, effective_slope;

  Units(const std::vector<double>& variance, double threshold, double temperature)
      : active_slope(variance.size()), effective_slope(variance.size()) {
    const double dims = double(variance.size());
    double total = 0, entropy = 0;
    for (const double v : variance) total += v;
    for (const double v : variance) entropy -= v > 0 ? v / total * log(v / total) : 0;
    effective = total > 0 ? exp(entropy) / dims : 0;
    term = total > 0 ? effective / total : 0;
    for (size_t d = 0; d < variance.size(); ++d) {
      const double v = variance[d], s = 1 / (1 + exp(-(v - threshold) / temperature));
      active += s / dims;
      active_slope[d] = s * (1 - s) / temperature / dims;
      effective_slope[d] = v > 0 ? -effective * (log(v / total) + entropy) / total : 0;
    }
  }
};

}  // namespace checking
