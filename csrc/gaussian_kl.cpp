// gaussian_kl: argument checks, autograd and dispatch. The arithmetic is in kernels/gaussian_kl/.
#include <torch_headers.h>

#include "../kernels/gaussian_kl/gaussian_kl.h"
#include "autograd.h"
#include "checks.h"
#include "launch.h"

#include <cmath>

#ifdef BOMKERN_CUDA
#include "../kernels/gaussian_kl/cuda.h"
#endif

namespace {

using namespace bomkern::gaussian_kl;
using at::Tensor;
using bomkern::fresh;
using bomkern::Shape;

using Gradients = std::tuple<Tensor, Tensor>;

Shape check(const Tensor& mu, const Tensor& logvar, int64_t block, double rho) {
  const Shape shape = bomkern::check_matrices(1, {{"mu", mu}, {"logvar", logvar}});
  TORCH_CHECK_VALUE(1 <= block && block <= shape.dims, "block_size must lie between 1 and the number of dimensions, ",
                    shape.dims, ", got ", block);
  const double least = block > 1 ? -1 / static_cast<double>(block - 1) : -HUGE_VAL;
  TORCH_CHECK_VALUE(least < rho && rho < 1, "rho must lie between ", least, " and 1 for block_size ", block, ", got ", rho);
  return shape;
}

// A block of the prior with `dims` dimensions: its inverse, and its share of twice the constant.
struct Block {
  double precision = 1, shared = 0, diagonal = 1, twice = 0;

  Block(int64_t dims, double rho) {
    if (dims == 1) return;
    const double n = static_cast<double>(dims), largest = 1 - rho + n * rho;  // eigenvalue; the others are 1 - rho
    precision = 1 / (1 - rho), shared = precision * rho / largest;
    diagonal = precision * (1 - rho / largest);  // precision - shared would cancel as rho goes to 1
    twice = n * (diagonal - 1) + (n - 1) * std::log(1 - rho) + std::log(largest);
  }

  template <class S> Inverse<S> inverse() const {
    return {static_cast<S>(precision), static_cast<S>(shared), static_cast<S>(diagonal)};
  }
};

template <class S> Inputs<S> describe(const Tensor& mu, const Tensor& logvar, int64_t block, double rho, const Shape& shape) {
  const int64_t before = (shape.dims - 1) / block;  // blocks before the last
  const Block whole(block, rho), last(shape.dims - before * block, rho);
  return {bomkern::describe(mu), bomkern::describe(logvar), shape.batch, shape.dims, block,
          whole.inverse<S>(), last.inverse<S>(), static_cast<S>((static_cast<double>(before) * whole.twice + last.twice) / 2)};
}

template <bool Cuda, class Arguments> void launch(const Arguments& a, const Tensor& like) {
  bomkern::launch<Cuda>("gaussian_kl", cpu_kernels(), a, like);
}

template <bool Cuda> Tensor gaussian_kl(const Tensor& mu, const Tensor& logvar, int64_t block, double rho) {
  const Shape shape = check(mu, logvar, block, rho);
  const Tensor out = fresh<Cuda>({shape.batch}, mu.options().dtype(shape.type()));
  bomkern::with_number(shape.wide, [&](auto zero) {
    using S = decltype(zero);
    launch<Cuda>(Forward<S>{describe<S>(mu, logvar, block, rho, shape), out.mutable_data_ptr<S>()}, mu);
  });
  return out;
}

template <bool Cuda>
Gradients gaussian_kl_backward(const Tensor& grad, const Tensor& mu, const Tensor& logvar, int64_t block, double rho,
                               std::array<bool, 2> want) {
  const Shape shape = check(mu, logvar, block, rho);
  bomkern::check_given("grad", grad, {shape.batch}, shape.type());
  const Gradients out(bomkern::fresh_like<Cuda>(mu, want[0]), bomkern::fresh_like<Cuda>(logvar, want[1]));
  bomkern::with_number(shape.wide, [&](auto zero) {
    using S = decltype(zero);
    launch<Cuda>(Backward<S>{describe<S>(mu, logvar, block, rho, shape), bomkern::describe_grad<S>(grad),
                             bomkern::data_of(std::get<0>(out), want[0]), bomkern::data_of(std::get<1>(out), want[1])},
                 mu);
  });
  return out;
}

using ForwardOp = Tensor(const Tensor&, const Tensor&, int64_t, double);
using BackwardOp = Gradients(const Tensor&, const Tensor&, const Tensor&, int64_t, double, std::array<bool, 2>);

Tensor gaussian_kl_autograd(const Tensor& mu, const Tensor& logvar, int64_t block, double rho) {
  static const auto op = bomkern::operator_named<ForwardOp>("bomkern::gaussian_kl", "");
  static const auto back = bomkern::operator_named<BackwardOp>("bomkern::gaussian_kl_backward", "");
  const bomkern::Differentiable autograd("gaussian_kl", {mu, logvar});
  const Tensor out = autograd.run([&] { return op.call(mu, logvar, block, rho); });
  const auto pull = [block, rho](const auto& grads, const auto& kept, const auto& want) {
    return bomkern::wanted(back.call(grads[0], kept[0], kept[1], block, rho, {want[0], want[1]}), want);
  };
  const auto results = [block, rho](const auto& inputs) {
    static const auto reference = bomkern::operator_named<ForwardOp>("bomkern::gaussian_kl_reference", "");
    return bomkern::variable_list{reference.call(inputs[0], inputs[1], block, rho)};
  };
  autograd.finish({out}, {mu, logvar}, pull, {mu, logvar}, bomkern::by_reference(results));
  return out;
}

}  // namespace

// The schemas of all ops are on one page: bomkern/dispatch/schemas.py.
TORCH_LIBRARY_IMPL(bomkern, CPU, m) {
  m.impl("gaussian_kl", gaussian_kl<false>);
  m.impl("gaussian_kl_backward", gaussian_kl_backward<false>);
}

#ifdef BOMKERN_CUDA
TORCH_LIBRARY_IMPL(bomkern, CUDA, m) {
  m.impl("gaussian_kl", gaussian_kl<true>);
  m.impl("gaussian_kl_backward", gaussian_kl_backward<true>);
}
#endif

TORCH_LIBRARY_IMPL(bomkern, Autograd, m) {
  m.impl("gaussian_kl", gaussian_kl_autograd);
  m.impl("gaussian_kl_backward", bomkern::no_derivative());
}
