// Include first in a translation unit for AVX2: every function after it may use these instructions.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define BOMKERN_VECTOR_BYTES 32
