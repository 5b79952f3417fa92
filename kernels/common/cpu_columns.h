// Mean and variance of the columns of a matrix on the CPU, from one read of it, and their gradients.
//
// A block of rows is in L1: its mean is taken first, of differences from its own first row, then the squares around that
// mean, so no digits are lost wherever the values lie, and a constant column has variance exactly 0. Blocks and slices are
// joined in double (Chan, Golub & LeVeque 1983), their means as differences from the column's first value.
#include "cpu_rows.h"

namespace bomkern {
namespace BOMKERN_ISA {

constexpr int block_rows = 32;
constexpr int64_t most_slices = 32;

// Rows of a slice, the work of one task. They and the order of additions depend on the shape alone.
inline int64_t slice_rows(int64_t batch, int64_t dims) {
  return round_up(greater(ceil_div(batch, most_slices), 16384 / dims), block_rows);
}
inline int64_t slices_of(int64_t batch, int64_t dims) { return ceil_div(batch, slice_rows(batch, dims)); }

// A slice's columns [D] in the workspace: their means less the column's first value, and the sums of squares around them.
struct Moments {
  double *mean, *square;
  static int64_t bytes(int64_t batch, int64_t dims) {
    return slices_of(batch, dims) * 2 * dims * int64_t(sizeof(double));
  }
  Moments(void* workspace, int64_t dims, int64_t slice)
      : mean(static_cast<double*>(workspace) + slice * 2 * dims), square(mean + dims) {}
};

// Columns [d, d + n) of the first row.
template <class S> void first_row(const Matrix& x, int64_t d, int64_t n, S* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = load_one<S>(x.data, x.dtype, (d + i) * x.stride[1]);
}

// Rows [begin, end), at most block_rows, of columns [d, d + n), at most a panel, join the `before` rows of their slice.
// `first` is of those columns; `scratch` is for rows that must be converted.
template <class S>
void add_block(const Matrix& x, int64_t begin, int64_t end, int64_t d, int n, int64_t before, const S* first,
               const Moments& to, S (*scratch)[panel]) {
  typedef typename Lanes<S>::Vec V;
  const int rows = int(end - begin);
  const S *row[block_rows + 1], share = S(1) / S(rows);
  for (int r = 0; r < rows; ++r) row[r] = row_of(x, begin + r, d, n, scratch[r]);
  row[rows] = row[0];  // an odd number's partner: its difference is 0
  S center[panel], square[panel];
  for_vectors<S>(n, [&](int64_t i, auto lanes) {
    const V own = load_lanes<V>(row[0] + i, lanes);
    V sum[2] = {}, squares[2] = {};
    for (int r = 0; r < rows; r += 2) {
      sum[0] += load_lanes<V>(row[r] + i, lanes) - own;
      sum[1] += load_lanes<V>(row[r + 1] + i, lanes) - own;
    }
    const V mean = (sum[0] + sum[1]) * share;
    int r = 0;
    for (; r + 2 <= rows; r += 2) {
      const V u = (load_lanes<V>(row[r] + i, lanes) - own) - mean;
      const V v = (load_lanes<V>(row[r + 1] + i, lanes) - own) - mean;
      squares[0] += u * u;
      squares[1] += v * v;
    }
    if (r < rows) {
      const V u = (load_lanes<V>(row[r] + i, lanes) - own) - mean;
      squares[0] += u * u;
    }
    store_lanes(center + i, mean, lanes);
    store_lanes(square + i, squares[0] + squares[1], lanes);
  });
  double *mean = to.mean + d, *squares = to.square + d;
  const auto offset = [&](int i) { return (double(row[0][i]) - double(first[i])) + double(center[i]); };
  if (before == 0) {
    for (int i = 0; i < n; ++i) mean[i] = offset(i);
    for (int i = 0; i < n; ++i) squares[i] = double(square[i]);
    return;
  }
  const double weight = double(rows) / double(before + rows), between = double(before) * weight;
  for (int i = 0; i < n; ++i) {
    const double apart = offset(i) - mean[i];
    mean[i] += apart * weight;
    squares[i] += double(square[i]) + apart * apart * between;
  }
}

// The moments of every slice, into the workspace.
template <class S> void each_slice(const Matrix& x, int64_t batch, int64_t dims, void* workspace, Parallel parallel) {
  const int64_t rows = slice_rows(batch, dims), panels = ceil_div(dims, panel);
  each(parallel, slices_of(batch, dims) * panels, [&](int64_t task) {
    const int64_t slice = task / panels, d = task % panels * panel, begin = slice * rows, end = lesser(begin + rows, batch);
    const Moments to(workspace, dims, slice);
    const int n = int(lesser(dims - d, panel));
    S scratch[block_rows][panel], first[panel];
    first_row(x, d, n, first);
    for (int64_t b = begin; b < end; b += block_rows)
      add_block(x, b, lesser(b + block_rows, end), d, n, b - begin, first, to, scratch);
  });
}

// Joins the slices. f(column, mean less the first value, unbiased variance), in double.
template <class F> void join_slices(void* workspace, int64_t batch, int64_t dims, F f) {
  const int64_t slices = slices_of(batch, dims), rows = slice_rows(batch, dims);
  for (int64_t d = 0; d < dims; d += panel) {
    const int n = int(lesser(dims - d, panel));
    const double* first = Moments(workspace, dims, 0).mean + d;
    double offset[panel] = {}, square[panel] = {};
    for (int64_t s = 1; s < slices; ++s) {
      const double *mean = Moments(workspace, dims, s).mean + d, share = double(lesser(batch - s * rows, rows)) / double(batch);
      for (int i = 0; i < n; ++i) offset[i] += share * (mean[i] - first[i]);
    }
    for (int64_t s = 0; s < slices; ++s) {
      const Moments part(workspace, dims, s);
      const double count = double(lesser(batch - s * rows, rows));
      for (int i = 0; i < n; ++i) {
        const double apart = (part.mean[d + i] - first[i]) - offset[i];
        square[i] += part.square[d + i] + count * apart * apart;
      }
    }
    for (int i = 0; i < n; ++i) f(d + i, first[i] + offset[i], square[i] / double(batch - 1));
  }
}

// The gradient of x through its column's mean and variance: base + slope ((x - first) - offset).
template <class S> struct ColumnSlopes {
  S *first, *base, *slope;  // [D] each, in the workspace
  const S* offset;          // of the mean from the first row, as forward wrote it
  bool spread;              // whether the variances have a gradient; else a NaN in a column reaches none

  static int64_t bytes(int64_t dims) { return 3 * dims * int64_t(sizeof(S)); }
  // grad_mean, grad_variance: [D], or null for 0. `more` adds to the gradient of the variances; says whether it did.
  template <class F>
  ColumnSlopes(const Matrix& x, int64_t batch, int64_t dims, const S* offset, const S* grad_mean, const S* grad_variance,
               void* workspace, F more)
      : first(static_cast<S*>(workspace)), base(first + dims), slope(base + dims), offset(offset) {
    first_row(x, 0, dims, first);
    for (int64_t d = 0; d < dims; ++d) {
      base[d] = grad_mean ? grad_mean[d] / S(batch) : S(0);
      slope[d] = grad_variance ? grad_variance[d] : S(0);
    }
    spread = more(slope) || grad_variance;
    for (int64_t d = 0; d < dims; ++d) slope[d] *= S(2 / double(batch - 1));
  }

  typedef typename Lanes<S>::Vec V;
  V centered(V x, int64_t d, auto lanes) const {
    return (x - load_lanes<V>(first + d, lanes)) - load_lanes<V>(offset + d, lanes);
  }

  // The gradients of row b, and `pull`, where there is one, times the row itself.
  void put_row(const Matrix& x, int64_t b, int64_t dims, const RowGrad<S>& pull, const Gradient& to, S* scratch) const {
    const S by = number_at(pull, b);
    for (int64_t d = 0; d < dims; d += panel) {
      const int n = int(lesser(dims - d, panel));
      const S* row = row_of(x, b, d, n, scratch);
      S* out = to.place(b * dims + d, scratch);
      for_vectors<S>(n, [&](int64_t i, auto lanes) {
        const V v = load_lanes<V>(row + i, lanes);
        V sum = load_lanes<V>(base + d + i, lanes);
        if (spread) sum += load_lanes<V>(slope + d + i, lanes) * centered(v, d + i, lanes);
        if (pull.data) sum += by * v;
        store_lanes(out + i, sum, lanes);
      });
      to.put(b * dims + d, n, out);
    }
  }
};

}  // namespace BOMKERN_ISA
}  // namespace bomkern
