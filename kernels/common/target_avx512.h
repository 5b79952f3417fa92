// Include first in a translation unit for AVX-512: every function after it may use these instructions.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif
#define BOMKERN_VECTOR_BYTES 64
#define BOMKERN_AVX512  // __AVX512F__ is not defined by a pragma in C++
