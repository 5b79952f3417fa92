// Compiles BOMKERN_KERNELS, an op's header, for any CPU: SSE2 on x86-64, NEON on 64-bit Arm.
#define BOMKERN_VECTOR_BYTES 16
#define BOMKERN_ISA baseline
#include BOMKERN_KERNELS
