// covariance_penalty on the CPU, for the instruction set that the including file names.
#include "../common/cpu_columns.h"
// (cpu_columns.h first: it includes simd.h)
#include "covariance_penalty.h"

namespace bomkern {
namespace covariance_penalty {
namespace BOMKERN_ISA {

using namespace bomkern::BOMKERN_ISA;

template <class S> int64_t moments_bytes(const Columns<S>& c) { return Moments::bytes(c.batch, c.dims); }

template <class S> void moments(const Columns<S>& c, bool normalize, void* workspace, Parallel parallel) {
  each_slice<S>(c.z, c.batch, c.dims, workspace, parallel);
  const double eps = sizeof(S) == 4 ? 0x1p-23 : 0x1p-52;
  const S largest = sizeof(S) == 4 ? S(__FLT_MAX__) : S(__DBL_MAX__);
  join_slices(workspace, c.batch, c.dims, [&](int64_t d, double offset, double variance) {
    const double mean = double(load_one<S>(c.z.data, c.z.dtype, d * c.z.stride[1])) + offset;
    const double deviation = __builtin_sqrt(variance), size = mean < 0 ? -mean : mean;
    c.offset[d] = S(offset);
    // A deviation so small that it has no inverse counts as 0.
    const bool constant = deviation <= eps * size || S(1 / deviation) > largest;
    const double inverse = deviation <= largest ? 1 / deviation : __builtin_nan("");  // no 0 of squares that overflowed
    c.inverse[d] = S(!normalize ? 1 : constant ? 0 : inverse);
  });
}

template <class S>
void center(const Columns<S>& c, int64_t begin, int64_t end, S* x, RowGrad<S> weight, S* weighted) {
  typedef typename Lanes<S>::Vec V;
  S scratch[panel], first[panel];
  for (int64_t d = 0; d < c.dims; d += panel) {
    const int n = int(lesser(c.dims - d, panel));
    first_row(c.z, d, n, first);
    for (int64_t b = begin; b < end; ++b) {
      const S *row = row_of(c.z, b, d, n, scratch), by = weighted ? number_at(weight, b) : S(0);
      const int64_t at = (b - begin) * c.dims + d;
      for_vectors<S>(n, [&](int64_t i, auto lanes) {
        const V u = load_lanes<V>(row + i, lanes) - load_lanes<V>(first + i, lanes);
        const V centered = (u - load_lanes<V>(c.offset + d + i, lanes)) * load_lanes<V>(c.inverse + d + i, lanes);
        store_lanes(x + at + i, centered, lanes);
        if (weighted) store_lanes(weighted + at + i, by * centered, lanes);
      });
    }
  }
}

// Adds n numbers to a sum, in order of their place: f(i, lanes) is the vector that begins at i.
template <class S, class F> double sum_over(int64_t n, F f) {
  double sum = 0;
  for (int64_t first = 0; first < n; first += panel) {
    typename Lanes<S>::Vec part[2] = {};
    for_vectors<S>(int(lesser(n - first, panel)),
                   [&](int64_t i, auto lanes) { part[i / Lanes<S>::width % 2] += f(first + i, lanes); });
    sum += double(sum_of(part[0])) + double(sum_of(part[1]));
  }
  return sum;
}

template <class S>
double join_second(const S* parts, int64_t count, int64_t dims, S scale, S* second, Parallel parallel) {
  typedef typename Lanes<S>::Vec V;
  each(parallel, ceil_div(dims, block_rows), [&](int64_t task) {
    for (int64_t i = task * block_rows; i < lesser((task + 1) * block_rows, dims); ++i) {
      for (int64_t d = i + 1; d < dims; d += panel) {
        for_vectors<S>(int(lesser(dims - d, panel)), [&](int64_t k, auto lanes) {
          V sum{};
          for (int64_t p = 0; p < count; ++p) sum += load_lanes<V>(parts + (p * dims + i) * dims + d + k, lanes);
          store_lanes(second + i * dims + d + k, scale * sum, lanes);
        });
      }
      S own{};
      for (int64_t p = 0; p < count; ++p) own += parts[(p * dims + i) * dims + i];
      second[i * dims + i] = own == own ? S(0) : own;  // of one column there is nothing else that a NaN would show in
    }
  });
  double squares = 0;
  for (int64_t i = 0; i < dims; ++i) {
    squares += double(second[i * dims + i]) + sum_over<S>(dims - i - 1, [&](int64_t k, auto lanes) {
      const V v = load_lanes<V>(second + i * dims + i + 1 + k, lanes);
      return v * v;
    });
  }
  constexpr int64_t tile = 32;  // of the transpose: both its sides are in L1
  each(parallel, ceil_div(dims, tile), [&](int64_t task) {
    const int64_t from = task * tile, to = lesser(from + tile, dims);
    for (int64_t j = 0; j < to; j += tile) {
      for (int64_t i = from; i < to; ++i) {
        for (int64_t k = j; k < lesser(lesser(j + tile, i), dims); ++k) second[i * dims + k] = second[k * dims + i];
      }
    }
  });
  return 2 * squares;
}

template <class S> void parts(const S* x, const S* y, int64_t n, int64_t dims, S scale, S* out) {
  typedef typename Lanes<S>::Vec V;
  for (int64_t b = 0; b < n; ++b, x += dims, y += dims) {
    out[b] = S(scale * sum_over<S>(dims, [&](int64_t i, auto lanes) {
      return load_lanes<V>(x + i, lanes) * load_lanes<V>(y + i, lanes);
    }));
  }
}

template <class S>
void gram_parts(const S* gram, const S* x, const S* v, int64_t n, int64_t batch, int64_t dims, S share, S scale, S* out) {
  typedef typename Lanes<S>::Vec V;
  for (int64_t b = 0; b < n; ++b, gram += batch, x += dims) {
    const double all = sum_over<S>(batch, [&](int64_t i, auto lanes) {
      const V k = load_lanes<V>(gram + i, lanes);
      return k * k;
    });
    const double own = sum_over<S>(dims, [&](int64_t i, auto lanes) {
      const V u = load_lanes<V>(x + i, lanes);
      return load_lanes<V>(v + i, lanes) * u * u;
    });
    out[b] = S(scale * (all * share - own));
  }
}

template <class S>
void gram_weights(const S* gram, int64_t begin, int64_t end, int64_t batch, RowGrad<S> weight, S scale, S* m) {
  for (int64_t b = begin; b < end; ++b, gram += batch, m += batch) {
    const S own = number_at(weight, b);
    for (int64_t i = 0; i < batch; ++i) m[i] = scale * (own + number_at(weight, i)) * gram[i];
  }
}

template <class S> int64_t column_sums_bytes(const Columns<S>& c) { return Moments::bytes(c.batch, c.dims); }

template <class S>
void column_sums(const Columns<S>& c, const S* h, RowGrad<S> weight, double* sums, void* workspace, Parallel parallel) {
  const int64_t rows = slice_rows(c.batch, c.dims), slices = slices_of(c.batch, c.dims);
  each(parallel, slices, [&](int64_t slice) {
    const Moments part(workspace, c.dims, slice);  // two numbers a column, here the two sums
    for (int64_t d = 0; d < 2 * c.dims; ++d) part.mean[d] = 0;
    S scratch[panel], first[panel];
    for (int64_t d = 0; d < c.dims; d += panel) {
      const int n = int(lesser(c.dims - d, panel));
      first_row(c.z, d, n, first);
      for (int64_t b = slice * rows; b < lesser((slice + 1) * rows, c.batch); ++b) {
        const S* row = row_of(c.z, b, d, n, scratch);
        const double by = double(number_at(weight, b));
        for (int i = 0; i < n; ++i) {
          const S x = ((row[i] - first[i]) - c.offset[d + i]) * c.inverse[d + i];
          const double value = by * double(h ? h[b * c.dims + d + i] : x);
          part.mean[d + i] += value;
          part.square[d + i] += value * double(x);
        }
      }
    }
  });
  for (int64_t d = 0; d < 2 * c.dims; ++d) {
    double sum = 0;
    for (int64_t slice = 0; slice < slices; ++slice) sum += Moments(workspace, c.dims, slice).mean[d];
    sums[d] = sum;
  }
}

template <class S> void row_squares(const S* second, int64_t dims, double* sums) {
  typedef typename Lanes<S>::Vec V;
  for (int64_t d = 0; d < dims; ++d, second += dims) {
    sums[d] = sum_over<S>(dims, [&](int64_t i, auto lanes) {
      const V v = load_lanes<V>(second + i, lanes);
      return v * v;
    });
  }
}

template <class S>
void finish(const Columns<S>& c, int64_t begin, int64_t end, const S* x, const S* h, const S* more, RowGrad<S> weight,
            S scale, const S* mean, const S* slope, const S* pull, void* to, DType dtype) {
  typedef typename Lanes<S>::Vec V;
  const Gradient out{to, dtype};
  S scratch[panel];
  for (int64_t b = begin; b < end; ++b) {
    const S by = number_at(weight, b);
    const int64_t row = (b - begin) * c.dims;
    for (int64_t d = 0; d < c.dims; d += panel) {
      const int n = int(lesser(c.dims - d, panel));
      S* place = out.place(b * c.dims + d, scratch);
      for_vectors<S>(n, [&](int64_t i, auto lanes) {
        const int64_t column = d + i, at = row + column;
        V sum{};
        if (h) sum = scale * by * load_lanes<V>(h + at, lanes);
        if (more) sum += load_lanes<V>(more + at, lanes);
        if (mean) sum -= load_lanes<V>(mean + column, lanes);
        if (slope) sum -= load_lanes<V>(slope + column, lanes) * load_lanes<V>(x + at, lanes);
        if (pull) sum -= by * load_lanes<V>(pull + column, lanes) * load_lanes<V>(x + at, lanes);
        store_lanes(place + i, sum * load_lanes<V>(c.inverse + column, lanes), lanes);
      });
      out.put(b * c.dims + d, n, place);
    }
  }
}

template <class S>
constexpr CpuStages<S> stages{
    moments<S>,      moments_bytes<S>, center<S>,      join_second<S>,       parts<S>,
    gram_parts<S>,   gram_weights<S>,  column_sums<S>, column_sums_bytes<S>, row_squares<S>,
    finish<S>,
};

extern constexpr CpuKernels kernels{BOMKERN_NAME(BOMKERN_ISA), stages<float>, stages<double>};

}  // namespace BOMKERN_ISA
}  // namespace covariance_penalty
}  // namespace bomkern
