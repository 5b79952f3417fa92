// goal_set's backward pass on the CPU for one instruction set..
namespace bomkern {
namespace goal_set {
namespace BOMKERN_ISA {

// A weight of 0 blocks an infinite or NaN incoming gradient.
template <class V> inline V times(V weight, V grad) { return weight == 0 ? V{} : weight * grad; }

// Samples [begin, end) of column k's gradient.
template <class S> void put_column(const Backward<S>& a, int k, int64_t begin, int64_t end, const Gradient& to) {
  typedef typename Lanes<S>::Vec V;
  const S* const weight = a.weight + k * a.batch;
  S scratch[panel], grads[panel];
  for (int64_t b = begin; b < end; b += panel) {
    const int n = int(lesser(end - b, panel));
    S* const out = to.place(b, scratch);
    if (a.grad.stride != 0) {
      const Matrix all{a.grad.data, {0, a.grad.stride}, sizeof(S) == 4 ? DType::f32 : DType::f64};
      const S* const grad = row_of(all, 0, b, n, grads);
      for_vectors<S>(n, [&](int64_t i, auto lanes) {
        store_lanes(out + i, times(load_lanes<V>(weight + b + i, lanes), load_lanes<V>(grad + i, lanes)), lanes);
      });
    } else {
      const V grad = splat<V>(*a.grad.data);
      for_vectors<S>(n, [&](int64_t i, auto lanes) {
        store_lanes(out + i, times(load_lanes<V>(weight + b + i, lanes), grad), lanes);
      });
    }
    to.put(b, n, out);
  }
}

// Rows [begin, end) of the [B, K] matrix.
template <class S> void put_matrix(const Backward<S>& a, int64_t begin, int64_t end, const Gradient& to) {
  S scratch[panel];
  const int64_t rows = panel / a.columns;
  for (int64_t b = begin; b < end; b += rows) {
    const int64_t n = lesser(end - b, rows);
    S* const out = to.place(b * a.columns, scratch);
    for (int k = 0; k < a.columns; ++k) {
      const S* const weight = a.weight + k * a.batch + b;
      for (int64_t i = 0; i < n; ++i) {
        const S w = weight[i];
        out[i * a.columns + k] = w == 0 ? S(0) : w * number_at(a.grad, b + i);
      }
    }
    to.put(b * a.columns, int(n * a.columns), out);
  }
}

// The gradient of a batch-level goal, from samples [begin, end).
template <class S> double sum_column(const Backward<S>& a, int k, int64_t begin, int64_t end) {
  double sum = 0;
  for (int64_t b = begin; b < end; ++b) {
    const double w = a.weight[k * a.batch + b];
    sum += w == 0 ? 0.0 : w * double(number_at(a.grad, b));
  }
  return sum;
}

template <class S> void backward(const Backward<S>& a, void* workspace, Parallel parallel) {
  const int64_t chunks = ceil_div(a.batch, chunk);
  double one[max_goals], *const parts = workspace ? static_cast<double*>(workspace) : one;
  each(parallel, chunks, [&](int64_t c) {
    const int64_t begin = c * chunk, end = lesser(begin + chunk, a.batch);
    for (int o = 0; o < a.outputs; ++o) {
      const Output& out = a.out[o];
      const Gradient to{out.data, out.dtype};
      if (out.batch_level) {
        parts[c * a.outputs + o] = sum_column(a, out.column, begin, end);
      } else if (out.column < 0) {
        put_matrix(a, begin, end, to);
      } else {
        put_column(a, out.column, begin, end, to);
      }
    }
  });
  for (int o = 0; o < a.outputs; ++o) {
    if (!a.out[o].batch_level) continue;
    double sum = 0;
    for (int64_t c = 0; c < chunks; ++c) sum += parts[c * a.outputs + o];
    const Gradient to{a.out[o].data, a.out[o].dtype};
    S scratch, *const out = to.place(0, &scratch);
    *out = S(sum);
    to.put(0, 1, out);
  }
}

template <class S> int64_t bytes_of(const Backward<S>& a) {
  const int64_t chunks = ceil_div(a.batch, chunk);
  return chunks > 1 ? chunks * a.outputs * int64_t(sizeof(double)) : 0;
}

}  // namespace BOMKERN_ISA
}  // namespace goal_set
}  // namespace bomkern
