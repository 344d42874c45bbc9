// What the layer's kernels do to wait less, each to be turned off alone for a measurement, as in
// -DLSTM_EXT_LOADS_FIRST=0.
#pragma once

#if !defined(LSTM_EXT_LOADS_FIRST)
#define LSTM_EXT_LOADS_FIRST 1
#endif
#if !defined(LSTM_EXT_STAGE_NEXT)
#define LSTM_EXT_STAGE_NEXT 1
#endif
#if !defined(LSTM_EXT_PUBLISH_FIRST)
#define LSTM_EXT_PUBLISH_FIRST 1
#endif
#if !defined(LSTM_EXT_SKIP_LAST_MEETING)
#define LSTM_EXT_SKIP_LAST_MEETING 1
#endif
#if !defined(LSTM_EXT_WIDE_FILL)
#define LSTM_EXT_WIDE_FILL 1
#endif
#if !defined(LSTM_EXT_SMALL_TILES)
#define LSTM_EXT_SMALL_TILES 1
#endif
#if !defined(LSTM_EXT_SPREAD_BACKWARD)
#define LSTM_EXT_SPREAD_BACKWARD 1
#endif
#if !defined(LSTM_EXT_QUICK_FLOAT)
#define LSTM_EXT_QUICK_FLOAT 0
#endif
#if !defined(LSTM_EXT_REGISTER_WAYS)
#define LSTM_EXT_REGISTER_WAYS 1
#endif

namespace lstm_ext::cuda::latency {

// What an element needs from memory, other than the exchanged operand, is read a meeting ahead.
constexpr bool kLoadsFirst = LSTM_EXT_LOADS_FIRST != 0;
// The exchanged operand is read some chunks before they are multiplied. In forward, of the 16-bit
// types with LSTM_EXT_STAGE_NEXT=2 alone: on an H200 it costs them 2 to 9 % there, and spares 7 to
// 11 % of backward.
template <class T, bool kBackward>
constexpr bool kStageNext = LSTM_EXT_STAGE_NEXT > (sizeof(T) >= 4 || kBackward ? 0 : 1);
// Blocks arrive at a meeting as soon as what others wait for is stored; the rest is stored, and the
// next step's numbers are read, before they wait.
constexpr bool kPublishFirst = LSTM_EXT_PUBLISH_FIRST != 0;
// Nobody waits after the last step.
constexpr bool kSkipLastMeeting = LSTM_EXT_SKIP_LAST_MEETING != 0;
// w_hh is copied to shared memory 16 bytes at a time.
constexpr bool kWideFill = LSTM_EXT_WIDE_FILL != 0;
// Forward: fewer rows a block where multiprocessors would have none.
constexpr bool kSmallTiles = LSTM_EXT_SMALL_TILES != 0;
// Backward: the same, and fewer units.
constexpr bool kSpreadBackward = LSTM_EXT_SPREAD_BACKWARD != 0;
// Forward: the ways that keep w_hh in registers, for layers that they are made for.
constexpr bool kRegisterWays = LSTM_EXT_REGISTER_WAYS != 0;
// Small layers in float32 by the activations of the 16-bit types (quick_math.cuh): off, for over
// 100 steps their error would be some twice that of exact ones.
constexpr bool kQuickFloat = LSTM_EXT_QUICK_FLOAT != 0;

}  // namespace lstm_ext::cuda::latency
