// The steps of a recurrence between its products, a row at a time: what layer normalisation,
// clipping and zoneout do needs whole rows, or little time.
#pragma once

#include "cpu/activations.h"
#include "cpu/layer_forward.h"
#include "cpu/recurrence_kernels.h"

namespace lstm_ext::cpu {
namespace {

// body(at, n) for the vectors of n elements each that a row of so many has.
template <class S, class Body>
LSTM_EXT_INLINE void for_vectors(int64_t size, const Body& body) {
  for (int64_t at = 0; at < size; at += kWidthOf<S>) body(at, at_most(kWidthOf<S>, size - at));
}

template <class V>
LSTM_EXT_INLINE auto sum_of_lanes(V v) {
  constexpr int width = sizeof(V) / sizeof(v[0]);
  std::remove_reference_t<decltype(v[0])> lane[width];
  store(lane, v);
  for (int n = width / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) lane[i] += lane[i + n];
  return lane[0];
}

// Lanes beyond the first n as zero.
template <class S>
LSTM_EXT_INLINE VectorOf<S> first(VectorOf<S> v, int64_t n) {
  if (n >= kWidthOf<S>) return v;
  ComputeType<S> lane[kWidthOf<S>];
  store(lane, v);
  return load(lane, n);
}

LSTM_EXT_INLINE float square_root(float v) { return __builtin_sqrtf(v); }
LSTM_EXT_INLINE double square_root(double v) { return __builtin_sqrt(v); }

// A row's mean, and one over its deviation.
template <class T>
struct RowMoments {
  T mean, scale;
};
template <class S>
LSTM_EXT_INLINE RowMoments<ComputeType<S>> moments_of(const ComputeType<S>* row, int64_t size,
                                                      double eps) {
  using T = ComputeType<S>;
  VectorOf<S> sum = {}, squares = {};
  for_vectors<S>(size, [&](int64_t at, int64_t n) { sum += load(row + at, n); });
  const T mean = sum_of_lanes(sum) / static_cast<T>(size);
  for_vectors<S>(size, [&](int64_t at, int64_t n) {
    const VectorOf<S> d = first<S>(load(row + at, n) - mean, n);
    squares += d * d;
  });
  const T variance = sum_of_lanes(squares) / static_cast<T>(size);
  return {mean, static_cast<T>(1) / square_root(variance + static_cast<T>(eps))};
}

template <class V, class T>
LSTM_EXT_INLINE V clamp(V v, T limit) {
  v = v > limit ? zeros<V>() + limit : v;
  return v < -limit ? zeros<V>() - limit : v;
}
// v where the value before a clip lay within it, else zero.
template <class V, class T>
LSTM_EXT_INLINE V where_within(V before, T limit, V v) {
  return before > limit ? zeros<V>() : before < -limit ? zeros<V>() : v;
}

template <class S>
LSTM_EXT_INLINE const S* mask_row(const MaskRowsArgs& mask, int64_t row) {
  return mask.data ? static_cast<const S*>(mask.data) + row * mask.row_stride : nullptr;
}

template <class S>
LSTM_EXT_INLINE S* row_of(void* data, int64_t row, int64_t size) {
  return data ? static_cast<S*>(data) + row * size : nullptr;
}
template <class S>
LSTM_EXT_INLINE const S* row_of(const void* data, int64_t row, int64_t size) {
  return data ? static_cast<const S*>(data) + row * size : nullptr;
}

template <class T, class V>
LSTM_EXT_INLINE void add_to(T* terms, int64_t at, V v, int64_t n) {
  if (terms) store(terms + at, load(terms + at, n) + v, n);
}

template <class S>
void begin_recurrence(const RecurrenceBeginArgs& args) {
  const int64_t P = args.options.P, H = args.options.H, stride = factor_row<S>(P),
                masks = args.options.h_masks;
  for (int64_t row = 0; row < args.rows; ++row) {
    S* h = row_of<S>(args.h, row, P);
    if (args.reset && args.reset[row]) {
      std::memset(h, 0, P * sizeof(S));
      std::memset(row_of<S>(args.c, row, H), 0, H * sizeof(S));
    }
    const S* mask = mask_row<S>(args.dropout_h, row);
    auto* factors = static_cast<FactorElement<S>*>(args.factors) + row * stride;
    S* before = row_of<S>(args.h_before, row, masks * P);
    for (int64_t k = 0; k < masks; ++k) {
      for_vectors<S>(P, [&](int64_t at, int64_t n) {
        auto v = load(h + at, n);
        if (mask) v *= load(mask + k * P + at, n);
        store(factors + at, v, n);
        if (before) store(before + k * P + at, v, n);
      });
      factors += args.options.factors_apart * stride;
    }
  }
}

template <class S>
void recurrence_step(const RecurrenceStepArgs& args) {
  using T = ComputeType<S>;
  using V = VectorOf<S>;
  const RecurrenceOptions& options = args.options;
  const int64_t H = options.H, stride = factor_row<S>(H);
  const auto *bias = static_cast<const S*>(options.bias),
             *norm = static_cast<const S*>(options.norm),
             *norm_c = static_cast<const S*>(options.norm_c),
             *bias_c = static_cast<const S*>(options.bias_c);
  const bool joint = norm && options.norm_joint;
  const T clip = static_cast<T>(options.cell_clip);
  for (int64_t row = 0; row < args.rows; ++row) {
    T* z = row_of<T>(args.z, row, 4 * H);
    const S* x = row_of<S>(args.gates_x, row, 4 * H);
    RowMoments<T> of_z = {0, 1};
    if (joint)
      for_vectors<S>(4 * H, [&](int64_t at, int64_t n) {
        store(z + at, load(z + at, n) + load(x + at, n), n);
      });
    if (norm) {
      of_z = moments_of<S>(z, 4 * H, options.eps);
      if (args.scale) static_cast<T*>(args.scale)[row] = of_z.scale;
    }
    S* normalized = row_of<S>(args.normalized, row, 4 * H);
    S* c = row_of<S>(args.c, row, H);
    S* gates = row_of<S>(args.gates, row, 4 * H);
    S* c_before = row_of<S>(args.c_before, row, H);
    T* r = row_of<T>(args.r, row, H);
    S* kept = row_of<S>(args.r_kept, row, H);
    auto* factors =
        args.r_factors ? static_cast<FactorElement<S>*>(args.r_factors) + row * stride : nullptr;
    const S* update = mask_row<S>(args.update_c, row);
    const auto pre = [&](int64_t at, int64_t n) {
      V v = load(z + at, n);
      if (norm) {
        v = (v - of_z.mean) * of_z.scale;
        if (normalized) store(normalized + at, v, n);
        v *= load(norm + at, n);
      }
      if (!joint) v += load(x + at, n);
      return bias ? v + load(bias + at, n) : v;
    };
    const auto next_c = [&](V before, V next, int64_t at, int64_t n) {
      if (update) {
        const V u = load(update + at, n);
        next = u * next + (1 - u) * before;
      }
      store(c + at, next, n);
    };
    const auto show = [&](V o, V shown, int64_t at, int64_t n) {
      const V v = o * Activations<T>::tanh(shown);
      store(r + at, v, n);
      if (kept) store(kept + at, v, n);
      if (factors) store(factors + at, v, n);
    };
    for_vectors<S>(H, [&](int64_t at, int64_t n) {
      const Gates<V> gate = PlainCell::activate<Activations<T>>(
          Gates<V>{pre(at, n), pre(H + at, n), pre(2 * H + at, n), pre(3 * H + at, n)});
      const V before = load(c + at, n);
      if (gates) {
        store_gates(gates + at, H, gate, n);
        store(c_before + at, before, n);
      }
      V next = next_cell_state(gate, before);
      if (clip > 0) next = clamp(next, clip);
      if (norm_c) {
        store(z + at, next, n);  // the places of i and o are free by now
        store(z + 3 * H + at, gate.o, n);
        return;
      }
      next_c(before, next, at, n);
      show(gate.o, next, at, n);
    });
    if (!norm_c) continue;
    const RowMoments<T> of_c = moments_of<S>(z, H, options.eps);
    for_vectors<S>(H, [&](int64_t at, int64_t n) {
      const V raw = load(z + at, n);
      V shown = (raw - of_c.mean) * of_c.scale * load(norm_c + at, n);
      if (bias_c) shown += load(bias_c + at, n);
      next_c(load(c + at, n), options.carry_norm ? shown : raw, at, n);
      show(load(z + 3 * H + at, n), shown, at, n);
    });
  }
}

template <class S>
void end_recurrence(const RecurrenceEndArgs& args) {
  using T = ComputeType<S>;
  const int64_t P = args.options.P;
  const T clip = static_cast<T>(args.options.projection_clip);
  for (int64_t row = 0; row < args.rows; ++row) {
    const T* h_new = row_of<T>(args.h_new, row, P);
    S *h = row_of<S>(args.h, row, P), *output = row_of<S>(args.output, row, P),
      *projected = row_of<S>(args.projected, row, P);
    const S* update = mask_row<S>(args.update_h, row);
    for_vectors<S>(P, [&](int64_t at, int64_t n) {
      auto v = load(h_new + at, n);
      if (projected) store(projected + at, v, n);
      if (clip > 0) v = clamp(v, clip);
      if (update) {
        const auto u = load(update + at, n);
        v = u * v + (1 - u) * load(h + at, n);
      }
      store(h + at, v, n);
      store(output + at, v, n);
    });
  }
}

template <class S>
void recurrence_end_gradient(const RecurrenceEndGradientArgs& args) {
  using T = ComputeType<S>;
  using V = VectorOf<S>;
  const int64_t P = args.options.P, stride = factor_row<S>(P);
  const T clip = static_cast<T>(args.options.projection_clip);
  for (int64_t row = 0; row < args.rows; ++row) {
    const S* output = row_of<S>(args.grad_output, row, P);
    const S* projected = row_of<S>(args.projected, row, P);
    const S* update = mask_row<S>(args.update_h, row);
    T *grad_h = row_of<T>(args.grad_h, row, P), *grad_new = row_of<T>(args.grad_h_new, row, P);
    for_vectors<S>(P, [&](int64_t at, int64_t n) {
      V v = load(grad_h + at, n), past = {};
      if (output) v += load(output + at, n);
      if (update) {
        const V u = load(update + at, n);
        past = (1 - u) * v;
        v *= u;
      }
      if (clip > 0) v = where_within(V(load(projected + at, n)), clip, v);
      store(grad_h + at, past, n);
      store(grad_new + at, v, n);
      if (args.factors) store(static_cast<S*>(args.factors) + row * stride + at, v, n);
    });
  }
}

template <class S>
void recurrence_step_gradient(const RecurrenceStepGradientArgs& args) {
  using T = ComputeType<S>;
  using V = VectorOf<S>;
  const RecurrenceOptions& options = args.options;
  const int64_t H = options.H;
  const auto *norm = static_cast<const S*>(options.norm),
             *norm_c = static_cast<const S*>(options.norm_c),
             *bias_c = static_cast<const S*>(options.bias_c);
  const T clip = static_cast<T>(options.cell_clip);
  T *raw_c = static_cast<T*>(args.scratch), *grad_n = raw_c + H;
  for (int64_t row = 0; row < args.rows; ++row) {
    const S *gates = row_of<S>(args.gates, row, 4 * H), *c = row_of<S>(args.c_before, row, H);
    const T* grad_r = row_of<T>(args.grad_r, row, H);
    const S* update = mask_row<S>(args.update_c, row);
    const bool reset = args.reset && args.reset[row];
    T *grad_c = row_of<T>(args.grad_c, row, H), *grad_z = row_of<T>(args.grad_z, row, 4 * H);
    T *norm_c_terms = row_of<T>(args.norm_c_terms, row, H),
      *bias_c_terms = row_of<T>(args.bias_c_terms, row, H);
    // Of the c that the step handed on: through the step, and what goes past it.
    const auto split = [&](int64_t at, int64_t n, V& past) {
      V through = load(grad_c + at, n);
      past = zeros<V>();
      if (update) {
        const V u = load(update + at, n);
        past = (1 - u) * through;
        through *= u;
      }
      return through;
    };
    // Gradients of the pre-activations and of c, from that of c~.
    const auto finish = [&](const Gates<V>& gate, V before, V raw, V grad_o, V grad_state, V past,
                            int64_t at, int64_t n) {
      if (clip > 0) grad_state = where_within(raw, clip, grad_state);
      V grad_before;
      const Gates<V> grad =
          PlainCell::state_gradients(gate, before, grad_state, grad_o, grad_before);
      store_gates(grad_z + at, H, grad, n);
      store(grad_c + at, reset ? zeros<V>() : grad_before + past, n);
    };
    if (!norm_c) {
      for_vectors<S>(H, [&](int64_t at, int64_t n) {
        const Gates<V> gate = load_gates(gates + at, H, n);
        const V before = load(c + at, n), raw = next_cell_state(gate, before);
        const V tanh_c = Activations<T>::tanh(clip > 0 ? clamp(raw, clip) : raw);
        const V grad_h = load(grad_r + at, n);
        V past;
        const V through = split(at, n, past);
        finish(gate, before, raw, PlainCell::output_gradient(gate, tanh_c, grad_h),
               through + PlainCell::shown_gradient(gate, tanh_c, grad_h), past, at, n);
      });
    } else {
      for_vectors<S>(H, [&](int64_t at, int64_t n) {
        const V raw = next_cell_state(load_gates(gates + at, H, n), V(load(c + at, n)));
        store(raw_c + at, clip > 0 ? clamp(raw, clip) : raw, n);
      });
      const RowMoments<T> of_c = moments_of<S>(raw_c, H, options.eps);
      V sum = {}, along = {};
      for_vectors<S>(H, [&](int64_t at, int64_t n) {
        const Gates<V> gate = load_gates(gates + at, H, n);
        const V normalized = (load(raw_c + at, n) - of_c.mean) * of_c.scale;
        V shown = normalized * load(norm_c + at, n);
        if (bias_c) shown += load(bias_c + at, n);
        const V tanh_c = Activations<T>::tanh(shown), grad_h = load(grad_r + at, n);
        V grad_shown = PlainCell::shown_gradient(gate, tanh_c, grad_h), past;
        if (options.carry_norm) grad_shown += split(at, n, past);
        add_to(norm_c_terms, at, grad_shown * normalized, n);
        add_to(bias_c_terms, at, grad_shown, n);
        const V grad_normalized = first<S>(grad_shown * load(norm_c + at, n), n);
        sum += grad_normalized;
        along += grad_normalized * normalized;
        store(grad_n + at, grad_normalized, n);
        store(grad_z + 3 * H + at, PlainCell::output_gradient(gate, tanh_c, grad_h), n);
      });
      const T mean = sum_of_lanes(sum) / static_cast<T>(H),
              slope = sum_of_lanes(along) / static_cast<T>(H);
      for_vectors<S>(H, [&](int64_t at, int64_t n) {
        const Gates<V> gate = load_gates(gates + at, H, n);
        const V before = load(c + at, n);
        const V normalized = (load(raw_c + at, n) - of_c.mean) * of_c.scale;
        V grad_state = (load(grad_n + at, n) - mean - normalized * slope) * of_c.scale, past;
        const V through = split(at, n, past);
        if (!options.carry_norm) grad_state += through;
        finish(gate, before, next_cell_state(gate, before), load(grad_z + 3 * H + at, n),
               grad_state, past, at, n);
      });
    }
    if (norm) {
      const S* normalized = row_of<S>(args.normalized, row, 4 * H);
      T *pre = row_of<T>(args.grad_pre, row, 4 * H),
        *norm_terms = row_of<T>(args.norm_terms, row, 4 * H),
        *bias_terms = row_of<T>(args.bias_terms, row, 4 * H);
      V sum = {}, along = {};
      for_vectors<S>(4 * H, [&](int64_t at, int64_t n) {
        const V grad = load(grad_z + at, n), value = load(normalized + at, n);
        if (pre) store(pre + at, grad, n);
        add_to(norm_terms, at, grad * value, n);
        add_to(bias_terms, at, grad, n);
        const V of_value = grad * load(norm + at, n);
        store(grad_z + at, of_value, n);
        sum += of_value;
        along += of_value * value;
      });
      const T mean = sum_of_lanes(sum) / static_cast<T>(4 * H),
              slope = sum_of_lanes(along) / static_cast<T>(4 * H),
              scale = static_cast<const T*>(args.scale)[row];
      for_vectors<S>(4 * H, [&](int64_t at, int64_t n) {
        const V grad = (load(grad_z + at, n) - mean - load(normalized + at, n) * slope) * scale;
        store(grad_z + at, grad, n);
      });
    }
    if (!args.z_factors) continue;
    if (options.h_masks == 1) {
      for_vectors<S>(4 * H, [&](int64_t at, int64_t n) {
        store(row_of<S>(args.z_factors, row, 4 * H) + at, V(load(grad_z + at, n)), n);
      });
      continue;
    }
    auto* factors = static_cast<FactorElement<S>*>(args.z_factors) + row * factor_row<S>(H);
    for (int k = 0; k < 4; ++k) {
      for_vectors<S>(H, [&](int64_t at, int64_t n) {
        store(factors + at, V(load(grad_z + k * H + at, n)), n);
      });
      factors += options.factors_apart * factor_row<S>(H);
    }
  }
}

template <class S>
void recurrence_begin_gradient(const RecurrenceBeginGradientArgs& args) {
  using T = ComputeType<S>;
  const int64_t P = args.options.P;
  for (int64_t row = 0; row < args.rows; ++row) {
    T* grad_h = row_of<T>(args.grad_h, row, P);
    if (args.reset && args.reset[row]) {
      std::memset(grad_h, 0, P * sizeof(T));
      continue;
    }
    const T* product = row_of<T>(args.grad_product, row, P);
    const S* mask = mask_row<S>(args.dropout_h, row);
    for (int64_t k = 0; k < args.options.h_masks; ++k) {
      for_vectors<S>(P, [&](int64_t at, int64_t n) {
        auto v = load(product + at, n);
        if (mask) v *= load(mask + k * P + at, n);
        store(grad_h + at, load(grad_h + at, n) + v, n);
      });
      product += args.options.factors_apart * P;
    }
  }
}

template <class S>
constexpr RecurrenceKernels recurrence_table() {
  RecurrenceKernels table = {};
  table.begin = begin_recurrence<S>;
  table.step = recurrence_step<S>;
  table.end = end_recurrence<S>;
  table.end_gradient = recurrence_end_gradient<S>;
  table.step_gradient = recurrence_step_gradient<S>;
  table.begin_gradient = recurrence_begin_gradient<S>;
  return table;
}

}  // namespace
}  // namespace lstm_ext::cpu
