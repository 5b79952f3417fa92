// bomkern._C: importing it registers the ops; build() describes how it was built.
#include "../kernels/common/cpu_features.h"

#include <pybind11/pybind11.h>

#include <string>

namespace {

const char* isa_name() {
  switch (bomkern::cpu_isa()) {
    case bomkern::Isa::avx512: return "avx512";
    case bomkern::Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

pybind11::dict build() {
  pybind11::dict facts;
#if defined(__clang__)
  facts["compiler"] = std::string("clang ") + __clang_version__;
#else
  facts["compiler"] = std::string("g++ ") + __VERSION__;
#endif
  facts["torch"] = BOMKERN_TORCH_VERSION;
  facts["cuda"] = BOMKERN_CUDA_VERSION;
  facts["cuda_architectures"] = BOMKERN_CUDA_ARCHITECTURES;
  facts["cuda_remark"] = BOMKERN_CUDA_REMARK;
  facts["no_cuda_because"] = BOMKERN_NO_CUDA_BECAUSE;
  facts["no_openmp_because"] = BOMKERN_NO_OPENMP_BECAUSE;
#if defined(__x86_64__)
  facts["simd"] = "baseline avx2 avx512";
#else
  facts["simd"] = "baseline";
#endif
  facts["simd_here"] = isa_name();
  return facts;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled ops of bomkern.";
  m.def("build", &build, "What this extension was built with, as a dict of strings; empty where there is none.");
}
