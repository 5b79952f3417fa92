// latent_statistics on the CPU for one instruction set: a block of rows of all three inputs at a time.
#include "../common/cpu_columns.h"
// (cpu_columns.h first: the others are written in its words)
#include "../active_units/cpu_units.h"
#include "../gaussian_kl/cpu_variance.h"

#include "latent_statistics.h"

namespace bomkern {
namespace latent_statistics {
namespace BOMKERN_ISA {

using namespace bomkern::BOMKERN_ISA;

// One row's sums over D.
template <class S> void write_row(const Forward<S>& a, int64_t b, S (*scratch)[panel]) {
  typedef typename Lanes<S>::Vec V;
  const Inputs<S>& in = a.in;
  double twice = 0, total = 0, square = 0;
  for (int64_t d = 0; d < in.dims; d += panel) {
    const int n = int(lesser(in.dims - d, panel));
    const S *mu = row_of(in.mu, b, d, n, scratch[0]), *logvar = row_of(in.logvar, b, d, n, scratch[1]);
    V kl{}, sum{}, squares{};
    for_groups<S>(n, [&](int64_t i, auto lanes, auto group) {
      V m[group.size], v[group.size], e[group.size];
      load_group(mu + i, m, lanes);
      load_group(logvar + i, v, lanes);
      slopes_of<S>(v, e);
      for (int k = 0; k < group.size; ++k) e[k] = m[k] * m[k] + (less_one<S>(v[k], e[k]) - v[k]);
      kl += total_of(e);
      sum += total_of(v);
      for (int k = 0; k < group.size; ++k) v[k] *= v[k];
      squares += total_of(v);
    });
    twice += sum_of(kl);
    total += sum_of(sum);
    square += sum_of(squares);
  }
  const double dims = double(in.dims);
  a.kl[b] = S(twice / 2);
  a.logvar_mean[b] = S(total / dims);
  a.logvar_square[b] = S(square / dims);
}

template <class S> void forward(const Forward<S>& a, void* workspace, Parallel parallel) {
  const Inputs<S>& in = a.in;
  const int64_t rows = slice_rows(in.batch, in.dims), bytes = Moments::bytes(in.batch, in.dims);
  void* const of[] = {workspace, static_cast<char*>(workspace) + bytes};
  const Matrix* const inputs[] = {&in.z, &in.mu};
  each(parallel, slices_of(in.batch, in.dims), [&](int64_t slice) {
    const int64_t begin = slice * rows, end = lesser(begin + rows, in.batch);
    S scratch[block_rows][panel], first[panel];
    for (int64_t b = begin; b < end; b += block_rows) {
      const int64_t last = lesser(b + block_rows, end);
      for (int which = 0; which < 2; ++which) {
        const Moments to(of[which], in.dims, slice);
        for (int64_t d = 0; d < in.dims; d += panel) {
          const int n = int(lesser(in.dims - d, panel));
          first_row(*inputs[which], d, n, first);
          add_block(*inputs[which], b, last, d, n, b - begin, first, to, scratch);
        }
      }
      for (int64_t row = b; row < last; ++row) write_row(a, row, scratch);
    }
  });
  const auto finish = [&](int which, S* means, S* variances, S* offsets) {
    const Matrix& x = *inputs[which];
    join_slices(of[which], in.batch, in.dims, [&](int64_t d, double offset, double variance) {
      means[d] = S(double(load_one<S>(x.data, x.dtype, d * x.stride[1])) + offset);
      variances[d] = S(variance);
      offsets[d] = S(offset);
    });
  };
  finish(0, a.z_mean, a.z_variance, a.z_offset);
  finish(1, a.mu_mean, a.mu_variance, a.mu_offset);
  const Units<S> units = units_of(a.mu_variance, in.dims, in.threshold, in.temperature);
  *a.active = units.active;
  *a.effective = units.effective;
}

// d kl, d mean and d mean square of a row's log-variances.
template <class S> void put_logvar(const Backward<S>& a, int64_t b, S* scratch) {
  typedef typename Lanes<S>::Vec V;
  const Inputs<S>& in = a.in;
  const S half = number_at(a.kl, b) / 2, dims = S(in.dims);
  const S level = number_at(a.logvar_mean, b) / dims, pull = 2 * number_at(a.logvar_square, b) / dims;
  const Gradient to{a.grad_logvar, in.logvar.dtype};
  for (int64_t d = 0; d < in.dims; d += panel) {
    const int n = int(lesser(in.dims - d, panel));
    const S* logvar = row_of(in.logvar, b, d, n, scratch);
    S* out = to.place(b * in.dims + d, scratch);
    for_groups<S>(n, [&](int64_t i, auto lanes, auto group) {
      V v[group.size], e[group.size];
      load_group(logvar + i, v, lanes);
      slopes_of<S>(v, e);
      // A gradient that is not there is 0 even where v is NaN.
      for (int k = 0; k < group.size; ++k) e[k] = (a.kl.data ? half * (e[k] - 1) : V{}) + level;
      for (int k = 0; k < group.size; ++k) e[k] += a.logvar_square.data ? pull * v[k] : V{};
      store_group(out + i, e, lanes);
    });
    to.put(b * in.dims + d, n, out);
  }
}

template <class S> void backward(const Backward<S>& a, void* workspace, Parallel parallel) {
  const Inputs<S>& in = a.in;
  const ColumnSlopes<S> z(in.z, in.batch, in.dims, a.z_offset, a.z_mean, a.z_variance, workspace,
                          [](S*) { return false; });
  void* const after = static_cast<char*>(workspace) + ColumnSlopes<S>::bytes(in.dims);
  const ColumnSlopes<S> mu(in.mu, in.batch, in.dims, a.mu_offset, a.mu_mean, a.mu_variance, after, [&](S* slope) {
    return add_slopes(a.variance, in.dims, in.threshold, in.temperature, a.active, a.effective, slope);
  });
  each_rows(parallel, in.batch, in.dims, [&](int64_t begin, int64_t end) {
    S scratch[panel];
    for (int64_t b = begin; b < end; ++b) {
      if (a.grad_z) z.put_row(in.z, b, in.dims, {}, {a.grad_z, in.z.dtype}, scratch);
      if (a.grad_mu) mu.put_row(in.mu, b, in.dims, a.kl, {a.grad_mu, in.mu.dtype}, scratch);
      if (a.grad_logvar) put_logvar(a, b, scratch);
    }
  });
}

template <class S> int64_t bytes_of(const Forward<S>& a) { return 2 * Moments::bytes(a.in.batch, a.in.dims); }
template <class S> int64_t bytes_of(const Backward<S>& a) { return 2 * ColumnSlopes<S>::bytes(a.in.dims); }

BOMKERN_CPU_OP

}  // namespace BOMKERN_ISA
}  // namespace latent_statistics
}  // namespace bomkern
