// goal_set_keep: argument checks and dispatch for the state that a step of goal_set updates. See kernels/goal_set/keep.h.
#include <torch_headers.h>

#include "../kernels/goal_set/keep.h"
#include "op.h"

#ifdef BOMKERN_CUDA
#include "../kernels/goal_set/cuda.h"
#endif

namespace {

using namespace bomkern::goal_set;
using at::Tensor;
using at::TensorList;

// Checks a buffer that is changed in place, or the weights: `goals` numbers with the ring's device and dtype.
void check_buffer(const char* name, const Tensor& x, int64_t goals, const Tensor& ring) {
  TORCH_CHECK_VALUE(x.dim() == 1 && x.size(0) == goals && x.is_contiguous(), name, " must have shape [", goals, "], got ",
                    x.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == ring.scalar_type(), name, " must be ", ring.scalar_type(), " as the ring, got ",
                   x.scalar_type());
  TORCH_CHECK_VALUE(x.device() == ring.device(), name, " is on ", x.device(), ", the ring on ", ring.device(), ": move it");
}

void check_number(const char* name, const Tensor& x, const Tensor& ring) {
  const auto type = x.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble, name, " must be float32 or float64, got ", type);
  TORCH_CHECK_VALUE(x.dim() == 1 && x.is_contiguous(), name, " must be contiguous with one dimension, got ", x.sizes());
  TORCH_CHECK_VALUE(x.device() == ring.device(), name, " is on ", x.device(), ", the ring on ", ring.device(), ": move it");
}

constexpr const char* spilled[] = {"average", "multipliers", "average_before", "multipliers_before"};

void check(const Tensor& record, const Tensor& ring, const Tensor& place, const std::optional<Tensor>& deficit,
           const std::optional<Tensor>& by_order, TensorList spill) {
  check_number("record", record, ring);
  const auto type = ring.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble, "ring must be float32 or float64, got ", type);
  TORCH_CHECK_VALUE(ring.dim() == 2 && ring.size(0) > 0 && ring.size(1) == record.size(0) && ring.is_contiguous(),
                    "ring must have shape [rows, ", record.size(0), "], got ", ring.sizes());
  TORCH_CHECK_TYPE(place.scalar_type() == at::kLong, "place must be int64, got ", place.scalar_type());
  TORCH_CHECK_VALUE(place.numel() == 1 && place.device() == ring.device(), "place must be one number on ", ring.device(),
                    ", got ", place.sizes(), " on ", place.device());
  TORCH_CHECK_VALUE(spill.empty() || spill.size() == 4, "spill must hold no tensor or four, got ", spill.size());
  TORCH_CHECK_VALUE(deficit.has_value() == !spill.empty() && by_order.has_value() == !spill.empty(),
                    "deficit and by_order must be given with spill, and not without");
  if (spill.empty()) return;
  check_number("deficit", *deficit, ring);
  const int64_t goals = deficit->size(0);
  TORCH_CHECK_VALUE(goals <= bomkern::min_goal::max_goals, "deficit must have at most ", bomkern::min_goal::max_goals,
                    " goals, got ", goals);
  TORCH_CHECK_TYPE(deficit->scalar_type() == record.scalar_type(), "deficit must be ", record.scalar_type(),
                   " as the record, got ", deficit->scalar_type());
  check_buffer("by_order", *by_order, goals, ring);
  for (int i = 0; i < 4; ++i) check_buffer(spilled[i], spill[i], goals, ring);
}

template <bool Cuda>
void goal_set_keep(const Tensor& record, const Tensor& ring, const Tensor& place, const std::optional<Tensor>& deficit,
                   const std::optional<Tensor>& by_order, double rate, TensorList spill, bool relative, double follow) {
  check(record, ring, place, deficit, by_order, spill);
  bomkern::with_number(record.scalar_type() == at::kDouble, [&](auto given) {
    bomkern::with_number(ring.scalar_type() == at::kDouble, [&](auto kept) {
      using S = decltype(given);
      using T = decltype(kept);
      Keep<S, T> a{record.const_data_ptr<S>(), record.size(0), ring.mutable_data_ptr<T>(), ring.size(0),
                   place.mutable_data_ptr<int64_t>()};
      if (!spill.empty()) {
        a.goals = static_cast<int>(deficit->size(0));
        a.deficit = deficit->const_data_ptr<S>();
        a.by_order = by_order->const_data_ptr<T>();
        a.rate = rate;
        a.relative = relative;
        a.follow = follow;
        T** buffers[] = {&a.average, &a.multipliers, &a.average_before, &a.multipliers_before};
        for (int i = 0; i < 4; ++i) *buffers[i] = spill[i].mutable_data_ptr<T>();
      }
      if constexpr (Cuda) {
#ifdef BOMKERN_CUDA
        const c10::cuda::CUDAGuard guard(ring.device());
        const auto error = cuda_run(a, c10::cuda::getCurrentCUDAStream().stream());
        TORCH_CHECK(error == cudaSuccess, "goal_set_keep: the CUDA launch failed: ", cudaGetErrorString(error));
#endif
      } else {
        keep_on_cpu(a);
      }
    });
  });
}

using KeepOp = void(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, const std::optional<Tensor>&,
                    double, TensorList, bool, double);

// The op has no gradient; this tells autograd that the buffers have changed.
void goal_set_keep_autograd(const Tensor& record, const Tensor& ring, const Tensor& place, const std::optional<Tensor>& deficit,
                            const std::optional<Tensor>& by_order, double rate, TensorList spill, bool relative,
                            double follow) {
  static const auto op = bomkern::operator_named<KeepOp>("bomkern::goal_set_keep", "");
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    op.call(record, ring, place, deficit, by_order, rate, spill, relative, follow);
  }
  const auto changed = [](const Tensor& x) {
    if (!x.is_inference()) x.unsafeGetTensorImpl()->bump_version();
  };
  changed(ring);
  changed(place);
  for (const Tensor& x : spill) changed(x);
}

}  // namespace

TORCH_LIBRARY_IMPL(bomkern, CPU, m) { m.impl("goal_set_keep", goal_set_keep<false>); }

#ifdef BOMKERN_CUDA
TORCH_LIBRARY_IMPL(bomkern, CUDA, m) { m.impl("goal_set_keep", goal_set_keep<true>); }
#endif

TORCH_LIBRARY_IMPL(bomkern, Autograd, m) { m.impl("goal_set_keep", goal_set_keep_autograd); }
