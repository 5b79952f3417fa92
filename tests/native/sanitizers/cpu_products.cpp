// The CPU kernels of pairs: total_correlation, and covariance_penalty's stages around a library's products.
#include "../../../kernels/covariance_penalty/covariance_penalty.h"
#include "../../../kernels/total_correlation/total_correlation.h"
#include "driver.h"

KERNELS_OF(total_correlation)
KERNELS_OF(covariance_penalty)

namespace driver {
namespace {

// Rows [first, first + rows) of a batch.
struct Part {
  int64_t rows, batch, first;
};

template <class S>
void total_correlation(const Part& part, int64_t dims, bool stratified, Layout layout, int wanted = 7) {
  using namespace bomkern::total_correlation;
  const auto [rows, batch, first] = part;
  const bool mixed = layout != Layout::plain;
  const auto type = [&] { return mixed ? any_type<S>() : type_of<S>; };
  const Input z(rows, dims, type(), layout, -3, 3), mu(batch, dims, type(), layout, -2, 2),
      logvar(batch, dims, type(), layout, -4, 1);
  const Inputs<S> in{z.matrix,
                     mu.matrix,
                     logvar.matrix,
                     rows,
                     batch,
                     dims,
                     first,
                     stratified,
                     S(stratified ? 0.1 : 1),
                     S(stratified ? 0.9 : 1)};
  const bool parts = below(2);
  const Grads<S> grad(rows, below(3));
  const Grads<double> of_log_q(rows, below(3));
  for_sets(sets(), [&](const CpuKernels& kernels, Parallel parallel, Seen& seen) {
    const Exact<S> out(rows), joint(rows), marginal(dims * rows);
    const Exact<double> log_q(parts ? rows : 0);
    call(kernels, Forward<S>{in, 0.5, 0.5, out, parts ? log_q.data() : nullptr, joint, marginal}, parallel);
    for (const auto* x : {&out, &joint, &marginal}) seen.numbers(*x, "total_correlation");
    seen.numbers(log_q, "total_correlation's log_q");
    const auto gradient = [&](int bit, int64_t n) { return wanted & bit ? n * dims : 0; };
    const Exact<S> by_z(gradient(1, rows)), by_mu(gradient(2, batch)), by_logvar(gradient(4, batch));
    const auto place = [&](int bit, const Exact<S>& x) { return wanted & bit ? x.data() : nullptr; };
    call(kernels,
         Backward<S>{in, grad.row(), parts ? of_log_q.row() : bomkern::RowGrad<double>{}, joint, marginal, place(1, by_z),
                     place(2, by_mu), place(4, by_logvar)},
         parallel);
    for (const auto* x : {&by_z, &by_mu, &by_logvar}) seen.numbers(*x, "total_correlation's gradients");
  });
}

const auto& stages_of(const bomkern::covariance_penalty::CpuKernels& kernels, float) { return kernels.f32; }
const auto& stages_of(const bomkern::covariance_penalty::CpuKernels& kernels, double) { return kernels.f64; }

template <class S> void fill(const Exact<S>& x) {
  for (int64_t i = 0; i < x.size(); ++i) x[i] = S(uniform(-1, 1));
}

template <class S> void covariance_penalty(int64_t batch, int64_t dims, Layout layout, bool mixed) {
  using namespace bomkern::covariance_penalty;
  const Input z(batch, dims, mixed ? any_type<S>() : type_of<S>, layout, -2, 2);
  const Grads<S> grad(batch, below(3));
  const bool normalize = below(2);
  const int64_t begin = batch / 3, rows = batch - begin, side = std::min<int64_t>(dims, 140), parts = 3;
  const Exact<S> products(parts * side * side), gram(rows * batch), more(rows * dims);
  fill(products), fill(gram), fill(more);
  for_sets(sets(), [&](const CpuKernels& kernels, Parallel parallel, Seen& seen) {
    const CpuStages<S>& stages = stages_of(kernels, S());
    const Exact<S> offset(dims), inverse(dims);
    const Columns<S> columns{z.matrix, batch, dims, offset, inverse};
    const Exact<unsigned char> workspace(stages.moments_bytes(columns));
    stages.moments(columns, normalize, workspace, parallel);
    const Exact<S> x(rows * dims), weighted(rows * dims);
    stages.center(columns, begin, batch, x, grad.row(), weighted);
    const Exact<S> second(side * side);
    const Exact<double> squares(side);
    stages.join_second(products, parts, side, S(0.5), second, parallel);
    stages.row_squares(second, side, squares);
    const Exact<S> out(rows), gram_out(rows), m(rows * batch);
    stages.parts(x, weighted, rows, dims, S(0.5), out);
    stages.gram_parts(gram, x, inverse, rows, batch, dims, S(0.2), S(0.5), gram_out);
    stages.gram_weights(gram, begin, batch, batch, grad.row(), S(0.5), m);
    const Exact<double> sums(2 * dims);
    const Exact<unsigned char> more_workspace(stages.column_sums_bytes(columns));
    stages.column_sums(columns, nullptr, grad.row(), sums, more_workspace, parallel);
    for (const auto* numbers : {&offset, &inverse, &x, &weighted, &second, &out, &gram_out, &m})
      seen.numbers(*numbers, "covariance_penalty's stages");
    seen.numbers(squares, "row_squares"), seen.numbers(sums, "column_sums");
    // Rows before `begin` are another task's, and stay NaN here.
    const Output to(batch * dims, z.matrix.dtype);
    stages.finish(columns, begin, batch, x, weighted, more, grad.row(), S(0.5), offset, inverse, offset, to.memory,
                  to.dtype);
    seen.numbers(to.memory + begin * dims * size_of(to.dtype), to.dtype, rows * dims, "finish");
  });
}

template <class S> void check() {
  for (const int64_t batch : {1, 2, 3, 15, 16, 17, 63, 64, 65, 200}) {
    for (const int64_t dims : {1, 7, 33, 70}) {
      total_correlation<S>({batch, batch, 0}, dims, false, Layout::plain);
      if (batch > 1) total_correlation<S>({batch, batch, 0}, dims, true, Layout::plain);
    }
  }
  for (const Layout layout : layouts) {
    total_correlation<S>({70, 70, 0}, 19, true, layout);
    total_correlation<S>({21, 70, 49}, 5, false, layout, 1 + below(7));
  }
  for (const Part& part : {Part{1, 100, 99}, Part{17, 130, 0}, Part{64, 130, 64}, Part{33, 70, 20}})
    total_correlation<S>(part, 9, true, Layout::plain);
  total_correlation<S>({1100, 1100, 0}, 2, true, Layout::plain);  // more rows than a chunk has
  for_shapes([](int64_t batch, int64_t dims, Layout layout, bool mixed) {
    if (batch * batch < 1 << 22) covariance_penalty<S>(batch, dims, layout, mixed);
  });
}

}  // namespace

void check_products() {
  check<float>();
  check<double>();
}

}  // namespace driver
