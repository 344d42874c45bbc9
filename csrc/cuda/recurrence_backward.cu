// The steps of a recurrence backward, before the products. What the forward made of c is made
// again; sums over rows are left to whoever calls, whose order is one.
#include "cuda/recurrence.cuh"

namespace lstm_ext::cuda {
namespace {

// The gradient of h as the later step leaves it.
template <class T>
__device__ inline Sum<T> gradient_of_h(const RecurrenceBackward<T>& call, int64_t row, int column) {
  const int64_t at = row * call.options.P + column;
  const Sum<T> past = call.grad_h[at];
  if (row >= call.later_rows) return past;
  if (is_set(call.later_reset, row)) return 0;
  Sum<T> product = widen(call.product[at]);
  if (call.later_dropout_h.data != nullptr) product *= mask_at(call.later_dropout_h, row, column);
  return past + product;
}

// What is left of a sequence that has no part in the step.
template <class T>
__device__ inline void hand_on(const RecurrenceBackward<T>& call, int64_t row, int column) {
  call.grad_h[row * call.options.P + column] = gradient_of_h(call, row, column);
}

// The gradient of what the step made of h, before its clip and its mask; what goes past the step
// takes the place of the gradient of h.
template <class T>
__device__ inline Sum<T> gradient_of_h_new(const RecurrenceBackward<T>& call, int64_t row,
                                           int column) {
  const int64_t at = row * call.options.P + column;
  Sum<T> grad = gradient_of_h(call, row, column), past = 0;
  if (call.grad_output != nullptr) grad += widen(call.grad_output[at]);
  if (call.update_h.data != nullptr) {
    const Sum<T> u = mask_at(call.update_h, row, column);
    past = (1 - u) * grad;
    grad *= u;
  }
  call.grad_h[at] = past;
  const auto clip = static_cast<Sum<T>>(call.options.projection_clip);
  return clip > 0 ? where_within(widen(call.projected[at]), clip, grad) : grad;
}

template <class T>
__global__ void __launch_bounds__(kSpreadThreads)
    recurrence_end_gradient_kernel(RecurrenceBackward<T> call) {
  const int64_t row = blockIdx.x;
  const Columns columns;
  const int P = call.options.P;
  for (int column = columns.first; column < P; column += columns.stride)
    if (row < call.rows)
      call.grad_h_new[row * P + column] = narrow<T>(gradient_of_h_new(call, row, column));
    else
      hand_on(call, row, column);
}

template <class T>
__global__ void __launch_bounds__(kRecurrenceThreads, kRecurrenceBlocks)
    recurrence_step_gradient_kernel(RecurrenceBackward<T> call) {
  using S = Sum<T>;
  const RecurrenceOptions<T>& options = call.options;
  const int H = options.H;
  const int64_t row = blockIdx.x;
  const Columns units;
  const bool projects = call.grad_r != nullptr;
  if (row >= call.rows) {
    if (!projects)
      for (int unit = units.first; unit < H; unit += units.stride) hand_on(call, row, unit);
    return;
  }
  const T *gates = call.gates + row * 4 * H, *c_before = call.c_before + row * H;
  S* const grad_c = call.grad_c + row * H;
  T* const grad_z = call.grad_z + row * 4 * H;
  const bool reset = is_set(call.reset, row), normed = options.norm != nullptr;
  const S clip = static_cast<S>(options.cell_clip);
  LSTM_EXT_DYNAMIC_SHARED(S, shared);  // [kSumPlaces], [4][H]: of a unit, its thread's alone
  BlockSums<S> sums(shared);
  S* const own = shared + kSumPlaces;
  const auto gate_of = [&](int unit) {
    return Gates<S>{widen(gates[unit]), widen(gates[H + unit]), widen(gates[2 * H + unit]),
                    widen(gates[3 * H + unit])};
  };
  const auto grad_r_of = [&](int unit) {
    return projects ? widen(call.grad_r[row * H + unit]) : gradient_of_h_new(call, row, unit);
  };
  // The gradient of the c that the step handed on: through the step, and what goes past it.
  const auto split = [&](int unit, S& past) {
    const S grad = grad_c[unit];
    past = 0;
    if (call.update_c.data == nullptr) return grad;
    const S u = mask_at(call.update_c, row, unit);
    past = (1 - u) * grad;
    return u * grad;
  };
  S of_normalized[2] = {};  // of the gradient before the norm of z: its sum, and along the values
  // Gradients of the pre-activations and of c, from that of c~.
  const auto finish = [&](int unit, const Gates<S>& gate, S before, S raw, S grad_o, S grad_state,
                          S past) {
    if (clip > 0) grad_state = where_within(raw, clip, grad_state);
    S grad_before;
    const Gates<S> grad = PlainCell::state_gradients(gate, before, grad_state, grad_o, grad_before);
    grad_c[unit] = reset ? S(0) : grad_before + past;
    const S of_gates[kGates] = {grad.i, grad.f, grad.g, grad.o};
#pragma unroll
    for (int k = 0; k < kGates; ++k) {
      const int at = k * H + unit;
      if (!normed) {
        grad_z[at] = narrow<T>(of_gates[k]);
        continue;
      }
      const int64_t in_step = row * 4 * H + at;
      const S value = widen(call.normalized[in_step]);
      if (call.grad_pre != nullptr) call.grad_pre[in_step] = narrow<T>(of_gates[k]);
      if (call.norm_terms != nullptr) call.norm_terms[in_step] = of_gates[k] * value;
      own[at] = of_gates[k] * widen(options.norm[at]);
      of_normalized[0] += own[at];
      of_normalized[1] += own[at] * value;
    }
  };
  if (options.norm_c == nullptr) {
    for (int unit = units.first; unit < H; unit += units.stride) {
      const Gates<S> gate = gate_of(unit);
      const S before = widen(c_before[unit]), raw = next_cell_state(gate, before);
      const S tanh_c = Math::tanh(clip > 0 ? clamp(raw, clip) : raw), grad_h = grad_r_of(unit);
      S past;
      const S through = split(unit, past);
      finish(unit, gate, before, raw, PlainCell::output_gradient(gate, tanh_c, grad_h),
             through + PlainCell::shown_gradient(gate, tanh_c, grad_h), past);
    }
  } else {
    S sum = 0;
    for (int unit = units.first; unit < H; unit += units.stride) {
      const S raw = next_cell_state(gate_of(unit), widen(c_before[unit]));
      own[unit] = clip > 0 ? clamp(raw, clip) : raw;
      sum += own[unit];
    }
    const RowMoments<S> of_c = moments_of(sums, sum, H, options.eps, [&](const auto& add) {
      for (int unit = units.first; unit < H; unit += units.stride) add(own[unit]);
    });
    S of_value[2] = {};
    for (int unit = units.first; unit < H; unit += units.stride) {
      const Gates<S> gate = gate_of(unit);
      const S value = (own[unit] - of_c.mean) * of_c.scale, weight = widen(options.norm_c[unit]);
      S shown = value * weight;
      if (options.bias_c != nullptr) shown += widen(options.bias_c[unit]);
      const S tanh_c = Math::tanh(shown), grad_h = grad_r_of(unit);
      S grad_shown = PlainCell::shown_gradient(gate, tanh_c, grad_h), past;
      if (options.carry_norm) grad_shown += split(unit, past);
      if (call.norm_c_terms != nullptr) call.norm_c_terms[row * H + unit] = grad_shown * value;
      if (call.bias_c_terms != nullptr) call.bias_c_terms[row * H + unit] = grad_shown;
      own[H + unit] = grad_shown * weight;
      own[3 * H + unit] = PlainCell::output_gradient(gate, tanh_c, grad_h);
      of_value[0] += own[H + unit];
      of_value[1] += own[H + unit] * value;
    }
    sums.add_up(of_value);
    const S mean = of_value[0] / static_cast<S>(H), slope = of_value[1] / static_cast<S>(H);
    for (int unit = units.first; unit < H; unit += units.stride) {
      const Gates<S> gate = gate_of(unit);
      const S before = widen(c_before[unit]), value = (own[unit] - of_c.mean) * of_c.scale;
      S grad_state = (own[H + unit] - mean - value * slope) * of_c.scale, past;
      const S through = split(unit, past);
      if (!options.carry_norm) grad_state += through;
      finish(unit, gate, before, next_cell_state(gate, before), own[3 * H + unit], grad_state,
             past);
    }
  }
  if (!normed) return;
  sums.add_up(of_normalized);
  const S mean = of_normalized[0] / static_cast<S>(4 * H),
          slope = of_normalized[1] / static_cast<S>(4 * H), scale = call.scale[row];
  for (int unit = units.first; unit < H; unit += units.stride)
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) {
      const int at = gate * H + unit;
      const S value = widen(call.normalized[row * 4 * H + at]);
      grad_z[at] = narrow<T>((own[at] - mean - value * slope) * scale);
    }
}

}  // namespace

template <class T>
cudaError_t recurrence_end_gradient(const RecurrenceBackward<T>& call, cudaStream_t stream) {
  const int64_t rows = std::max(call.rows, call.later_rows);
  if (rows == 0) return cudaSuccess;
  return launch(over_columns(rows, call.options.P, stream), recurrence_end_gradient_kernel<T>,
                call);
}

template <class T>
cudaError_t recurrence_step_gradient(const RecurrenceBackward<T>& call, cudaStream_t stream) {
  const int64_t rows = call.grad_r != nullptr ? call.rows : std::max(call.rows, call.later_rows);
  if (rows == 0) return cudaSuccess;
  return launch(over_units(rows, call.options, stream), recurrence_step_gradient_kernel<T>, call);
}

#define LSTM_EXT_INSTANTIATE(T)                                                                \
  template cudaError_t recurrence_end_gradient<T>(const RecurrenceBackward<T>&, cudaStream_t); \
  template cudaError_t recurrence_step_gradient<T>(const RecurrenceBackward<T>&, cudaStream_t);
LSTM_EXT_EACH_TYPE(LSTM_EXT_INSTANTIATE)
#undef LSTM_EXT_INSTANTIATE

}  // namespace lstm_ext::cuda
