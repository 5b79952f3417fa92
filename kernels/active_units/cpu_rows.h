// active_units on the CPU for one instruction set: one pass over the rows in each direction.
#include "../common/cpu_columns.h"
// (cpu_columns.h first: it includes simd.h)
#include "cpu_units.h"

#include "active_units.h"

namespace bomkern {
namespace active_units {
namespace BOMKERN_ISA {

using namespace bomkern::BOMKERN_ISA;

template <class S> void forward(const Forward<S>& a, void* workspace, Parallel parallel) {
  const Inputs<S>& in = a.in;
  each_slice<S>(in.mu, in.batch, in.dims, workspace, parallel);
  join_slices(workspace, in.batch, in.dims, [&](int64_t d, double offset, double variance) {
    a.offset[d] = S(offset);
    a.variance[d] = S(variance);
  });
  const Units<S> units = units_of(a.variance, in.dims, in.threshold, in.temperature);
  *a.active = units.active;
  *a.effective = units.effective;
}

template <class S> void backward(const Backward<S>& a, void* workspace, Parallel parallel) {
  const Inputs<S>& in = a.in;
  const ColumnSlopes<S> slopes(in.mu, in.batch, in.dims, a.offset, nullptr, nullptr, workspace, [&](S* slope) {
    return add_slopes(a.variance, in.dims, in.threshold, in.temperature, a.grad_active, a.grad_effective, slope);
  });
  const Gradient to{a.grad_mu, in.mu.dtype};
  each_rows(parallel, in.batch, in.dims, [&](int64_t begin, int64_t end) {
    S scratch[panel];
    for (int64_t b = begin; b < end; ++b) slopes.put_row(in.mu, b, in.dims, {}, to, scratch);
  });
}

template <class S> int64_t bytes_of(const Forward<S>& a) { return Moments::bytes(a.in.batch, a.in.dims); }
template <class S> int64_t bytes_of(const Backward<S>& a) { return ColumnSlopes<S>::bytes(a.in.dims); }

BOMKERN_CPU_OP

}  // namespace BOMKERN_ISA
}  // namespace active_units
}  // namespace bomkern
