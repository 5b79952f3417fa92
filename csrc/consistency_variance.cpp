// consistency_variance: argument checks, autograd and dispatch. The arithmetic is in kernels/consistency_variance/.
#include <torch_headers.h>

#include "../kernels/consistency_variance/consistency_variance.h"
#include "autograd.h"
#include "checks.h"
#include "launch.h"

#ifdef BOMKERN_CUDA
#include "../kernels/consistency_variance/cuda.h"
#endif

namespace {

using namespace bomkern::consistency_variance;
using at::Tensor;
using at::TensorList;
using bomkern::Shape;

struct Problem : Shape {
  int64_t count;
  bool stacked;  // one [V, B, D] tensor, not V tensors
};

// Makes the same checks as bomkern/common/checks.py for the implementations in Python.
Problem check(TensorList views, double correction) {
  const bool stacked = views.size() == 1 && views[0].dim() == 3;
  const int64_t count = stacked ? views[0].size(0) : static_cast<int64_t>(views.size());
  TORCH_CHECK_VALUE(count >= 2 && count <= max_views, "views must be 2 to ", max_views,
                    " tensors, or one [V, B, D] tensor, got ", count);
  bool wide = false;
  for (int64_t v = 0; v < count; ++v) {
    const std::string name = "views[" + std::to_string(v) + "]";
    if (stacked) {
      bomkern::check_matrix(name, views[0][v], "views[0]", views[0][0]);
    } else {
      bomkern::check_matrix(name, views[v], "views[0]", views[0]);
    }
    wide |= views[stacked ? 0 : v].scalar_type() == at::kDouble;
  }
  const Problem p{{views[0].size(stacked), views[0].size(1 + stacked), wide}, count, stacked};
  TORCH_CHECK_VALUE(p.batch > 0 && p.dims > 0, "views[0] must hold at least one sample of at least one dimension, got shape ",
                    views[0].sizes());
  TORCH_CHECK_VALUE(correction >= 0 && correction < static_cast<double>(count),
                    "correction must be at least 0 and below the number of views, ", count, ", got ", correction);
  return p;
}

template <class S> Inputs<S> describe(TensorList views, double correction, const Problem& p) {
  Inputs<S> in{};
  in.views = static_cast<int>(p.count);
  in.batch = p.batch;
  in.dims = p.dims;
  in.scale = static_cast<S>(1 / ((static_cast<double>(p.count) - correction) * static_cast<double>(p.dims)));
  for (int64_t v = 0; v < p.count; ++v) {
    const Tensor& from = views[p.stacked ? 0 : v];
    const int64_t offset = p.stacked ? v * from.stride(0) * static_cast<int64_t>(from.element_size()) : 0;
    in.view[v] = {static_cast<const char*>(from.const_data_ptr()) + offset,
                  {from.stride(p.stacked), from.stride(1 + p.stacked)},
                  bomkern::dtype_of(from.scalar_type())};
  }
  return in;
}

template <bool Cuda, class Arguments> void launch(const Arguments& a, const Tensor& like) {
  bomkern::launch<Cuda>("consistency_variance", cpu_kernels(), a, like);
}

template <bool Cuda> Tensor consistency_variance(TensorList views, double correction) {
  const Problem p = check(views, correction);
  const Tensor out = bomkern::fresh<Cuda>({p.batch}, views[0].options().dtype(p.type()));
  bomkern::with_number(p.wide, [&](auto zero) {
    using S = decltype(zero);
    launch<Cuda>(Forward<S>{describe<S>(views, correction, p), out.mutable_data_ptr<S>()}, views[0]);
  });
  return out;
}

template <bool Cuda>
std::vector<Tensor> consistency_variance_backward(const Tensor& grad, TensorList views, double correction,
                                                  const c10::List<bool>& want) {
  const Problem p = check(views, correction);
  bomkern::check_given("grad", grad, {p.batch}, p.type());
  TORCH_CHECK_VALUE(want.size() == views.size(), "want must have ", views.size(), " entries, got ", want.size());
  std::vector<Tensor> out;
  out.reserve(views.size());
  for (size_t i = 0; i < views.size(); ++i) out.push_back(bomkern::fresh_like<Cuda>(views[i], want[i]));
  bomkern::with_number(p.wide, [&](auto zero) {
    using S = decltype(zero);
    Backward<S> a{describe<S>(views, correction, p), bomkern::describe_grad<S>(grad), {}};
    for (int64_t v = 0; v < p.count; ++v) {
      const size_t i = p.stacked ? 0 : static_cast<size_t>(v);
      if (!want[i]) continue;
      const int64_t offset = p.stacked ? v * p.batch * p.dims * static_cast<int64_t>(out[0].element_size()) : 0;
      a.out[v] = static_cast<char*>(out[i].mutable_data_ptr()) + offset;
    }
    launch<Cuda>(a, views[0]);
  });
  return out;
}

using ForwardOp = Tensor(TensorList, double);
using BackwardOp = std::vector<Tensor>(const Tensor&, TensorList, double, const c10::List<bool>&);

Tensor consistency_variance_autograd(TensorList views, double correction) {
  static const auto op = bomkern::operator_named<ForwardOp>("bomkern::consistency_variance", "");
  static const auto back = bomkern::operator_named<BackwardOp>("bomkern::consistency_variance_backward", "");
  const bomkern::Differentiable autograd("consistency_variance", views);
  const Tensor out = autograd.run([&] { return op.call(views, correction); });
  const auto pull = [correction](const auto& grads, const auto& kept, const auto& want) {
    c10::List<bool> wants;
    for (const bool one : want) wants.push_back(one);
    bomkern::refuse_batched(grads, "consistency_variance");
    auto made = back.call(grads[0], kept, correction, wants);
    for (size_t i = 0; i < want.size(); ++i) {
      if (!want[i]) made[i] = Tensor();
    }
    return made;
  };
  const auto results = [correction](const auto& inputs) {
    static const auto reference = bomkern::operator_named<ForwardOp>("bomkern::consistency_variance_reference", "");
    return bomkern::variable_list{reference.call(inputs, correction)};
  };
  autograd.finish({out}, views, pull, views, bomkern::by_reference(results));
  return out;
}

}  // namespace

// The schemas of all ops are on one page: bomkern/dispatch/schemas.py.
TORCH_LIBRARY_IMPL(bomkern, CPU, m) {
  m.impl("consistency_variance", consistency_variance<false>);
  m.impl("consistency_variance_backward", consistency_variance_backward<false>);
}

#ifdef BOMKERN_CUDA
TORCH_LIBRARY_IMPL(bomkern, CUDA, m) {
  m.impl("consistency_variance", consistency_variance<true>);
  m.impl("consistency_variance_backward", consistency_variance_backward<true>);
}
#endif

TORCH_LIBRARY_IMPL(bomkern, Autograd, m) {
  m.impl("consistency_variance", consistency_variance_autograd);
  m.impl("consistency_variance_backward", bomkern::no_derivative());
}
