// Numbers of a launch plan that a bench may set while it looks for better ones. Host code; nothing public reaches them.
#pragma once
#include <stdint.h>
#include <string.h>

#include <initializer_list>

#define BOMKERN_EXPORT extern "C" __attribute__((visibility("default")))
// A threshold that ops share, and the setter beside it: each op's file has both, the library has them once.
#define BOMKERN_SHARED_THRESHOLD inline __attribute__((visibility("hidden"))) int64_t
#define BOMKERN_EXPORT_SHARED extern "C" inline __attribute__((visibility("default"), used))

namespace bomkern {
namespace cuda {

struct Threshold {
  const char* name;
  int64_t* value;
  bool (*takes)(int64_t) = nullptr;  // which values it can have; any from 1 on where null
};

// What the threshold was, or -1 where none has that name. A value below 1, or one that it cannot have, changes nothing.
inline int64_t tune(std::initializer_list<Threshold> thresholds, const char* name, int64_t value) {
  for (const Threshold& t : thresholds) {
    if (strcmp(t.name, name)) continue;
    const int64_t before = *t.value;
    if (value > 0 && (t.takes == nullptr || t.takes(value))) *t.value = value;
    return before;
  }
  return -1;
}

}  // namespace cuda
}  // namespace bomkern
