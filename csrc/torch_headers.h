// The headers of torch and of the standard library that csrc/ uses, precompiled by tools/build_extension.py. Every file
// includes it first, as <torch_headers.h>, so that the compiler finds the precompiled form.
#ifndef BOMKERN_TORCH_HEADERS_H  // no #pragma once, because there are two copies of this file
#define BOMKERN_TORCH_HEADERS_H
#include "torch_internals.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/alias.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/scalar_tensor.h>
#include <c10/core/Event.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#ifdef BOMKERN_CUDA
#include <ATen/ops/t.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#endif  // BOMKERN_TORCH_HEADERS_H
