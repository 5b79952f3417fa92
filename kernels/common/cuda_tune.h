// Thresholds of launch plans that bench/tune.py can set. Host code; no public function sets them.
#pragma once
#include <stdint.h>
#include <string.h>

#include <initializer_list>

#define BOMKERN_EXPORT extern "C" __attribute__((visibility("default")))
// A threshold that ops share, and its setter. Each op's file defines both, and the linker keeps one.
#define BOMKERN_SHARED_THRESHOLD inline __attribute__((visibility("hidden"))) int64_t
#define BOMKERN_EXPORT_SHARED extern "C" inline __attribute__((visibility("default"), used))

namespace bomkern {
namespace cuda {

struct Threshold {
  const char* name;
  int64_t* value;
  bool (*takes)(int64_t) = nullptr;  // the values that it can have; null: any from 1 on
};

// Returns the previous value of the threshold, or -1 for an unknown name. A value below 1, or one that `takes` rejects,
// changes nothing.
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
