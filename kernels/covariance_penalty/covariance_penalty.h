// covariance_penalty: the stages around the matrix products, which are a library's. No torch here.
//
// x = (z - z_0 - offset) inverse, by column: less its mean, over its deviation if normalized (0 for a constant column).
// C = x'x / (B - 1), O = C without its diagonal, k = B / (B - 1), alpha = 2 k / D. Then
//   part_b = k / D x_b . y_b, y = x O, and their mean over the batch is sum O^2 / D.
// For a loss that weighs the parts by g, with G = k / D x' diag(g) x,
//   h = alpha diag(g) y + 2 / (B - 1) x offdiag(G) is its gradient by x; if all g are one, both terms are, and h = 2 alpha g y.
// By z: inverse (h - mean - e x), the column's mean of h and, if normalized, e = sum_b h x / (B - 1), where
//   sum_b h = alpha sum_b g_b y_b,   sum_b h x = 2 alpha sum_b g_b x_b y_b, and sum_b x y = (B - 1) sum_j O_dj^2.
// Where D > B, K = x x' serves: part_b = k / D (sum_i K_bi^2 / (B - 1) - sum_d v_d x_bd^2), v = sum_b x_bd^2 / (B - 1), and
//   h = M x - (alpha g_b v + alpha / (B - 1) sum_i g_i x_i^2) x_b with M_bi = alpha / (B - 1) (g_b + g_i) K_bi.
#pragma once
#include "../common/dtype.h"
#include "../common/parallel.h"

namespace bomkern {
namespace covariance_penalty {

// S is float, or double where z is double.
template <class S> struct Columns {
  Matrix z;  // [B, D]
  int64_t batch, dims;
  S *offset, *inverse;  // [D]
};

// The CPU's stages between matrix products. A stage with rows [begin, end) runs on the calling thread, on contiguous numbers:
// a matrix [B, D] is passed whole, rows of it alone.
template <class S> struct CpuStages {
  // Writes offset and inverse.
  void (*moments)(const Columns<S>&, bool normalize, void* workspace, Parallel);
  int64_t (*moments_bytes)(const Columns<S>&);

  // Rows of x; with `weighted`, also weight_b x_b.
  void (*center)(const Columns<S>&, int64_t begin, int64_t end, S* x, RowGrad<S> weight, S* weighted);

  // parts [D, D] of x'x, upper triangle alone: second = scale times their sum, its diagonal 0, or NaN. Returns its sum of squares.
  double (*join_second)(const S* parts, int64_t count, int64_t dims, S scale, S* second, Parallel);

  // out_b = scale x_b . y_b for n rows.
  void (*parts)(const S* x, const S* y, int64_t n, int64_t dims, S scale, S* out);
  // out_b = scale (sum_i K_bi^2 share - sum_d v_d x_bd^2) for n rows.
  void (*gram_parts)(const S* gram, const S* x, const S* v, int64_t n, int64_t batch, int64_t dims, S share, S scale, S* out);
  // m_bi = scale (weight_b + weight_i) K_bi for rows [begin, end).
  void (*gram_weights)(const S* gram, int64_t begin, int64_t end, int64_t batch, RowGrad<S> weight, S scale, S* m);

  // sums [2, D]: sum_b weight_b h_b and sum_b weight_b h_b x_b; h [B, D], or x where it is null.
  void (*column_sums)(const Columns<S>&, const S* h, RowGrad<S> weight, double* sums, void* workspace, Parallel);
  int64_t (*column_sums_bytes)(const Columns<S>&);
  // sums [D]: sum_j O_dj^2.
  void (*row_squares)(const S* second, int64_t dims, double* sums);

  // to_b = inverse (scale weight_b h_b + more_b - mean - (slope + weight_b pull) x_b) for rows [begin, end), of which x, h
  // and more are the first row; what is null counts as 0.
  void (*finish)(const Columns<S>&, int64_t begin, int64_t end, const S* x, const S* h, const S* more, RowGrad<S> weight,
                 S scale, const S* mean, const S* slope, const S* pull, void* to, DType dtype);
};

struct CpuKernels {
  const char* name;
  CpuStages<float> f32;
  CpuStages<double> f64;
};

// The widest instruction set this CPU has of those compiled in.
const CpuKernels& cpu_kernels();

}  // namespace covariance_penalty
}  // namespace bomkern
