// covariance_penalty on the GPU, step by step: which stages, which matrix products, which factors. Host code, no torch.
//
// A Library has the matrices: Array empty(rows, columns), S* data(array), Array transposed(array), and the product of two,
// Array product(a, b); run(stage) starts a stage of cuda.h.
#pragma once
#include "cuda.h"

namespace bomkern {
namespace covariance_penalty {

template <class S, class Library> class Steps {
 public:
  using Array = typename Library::Array;
  struct Saved {
    Array product, second;  // y = x O (x x' x's part of it where D > B), for the parts alone; and what the schema says
  };

  Steps(const Library& library, const Matrix& z, int64_t batch, int64_t dims)
      : lib_(library), z_(z), batch_(batch), dims_(dims), wide_(dims > batch) {
    share_ = 1 / (double(batch) - 1);
    part_ = double(batch) * share_ / double(dims);
  }

  // out: [B], or one number where not per_sample. offset, inverse: [D].
  Saved forward(bool normalize, bool per_sample, S* out, S* offset, S* inverse) const {
    const Array spread = lib_.empty(1, dims_), x = lib_.empty(batch_, dims_);
    lib_.run(Center<S>{z_, batch_, dims_, normalize, offset, inverse, to(spread), to(x)});
    Saved saved{};
    saved.second = wide_ ? lib_.product(x, lib_.transposed(x)) : lib_.product(lib_.transposed(x), x);
    Gram<S> gram = gram_of(saved.second, wide_ ? batch_ : dims_, share_);
    gram.offdiagonal = !wide_;
    if (!per_sample) gram.out = out;
    if (!per_sample && wide_) gram.spread = to(spread);
    if (!per_sample || !wide_) lib_.run(gram);
    if (!per_sample) return saved;
    saved.product = wide_ ? lib_.product(saved.second, x) : lib_.product(x, saved.second);
    const S* const subtracted = wide_ ? to(spread) : nullptr;
    lib_.run(Parts<S>{to(x), to(saved.product), subtracted, batch_, dims_, S(share_), S(part_), out});
    return saved;
  }

  // grad: [B], stride 0 where all are one number known to be so; or the one number, stride 0, where not per_sample.
  // `to_z`: [B, D], contiguous, of z's dtype.
  void backward(const RowGrad<S>& grad, const Saved& saved, const S* offset, const S* inverse, bool normalize,
                bool per_sample, void* to_z) const {
    Finish<S> finish{};
    finish.z = z_, finish.batch = batch_, finish.dims = dims_, finish.offset = offset, finish.inverse = inverse;
    finish.grad = grad, finish.to = to_z;
    Recenter<S> recenter{z_, batch_, dims_, offset, inverse, grad, S(part_), nullptr, nullptr};
    Array x{}, weighted{}, product{}, more{};
    if (!per_sample) {
      // h = 4 g / (D (B - 1)) x O; where D > B, x O = share K x - v x, whose v the last stage makes of its sums. With
      // normalize v is 1, and the gradient has no part along x: both of its sums cancel.
      const double rate = 4 * share_ / double(dims_), of_product = wide_ ? rate * share_ : rate;
      x = lib_.empty(batch_, dims_);
      recenter.x = to(x);
      lib_.run(recenter);
      product = wide_ ? lib_.product(saved.second, x) : lib_.product(x, saved.second);
      finish.product = to(product);
      finish.of_product = S(of_product);
      if (normalize) finish.of_slope = S(of_product * share_);
      if (!normalize && wide_) finish.of_square = S(rate * share_);
    } else if (grad.stride == 0) {
      finish.product = to(saved.product);
      finish.of_product = S(4 * part_);
      if (normalize) finish.of_slope = S(4 * part_ * share_);
    } else {
      // G x in two products, from the left or from the right; its diagonal is left out before the second or, where D > B,
      // taken off in the last stage.
      weighted = lib_.empty(batch_, dims_);
      recenter.weighted = to(weighted);
      if (!wide_) x = lib_.empty(batch_, dims_), recenter.x = to(x);
      lib_.run(recenter);
      if (wide_) {
        more = lib_.product(saved.second, weighted);
        finish.of_square = S(2 * share_ * part_);
      } else {
        const Array g = lib_.product(lib_.transposed(x), weighted);
        lib_.run(gram_of(g, dims_, 1));
        more = lib_.product(x, g);
      }
      finish.product = to(saved.product), finish.more = to(more);
      finish.of_product = S(2 * part_), finish.of_more = S(2 * share_);
      finish.of_mean = S(2 * part_ / double(batch_));
      if (normalize) finish.of_slope = S(4 * part_ * share_);
    }
    lib_.run(finish);
  }

 private:
  const Library& lib_;
  Matrix z_;
  int64_t batch_, dims_;
  bool wide_;
  double share_, part_;  // 1 / (B - 1); B / (B - 1) / D

  S* to(const Array& array) const { return lib_.data(array); }

  // The diagonal off, `scale` times the rest.
  Gram<S> gram_of(const Array& array, int64_t side, double scale) const {
    Gram<S> gram{};
    gram.matrix = to(array), gram.side = side, gram.scale = S(scale), gram.offdiagonal = true;
    gram.dims = dims_, gram.share = S(1 / double(dims_));
    return gram;
  }
};

}  // namespace covariance_penalty
}  // namespace bomkern
