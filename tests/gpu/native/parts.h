// Measurements one after another in a child process, so that one which crashes or hangs costs no
// other: another child then goes on with the next.
#pragma once

#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <exception>
#include <string>

namespace native {

struct Part {
  const char* name;
  void (*measure)();
};

// What a program of parts does besides them.
struct Setting {
  int (*begin)();    // in each child first; a status but 0 ends the program with it
  bool (*settle)();  // after each part: false if this process can do no more
  void (*failed)(const std::string& name, const std::string& what);
  unsigned seconds;  // for a part
};

template <int kCount>
int run_here(const Part (&parts)[kCount], const Setting& setting, int first,
             const std::string& only, volatile int* current) {
  for (int k = first; k < kCount; ++k) {
    *current = k;
    if (only != "" && only != parts[k].name) continue;
    alarm(setting.seconds);
    try {
      parts[k].measure();
    } catch (const std::exception& error) {
      setting.failed(parts[k].name, error.what());
    }
    if (!setting.settle()) {
      setting.failed(parts[k].name, "ended its process");
      return 1;
    }
    alarm(0);
  }
  *current = kCount;
  return 0;
}

// only: the name of one part, or empty.
template <int kCount>
int run_parts(const Part (&parts)[kCount], const Setting& setting, const std::string& only) {
  void* const shared =
      mmap(nullptr, sizeof(int), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (shared == MAP_FAILED) return 1;
  auto* const current = static_cast<volatile int*>(shared);
  for (int first = 0; first < kCount; first = *current + 1) {
    *current = -1;
    std::fflush(stdout);
    const pid_t child = fork();
    if (child < 0) return 1;
    if (child == 0) {
      alarm(setting.seconds);
      const int unable = setting.begin();
      const int status = unable != 0 ? unable : run_here(parts, setting, first, only, current);
      std::fflush(stdout);
      _exit(status);
    }
    int status = 0;
    if (waitpid(child, &status, 0) != child) return 1;
    const bool began = *current >= 0;
    if (WIFEXITED(status) && (WEXITSTATUS(status) == 0 || !began)) return WEXITSTATUS(status);
    if (WIFSIGNALED(status)) {
      const std::string what = std::string("ended by ") + strsignal(WTERMSIG(status));
      setting.failed(began ? parts[*current].name : "start", what);
      if (!began) return 1;
    }
  }
  return 0;
}

}  // namespace native
