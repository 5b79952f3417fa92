// The CPU kernels that stream over rows: gaussian_kl, consistency_variance, active_units, latent_statistics.
#include "../../../kernels/active_units/active_units.h"
#include "../../../kernels/consistency_variance/consistency_variance.h"
#include "../../../kernels/gaussian_kl/gaussian_kl.h"
#include "../../../kernels/latent_statistics/latent_statistics.h"
#include "driver.h"

KERNELS_OF(gaussian_kl)
KERNELS_OF(consistency_variance)
KERNELS_OF(active_units)
KERNELS_OF(latent_statistics)

namespace driver {
namespace {

template <class S> DType pick(bool mixed) { return mixed ? any_type<S>() : type_of<S>; }

template <class S> void gaussian_kl(int64_t batch, int64_t dims, int64_t block, Layout layout, bool mixed) {
  using namespace bomkern::gaussian_kl;
  const Input mu(batch, dims, pick<S>(mixed), layout, -2, 2), logvar(batch, dims, pick<S>(mixed), layout, -4, 2);
  const S shared = block > 1 ? S(0.1) : S(0), of_last = dims % block == 1 ? S(0) : shared;
  const Inputs<S> in{mu.matrix, logvar.matrix, batch, dims, block, {S(1.2), shared, S(1.1)}, {S(1.3), of_last, S(1.2)}, S(0.3)};
  const Grads<S> grad(batch, below(3));
  const int wanted = 1 + below(3);
  for_sets(sets(), [&](const CpuKernels& kernels, Parallel parallel, Seen& seen) {
    const Exact<S> out(batch);
    call(kernels, Forward<S>{in, out}, parallel);
    seen.numbers(out, "gaussian_kl");
    const Output by_mu(wanted & 1 ? batch * dims : 0, mu.matrix.dtype),
        by_logvar(wanted & 2 ? batch * dims : 0, logvar.matrix.dtype);
    call(kernels,
         Backward<S>{in, grad.row(), wanted & 1 ? by_mu.memory.data() : nullptr,
                     wanted & 2 ? by_logvar.memory.data() : nullptr},
         parallel);
    by_mu.seen(seen, "gaussian_kl by mu"), by_logvar.seen(seen, "gaussian_kl by logvar");
  });
}

template <class S> void consistency_variance(int64_t batch, int64_t dims, int views, Layout layout, bool mixed) {
  using namespace bomkern::consistency_variance;
  std::vector<std::unique_ptr<Input>> inputs;
  Inputs<S> in{{}, views, batch, dims, S(0.25)};
  for (int v = 0; v < views; ++v) {
    inputs.push_back(std::make_unique<Input>(batch, dims, pick<S>(mixed), layout, -2, 2));
    in.view[v] = inputs.back()->matrix;
  }
  const Grads<S> grad(batch, below(3));
  const int left_out = below(views + 1);
  for_sets(sets(), [&](const CpuKernels& kernels, Parallel parallel, Seen& seen) {
    const Exact<S> out(batch);
    call(kernels, Forward<S>{in, out}, parallel);
    seen.numbers(out, "consistency_variance");
    std::vector<std::unique_ptr<Output>> outputs;
    Backward<S> a{in, grad.row(), {}};
    for (int v = 0; v < views; ++v) {
      outputs.push_back(std::make_unique<Output>(v == left_out ? 0 : batch * dims, in.view[v].dtype));
      if (v != left_out) a.out[v] = outputs[v]->memory.data();
    }
    call(kernels, a, parallel);
    for (const auto& output : outputs) output->seen(seen, "consistency_variance by a view");
  });
}

template <class S> void active_units(int64_t batch, int64_t dims, Layout layout, bool mixed) {
  using namespace bomkern::active_units;
  const Input mu(batch, dims, pick<S>(mixed), layout, -2, 2);
  const Inputs<S> in{mu.matrix, batch, dims, S(0.1), S(0.05)};
  const Grads<S> grad(1, 0);
  for_sets(sets(), [&](const CpuKernels& kernels, Parallel parallel, Seen& seen) {
    const Exact<S> active(1), effective(1), offset(dims), variance(dims);
    call(kernels, Forward<S>{in, active, effective, offset, variance}, parallel);
    for (const auto* x : {&active, &effective, &offset, &variance}) seen.numbers(*x, "active_units");
    const Output by_mu(batch * dims, mu.matrix.dtype);
    call(kernels, Backward<S>{in, grad.memory, grad.memory, offset, variance, by_mu.memory}, parallel);
    by_mu.seen(seen, "active_units by mu");
  });
}

template <class S> void latent_statistics(int64_t batch, int64_t dims, Layout layout, bool mixed) {
  using namespace bomkern::latent_statistics;
  const Input z(batch, dims, pick<S>(mixed), layout, -3, 3), mu(batch, dims, pick<S>(mixed), layout, -2, 2),
      logvar(batch, dims, pick<S>(mixed), layout, -4, 2);
  const Inputs<S> in{z.matrix, mu.matrix, logvar.matrix, batch, dims, S(0.1), S(0.05)};
  const Grads<S> by_row(batch, below(3)), by_column(dims, 1), one(1, 0);
  const bool column = below(2), unit = below(2);
  for_sets(sets(), [&](const CpuKernels& kernels, Parallel parallel, Seen& seen) {
    const Exact<S> kl(batch), mean(batch), square(batch), z_mean(dims), z_variance(dims), mu_mean(dims),
        mu_variance(dims), active(1), effective(1), z_offset(dims), mu_offset(dims);
    call(kernels,
         Forward<S>{in, kl, mean, square, z_mean, z_variance, mu_mean, mu_variance, active, effective, z_offset,
                    mu_offset},
         parallel);
    for (const auto* x : {&kl, &mean, &square, &z_mean, &z_variance, &mu_mean, &mu_variance, &active, &effective,
                          &z_offset, &mu_offset})
      seen.numbers(*x, "latent_statistics");
    const Output by_z(batch * dims, z.matrix.dtype), by_mu(batch * dims, mu.matrix.dtype),
        by_logvar(batch * dims, logvar.matrix.dtype);
    const S *columns = column ? by_column.memory.data() : nullptr, *units = unit ? one.memory.data() : nullptr;
    call(kernels,
         Backward<S>{in,
                     by_row.row(),
                     by_row.row(),
                     {nullptr, 0},
                     columns,
                     columns,
                     columns,
                     columns,
                     units,
                     units,
                     z_offset,
                     mu_offset,
                     mu_variance,
                     by_z.memory,
                     by_mu.memory,
                     by_logvar.memory},
         parallel);
    by_z.seen(seen, "latent_statistics by z"), by_mu.seen(seen, "by mu"), by_logvar.seen(seen, "by logvar");
  });
}

template <class S> void check() {
  for_shapes([](int64_t batch, int64_t dims, Layout layout, bool mixed) {
    gaussian_kl<S>(batch, dims, 1, layout, mixed);
    for (const int64_t block : {2, 5, 8}) {
      if (block <= dims) gaussian_kl<S>(batch, dims, block, layout, mixed);
    }
    gaussian_kl<S>(batch, dims, dims, layout, mixed);
    if (batch * dims < 50000) consistency_variance<S>(batch, dims, dims % 2 ? 2 : 3, layout, mixed);
    active_units<S>(batch, dims, layout, mixed);
    latent_statistics<S>(batch, dims, layout, mixed);
  });
  gaussian_kl<S>(1, 5, 1, Layout::plain, false);
  consistency_variance<S>(1, 7, 16, Layout::plain, true);
}

}  // namespace

void check_rows() {
  check<float>();
  check<double>();
}

}  // namespace driver
