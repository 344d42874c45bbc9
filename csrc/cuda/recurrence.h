// The launchers of a recurrence's steps (ops/recurrence.h): what lies between the library's
// products, a step at a time. Raw pointers and sizes, to the first row of a step; rows are dense.
//
//   forward, of each step       z = x W_hh^T by the library, recurrence_step
//   where h is projected        .., r W_hr^T by the library, recurrence_end
//   backward, of each step      recurrence_step_gradient, product = grad_z W_hh by the library
//   where h is projected        recurrence_end_gradient, grad_r by the library, the same two
//
// What comes after one product and before the next is one launch: the end of a step and the
// beginning of the next are.
#pragma once

#include "cuda/kernels.h"

namespace lstm_ext::cuda {

// A mask's rows of a step, stride numbers apart (0: one for all rows); null: none.
template <class T>
struct StepMask {
  const T* data;
  int64_t stride;
};

// What a recurrence has for all steps. H hidden, P projected (else H).
template <class T>
struct RecurrenceOptions {
  int H, P;
  const T* bias;    // [4H] or null
  const T* norm;    // [4H] or null
  const T* norm_c;  // [H] or null
  const T* bias_c;  // [H] or null
  bool norm_joint, carry_norm;
  double eps, cell_clip, projection_clip;  // clips of 0 are none

  bool has_norm() const { return norm != nullptr || norm_c != nullptr; }
};

template <class T>
struct RecurrenceForward {
  RecurrenceOptions<T> options;
  int64_t rows;       // of this step; 0: there is none yet, and recurrence_end begins the first
  const bool* reset;  // [rows]: h and c are zero before the step; or null
  const T* z;         // [rows, 4H]
  const T* gates_x;   // [rows, 4H]
  StepMask<T> update_c, update_h;
  T* c;                // [N, H], replaced
  T* h;                // [N, P], replaced
  T* output;           // [rows, P]
  T* r;                // [rows, H]: o * tanh; null where h is not projected
  const T* projected;  // [rows, P]: r W_hr^T
  T* gates;            // [rows, 4H], activated, with the next three; null in inference
  T* c_before;         // [rows, H]: the c that the step started from
  T* normalized;       // [rows, 4H] where there is a norm, before its weight
  Sum<T>* scale;       // [rows]: one over the deviation
  // Of the next step: what W_hh multiplies.
  int64_t next_rows;  // 0: there is none
  const bool* next_reset;
  StepMask<T> next_dropout_h;
  T* next_x;  // [next_rows, P], or null: h itself
};

// Gates and c; and unless h is projected, the end of the step and the beginning of the next.
template <class T>
cudaError_t recurrence_step(const RecurrenceForward<T>& call, cudaStream_t stream);

// h' from its projection, and the beginning of the next step.
template <class T>
cudaError_t recurrence_end(const RecurrenceForward<T>& call, cudaStream_t stream);

template <class T>
struct RecurrenceBackward {
  RecurrenceOptions<T> options;
  // Of the step that came after this one.
  int64_t later_rows;  // 0: there was none
  const bool* later_reset;
  StepMask<T> later_dropout_h;
  const T* product;  // [later_rows, P]: grad_z W_hh
  // Of this one.
  int64_t rows;  // 0: there is none, and recurrence_end_gradient ends the first
  const bool* reset;
  StepMask<T> update_h, update_c;
  const T* grad_output;  // [rows, P] or null: zero
  const T* projected;    // [rows, P] where h is projected
  Sum<T>* grad_h;        // [N, P], replaced; of it remains what goes past the step
  T* grad_h_new;         // [rows, P] where h is projected: of the projection
  const T* grad_r;       // [rows, H]: grad_h_new W_hr; null where h is not projected
  const T* gates;
  const T* c_before;
  const T* normalized;
  const Sum<T>* scale;
  Sum<T>* grad_c;        // [N, H], replaced
  T* grad_z;             // [rows, 4H]
  T* grad_pre;           // [rows, 4H] where there is a norm, of what follows it; or null
  Sum<T>* norm_terms;    // [rows, 4H] or null: added up, they are the gradient of norm
  Sum<T>* norm_c_terms;  // [rows, H], the same of norm_c
  Sum<T>* bias_c_terms;  // [rows, H], and of bias_c
};

// The later step's share in the gradient of h, and up to what W_hr is multiplied with.
template <class T>
cudaError_t recurrence_end_gradient(const RecurrenceBackward<T>& call, cudaStream_t stream);

// The same unless h is projected; then the gradients of z and c.
template <class T>
cudaError_t recurrence_step_gradient(const RecurrenceBackward<T>& call, cudaStream_t stream);

// Whether a row that is normalised has room in a block's shared memory.
template <class T>
bool recurrence_norm_fits(int H, const Device& device);

}  // namespace lstm_ext::cuda
