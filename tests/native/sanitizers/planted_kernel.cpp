// A CUDA kernel with an error that no result shows, under the emulator, for AddressSanitizer to find; see planted.cpp.
// The errors come after a barrier: the emulator has changed stacks by then.
//   planted_kernel input | shared
#include "../cuda_emulator/checking.h"

namespace {

void kernel(const float* in, float* out, int past) {
  BOMKERN_SHARED_BYTES(bytes);
  float* const shared = reinterpret_cast<float*>(bytes);
  shared[threadIdx.x] = in[threadIdx.x + (past == 1)];
  __syncthreads();
  const float next = shared[threadIdx.x + (past == 2)];  // the last thread's is nobody's
  out[threadIdx.x] = threadIdx.x == 63 ? 0 : next;
}

}  // namespace

int main(int, char** names) {
  const int past = names[1] && !strcmp(names[1], "input") ? 1 : names[1] && !strcmp(names[1], "shared") ? 2 : 0;
  const checking::Buffer<float> in(64), out(64);
  emu::run(64 / 64, 64, 64 * sizeof(float), 1, false, [&] { kernel(in.data, out.data, past); });
  return 0;
}
