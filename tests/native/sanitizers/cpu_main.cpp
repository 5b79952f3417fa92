// Every CPU kernel on memory of exactly its size and on threads that nothing orders, with no torch and no Python
// between: for AddressSanitizer and UndefinedBehaviorSanitizer, and for ThreadSanitizer.
#include "driver.h"

int main() {
  driver::check_rows();
  driver::check_products();
  driver::check_goals();
  if (driver::failures) return fprintf(stderr, "%lld failures\n", (long long)driver::failures), 1;
  printf("%lld cases on %d instruction sets: every number written, the same on any threads\n", (long long)driver::cases,
         int(bomkern::cpu_isa()) + 1);
}
