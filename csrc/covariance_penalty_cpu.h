// covariance_penalty on the CPU: the kernels' stages around a library's matrix products.
//
// Each product runs on one thread, inside tasks that depend on the shape alone. A library that spreads one product over its
// threads returns other bits when their number changes.
#pragma once
#include "../kernels/covariance_penalty/covariance_penalty.h"
#include "launch.h"
#include "products.h"

#include <torch_headers.h>

#include <algorithm>

namespace bomkern::covariance_penalty {

// Makes MKL divide this thread's products for one thread while the object lives. In a parallel region MKL runs on one thread
// anyway, but it divides the work for all threads, which changes the bits.
class OneThread {
 public:
  OneThread() : before_(set_product_threads(1)) {}
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;
  ~OneThread() { set_product_threads(before_); }

 private:
  int before_;
};

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // out, product, second, offset, inverse

inline const CpuStages<float>& stages_of(float) { return cpu_kernels().f32; }
inline const CpuStages<double>& stages_of(double) { return cpu_kernels().f64; }

// Returns a matrix over existing memory, with rows `stride` apart.
template <class S> Tensor matrix(S* data, int64_t rows, int64_t columns, int64_t stride) {
  return at::from_blob(data, {rows, columns}, {stride, 1}, at::TensorOptions(c10::CppTypeToScalarType<S>::value));
}

// One call: its shape, its chunks, and its stages.
template <class S> class OnCpu {
 public:
  OnCpu(const Tensor& z, const Tensor& offset, const Tensor& inverse)
      : z_(z), offset_(offset), inverse_(inverse), batch_(z.size(0)), dims_(z.size(1)),
        columns_{bomkern::describe(z), batch_, dims_, data(offset), data(inverse)} {
    const auto n = static_cast<double>(batch_);
    share_ = 1 / (n - 1);
    alpha_ = 2 * n / (n - 1) / static_cast<double>(dims_);
    // Rows per task: their x stays in L2, and the product is large enough to be worth a call.
    chunk_ = gram() ? std::clamp<int64_t>((batch_ + 7) / 8, 16, 256) : std::max<int64_t>(128, 32768 / dims_);
    chunks_ = (batch_ + chunk_ - 1) / chunk_;
    in_doubles_ = std::is_same_v<S, float> && loses_digits(at::Float32Backend::MKLDNN);
  }

  Result forward(bool normalize, bool per_sample, bool save) const {
    const Tensor workspace = bytes(stages_.moments_bytes(columns_));
    stages_.moments(columns_, normalize, workspace.mutable_data_ptr(), run_tasks);
    return gram() ? forward_gram(per_sample, save) : forward_columns(per_sample, save);
  }

  // `weight` is the gradient of each part; `product` and `second` are forward's outputs.
  Tensor backward(RowGrad<S> weight, const Tensor& product, const Tensor& second, bool normalize) const {
    // A mean's gradient arrives as the same number B times.
    if (all_equal(weight)) weight.stride = 0;
    return gram() ? backward_gram(weight, product, second, normalize) : backward_columns(weight, product, second, normalize);
  }

 private:
  const CpuStages<S>& stages_ = stages_of(S());
  Tensor z_, offset_, inverse_;
  int64_t batch_, dims_, chunk_, chunks_;
  double share_, alpha_;  // 1 / (B - 1); 2 B / (B - 1) / D
  Columns<S> columns_;
  bool in_doubles_;  // products in double, because torch would compute them in half precision

  bool all_equal(RowGrad<S> weight) const {
    for (int64_t b = 1; b < batch_; ++b) {
      if (weight.data[b * weight.stride] != weight.data[0]) return false;
    }
    return true;
  }
  bool gram() const { return dims_ > batch_; }
  Tensor empty(at::IntArrayRef size) const { return fresh<false>(size, offset_.options()); }
  Tensor bytes(int64_t size) const { return fresh<false>({size}, offset_.options().dtype(at::kByte)); }
  static S* data(const Tensor& x) { return x.defined() ? x.template mutable_data_ptr<S>() : nullptr; }
  S* row(const Tensor& x, int64_t b) const { return x.defined() ? data(x) + b * x.size(1) : nullptr; }

  // Calls f(task, scratch of this thread), in a parallel region even for one task (see OneThread).
  template <class F> void each_task(int64_t tasks, int64_t numbers, const F& f) const {
    std::atomic<int64_t> next{0};
    const auto take = [&] { return next.fetch_add(1, std::memory_order_relaxed); };  // it orders no other memory
    const int64_t threads = std::min<int64_t>(std::max<int64_t>(tasks, 2), at::get_num_threads());
    at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      const OneThread one;
      Tensor scratch;
      for (int64_t task = take(); task < tasks; task = take()) {
        if (!scratch.defined()) scratch = empty({numbers});
        f(task, data(scratch));
      }
    });
  }
  // Calls f(first row, rows, scratch of this thread) for each chunk of the batch.
  template <class F> void each_chunk(int64_t numbers, const F& f) const {
    each_task(chunks_, numbers, [&](int64_t c, S* scratch) {
      f(c * chunk_, std::min((c + 1) * chunk_, batch_) - c * chunk_, scratch);
    });
  }

  // out = a b, or out += a b.
  void product(Tensor& out, const Tensor& a, const Tensor& b, bool add = false) const {
    if (!in_doubles_) {
      add ? cpu_addmm_out(out, a, b) : cpu_mm_out(out, a, b);
      return;
    }
    const at::AutoDispatchBelowADInplaceOrView below;
    Tensor wide = fresh<false>(out.sizes(), out.options().dtype(at::kDouble));
    cpu_mm_out(wide, a.to(at::kDouble), b.to(at::kDouble));
    add ? out.add_(wide) : out.copy_(wide);
  }

  // out [m, n] = a [m, k] b.
  void multiply(S* a, int64_t m, int64_t k, const Tensor& b, S* out) const {
    Tensor to = matrix(out, m, b.size(1), b.size(1));
    product(to, matrix(a, m, k, k), b);
  }

  // Returns offdiag(x'x) scale, or offdiag(x' diag(weight) x) scale, and its sum of squares.
  std::pair<Tensor, double> second_moment(const RowGrad<S>* weight, double scale) const {
    // The work is split into slices of rows, each with its own sum, and panels of columns, without the lower triangle.
    const int64_t slices = std::clamp<int64_t>(std::min(chunks_, batch_ / dims_), 1, 16);
    const int64_t width = std::max<int64_t>(64, (dims_ / 4 + 15) / 16 * 16), panels = (dims_ + width - 1) / width;
    const Tensor parts = empty({slices, dims_, dims_}), out = empty({dims_, dims_});
    each_task(slices * panels, 2 * chunk_ * dims_, [&](int64_t task, S* x) {
      const int64_t slice = task / panels, from = task % panels * width, wide = std::min(width, dims_ - from);
      S* const weighted = weight ? x + chunk_ * dims_ : nullptr;
      Tensor sum = matrix(data(parts) + (slice * dims_ + from) * dims_ + from, wide, dims_ - from, dims_);
      for (int64_t c = slice; c < chunks_; c += slices) {
        const int64_t begin = c * chunk_, rows = std::min(begin + chunk_, batch_) - begin;
        stages_.center(columns_, begin, begin + rows, x, weight ? *weight : RowGrad<S>{}, weighted);
        const Tensor a = matrix(x + from, rows, wide, dims_).t();
        const Tensor b = matrix((weight ? weighted : x) + from, rows, dims_ - from, dims_);
        product(sum, a, b, c != slice);
      }
    });
    const double squares = stages_.join_second(data(parts), slices, dims_, static_cast<S>(scale), data(out), run_tasks);
    // A NaN stays on the diagonal, which may be the only place where its column shows. With weights the squares may overflow
    // to either infinity, so the diagonal is cleared; their columns show in `product`.
    for (int64_t d = 0; weight && d < dims_; ++d) data(out)[d * dims_ + d] = 0;
    return {out, squares};
  }

  // See CpuStages::column_sums.
  std::vector<double> column_sums(const Tensor& h, RowGrad<S> weight) const {
    std::vector<double> sums(2 * dims_);
    const Tensor workspace = bytes(stages_.column_sums_bytes(columns_));
    stages_.column_sums(columns_, data(h), weight, sums.data(), workspace.mutable_data_ptr(), run_tasks);
    return sums;
  }

  template <class F> Tensor vector(const F& f) const {
    const Tensor out = empty({dims_});
    for (int64_t d = 0; d < dims_; ++d) data(out)[d] = static_cast<S>(f(d));
    return out;
  }

  Tensor all_rows() const {
    const Tensor x = empty({batch_, dims_});
    each_chunk(0, [&](int64_t b, int64_t n, S*) { stages_.center(columns_, b, b + n, row(x, b), {}, nullptr); });
    return x;
  }

  // sum_b x_b^2 / (B - 1) of each column.
  Tensor variances() const {
    const S one = 1;
    const auto sums = column_sums(Tensor(), {&one, 0});
    return vector([&](int64_t d) { return sums[dims_ + d] * share_; });
  }

  Result forward_columns(bool per_sample, bool save) const {
    const auto second = second_moment(nullptr, share_);
    const Tensor& o = second.first;
    if (!per_sample) {
      const Tensor out = empty({});
      *data(out) = static_cast<S>(second.second / static_cast<double>(dims_));
      return {out, empty({0}), o, offset_, inverse_};
    }
    const Tensor out = empty({batch_}), product = save ? empty({batch_, dims_}) : empty({0});
    each_chunk(2 * chunk_ * dims_, [&](int64_t b, int64_t n, S* x) {
      S* const y = save ? row(product, b) : x + chunk_ * dims_;
      stages_.center(columns_, b, b + n, x, {}, nullptr);
      multiply(x, n, dims_, o, y);
      stages_.parts(x, y, n, dims_, static_cast<S>(alpha_ / 2), data(out) + b);
    });
    return {out, product, o, offset_, inverse_};
  }

  Result forward_gram(bool per_sample, bool save) const {
    const Tensor x = all_rows(), v = variances(), k = empty({batch_, batch_}), parts = empty({batch_});
    each_chunk(0, [&](int64_t b, int64_t n, S*) {
      multiply(row(x, b), n, dims_, x.t(), row(k, b));
      stages_.gram_parts(row(k, b), row(x, b), data(v), n, batch_, dims_, static_cast<S>(share_),
                         static_cast<S>(alpha_ / 2), data(parts) + b);
    });
    if (per_sample) return {parts, save ? x : empty({0}), k, offset_, inverse_};
    double sum = 0;
    for (int64_t b = 0; b < batch_; ++b) sum += static_cast<double>(data(parts)[b]);
    const Tensor out = empty({});
    *data(out) = static_cast<S>(sum / static_cast<double>(batch_));
    return {out, empty({0}), k, offset_, inverse_};
  }

  // Computes h = scale weight_b (product_b, or x_b times `times`) + (more_b, or x_b times `more_times`), then the gradient
  // of z. Undefined tensors count as 0.
  struct Terms {
    Tensor product, times, more, more_times, mean, slope, pull;
  };
  Tensor finish(const Terms& t, RowGrad<S> weight, double scale) const {
    const Tensor out = fresh<false>(z_.sizes(), z_.options());
    const bool needs_x = t.times.defined() || t.more_times.defined() || t.slope.defined() || t.pull.defined();
    each_chunk(3 * chunk_ * dims_, [&](int64_t b, int64_t n, S* x) {
      S *h = row(t.product, b), *more = row(t.more, b);
      if (needs_x) stages_.center(columns_, b, b + n, x, {}, nullptr);
      if (t.times.defined()) multiply(x, n, dims_, t.times, h = x + chunk_ * dims_);
      if (t.more_times.defined()) multiply(x, n, dims_, t.more_times, more = x + 2 * chunk_ * dims_);
      stages_.finish(columns_, b, b + n, x, h, more, weight, static_cast<S>(scale), data(t.mean), data(t.slope), data(t.pull),
                     out.mutable_data_ptr(), dtype_of(out.scalar_type()));
    });
    return out;
  }

  Tensor backward_columns(RowGrad<S> weight, const Tensor& product, const Tensor& o, bool normalize) const {
    Terms t;
    (product.numel() > 0 ? t.product : t.times) = product.numel() > 0 ? product : o;
    if (weight.stride == 0) {  // both terms of h are equal
      if (normalize) {
        std::vector<double> squares(dims_);
        stages_.row_squares(data(o), dims_, squares.data());
        t.slope = vector([&](int64_t d) { return 2 * alpha_ * static_cast<double>(weight.data[0]) * squares[d]; });
      }
      return finish(t, weight, 2 * alpha_);
    }
    const auto sums = column_sums(product, weight);
    t.mean = vector([&](int64_t d) { return alpha_ / static_cast<double>(batch_) * sums[d]; });
    if (normalize) t.slope = vector([&](int64_t d) { return 2 * alpha_ * share_ * sums[dims_ + d]; });
    t.more_times = second_moment(&weight, alpha_ * share_).first;
    return finish(t, weight, alpha_);
  }

  Tensor backward_gram(RowGrad<S> weight, const Tensor& product, const Tensor& k, bool normalize) const {
    const Tensor x = product.numel() > 0 ? product : all_rows(), h = empty({batch_, dims_}), v = variances();
    each_chunk(chunk_ * batch_, [&](int64_t b, int64_t n, S* m) {
      stages_.gram_weights(row(k, b), b, b + n, batch_, weight, static_cast<S>(alpha_ * share_), m);
      multiply(m, n, batch_, x, row(h, b));
    });
    const S one = 1;
    const auto own = column_sums(Tensor(), weight), made = column_sums(h, {&one, 0});
    const auto variance = [&](int64_t d) { return static_cast<double>(data(v)[d]); };
    Terms t;
    t.more = h;
    t.mean = vector([&](int64_t d) { return (made[d] - alpha_ * variance(d) * own[d]) / static_cast<double>(batch_); });
    t.slope = vector([&](int64_t d) {
      const double second = own[dims_ + d];  // sum_b weight_b x_b^2
      return alpha_ * share_ * second + (normalize ? (made[dims_ + d] - 2 * alpha_ * variance(d) * second) * share_ : 0);
    });
    t.pull = vector([&](int64_t d) { return alpha_ * variance(d); });
    return finish(t, weight, 0);
  }
};

}  // namespace bomkern::covariance_penalty
