// Runs goal_set's CUDA kernels under the emulator against the definition written out in double.
#include "checking.h"
#include "keep.h"

#include "../../../kernels/goal_set/cuda.h"

extern "C" int64_t bomkern_tune_goal_set(const char* name, int64_t value);

using namespace bomkern;
using namespace bomkern::goal_set;
using namespace checking;

namespace {

enum class Lay { columns, mixed, matrix, misaligned };

struct Setting {
  int64_t batch;
  int count;
  Reduction reduction;
  double mu;
  Lay lay;
  bool save = true, grouped = true, special = false, given = false, masked = false;
};

bool chance(double p) { return uniform(0, 1) < p; }

double deficit_of(int curve, const double* p, double x, double* slope) {
  const double u = x - p[0], side = u > 0 ? p[1] : u < 0 ? p[2] : p[1] == p[2] ? p[1] : 0;
  const double r = side == 0 && u == u ? 0 : u * side, tail = p[3];
  double d = r;
  *slope = side;
  if (curve == 1) {
    d = r != r ? r : fabs(r) > 1e8 ? 2 * log(fabs(r)) : log1p(r * r);
    *slope = side * 2 * r / (1 + r * r);
  } else if (curve == 2) {
    d = r <= 1 - tail ? -log1p(-r) : (r - 1 + tail) / tail - log(tail);
    *slope = side / (r <= 1 - tail ? 1 - r : tail);
  }
  return d == -INFINITY ? INFINITY : d;
}

template <class S> struct Case {
  Setting s;
  std::vector<std::unique_ptr<Input>> inputs;  // a column each, [1, B]; the matrix's are one
  Buffer<S> params, temperature, multipliers, counts;
  Buffer<bool> present;  // [K, B]
  Forward<S> a{};
  std::vector<double> raw, slopes, means, weights, shares, losses;  // [B, K], [B, K], [B, G] three times, [B]
  std::vector<int> winner, tied;  // tied: the kernel's winner where it is as bad but for rounding, else -1
  std::vector<int> owner;

  explicit Case(const Setting& s) : s(s), params(4 * s.count), temperature(1), multipliers(s.count), counts(1 + 2 * s.count), present(s.count * s.batch) {
    const int K = s.count;
    a.columns.count = K, a.columns.batch = s.batch;
    for (int k = 0, g = 0; k < K; ++k) {
      if (k > 0 && (!s.grouped || chance(0.5))) ++g;
      owner.push_back(g);
      a.groups.first[g + 1] = uint8_t(k + 1);
      a.groups.count = g + 1;
    }
    const DType common = chance(0.5) ? any_type<S>() : number<S>();
    if (s.lay == Lay::matrix) inputs.emplace_back(new Input(s.batch, K, common, Layout::plain));
    for (int k = 0; k < K; ++k) add_column(k, common);
    *temperature.data = S(s.mu);
    a.params = params.data, a.temperature = temperature.data, a.reduction = s.reduction;
    for (int g = 0; g < s.count; ++g) multipliers.data[g] = S(chance(0.2) ? 0 : uniform(0, 1));
    a.multipliers = s.given ? multipliers.data : nullptr;
    draw_mask();
    define();
  }

  void add_column(int k, DType common) {
    const bool twin = k > 0 && chance(0.2) && s.lay != Lay::mixed;  // so that goals tie
    const DType dtype = s.lay == Lay::mixed ? any_type<S>() : common;
    const bool alone = s.lay == Lay::mixed && chance(0.3);
    if (s.lay != Lay::matrix) {
      const Layout strange = chance(0.5) ? Layout::gaps : Layout::plain;
      const Layout layout = alone ? Layout::columns_alike
                            : s.lay == Lay::mixed ? strange
                            : s.lay == Lay::misaligned && chance(0.5) ? Layout::misaligned : Layout::plain;
      inputs.emplace_back(new Input(1, s.batch, dtype, layout));
    }
    const double specials[] = {INFINITY, -INFINITY, NAN, 1e30, -1e30, 0};
    for (int64_t b = 0; b < s.batch; ++b) {
      double x = twin ? read_raw(b, k - 1) : uniform(-1, 2);
      if (s.special && chance(0.02)) x = specials[below(6)];
      if (!alone || b == 0) write_raw(b, k, x);
    }
    const Matrix& m = inputs[s.lay == Lay::matrix ? 0 : k]->matrix;
    const int64_t skip = s.lay == Lay::matrix ? k * size_of(m.dtype) : 0;
    a.columns.data[k] = static_cast<const char*>(m.data) + skip;
    a.columns.stride[k] = s.lay == Lay::matrix ? K() : m.stride[1];
    a.columns.dtype[k] = m.dtype;
    a.columns.curve[k] = twin ? a.columns.curve[k - 1] : uint8_t(below(3));
    S* const p = params.data + 4 * k;
    if (twin) return void(memcpy(p, p - 4, 4 * sizeof(S)));
    const int curve = a.columns.curve[k], side = curve == 0 ? below(3) : 2;
    p[0] = S(uniform(-1, 1)), p[1] = S(side == 1 ? 0 : uniform(0.2, 2));
    p[2] = S(side == 0 ? p[1] : side == 1 || curve ? -uniform(0.2, 2) : 0), p[3] = S(curve == 2 ? 0.3 : 0);
  }

  // Samples without any goal, columns that no sample has, and all between; values under the mask are not numbers.
  void draw_mask() {
    const double likely = chance(0.3) ? 1 : uniform(0, 1);
    std::vector<double> of_column(K());
    for (double& p : of_column) p = chance(0.2) ? 0 : likely;
    for (int64_t b = 0; b < s.batch; ++b) {
      const bool none = chance(0.1);
      for (int k = 0; k < K(); ++k) present.data[k * s.batch + b] = !s.masked || (!none && chance(of_column[k]));
    }
    if (!s.masked) return;
    for (int i = 0; i < 1 + G() + K(); ++i) counts.data[i] = 0;
    for (int64_t b = 0; b < s.batch; ++b) {
      bool some = false;
      for (int g = 0; g < G(); ++g) counts.data[1 + g] += S(members(g, b) > 0), some = some || members(g, b) > 0;
      for (int k = 0; k < K(); ++k) {
        counts.data[1 + G() + k] += S(here(k, b));
        if (!here(k, b) && inputs[s.lay == Lay::matrix ? 0 : k]->matrix.stride[1] && chance(0.5)) write_raw(b, k, NAN);
      }
      counts.data[0] += S(some);
    }
    a.present = present.data, a.counts = counts.data;
  }
  bool here(int k, int64_t b) const { return present.data[k * s.batch + b]; }
  int members(int g, int64_t b) const {
    int n = 0;
    for (int k = a.groups.first[g]; k < a.groups.first[g + 1]; ++k) n += here(k, b);
    return n;
  }
  // What the record's means are over: samples with any goal, with a goal, with a column.
  double samples() const { return s.masked ? std::max(1.0, double(counts.data[0])) : double(s.batch); }
  double with_goal(int g) const { return s.masked ? double(counts.data[1 + g]) : double(s.batch); }
  double with_column(int k) const { return s.masked ? double(counts.data[1 + G() + k]) : double(s.batch); }

  int K() const { return s.count; }
  int G() const { return a.groups.count; }
  double read_raw(int64_t b, int k) const { return s.lay == Lay::matrix ? inputs[0]->at(b, k) : inputs[k]->at(0, b); }
  void write_raw(int64_t b, int k, double x) { s.lay == Lay::matrix ? inputs[0]->put(b, k, x) : inputs[k]->put(0, b, x); }

  void define() {
    raw.resize(s.batch * K()), slopes.resize(s.batch * K()), losses.resize(s.batch), winner.resize(s.batch);
    means.assign(s.batch * G(), 0), weights.assign(s.batch * G(), 0), shares.resize(s.batch * G());
    for (int64_t b = 0; b < s.batch; ++b) {
      double *mean = &means[b * G()], *weight = &weights[b * G()], total = 0;
      for (int k = 0; k < K(); ++k) {
        const double p[4] = {params.data[4 * k], params.data[4 * k + 1], params.data[4 * k + 2], params.data[4 * k + 3]};
        raw[b * K() + k] = read_raw(b, k);
        const int g = owner[k];
        const double d = deficit_of(a.columns.curve[k], p, raw[b * K() + k], &slopes[b * K() + k]);
        if (here(k, b)) mean[g] += d / members(g, b);
      }
      int& w = winner[b];
      w = -1;
      for (int g = 0; g < G(); ++g) {
        if (members(g, b) == 0) continue;
        w = w < 0 || mean[g] > mean[w] || (mean[g] != mean[g] && mean[w] == mean[w]) ? g : w;
      }
      if (!tied.empty() && tied[b] >= 0) w = tied[b];
      losses[b] = 0;
      for (int g = 0; g < G(); ++g) weight[g] = shares[b * G() + g] = 0;
      if (w < 0) continue;
      const bool soft = s.mu > 0 && std::isfinite(mean[w]);
      for (int g = 0; g < G(); ++g) {
        if (members(g, b)) total += weight[g] = soft ? exp((mean[g] - mean[w]) / s.mu) : g == w;
      }
      for (int g = 0; g < G(); ++g) weight[g] /= total;
      losses[b] = soft ? mean[w] + s.mu * log(total) : mean[w];
      for (int g = 0; g < G(); ++g) shares[b * G() + g] = weight[g];
      if (s.given && std::isfinite(mean[w])) give(b, mean, weight, &shares[b * G()], w, &losses[b]);
    }
  }
  // Weights by the multipliers, and shares by their parts of the sum.
  void give(int64_t b, const double* mean, double* weight, double* share, int w, double* loss) const {
    double sum = 0;
    *loss = 0;
    for (int g = 0; g < G(); ++g) {
      const bool there = members(g, b) > 0;
      if (there) *loss += multipliers.data[g] == 0 ? 0 : multipliers.data[g] * mean[g];
      if (s.reduction == Reduction::min) {
        sum += there ? multipliers.data[g] : 0;
      } else {
        sum += multipliers.data[g] * with_goal(g) / samples();
      }
    }
    for (int g = 0; g < G(); ++g) {
      const bool finite = std::isfinite(*loss);
      const double own = members(g, b) ? double(multipliers.data[g]) : 0;
      weight[g] = finite ? own : g == w;
      share[g] = finite ? own / (sum > 0 ? sum : 1) : g == w;
    }
  }
  bool finite(int64_t b) const { return std::isfinite(losses[b]); }

  // The sample that reduction "min" takes; where `taken` is as bad but for rounding, that one.
  int64_t taken = -1;
  int64_t worst() const {
    if (taken >= 0) return taken;
    int64_t at = -1;
    for (int64_t b = 0; b < s.batch; ++b) {
      if (winner[b] < 0) continue;
      at = at < 0 || losses[b] > losses[at] || (losses[b] != losses[b] && losses[at] == losses[at]) ? b : at;
    }
    return at < 0 ? 0 : at;
  }

  // How far rounding may move weights: a difference of deficits over mu.
  double slack(int64_t b) const {
    const double size = winner[b] < 0 ? 0 : fabs(means[b * G() + winner[b]]), epsilon = sizeof(S) == 4 ? 1e-6 : 1e-14;
    return std::isfinite(size) ? epsilon * (4 + (s.mu > 0 ? 8 * (1 + size) / s.mu : 0)) : epsilon;
  }
};

template <class S>
double mean_of(const Case<S>& c, int64_t batch, double (*value)(const Case<S>&, int64_t, int), int i, double samples) {
  double sum = 0;
  for (int64_t b = 0; b < batch; ++b) sum += value(c, b, i);
  return sum / samples;
}

template <class S> void check_record(const Case<S>& c, const S* record, double loss, double slack) {
  const RecordAt at(c.G(), c.K());
  const double epsilon = sizeof(S) == 4 ? 3e-6 : 1e-12;
  const int64_t batch = c.s.batch, taken = c.worst();
  const auto same = [&](const char* what, int i, double want, double tolerance, double size = 1) {
    expect(close(record[i], want, tolerance, size), what, i, record[i], want);
  };
  for (int g = 0; g < c.G(); ++g) {
    const auto weight = [](const Case<S>& c, int64_t b, int g) { return c.shares[b * c.G() + g]; };
    const double share = c.s.reduction == Reduction::min ? weight(c, taken, g) : mean_of<S>(c, batch, weight, g, c.samples());
    same("share", at.share + g, share, slack);
    const auto level = [](const Case<S>& c, int64_t b, int g) {
      const double mean = c.means[b * c.G() + g];
      return c.members(g, b) ? exp(mean < 0 ? 0 : -mean) : 0;
    };
    same("level", at.level + g, mean_of<S>(c, batch, level, g, c.with_goal(g)), epsilon);
    double size = 1;  // what cancels in the mean
    for (int64_t b = 0; b < batch; ++b) size = std::max(size, std::isfinite(c.means[b * c.G() + g]) ? fabs(c.means[b * c.G() + g]) : 0);
    const auto mean = [](const Case<S>& c, int64_t b, int g) { return c.means[b * c.G() + g]; };
    same("deficit", at.deficit + g, mean_of<S>(c, batch, mean, g, c.with_goal(g)), epsilon, size);
  }
  for (int k = 0; k < c.K(); ++k) {
    double highest = -INFINITY, size = 1;
    for (int64_t b = 0; b < batch; ++b) {
      const double x = c.raw[b * c.K() + k];
      if (c.here(k, b) && std::isfinite(x)) highest = std::max(highest, x), size = std::max(size, fabs(x));
    }
    const auto raw = [](const Case<S>& c, int64_t b, int k) { return c.here(k, b) ? c.raw[b * c.K() + k] : 0; };
    same("raw", at.raw + k, mean_of<S>(c, batch, raw, k, c.with_column(k)), epsilon, size);
    same("highest", at.highest + k, highest, 0);
    same("ideal", at.ideal + k, c.params.data[4 * k], 0);
    same("slope", at.slope + k, c.params.data[4 * k + 1], 0);
  }
  bool finite = true;
  for (int64_t b = 0; b < batch; ++b) finite = finite && c.finite(b);
  same("loss", at.loss, loss, epsilon);
  same("finite", at.finite, finite, 0);
}

template <class S> void check_backward(const Case<S>& c, const std::vector<double>& want_weight) {
  const int64_t batch = c.s.batch;
  const bool each = c.s.reduction == Reduction::none;
  const Gradients<S> grad(batch, each ? below(3) : 0);
  Buffer<S> weight(batch * c.K());
  for (size_t i = 0; i < weight.n; ++i) weight.data[i] = S(want_weight[i]);
  Backward<S> a{grad.row(), weight.data, batch, c.K()};
  std::vector<std::unique_ptr<checking::Output>> made;
  const auto add = [&](int column, bool batch_level, DType dtype) {
    made.emplace_back(new checking::Output(batch_level ? 1 : column < 0 ? batch * c.K() : batch, dtype));
    a.out[a.outputs++] = {made.back()->data(), column, batch_level, dtype};
  };
  if (c.s.lay == Lay::matrix) {
    add(-1, false, c.a.columns.dtype[0]);
  } else {
    for (int k = 0; k < c.K(); ++k) {
      if (!chance(0.15)) add(k, c.a.columns.stride[k] == 0, c.a.columns.dtype[k]);
    }
  }
  const bool sums = std::any_of(a.out, a.out + a.outputs, [](const goal_set::Output& out) { return out.batch_level; });
  const int launches = (a.outputs > 0) + (sums && batch > 4096);
  run(a, launches);
  for (int o = 0; o < a.outputs; ++o) {
    if (a.out[o].batch_level) expect_same_bits(a, made[o]->buffer, launches);
  }
  const double epsilon = sizeof(S) == 4 ? 2e-7 : 1e-15;
  const auto pull = [&](int k, int64_t b) { return weight.data[k * batch + b] * grad.at(b); };
  for (int o = 0; o < a.outputs; ++o) {
    const goal_set::Output& out = a.out[o];
    made[o]->buffer.check_guards("gradient");
    if (out.batch_level) {
      long double sum = 0;  // so that the error is the kernel's
      double size = 0;
      for (int64_t b = 0; b < batch; ++b) sum += pull(out.column, b), size += fabs(pull(out.column, b));
      expect(close_as(out.dtype, made[o]->at(0), sum, epsilon, size), "sum", o, made[o]->at(0), sum);
      continue;
    }
    for (int64_t i = 0; i < (out.column < 0 ? batch * c.K() : batch); ++i) {
      const double want = out.column < 0 ? pull(int(i % c.K()), i / c.K()) : pull(out.column, i);
      const double got = made[o]->at(i), subnormal = 1e-37;
      const bool tiny = fabs(want) < subnormal && fabs(got) < subnormal;
      expect(tiny || close_as(out.dtype, got, want, epsilon, 0), "gradient", i, got, want);
    }
  }
}

template <class S> void check(const Setting& s) {
  if (emu::left_out()) return;
  begin("float%d B=%lld K=%d reduction=%d mu=%g layout=%d save=%d grouped=%d special=%d given=%d masked=%d", int(sizeof(S)) * 8,
        (long long)s.batch, s.count, int(s.reduction), s.mu, int(s.lay), s.save, s.grouped, s.special, s.given,
        s.masked);
  emu::machine.multiprocessors = chance(0.5) ? 3 : 16;
  Case<S> c(s);
  const bool each = s.reduction == Reduction::none, global = s.reduction == Reduction::min;
  Buffer<S> loss(each ? s.batch : 1), record(RecordAt(c.G(), s.count).finite + 1), weight(s.save ? s.batch * s.count : 0);
  Buffer<int64_t> bottleneck(s.batch);
  c.a.loss = loss.data, c.a.record = record.data, c.a.bottleneck = bottleneck.data, c.a.weight = s.save ? weight.data : nullptr;
  run(c.a, 1);
  loss.check_guards("loss"), record.check_guards("record"), weight.check_guards("weight"), bottleneck.check_guards("bottleneck");

  const double epsilon = sizeof(S) == 4 ? 3e-6 : 1e-12;
  double sum = 0, slack = 0;
  c.tied.assign(s.batch, -1);
  for (int64_t b = 0; b < s.batch; ++b) {
    const double *mean = &c.means[b * c.G()], got = bottleneck.data[b];
    const int want = c.winner[b];
    const bool either = got == want || (got >= 0 && want >= 0 && c.members(int(got), b) &&
                                        fabs(mean[int(got)] - mean[want]) <= epsilon * (1 + fabs(mean[want])));
    expect(either, "bottleneck", b, got, want);
    if (either && got != want) c.tied[b] = int(got);
    if (each) expect(close(loss.data[b], c.losses[b], epsilon, 1), "loss", b, loss.data[b], c.losses[b]);
    sum += c.losses[b];
    slack = std::max(slack, c.slack(b));
  }
  c.define();
  for (int64_t i = 0; global && s.save && i < s.batch * s.count; ++i) {
    const int64_t at = c.worst(), b = i % s.batch;
    if (weight.data[i] != 0 && fabs(c.losses[b] - c.losses[at]) <= epsilon * (1 + fabs(c.losses[at]))) c.taken = b;
  }
  const int64_t taken = c.worst();
  const double total = global ? c.losses[taken] : s.reduction == Reduction::sum ? sum : sum / c.samples();
  if (!each) expect(close(*loss.data, total, epsilon, 1), "loss", 0, *loss.data, total);
  check_record(c, record.data, total, slack);
  std::vector<double> want(s.batch * s.count);
  for (int k = 0; k < s.count; ++k) {
    for (int64_t b = 0; b < s.batch; ++b) {
      const int g = c.owner[k];
      const bool none = !c.finite(b) || (global && b != taken) || !c.here(k, b);
      const double share = none ? 0 : c.weights[b * c.G() + g] / c.members(g, b);
      const double part = s.reduction == Reduction::mean ? 1 / c.samples() : 1, slope = c.slopes[b * s.count + k];
      const int64_t at = k * s.batch + b;
      want[at] = share == 0 ? 0 : share * slope * part;
      if (!s.save) continue;
      const double size = std::isfinite(slope) ? fabs(slope) * part : 0;
      expect(close(weight.data[at], want[at], c.slack(b), size), "weight", at, weight.data[at], want[at]);
    }
  }
  if (s.batch <= 1200) expect_same_bits(c.a, record);
  check_backward(c, want);
}

template <class S> void check_modes(int64_t batch, int count) {
  for (int mode = 0; mode < 16; ++mode) {
    const double mu = mode / 4 % 2 ? uniform(0.05, 2) : 0;
    const bool save = !chance(0.2), grouped = mode / 8 == 1, special = chance(0.4), given = chance(0.3);
    const bool masked = chance(0.5);
    check<S>({batch, count, Reduction(mode % 4), mu, Lay(below(4)), save, grouped, special, given, masked});
  }
}

}  // namespace

int main() {
  for (const int batch : {1, 2, 31, 64, 127, 129, 512, 1000, 1025, 2047, 2052}) {
    check_modes<float>(batch, 1 + below(12));
    check_modes<double>(batch, 1 + below(12));
  }
  check_modes<float>(300, 64);
  check_modes<double>(1100, 64);
  for (const int64_t batch : {5001, 9000}) {  // the grid comes round again
    check<float>({batch, 3, Reduction::mean, 0, Lay::columns});
    check<float>({batch, 4, Reduction::min, 0.1, Lay::mixed});
    check<float>({batch, 8, Reduction::mean, 0.1, Lay::mixed});
    check<double>({batch, 6, Reduction::none, 0, Lay::mixed});
    check<double>({batch, 3, Reduction::none, 0.3, Lay::matrix});
    check<float>({batch, 2, Reduction::sum, 0, Lay::columns, false, false, true});
    check<float>({batch, 5, Reduction::mean, 0.2, Lay::mixed, true, true, true, false, true});
    check<float>({batch, 4, Reduction::min, 0, Lay::columns, true, true, false, true, true});
  }
  // Thresholds that a bench sets: grids of batches that are else one block's.
  expect(bomkern_tune_goal_set("one_block", 300) == 1024, "one_block", 0, 0, 1024);
  check_modes<float>(700, 5);
  // And those that no block can have.
  for (const auto& [name, now, value] : {std::tuple("one_block", 300, 1025), {"most_grid_threads", 128, 100},
                                         {"most_grid_threads", 128, 288}, {"least_grid_threads", 64, 512}}) {
    bomkern_tune_goal_set(name, value);
    expect(bomkern_tune_goal_set(name, 0) == now, name, value, double(bomkern_tune_goal_set(name, 0)), now);
  }
  check_keeps<float, float>(), check_keeps<float, double>(), check_keeps<double, float>(), check_keeps<double, double>();
  return done("goal_set");
}
