// One error of each kind that the sanitizers are there to find. tools/sanitize.sh runs it first: where one goes
// unreported, no later silence means anything.
//   planted overflow | undefined | race
#include "driver.h"

namespace {

// volatile: not to be foreseen by the compiler, nor left out.
volatile int64_t one_more = 0;

int overflow() {
  const driver::Exact<float> x(8);
  x[8 + one_more] = 1;
  return 0;
}

int undefined() {
  const int table[4] = {};
  volatile int largest = 0x7fffffff;
  return table[4 + one_more] + (largest + 1 == 0);
}

int race() {
  const driver::Exact<int64_t> sum(1);
  auto* const to = sum.data();
  driver::threads(4, [](void* state, int64_t) { ++*static_cast<int64_t*>(state); }, to);
  return 0;
}

}  // namespace

int main(int, char** names) {
  const char* const name = names[1] ? names[1] : "";
  if (!strcmp(name, "overflow")) return overflow();
  if (!strcmp(name, "undefined")) return undefined();
  if (!strcmp(name, "race")) return race();
  return fprintf(stderr, "planted overflow, undefined or race, not '%s'\n", name), 2;
}
