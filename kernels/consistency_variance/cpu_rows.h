// consistency_variance on the CPU for one instruction set: a row of all views at a time.
#include "../common/cpu_rows.h"
// (cpu_rows.h first: it includes simd.h)
#include "consistency_variance.h"

namespace bomkern {
namespace consistency_variance {
namespace BOMKERN_ISA {

using namespace bomkern::BOMKERN_ISA;

// f(first column, n, the views' rows, scratch) for the panels of a row.
template <class S, class F> [[gnu::always_inline]] inline void for_panels(const Inputs<S>& in, int64_t b, const F& f) {
  constexpr int narrow = panel / 4;  // of all views together: in L1
  S scratch[max_views][narrow];
  for (int64_t d = 0; d < in.dims; d += narrow) {
    const int n = int(lesser(in.dims - d, narrow));
    const S* row[max_views];
    for (int v = 0; v < in.views; ++v) row[v] = row_of(in.view[v], b, d, n, scratch[v]);
    f(d, n, row, scratch);
  }
}

template <class S> void forward(const Forward<S>& a, void*, Parallel parallel) {
  typedef typename Lanes<S>::Vec V;
  const Inputs<S>& in = a.in;
  const S inverse = S(1) / S(in.views);
  each_rows(parallel, in.batch, in.dims * in.views, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      double total = 0;
      for_panels(in, b, [&](int64_t, int n, const S* const* row, auto&) {
        V sum{};
        for_groups<S>(n, [&](int64_t i, auto lanes, auto group) {
          V first[group.size], s[group.size] = {}, q[group.size] = {};
          load_group(row[0] + i, first, lanes);
          for (int v = 1; v < in.views; ++v) {
            V u[group.size];
            load_group(row[v] + i, u, lanes);
            for (int k = 0; k < group.size; ++k) u[k] -= first[k];
            for (int k = 0; k < group.size; ++k) s[k] += u[k];
            for (int k = 0; k < group.size; ++k) q[k] += u[k] * u[k];
          }
          for (int k = 0; k < group.size; ++k) q[k] -= (s[k] * inverse) * s[k];  // s * s may overflow
          sum += total_of(q);
        });
        total += sum_of(sum);
      });
      a.out[b] = S(total * in.scale);
    }
  });
}

template <class S> void backward(const Backward<S>& a, void*, Parallel parallel) {
  typedef typename Lanes<S>::Vec V;
  const Inputs<S>& in = a.in;
  const S inverse = S(1) / S(in.views);
  each_rows(parallel, in.batch, in.dims * in.views, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const S slope = 2 * in.scale * number_at(a.grad, b);
      for_panels(in, b, [&](int64_t d, int n, const S* const* row, auto& scratch) {
        const auto gradient = [&](int v) { return Gradient{a.out[v], in.view[v].dtype}; };
        const int64_t at = b * in.dims + d;
        S* out[max_views];
        for (int v = 0; v < in.views; ++v) out[v] = a.out[v] ? gradient(v).place(at, scratch[v]) : nullptr;
        for_groups<S>(n, [&](int64_t i, auto lanes, auto group) {
          V first[group.size], mean[group.size] = {}, x[group.size];
          load_group(row[0] + i, first, lanes);
          for (int v = 1; v < in.views; ++v) {
            load_group(row[v] + i, x, lanes);
            for (int k = 0; k < group.size; ++k) mean[k] += x[k] - first[k];
          }
          for (int v = 0; v < in.views; ++v) {
            if (!out[v]) continue;
            load_group(row[v] + i, x, lanes);
            for (int k = 0; k < group.size; ++k) x[k] = slope * ((x[k] - first[k]) - mean[k] * inverse);
            store_group(out[v] + i, x, lanes);
          }
        });
        for (int v = 0; v < in.views; ++v) {
          if (out[v]) gradient(v).put(at, n, out[v]);
        }
      });
    }
  });
}

template <class Arguments> int64_t bytes_of(const Arguments&) { return 0; }

BOMKERN_CPU_OP

}  // namespace BOMKERN_ISA
}  // namespace consistency_variance
}  // namespace bomkern
