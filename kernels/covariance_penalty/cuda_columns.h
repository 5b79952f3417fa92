// covariance_penalty's GPU kernels that go along columns: x from z, and z's gradient.
#pragma once
#include "../common/cuda_columns.h"

#include "cuda.h"

namespace bomkern {
namespace covariance_penalty {
namespace cuda {

using namespace bomkern::BOMKERN_ISA;

template <class S> constexpr S epsilon = sizeof(S) == 4 ? S(1.1920928955078125e-7) : S(2.220446049250313e-16);

// The factors of x, for a piece of columns.
template <class S, int W> struct Centered {
  S first[W], offset[W], inverse[W];
  BOMKERN_HD Centered(const Matrix& z, const S* offsets, const S* inverses, int64_t column) {
    load<S, W>(z, 0, column, first);
    load_vector<S, W>(offsets, column, offset);
    load_vector<S, W>(inverses, column, inverse);
  }
  BOMKERN_HD void apply(const Raw<W>& raw, DType dtype, S (&x)[W]) const {
    widen<S, W>(raw, dtype, x);
#pragma unroll
    for (int i = 0; i < W; ++i) x[i] = ((x[i] - first[i]) - offset[i]) * inverse[i];
  }
};

template <class S, int W> BOMKERN_HD void load_piece(const S* from, int64_t at, S (&v)[W]) {
  load<S, W>({from, {0, 1}, sizeof(S) == 4 ? DType::f32 : DType::f64}, 0, at, v);
}
template <class S, int W> BOMKERN_HD void store_piece(S* to, int64_t at, const S (&v)[W]) {
  store<S, W>(to, sizeof(S) == 4 ? DType::f32 : DType::f64, at, v);
}

template <class S> struct CenterLaunch {
  Center<S> a;
  Tiling tiling;
  S* parts;  // [2, slices, D]
};

template <class S, int W>
__global__ void __launch_bounds__(column_threads, 2) center_kernel(const __grid_constant__ CenterLaunch<S> l) {
  BOMKERN_SHARED_BYTES(bytes);
  const Center<S>& a = l.a;
  const Tiling& t = l.tiling;
  moments_of<S, W>(a.z, t, l.parts, bytes);
  grid_sync();
  for (int64_t set = blockIdx.x; set < t.sets; set += gridDim.x) {
    finish_moments(l.parts, t, set, bytes, [&](int64_t d, S offset, S square) {
      S first[1];
      load<S, 1>(a.z, 0, d, first);
      const S variance = square / S(a.batch - 1), mean = first[0] + offset, deviation = sqrt(variance);
      const bool constant = deviation <= epsilon<S> * (mean < 0 ? -mean : mean);
      const S whole = isfinite(deviation) ? 1 / deviation : S(NAN);  // no 0 of squares that overflowed
      const S inverse = !a.normalize ? S(1) : constant ? S(0) : whole;
      a.offset[d] = offset;
      a.inverse[d] = inverse;
      a.spread[d] = inverse == 0 ? S(0) : variance * inverse * inverse;
    });
  }
  grid_sync();
  for (int64_t index = blockIdx.x; index < t.tiles * t.slices; index += gridDim.x) {
    const Item<W> item(t, index);
    if (!item.inside) continue;
    const Centered<S, W> centered(a.z, a.offset, a.inverse, item.column);
    for (int64_t row = item.first; row < item.end; row += chunk_rows<W> * item.groups) {
      const int n = item.rows_from(row);
      Chunk<W> chunk;
      chunk.fetch_from(a.z, item, row, n);
#pragma unroll
      for (int j = 0; j < chunk_rows<W>; ++j) {
        if (j >= n) break;
        S x[W];
        centered.apply(chunk.row[j], a.z.dtype, x);
        store_piece<S, W>(a.x, (row + j * item.groups) * a.dims + item.column, x);
      }
    }
  }
}

template <class S> struct RecenterLaunch {
  Recenter<S> a;
  Tiling tiling;
};

template <class S, int W>
__global__ void __launch_bounds__(column_threads, 2) recenter_kernel(const __grid_constant__ RecenterLaunch<S> l) {
  const Recenter<S>& a = l.a;
  const Tiling& t = l.tiling;
  for (int64_t index = blockIdx.x; index < t.tiles * t.slices; index += gridDim.x) {
    const Item<W> item(t, index);
    if (!item.inside) continue;
    const Centered<S, W> centered(a.z, a.offset, a.inverse, item.column);
    for (int64_t row = item.first; row < item.end; row += chunk_rows<W> * item.groups) {
      const int n = item.rows_from(row);
      Chunk<W> chunk;
      chunk.fetch_from(a.z, item, row, n);
#pragma unroll
      for (int j = 0; j < chunk_rows<W>; ++j) {
        if (j >= n) break;
        const int64_t b = row + j * item.groups, at = b * a.dims + item.column;
        S x[W];
        centered.apply(chunk.row[j], a.z.dtype, x);
        if (a.x) store_piece<S, W>(a.x, at, x);
        if (a.weighted == nullptr) continue;
        const S weight = a.scale * grad_of(a.weight, b);
#pragma unroll
        for (int i = 0; i < W; ++i) x[i] *= weight;
        store_piece<S, W>(a.weighted, at, x);
      }
    }
  }
}

// The three sums over the batch: of g y, g x y and g x^2.
template <class S, int W> struct Sums {
  S at[3][W];
  BOMKERN_HD void merge(const Sums& other) {
#pragma unroll
    for (int k = 0; k < 3; ++k) {
#pragma unroll
      for (int i = 0; i < W; ++i) at[k][i] += other.at[k][i];
    }
  }
};

template <class S> struct FinishLaunch {
  Finish<S> a;
  Tiling tiling;
  S* parts;         // [3, slices, D]; null where no sum is made
  S *mean, *slope;  // [D] of the workspace
};

// The sums over an item's rows, into parts.
template <class S, int W>
BOMKERN_HD void sum_item(const FinishLaunch<S>& l, const Item<W>& item, unsigned char* bytes) {
  const Finish<S>& a = l.a;
  Sum<S> sum[3][W];
  if (item.inside) {
    const Centered<S, W> centered(a.z, a.offset, a.inverse, item.column);
    for (int64_t row = item.first; row < item.end; row += chunk_rows<W> * item.groups) {
      const int n = item.rows_from(row);
      Chunk<W> chunk;
      chunk.fetch_from(a.z, item, row, n);
#pragma unroll
      for (int j = 0; j < chunk_rows<W>; ++j) {
        if (j >= n) break;
        const int64_t b = row + j * item.groups;
        const S grad = grad_of(a.grad, b);
        S x[W], y[W];
        load_piece<S, W>(a.product, b * a.dims + item.column, y);
        centered.apply(chunk.row[j], a.z.dtype, x);
#pragma unroll
        for (int i = 0; i < W; ++i) {
          const S weighted = grad * x[i];
          sum[0][i].add(grad * y[i]), sum[1][i].add(weighted * y[i]), sum[2][i].add(weighted * x[i]);
        }
      }
    }
  }
  Sums<S, W> mine;
#pragma unroll
  for (int i = 0; i < W; ++i) {
    for (int k = 0; k < 3; ++k) mine.at[k][i] = sum[k][i].rounded();
  }
  merge_groups(mine, l.tiling.lanes, bytes);
  if (int(threadIdx.x) >= l.tiling.lanes || !item.inside) return;
  S* const part = l.parts + item.slice * a.dims + item.column;
#pragma unroll
  for (int k = 0; k < 3; ++k) {
#pragma unroll
    for (int i = 0; i < W; ++i) part[k * l.tiling.slices * a.dims + i] = mine.at[k][i];
  }
}

template <class S, int W>
BOMKERN_HD void write_item(const FinishLaunch<S>& l, const Item<W>& item) {
  const Finish<S>& a = l.a;
  const Centered<S, W> centered(a.z, a.offset, a.inverse, item.column);
  S mean[W], slope[W];
#pragma unroll
  for (int i = 0; i < W; ++i) {
    mean[i] = l.parts ? l.mean[item.column + i] : S(0);
    slope[i] = l.parts ? l.slope[item.column + i] : S(0);
  }
  for (int64_t row = item.first; row < item.end; row += chunk_rows<W> * item.groups) {
    const int n = item.rows_from(row);
    Chunk<W> chunk;
    chunk.fetch_from(a.z, item, row, n);
#pragma unroll
    for (int j = 0; j < chunk_rows<W>; ++j) {
      if (j >= n) break;
      const int64_t b = row + j * item.groups, at = b * a.dims + item.column;
      const S factor = a.of_product * grad_of(a.grad, b);
      S x[W], h[W], more[W] = {};
      load_piece<S, W>(a.product, at, h);
      if (a.more) load_piece<S, W>(a.more, at, more);
      centered.apply(chunk.row[j], a.z.dtype, x);
#pragma unroll
      for (int i = 0; i < W; ++i) {
        h[i] = fma_of(factor, h[i], fma_of(a.of_more, more[i], -mean[i]));
        h[i] = centered.inverse[i] * fma_of(-slope[i], x[i], h[i]);
      }
      store<S, W>(a.to, a.z.dtype, at, h);
    }
  }
}

template <class S, int W>
__global__ void __launch_bounds__(column_threads, 1) finish_kernel(const __grid_constant__ FinishLaunch<S> l) {
  BOMKERN_SHARED_BYTES(bytes);
  const Finish<S>& a = l.a;
  const Tiling& t = l.tiling;
  const int64_t items = t.tiles * t.slices;
  if (l.parts) {
    for (int64_t index = blockIdx.x; index < items; index += gridDim.x) sum_item<S, W>(l, Item<W>(t, index), bytes);
    grid_sync();
    for (int64_t set = blockIdx.x; set < t.sets; set += gridDim.x) {
      finish_sums<3>(l.parts, t, set, bytes, [&](int64_t d, const S (&sums)[3]) {
        l.mean[d] = a.of_mean * sums[0];
        l.slope[d] = fma_of(a.of_slope, sums[1], a.of_square * sums[2]);
      });
    }
    grid_sync();
  }
  for (int64_t index = blockIdx.x; index < items; index += gridDim.x) {
    const Item<W> item(t, index);
    if (item.inside) write_item<S, W>(l, item);
  }
}

}  // namespace cuda
}  // namespace covariance_penalty
}  // namespace bomkern
