// LSTM_EXT_VERBOSE=1: a line on stderr for each call of an operator, with the path it took and why.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace lstm_ext {

// Read from the environment once, when the library is loaded.
bool verbose();

// "lstm_ext: OPERATION DTYPE [SIZES] on DEVICE: PATH". Call it only if verbose().
void log_path(const char* operation, const at::Tensor& input, const at::Tensor& hx,
              const std::string& path);

}  // namespace lstm_ext
