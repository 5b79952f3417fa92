// gaussian_kl on the CPU for one instruction set: a row at a time, block by block of the prior.
#include "../common/cpu_rows.h"
// (cpu_rows.h first: cpu_variance.h is written in its words)
#include "cpu_variance.h"

#include "gaussian_kl.h"

namespace bomkern {
namespace gaussian_kl {
namespace BOMKERN_ISA {

using namespace bomkern::BOMKERN_ISA;

// f(first column, n, the block's inverse, its sum of mu, whether this is its first panel) for the panels of each block of the
// prior; where blocks share nothing, a row is one block.
template <class S, class F> [[gnu::always_inline]] inline void for_blocks(const Inputs<S>& in, int64_t b, const F& f) {
  const bool apart = in.whole.shared == 0;
  const int64_t whole = apart ? in.dims : in.block;
  S scratch[panel];
  int64_t first = 0;
  // The inner loop runs over whole blocks, then over what is left: within it the length is constant, which spares work.
  for (int64_t length = whole; first < in.dims; length = in.dims - first) {
    const Inverse<S>& own = length == whole ? in.whole : in.last;
    for (; first + length <= in.dims; first += length) {
      typename Lanes<S>::Vec sum{};
      const bool shares = !apart && length > 1;  // else 0, which times the square of an infinite sum would be NaN
      for (int64_t d = first; shares && d < first + length; d += panel) {
        const int n = int(lesser(first + length - d, panel));
        const S* mu = row_of(in.mu, b, d, n, scratch);
        for_vectors<S>(n, [&](int64_t i, auto lanes) { sum += load_lanes<decltype(sum)>(mu + i, lanes); });
      }
      const S total = shares ? sum_of(sum) : S(0);
      for (int64_t d = first; d < first + length; d += panel)
        f(d, int(lesser(first + length - d, panel)), own, total, d == first);
    }
  }
}

template <class S> void forward(const Forward<S>& a, void*, Parallel parallel) {
  typedef typename Lanes<S>::Vec V;
  const Inputs<S>& in = a.in;
  each_rows(parallel, in.batch, in.dims, [&](int64_t begin, int64_t end) {
    S scratch[2][panel];
    for (int64_t b = begin; b < end; ++b) {
      double twice = 0;
      for_blocks(in, b, [&](int64_t d, int n, const Inverse<S>& own, S total, bool first) {
        const S *mu = row_of(in.mu, b, d, n, scratch[0]), *logvar = row_of(in.logvar, b, d, n, scratch[1]);
        V sum{}, squares{};
        // All terms are 0 where the padding is: mu = logvar = 0.
        for_groups<S>(n, [&](int64_t i, auto lanes, auto group) {
          V m[group.size], v[group.size], e[group.size];
          load_group(mu + i, m, lanes);
          load_group(logvar + i, v, lanes);
          slopes_of<S>(v, e);
          for (int k = 0; k < group.size; ++k) m[k] *= m[k];
          for (int k = 0; k < group.size; ++k) e[k] = own.diagonal * less_one<S>(v[k], e[k]) - v[k];
          squares += total_of(m);
          sum += total_of(e);
        });
        twice += sum_of(sum + own.precision * squares) - (first ? own.shared * total * total : S(0));
      });
      a.out[b] = S(twice / 2 + in.constant);
    }
  });
}

template <class S> void backward(const Backward<S>& a, void*, Parallel parallel) {
  typedef typename Lanes<S>::Vec V;
  const Inputs<S>& in = a.in;
  const Gradient to_mu{a.grad_mu, in.mu.dtype}, to_logvar{a.grad_logvar, in.logvar.dtype};
  each_rows(parallel, in.batch, in.dims, [&](int64_t begin, int64_t end) {
    S scratch[panel];
    for (int64_t b = begin; b < end; ++b) {
      const S grad = number_at(a.grad, b);
      for_blocks(in, b, [&](int64_t d, int n, const Inverse<S>& own, S total, bool) {
        const int64_t at = b * in.dims + d;
        if (a.grad_mu) {
          const S* mu = row_of(in.mu, b, d, n, scratch);
          S* out = to_mu.place(at, scratch);
          const S slope = grad * own.precision, base = grad * own.shared * total;
          for_vectors<S>(n, [&](int64_t i, auto lanes) { store_lanes(out + i, slope * load_lanes<V>(mu + i, lanes) - base, lanes); });
          to_mu.put(at, n, out);
        }
        if (a.grad_logvar) {
          const S* logvar = row_of(in.logvar, b, d, n, scratch);
          S* out = to_logvar.place(at, scratch);
          const S half = grad / 2;
          for_groups<S>(n, [&](int64_t i, auto lanes, auto group) {
            V v[group.size], e[group.size];
            load_group(logvar + i, v, lanes);
            slopes_of<S>(v, e);
            for (int k = 0; k < group.size; ++k) e[k] = half * (own.diagonal * e[k] - 1);
            store_group(out + i, e, lanes);
          });
          to_logvar.put(at, n, out);
        }
      });
    }
  });
}

template <class Arguments> int64_t bytes_of(const Arguments&) { return 0; }

BOMKERN_CPU_OP

}  // namespace BOMKERN_ISA
}  // namespace gaussian_kl
}  // namespace bomkern
