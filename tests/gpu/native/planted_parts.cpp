// Parts that fail in every way there is, for the test of parts.h.
#include <cstdlib>
#include <stdexcept>

#include "parts.h"

namespace {

bool usable = true;

void say(const char* what) {
  std::printf("%s\n", what);
  std::fflush(stdout);
}

const native::Part kParts[] = {
    {"first", [] { say("first"); }},   {"throws", [] { throw std::runtime_error("an error"); }},
    {"second", [] { say("second"); }}, {"crashes", [] { std::abort(); }},
    {"hangs", [] { pause(); }},        {"spoils", [] { usable = false; }},
    {"last", [] { say("last"); }},
};

int begin() { return std::getenv("NOT_HERE") != nullptr ? 77 : 0; }
bool settle() { return usable; }
void failed(const std::string& name, const std::string& what) { say((name + ": " + what).c_str()); }

}  // namespace

int main(int count, char** arguments) {
  return native::run_parts(kParts, {begin, settle, failed, 1}, count > 1 ? arguments[1] : "");
}
