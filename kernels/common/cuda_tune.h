// Numbers of a launch plan that a bench may set while it looks for better ones. Host code; nothing public reaches them.
#pragma once
#include <stdint.h>
#include <string.h>

#include <initializer_list>

#define BOMKERN_EXPORT extern "C" __attribute__((visibility("default")))

namespace bomkern {
namespace cuda {

struct Threshold {
  const char* name;
  int64_t* value;
};

// What the threshold was, or -1 where none has that name. A value below 1 changes nothing.
inline int64_t tune(std::initializer_list<Threshold> thresholds, const char* name, int64_t value) {
  for (const Threshold& t : thresholds) {
    if (strcmp(t.name, name)) continue;
    const int64_t before = *t.value;
    if (value > 0) *t.value = value;
    return before;
  }
  return -1;
}

}  // namespace cuda
}  // namespace bomkern
