// The steps of a recurrence forward, after the products. Bound by launches and memory: some 12
// numbers go by for each unit of a row, and 6 to 10 more where they are kept for backward.
#include "cuda/recurrence.cuh"

namespace lstm_ext::cuda {
namespace {

// update * next + (1 - update) * before.
template <class T>
__device__ inline Sum<T> mix(const StepMask<T>& update, int64_t row, int column, Sum<T> next,
                             Sum<T> before) {
  if (update.data == nullptr) return next;
  const Sum<T> u = mask_at(update, row, column);
  return u * next + (1 - u) * before;
}

// h' of an element from h~.
template <class T>
__device__ inline void end_element(const RecurrenceForward<T>& call, int64_t row, int column,
                                   Sum<T> h_new) {
  const int64_t at = row * call.options.P + column;
  const Sum<T> before = is_set(call.reset, row) ? Sum<T>(0) : widen(call.h[at]);
  const T h = narrow<T>(mix(call.update_h, row, column, h_new, before));
  call.h[at] = h;
  call.output[at] = h;
}

// What the next product multiplies, once h is there.
template <class T>
__device__ inline void begin_next(const RecurrenceForward<T>& call, int64_t row, int column) {
  if (call.next_x == nullptr || row >= call.next_rows) return;
  const int64_t at = row * call.options.P + column;
  Sum<T> h = is_set(call.next_reset, row) ? Sum<T>(0) : widen(call.h[at]);
  if (call.next_dropout_h.data != nullptr) h *= mask_at(call.next_dropout_h, row, column);
  call.next_x[at] = narrow<T>(h);
}

template <class T>
__global__ void __launch_bounds__(kRecurrenceThreads, kRecurrenceBlocks)
    recurrence_step_kernel(RecurrenceForward<T> call) {
  using S = Sum<T>;
  const RecurrenceOptions<T>& options = call.options;
  const int H = options.H;
  const int64_t row = blockIdx.x;
  const Columns units;
  const bool projects = call.r != nullptr;
  if (row >= call.rows) {  // sequences that begin at the next step, in reverse
    if (!projects)
      for (int unit = units.first; unit < H; unit += units.stride) begin_next(call, row, unit);
    return;
  }
  const T *z = call.z + row * 4 * H, *x = call.gates_x + row * 4 * H;
  T* const c = call.c + row * H;
  const bool reset = is_set(call.reset, row);
  const bool normed = options.norm != nullptr, joint = normed && options.norm_joint;
  const S clip = static_cast<S>(options.cell_clip);
  LSTM_EXT_DYNAMIC_SHARED(S, shared);  // [kSumPlaces], [4][H]: of a unit, its thread's alone
  BlockSums<S> sums(shared);
  S* const own = shared + kSumPlaces;
  RowMoments<S> of_z = {0, 1};
  if (normed) {
    S sum = 0;
    for (int unit = units.first; unit < H; unit += units.stride)
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) {
        const int at = gate * H + unit;
        own[at] = widen(z[at]) + (joint ? widen(x[at]) : S(0));
        sum += own[at];
      }
    of_z = moments_of(sums, sum, 4 * H, options.eps, [&](const auto& add) {
      for (int unit = units.first; unit < H; unit += units.stride)
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate) add(own[gate * H + unit]);
    });
    if (call.scale != nullptr && threadIdx.x == 0) call.scale[row] = of_z.scale;
  }
  const auto pre = [&](int gate, int unit) {
    const int at = gate * H + unit;
    S v;
    if (normed) {
      v = (own[at] - of_z.mean) * of_z.scale;
      if (call.normalized != nullptr) call.normalized[row * 4 * H + at] = narrow<T>(v);
      v *= widen(options.norm[at]);
    } else {
      v = widen(z[at]);
    }
    if (!joint) v += widen(x[at]);
    return options.bias != nullptr ? v + widen(options.bias[at]) : v;
  };
  // c' and h', or what h is projected from; from the c before, the next one, and what is shown.
  const auto finish = [&](int unit, S before, S next, S o, S shown) {
    c[unit] = narrow<T>(mix(call.update_c, row, unit, next, before));
    const S r = o * Math::tanh(shown);
    if (projects) {
      call.r[row * H + unit] = narrow<T>(r);
    } else {
      end_element(call, row, unit, r);
      begin_next(call, row, unit);
    }
  };
  S sum = 0;
  for (int unit = units.first; unit < H; unit += units.stride) {
    const Gates<S> gate =
        PlainCell::activate<Math>(Gates<S>{pre(0, unit), pre(1, unit), pre(2, unit), pre(3, unit)});
    const S before = reset ? S(0) : widen(c[unit]);
    if (call.gates != nullptr) {
      T* const gates = call.gates + row * 4 * H;
      gates[unit] = narrow<T>(gate.i);
      gates[H + unit] = narrow<T>(gate.f);
      gates[2 * H + unit] = narrow<T>(gate.g);
      gates[3 * H + unit] = narrow<T>(gate.o);
      call.c_before[row * H + unit] = narrow<T>(before);
    }
    S next = next_cell_state(gate, before);
    if (clip > 0) next = clamp(next, clip);
    if (options.norm_c != nullptr) {
      own[unit] = next;  // the unit's places are free by now
      own[H + unit] = gate.o;
      sum += next;
    } else {
      finish(unit, before, next, gate.o, next);
    }
  }
  if (options.norm_c == nullptr) return;
  const RowMoments<S> of_c = moments_of(sums, sum, H, options.eps, [&](const auto& add) {
    for (int unit = units.first; unit < H; unit += units.stride) add(own[unit]);
  });
  for (int unit = units.first; unit < H; unit += units.stride) {
    S shown = (own[unit] - of_c.mean) * of_c.scale * widen(options.norm_c[unit]);
    if (options.bias_c != nullptr) shown += widen(options.bias_c[unit]);
    finish(unit, reset ? S(0) : widen(c[unit]), options.carry_norm ? shown : own[unit],
           own[H + unit], shown);
  }
}

template <class T>
__global__ void __launch_bounds__(kSpreadThreads) recurrence_end_kernel(RecurrenceForward<T> call) {
  const int64_t row = blockIdx.x;
  const Columns columns;
  const auto clip = static_cast<Sum<T>>(call.options.projection_clip);
  const int P = call.options.P;
  for (int column = columns.first; column < P; column += columns.stride) {
    if (row < call.rows) {
      const Sum<T> projected = widen(call.projected[row * P + column]);
      end_element(call, row, column, clip > 0 ? clamp(projected, clip) : projected);
    }
    begin_next(call, row, column);
  }
}

}  // namespace

template <class T>
bool recurrence_norm_fits(int H, const Device& device) {
  return bytes_of_row<T>(H) <= static_cast<size_t>(device.shared_per_block);
}

template <class T>
cudaError_t recurrence_step(const RecurrenceForward<T>& call, cudaStream_t stream) {
  const int64_t rows = call.r != nullptr ? call.rows : std::max(call.rows, call.next_rows);
  if (rows == 0) return cudaSuccess;
  return launch(over_units(rows, call.options, stream), recurrence_step_kernel<T>, call);
}

template <class T>
cudaError_t recurrence_end(const RecurrenceForward<T>& call, cudaStream_t stream) {
  const int64_t rows = std::max(call.rows, call.next_rows);
  if (rows == 0) return cudaSuccess;
  return launch(over_columns(rows, call.options.P, stream), recurrence_end_kernel<T>, call);
}

#define LSTM_EXT_INSTANTIATE(T)                                                       \
  template bool recurrence_norm_fits<T>(int, const Device&);                          \
  template cudaError_t recurrence_step<T>(const RecurrenceForward<T>&, cudaStream_t); \
  template cudaError_t recurrence_end<T>(const RecurrenceForward<T>&, cudaStream_t);
LSTM_EXT_EACH_TYPE(LSTM_EXT_INSTANTIATE)
#undef LSTM_EXT_INSTANTIATE

}  // namespace lstm_ext::cuda
