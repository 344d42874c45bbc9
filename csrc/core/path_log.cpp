#include "core/path_log.h"

#include <cstdlib>
#include <iostream>
#include <sstream>

namespace lstm_ext {

bool verbose() {
  static const bool wanted = [] {
    const char* const value = std::getenv("LSTM_EXT_VERBOSE");
    return value != nullptr && std::string(value) != "" && std::string(value) != "0";
  }();
  return wanted;
}

void log_path(const char* operation, const at::Tensor& input, const at::Tensor& hx,
              const std::string& path) {
  std::ostringstream line;  // whole, so that lines of several threads do not mix
  line << "lstm_ext: " << operation << ", " << toString(input.scalar_type()) << " input "
       << input.sym_sizes() << ", hidden " << hx.sym_size(-1) << ", " << input.device() << ": "
       << path << '\n';
  std::cerr << line.str();
}

}  // namespace lstm_ext
