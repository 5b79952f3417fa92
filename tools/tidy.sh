#!/usr/bin/env bash
# Run clang-tidy with .clang-tidy over csrc/ and kernels/: the CPU code, and the CUDA code as the emulator compiles it.
#
#   make tidy                                        # everything: some minutes
#   PYTHON=python3 bash tools/tidy.sh FILE...        # some files
#
# CLANG_TIDY names a clang-tidy that is not on the PATH (pip install clang-tidy). PYTHON names a Python with torch.
set -uo pipefail
cd "$(dirname "$0")/.."
TIDY=${CLANG_TIDY:-clang-tidy}
PYTHON=${PYTHON:-python3}
command -v "$TIDY" >/dev/null || {
  echo "make tidy not run: clang-tidy is not installed; pip install clang-tidy, or set CLANG_TIDY"
  exit 0
}
"$TIDY" --version | grep -i version
FILES=("$@")
[[ $# -gt 0 ]] || FILES=(kernels/*/*.cpp kernels/*/cuda.cu csrc/*.cpp)
TORCH=$($PYTHON -c '
import sysconfig
from torch.utils.cpp_extension import include_paths
print(*(f"-isystem{path}" for path in [*include_paths(), sysconfig.get_paths()["include"]]))') || exit 2
# torch includes omp.h, a header of the compiler: g++'s is searched after all of clang's headers.
OPENMP=-idirafter$(dirname "$(g++ -print-file-name=include/omp.h)")
NOT_CUDA=-checks=-bugprone-narrowing-conversions,-bugprone-implicit-widening-of-multiplication-result
NOT_CUDA+=,-bugprone-misplaced-widening-cast,-bugprone-branch-clone,-bugprone-macro-parentheses
export TIDY TORCH OPENMP NOT_CUDA
check() {
  case $1 in
    # A thread's offset in its tile has 32 bits by design, to save registers. Offsets in a tensor are int64.
    *.cu) set -- "$1" "$NOT_CUDA" -x c++ -Itests/native/cuda_emulator ;;
    csrc/*) set -- "$1" -fopenmp $TORCH "$OPENMP" ;;
  esac
  local file=$1 only=()
  shift
  [[ ${1:-} == -checks=* ]] && only=("$1") && shift
  "$TIDY" --quiet "${only[@]}" "$file" -- -std=c++20 -Wno-psabi -DBOMKERN_TORCH_VERSION='""' -DBOMKERN_CUDA_VERSION='""' \
    -DBOMKERN_CUDA_ARCHITECTURES='""' -DBOMKERN_NO_CUDA_BECAUSE='""' \
    -DBOMKERN_NO_OPENMP_BECAUSE='""' -DBOMKERN_CUDA_REMARK='""' -Icsrc "$@" 2>/dev/null && echo "clean: $file"
}
export -f check
printf '%s\n' "${FILES[@]}" | xargs -P "${MAX_JOBS:-$(nproc)}" -I{} bash -c 'check {}'
