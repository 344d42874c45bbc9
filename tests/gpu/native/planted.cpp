// Stray writes, wrong numbers and a kernel that hangs, for the tests of the checks themselves. The
// argument names what is planted; exit status 0 says that nothing was found.
#include <unistd.h>

#include <string>

#include "buffer.h"

namespace {

check::Report report;

void plant(const std::string& what) {
  for (const bool off : {false, true}) {
    report.begin(what + (off ? " off" : ""));
    check::Buffer<float> numbers(check::Values{1, 2, 3}, off), unwritten(2, off);
    float* const at = numbers.at();
    if (what == "before") at[-1] = 0;
    if (what == "far before") at[-40] = 0;
    if (what == "after") at[3] = 0;
    if (what == "wrong") at[1] = 2.5;
    if (what == "read after") at[1] = at[3];
    if (what == "hang") pause();
    report.ran(what == "refused" ? cudaErrorInvalidConfiguration : cudaSuccess);
    report.close(numbers.values(), {1, 2, 3}, 1e-6, "numbers");
    if (what == "unwritten") report.close(unwritten.values(), {0, 0}, 1e-6, "unwritten");
    check::Buffer<float> again(check::Values{1, 2, 3});
    if (what == "other bits") again.at()[2] = 4;
    report.that(numbers.same_bits(again) == (what != "wrong" && what != "read after"),
                machine::kSameBits);
  }
}

}  // namespace

int main(int count, char** arguments) {
  return check::run(1, arguments, "", report, [&](check::Amount) {
    machine::watch_seconds = 1;
    plant(count > 1 ? arguments[1] : "nothing");
  });
}
