// The CUDA kernels of a recurrence's steps, launch by launch, against plain loops in double
// precision: built and run as check_cell.cpp is. Exit status 0 if all agree.
#include <memory>
#include <string>

#include "buffer.h"
#include "cuda/recurrence.h"

namespace {

using namespace lstm_ext::cuda;
using check::Buffer;
using check::draw;
using check::sigmoid;
using check::Values;

check::Report report;

enum class Rows { kNone, kUnit, kEach };  // of a mask

struct Case {
  int N, rows, other_rows, H, P;  // other_rows: of the next step, or of the later one
  bool projects, keeps, reset;
  bool bias, norm, norm_c, bias_c, joint, carry;
  double cell_clip, projection_clip;
  Rows update_h, update_c, dropout_h;
  bool off;  // every pointer one number beyond a multiple of 16 bytes
};

// Each part of a step in about every second case.
Case draw_case(unsigned seed) {
  std::mt19937 random(seed * 9973 + 1);
  const auto one_of = [&](auto... values) {
    const std::common_type_t<decltype(values)...> all[] = {values...};
    return all[random() % sizeof...(values)];
  };
  const auto coin = [&] { return random() % 2 == 0; };
  const auto mask = [&] { return one_of(Rows::kNone, Rows::kUnit, Rows::kEach); };
  Case test = {};
  test.N = one_of(1, 3, 4);
  test.rows = static_cast<int>(1 + random() % test.N);
  test.other_rows = static_cast<int>(random() % (test.N + 1));
  test.H = one_of(1, 5, 33, 40);
  test.projects = coin();
  test.P = test.projects ? one_of(1, 7, 38) : test.H;
  test.keeps = coin();
  test.reset = coin();
  test.bias = coin();
  test.norm = coin();
  test.norm_c = coin();
  test.bias_c = test.norm_c && coin();
  test.joint = coin();
  test.carry = coin();
  test.cell_clip = coin() ? 0.4 : 0;
  test.projection_clip = test.projects && coin() ? 0.5 : 0;
  test.update_h = mask();
  test.update_c = mask();
  test.dropout_h = mask();
  test.off = coin();
  return test;
}

// More units than a block has threads, with a norm (512) and without (256).
Case wide(bool norm, int H) {
  Case test = {2, 2, 2, H, H, false, true, true};
  test.norm = test.norm_c = norm;
  test.cell_clip = 0.4;
  test.update_h = test.update_c = test.dropout_h = Rows::kEach;
  return test;
}

// Numbers as T has them, on the machine too. Null where they are not there.
template <class T>
class Numbers {
 public:
  Numbers() = default;
  Numbers(Values values, bool off)
      : values_(std::move(values)), buffer_(std::make_unique<Buffer<T>>(values_, off)) {}
  T* at() { return buffer_ ? buffer_->at() : nullptr; }
  const Values& values() const { return values_; }
  double operator[](int64_t k) const { return values_[k]; }

 private:
  Values values_;
  std::unique_ptr<Buffer<T>> buffer_;  // memory of a GPU is not moved
};

// What both directions read.
template <class T>
struct Step {
  Step(const Case& of, unsigned seed) : test(of), random(seed) {
    const auto vector = [&](bool there, int size) { return there ? some(size) : Numbers<T>(); };
    const auto mask = [&](Rows rows, int n, int columns) {
      return rows == Rows::kNone ? Numbers<T>() : some((rows == Rows::kUnit ? 1 : n) * columns);
    };
    const auto flags = [&](int n) {
      auto made = std::make_unique<bool[]>(n);
      for (int k = 0; k < n; ++k) made[k] = random() % 3 == 0;
      return made;
    };
    bias = vector(test.bias, 4 * test.H);
    norm = vector(test.norm, 4 * test.H);
    norm_c = vector(test.norm_c, test.H);
    bias_c = vector(test.bias_c, test.H);
    update_h = mask(test.update_h, test.rows, test.P);
    update_c = mask(test.update_c, test.rows, test.H);
    dropout_h = mask(test.dropout_h, test.other_rows, test.P);
    reset = flags(test.rows);
    other_reset = flags(test.other_rows);
    resets = {Values(reset.get(), reset.get() + test.rows), false};
    other_resets = {Values(other_reset.get(), other_reset.get() + test.other_rows), false};
  }
  Numbers<T> some(int64_t count, double scale = 1) {
    return {draw<T>(count, scale, random), test.off};
  }
  RecurrenceOptions<T> options() {
    return {test.H,     test.P,     bias.at(), norm.at(),      norm_c.at(),         bias_c.at(),
            test.joint, test.carry, 1e-2,      test.cell_clip, test.projection_clip};
  }
  static StepMask<T> mask(Numbers<T>& numbers, Rows rows, int columns) {
    return {numbers.at(), rows == Rows::kEach ? columns : 0};
  }
  static double mask_at(const Numbers<T>& numbers, Rows rows, int row, int columns, int column) {
    if (rows == Rows::kNone) return 1;
    return numbers[(rows == Rows::kEach ? row * columns : 0) + column];
  }
  double update_of_h(int row, int p) const {
    return mask_at(update_h, test.update_h, row, test.P, p);
  }
  double update_of_c(int row, int u) const {
    return mask_at(update_c, test.update_c, row, test.H, u);
  }
  double dropout(int row, int p) const {
    return mask_at(dropout_h, test.dropout_h, row, test.P, p);
  }
  bool is_reset(int row) const { return test.reset && reset[row]; }
  bool other_is_reset(int row) const { return test.reset && other_reset[row]; }

  const Case test;
  std::mt19937 random;
  Numbers<T> bias, norm, norm_c, bias_c, update_h, update_c, dropout_h;
  std::unique_ptr<bool[]> reset, other_reset;
  Numbers<bool> resets, other_resets;
};

struct Moments {
  double mean, scale;
};
Moments moments(const double* row, int size) {
  double mean = 0, squares = 0;
  for (int k = 0; k < size; ++k) mean += row[k] / size;
  for (int k = 0; k < size; ++k) squares += (row[k] - mean) * (row[k] - mean) / size;
  return {mean, 1 / std::sqrt(squares + 1e-2)};
}
double clipped(double v, double limit) {
  return limit > 0 ? std::min(std::max(v, -limit), limit) : v;
}

template <class T>
double tolerance() {
  return (sizeof(T) >= 4 ? 64 : 2) * check::spacing<T>();
}

template <class T>
void check_forward(const Case& test, unsigned seed) {
  const auto [N, rows, other, H, P] =
      std::tuple(test.N, test.rows, test.other_rows, test.H, test.P);
  Step<T> step(test, seed);
  Numbers<T> z = step.some(rows * 4 * H), x = step.some(rows * 4 * H), h = step.some(N * P),
             c = step.some(N * H), projected = step.some(rows * P);
  Values expected_h = h.values(), expected_c = c.values(), output(rows * P), r(rows * H);
  Values gates(rows * 4 * H), c_before(rows * H), normalized(rows * 4 * H), scale(rows);
  for (int n = 0; n < rows; ++n) {
    Values pre(4 * H), raw(H), shown(H);
    for (int k = 0; k < 4 * H; ++k)
      pre[k] = z[n * 4 * H + k] + (test.joint && test.norm ? x[n * 4 * H + k] : 0);
    if (test.norm) {
      const Moments of_z = moments(pre.data(), 4 * H);
      scale[n] = of_z.scale;
      for (int k = 0; k < 4 * H; ++k) {
        normalized[n * 4 * H + k] = (pre[k] - of_z.mean) * of_z.scale;
        pre[k] = normalized[n * 4 * H + k] * step.norm[k];
      }
    }
    for (int k = 0; k < 4 * H; ++k) {
      if (!(test.joint && test.norm)) pre[k] += x[n * 4 * H + k];
      if (test.bias) pre[k] += step.bias[k];
      gates[n * 4 * H + k] = k / H == 2 ? std::tanh(pre[k]) : sigmoid(pre[k]);
    }
    const double* gate = &gates[n * 4 * H];
    for (int u = 0; u < H; ++u) {
      c_before[n * H + u] = step.is_reset(n) ? 0 : c[n * H + u];
      raw[u] = shown[u] =
          clipped(gate[H + u] * c_before[n * H + u] + gate[u] * gate[2 * H + u], test.cell_clip);
    }
    const Moments of_c = moments(raw.data(), H);
    for (int u = 0; u < H; ++u) {
      if (test.norm_c) {
        shown[u] = (raw[u] - of_c.mean) * of_c.scale * step.norm_c[u];
        if (test.bias_c) shown[u] += step.bias_c[u];
      }
      const double update = step.update_of_c(n, u);
      expected_c[n * H + u] = update * (test.norm_c && test.carry ? shown[u] : raw[u]) +
                              (1 - update) * c_before[n * H + u];
      r[n * H + u] = gate[3 * H + u] * std::tanh(shown[u]);
    }
    for (int p = 0; p < P; ++p) {
      const double h_new =
          test.projects ? clipped(projected[n * P + p], test.projection_clip) : r[n * H + p];
      const double update = step.update_of_h(n, p);
      output[n * P + p] = expected_h[n * P + p] =
          update * h_new + (1 - update) * (step.is_reset(n) ? 0 : h[n * P + p]);
    }
  }
  Values next_x(other * P);
  for (int n = 0; n < other; ++n)
    for (int p = 0; p < P; ++p)
      next_x[n * P + p] = step.other_is_reset(n) ? 0 : expected_h[n * P + p] * step.dropout(n, p);

  const double allowed = tolerance<T>();
  Buffer<T> first(N * P);
  for (unsigned order = 0; order < machine::orders(); ++order) {
    machine::use_order(order);
    Buffer<T> new_h(h.values(), test.off), new_c(c.values(), test.off), out(rows * P, test.off),
        of_r(rows * H, test.off), kept_gates(rows * 4 * H, test.off), kept_c(rows * H, test.off),
        kept_normalized(rows * 4 * H, test.off), x_next(other * P, test.off);
    Buffer<Sum<T>> kept_scale(rows);
    RecurrenceForward<T> call = {};
    call.options = step.options();
    call.rows = rows;
    call.reset = test.reset ? step.resets.at() : nullptr;
    call.z = z.at();
    call.gates_x = x.at();
    call.update_c = Step<T>::mask(step.update_c, test.update_c, H);
    call.update_h = Step<T>::mask(step.update_h, test.update_h, P);
    call.c = new_c.at();
    call.h = new_h.at();
    call.output = out.at();
    if (test.projects) {
      call.r = of_r.at();
      call.projected = projected.at();
    }
    if (test.keeps) {
      call.gates = kept_gates.at();
      call.c_before = kept_c.at();
      if (test.norm) {
        call.normalized = kept_normalized.at();
        call.scale = kept_scale.at();
      }
    }
    call.next_rows = other;
    call.next_reset = test.reset ? step.other_resets.at() : nullptr;
    call.next_dropout_h = Step<T>::mask(step.dropout_h, test.dropout_h, P);
    call.next_x = x_next.at();
    const machine::Launches launches;
    report.ran(recurrence_step(call, nullptr));
    if (test.projects) report.ran(recurrence_end(call, nullptr));
    report.launched(launches, test.projects ? 2 : 1, "one launch between products");
    report.close(new_h.values(), expected_h, allowed, "h'");
    report.close(new_c.values(), expected_c, allowed, "c'");
    report.close(out.values(), output, allowed, "output");
    report.close(x_next.values(), next_x, allowed, "what comes next");
    if (test.projects) report.close(of_r.values(), r, allowed, "r");
    if (test.keeps) {
      report.close(kept_gates.values(), gates, allowed, "gates");
      report.close(kept_c.values(), c_before, allowed, "c before");
      if (test.norm) {
        report.close(kept_normalized.values(), normalized, allowed, "normalized");
        report.close(kept_scale.values(), scale, 64 * check::spacing<Sum<T>>(), "scale");
      }
    }
    if (order == 0)
      first.take_bits(new_h);
    else
      report.that(first.same_bits(new_h), machine::kSameBits);
  }

  // The beginning of a first step, which has none before it.
  Buffer<T> x_first(other * P, test.off);
  RecurrenceForward<T> call = {};
  call.options = step.options();
  call.h = h.at();
  call.next_rows = other;
  call.next_dropout_h = Step<T>::mask(step.dropout_h, test.dropout_h, P);
  call.next_x = x_first.at();
  report.ran(recurrence_end(call, nullptr));
  for (int k = 0; k < other * P; ++k) next_x[k] = h[k] * step.dropout(k / P, k % P);
  report.close(x_first.values(), next_x, allowed, "what comes first");
}

template <class T>
void check_backward(const Case& test, unsigned seed) {
  const auto [N, rows, other, H, P] =
      std::tuple(test.N, test.rows, test.other_rows, test.H, test.P);
  using S = Sum<T>;
  Step<T> step(test, seed);
  Numbers<T> product = step.some(other * P), output, gate = step.some(rows * 4 * H, 0.9),
             c = step.some(rows * H), value = step.some(rows * 4 * H),
             projected = step.some(rows * P), of_r = step.some(rows * H);
  if (test.keeps) output = step.some(rows * P);
  Numbers<S> scale({draw<S>(rows, 1, step.random), false}),
      of_h({draw<S>(N * P, 1, step.random), false}), of_c({draw<S>(N * H, 1, step.random), false});
  Values grad_h = of_h.values(), grad_c = of_c.values(), h_new(rows * P), z(rows * 4 * H),
         all_pre(rows * 4 * H), norm_terms(rows * 4 * H), norm_c_terms(rows * H),
         bias_c_terms(rows * H);
  for (int n = 0; n < other; ++n)
    for (int p = 0; p < P; ++p)
      grad_h[n * P + p] =
          step.other_is_reset(n) ? 0 : grad_h[n * P + p] + product[n * P + p] * step.dropout(n, p);
  for (int n = 0; n < rows; ++n) {
    for (int p = 0; p < P; ++p) {
      const int at = n * P + p;
      const double all = grad_h[at] + (test.keeps ? output[at] : 0), u = step.update_of_h(n, p);
      grad_h[at] = (1 - u) * all;
      h_new[at] =
          test.projection_clip > 0 && std::abs(projected[at]) > test.projection_clip ? 0 : u * all;
    }
    const auto at_gate = [&](int k, int u) { return gate[(n * 4 + k) * H + u]; };
    Values raw(H), kept(H), grad(H), grad_o(H), along(H);
    for (int u = 0; u < H; ++u) {
      raw[u] = at_gate(1, u) * c[n * H + u] + at_gate(0, u) * at_gate(2, u);
      kept[u] = clipped(raw[u], test.cell_clip);
    }
    const Moments of_kept = moments(kept.data(), H);
    double mean = 0, slope = 0;
    for (int u = 0; u < H; ++u) {
      const int at = n * H + u;
      const double normal = (kept[u] - of_kept.mean) * of_kept.scale, o = at_gate(3, u);
      double shown = kept[u];
      if (test.norm_c) shown = normal * step.norm_c[u] + (test.bias_c ? step.bias_c[u] : 0);
      const double grad_r = test.projects ? of_r[at] : h_new[at], t = std::tanh(shown);
      grad_o[u] = grad_r * t * o * (1 - o);
      grad[u] = grad_r * o * (1 - t * t);
      const double through = step.update_of_c(n, u) * of_c[at];
      if (!test.norm_c) {
        grad[u] += through;
        continue;
      }
      if (test.carry) grad[u] += through;
      norm_c_terms[at] = grad[u] * normal;
      bias_c_terms[at] = grad[u];
      grad[u] *= step.norm_c[u];
      mean += grad[u] / H;
      slope += grad[u] * normal / H;
    }
    for (int u = 0; u < H; ++u) {
      const int at = n * H + u;
      const double normal = (kept[u] - of_kept.mean) * of_kept.scale;
      if (test.norm_c) {
        grad[u] = (grad[u] - mean - normal * slope) * of_kept.scale;
        if (!test.carry) grad[u] += step.update_of_c(n, u) * of_c[at];
      }
      if (kept[u] != raw[u]) grad[u] = 0;
      const double i = at_gate(0, u), f = at_gate(1, u), g = at_gate(2, u);
      double* const pre = &all_pre[n * 4 * H + u];
      pre[0] = grad[u] * g * i * (1 - i);
      pre[H] = grad[u] * c[at] * f * (1 - f);
      pre[2 * H] = grad[u] * i * (1 - g * g);
      pre[3 * H] = grad_o[u];
      const double past = (1 - step.update_of_c(n, u)) * of_c[at];
      grad_c[at] = step.is_reset(n) ? 0 : grad[u] * f + past;
    }
    mean = slope = 0;
    for (int k = 0; k < 4 * H; ++k) {
      const int at = n * 4 * H + k;
      z[at] = all_pre[at];
      if (!test.norm) continue;
      norm_terms[at] = all_pre[at] * value[at];
      z[at] *= step.norm[k];
      mean += z[at] / (4 * H);
      slope += z[at] * value[at] / (4 * H);
    }
    if (test.norm)
      for (int at = n * 4 * H; at < (n + 1) * 4 * H; ++at)
        z[at] = (z[at] - mean - value[at] * slope) * scale[n];
  }

  const double allowed = tolerance<T>(), of_sums = 64 * check::spacing<S>();
  Buffer<T> first(rows * 4 * H);
  for (unsigned order = 0; order < machine::orders(); ++order) {
    machine::use_order(order);
    Buffer<S> new_h(of_h.values()), new_c(of_c.values()), terms(rows * 4 * H), terms_c(rows * H),
        terms_b(rows * H);
    Buffer<T> made_h(rows * P, test.off), made_z(rows * 4 * H, test.off),
        made_pre(rows * 4 * H, test.off);
    RecurrenceBackward<T> call = {};
    call.options = step.options();
    call.later_rows = other;
    call.later_reset = test.reset ? step.other_resets.at() : nullptr;
    call.later_dropout_h = Step<T>::mask(step.dropout_h, test.dropout_h, P);
    call.product = product.at();
    call.rows = rows;
    call.reset = test.reset ? step.resets.at() : nullptr;
    call.update_h = Step<T>::mask(step.update_h, test.update_h, P);
    call.update_c = Step<T>::mask(step.update_c, test.update_c, H);
    call.grad_output = output.at();
    call.grad_h = new_h.at();
    call.gates = gate.at();
    call.c_before = c.at();
    if (test.norm) {
      call.normalized = value.at();
      call.scale = scale.at();
    }
    call.grad_c = new_c.at();
    call.grad_z = made_z.at();
    const bool with_terms = order % 2 == 0;
    if (with_terms) {
      if (test.norm) {
        call.grad_pre = made_pre.at();
        call.norm_terms = terms.at();
      }
      if (test.norm_c) call.norm_c_terms = terms_c.at();
      if (test.norm_c) call.bias_c_terms = terms_b.at();
    }
    const machine::Launches launches;
    if (test.projects) {
      call.projected = projected.at();
      call.grad_h_new = made_h.at();
      report.ran(recurrence_end_gradient(call, nullptr));
      report.close(made_h.values(), h_new, allowed, "gradient of the projection");
      call.grad_r = of_r.at();
    }
    report.ran(recurrence_step_gradient(call, nullptr));
    report.launched(launches, test.projects ? 2 : 1, "one launch between products");
    report.close(new_h.values(), grad_h, of_sums, "gradient of h");
    report.close(new_c.values(), grad_c, of_sums, "gradient of c");
    report.close(made_z.values(), z, allowed, "gradient of z");
    if (with_terms && test.norm) {
      report.close(made_pre.values(), all_pre, allowed, "gradient after the norm");
      report.close(terms.values(), norm_terms, of_sums, "terms of norm");
    }
    if (with_terms && test.norm_c) {
      report.close(terms_c.values(), norm_c_terms, of_sums, "terms of norm_c");
      report.close(terms_b.values(), bias_c_terms, of_sums, "terms of bias_c");
    }
    if (order == 0)
      first.take_bits(made_z);
    else
      report.that(first.same_bits(made_z), machine::kSameBits);
  }
}

template <class T>
void check_case(const Case& test, unsigned seed) {
  report.begin(std::string(check::name<T>()) + " case " + std::to_string(seed) + " N " +
               std::to_string(test.N) + " H " + std::to_string(test.H) + " P " +
               std::to_string(test.P));
  check_forward<T>(test, seed);
  check_backward<T>(test, seed);
}

template <class T>
void check_all(check::Amount amount) {
  const unsigned count = amount == check::Amount::kAll ? 60 : 10;
  for (unsigned seed = 0; seed < count; ++seed) check_case<T>(draw_case(seed), seed);
  if (amount != check::Amount::kAll && !std::is_same_v<T, float>) return;
  check_case<T>(wide(true, 520), 1000);
  check_case<T>(wide(false, 260), 1001);
}

void check_fits() {
  report.begin("fits");
  report.that(recurrence_norm_fits<float>(14000, {132, 227 * 1024, false}), "14,000 units");
  report.that(!recurrence_norm_fits<double>(14000, {132, 227 * 1024, false}), "not of double");
  report.that(!recurrence_norm_fits<float>(8, {132, 64, false}), "not in 64 bytes");
}

}  // namespace

int main(int count, char** arguments) {
  return check::run(count, arguments, "The CUDA kernels of a recurrence.", report,
                    [](check::Amount amount) {
                      check_all<float>(amount);
                      check_all<__nv_bfloat16>(amount);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // which see no others
                      check_all<double>(amount);
                      check_all<__half>(amount);
#endif
                      check_fits();
                    });
}
