// total_correlation's inputs, packed for the kernels that do the work (see cuda_terms.h).
#pragma once
#include "cuda_terms.h"

namespace bomkern {
namespace total_correlation {
namespace cuda {

constexpr int pack_threads = 256, pack_dims = 32;
constexpr int pack_rows = pack_threads / pack_dims;  // rows in flight

BOMKERN_HD float lower(float a, float b) { return fminf(a, b); }
BOMKERN_HD double lower(double a, double b) { return fmin(a, b); }

// Statistics of a column of log-variances.
template <class S> struct Column {
  double sum = 0;
  S least = S(__builtin_inff());
  BOMKERN_HD void add(const Column& other) {
    sum += other.sum;
    least = lower(least, other.least);
  }
  // The log-variance whose c is C_d of cuda_terms.h. A mean that is NaN or +inf gives way.
  BOMKERN_HD double center(const Weights<S>& weights) const {
    const double highest = highest_term - double(weights.own);
    return fmin(sum / double(weights.batch) + 1, double(least) + highest / half_log2_e);
  }
};

template <class S> struct PackLaunch {
  Inputs<S> in;
  Weights<S> weights;
  const S* marginal;   // null in forward
  Column<S>* columns;  // [slices, chunks * 4]: of each slice of the components
  double* centers;     // [chunks * 4] C_d; null where not wanted
  S* components;
  S* rows;
  int64_t slice_rows;  // matrix rows of a slice: components, and rows of z as far as there are any
  int chunks, slices, dim_blocks;
};

template <class S> BOMKERN_HD S element(const Matrix& m, int64_t row, int64_t column) {
  const int64_t at = row * m.stride[0] + column * m.stride[1];
  switch (m.dtype) {
    case DType::f64: return S(static_cast<const double*>(m.data)[at]);
    case DType::f32: return S(static_cast<const float*>(m.data)[at]);
    default: return S(widen(static_cast<const uint16_t*>(m.data)[at], m.dtype == DType::bf16));
  }
}

template <class S>
__global__ void __launch_bounds__(pack_threads) column_kernel(const __grid_constant__ PackLaunch<S> l) {
  BOMKERN_SHARED_BYTES(bytes);
  Column<S>* const found = reinterpret_cast<Column<S>*>(bytes);  // [pack_rows, pack_dims]
  const int lane = threadIdx.x % pack_dims, group = threadIdx.x / pack_dims;
  const int64_t slice = blockIdx.x / l.dim_blocks, d = int64_t(blockIdx.x % l.dim_blocks) * pack_dims + lane;
  const int64_t end = min((slice + 1) * l.slice_rows, l.in.batch);
  Column<S> column;
  if (d < l.in.dims) {
#pragma unroll 4
    for (int64_t i = slice * l.slice_rows + group; i < end; i += pack_rows) {
      const S logvar = element<S>(l.in.logvar, i, d);
      column.add({double(logvar), logvar});
    }
  }
  found[threadIdx.x] = column;
  __syncthreads();
  if (group != 0 || d >= l.chunks * width) return;
  for (int g = 1; g < pack_rows; ++g) column.add(found[g * pack_dims + lane]);
  l.columns[slice * l.chunks * width + d] = column;
}

template <class S>
__global__ void __launch_bounds__(pack_threads) pack_kernel(const __grid_constant__ PackLaunch<S> l) {
  BOMKERN_SHARED_BYTES(bytes);
  Column<S>* const found = reinterpret_cast<Column<S>*>(bytes);
  const int lane = threadIdx.x % pack_dims, group = threadIdx.x / pack_dims;
  const int64_t slice = blockIdx.x / l.dim_blocks, d = int64_t(blockIdx.x % l.dim_blocks) * pack_dims + lane;
  const bool padded = d < l.chunks * width, inside = d < l.in.dims;
  Column<S> column, all;
  if (padded) {
    for (int s = group; s < l.slices; s += pack_rows) column.add(l.columns[int64_t(s) * l.chunks * width + d]);
  }
  found[threadIdx.x] = column;
  __syncthreads();
  if (!padded) return;
  for (int g = 0; g < pack_rows; ++g) all.add(found[g * pack_dims + lane]);  // in every block the same bits
  const double center = all.center(l.weights);
  if (l.centers && slice == 0 && group == 0) l.centers[d] = -half_log2_e * center;

  const int64_t chunk = d / width, at = d % width, end = min((slice + 1) * l.slice_rows, l.in.batch);
  const int fields = l.marginal ? 2 : 1;
#pragma unroll 2
  for (int64_t i = slice * l.slice_rows + group; i < end; i += pack_rows) {
    S z = 0, mu = 0, a = 0, c = 0, marginal = 0;
    if (inside) {
      const S logvar = element<S>(l.in.logvar, i, d);
      mu = element<S>(l.in.mu, i, d);
      a = S(half_log2_e * exp(-double(logvar)));
      c = S(half_log2_e * (center - double(logvar)));
      if (i < l.in.rows) {
        z = element<S>(l.in.z, i, d);
        if (l.marginal) marginal = l.marginal[d * l.in.rows + i];
      }
    }
    S* const component = l.components + (i * l.chunks + chunk) * (component_fields * width) + at;
    component[0] = mu, component[width] = a, component[2 * width] = c;
    if (i >= l.in.rows) continue;  // never more than components: R <= B
    S* const row = l.rows + (i * l.chunks + chunk) * (fields * width) + at;
    row[0] = z;
    if (l.marginal) row[width] = marginal;
  }
}

}  // namespace cuda
}  // namespace total_correlation
}  // namespace bomkern
