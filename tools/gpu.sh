#!/usr/bin/env bash
# On a machine with a GPU: build for it, run every test, the sanitizer on a small set, and the benches.
# Uses the python3 that has torch, and fetches nothing. Results go to $RESULTS (default bench/results).
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
RESULTS=${RESULTS:-bench/results}
mkdir -p "$RESULTS"
failed=0
step() {
  local name=$1
  shift
  echo "== $name"
  "$@" || { echo "== FAILED: $name"; failed=1; }
}

GPU=$($PYTHON -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-"))') || {
  echo "no GPU that torch can use; make gpu needs one"
  exit 1
}
BOMKERN_BUILD_CUDA=1 step build $PYTHON -m pip install --quiet --no-build-isolation --no-deps -e . || exit 1
$PYTHON -m bomkern info
step tests $PYTHON -m pytest tests -q -k "not train"
OPS=$(echo tests/test_{min_goal,goal_set_op,total_correlation,gaussian_kl,consistency_variance,active_units,latent_statistics,covariance_penalty}.py)
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck initcheck; do
    step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 \
      $PYTHON -m pytest $OPS -q -p no:cacheprovider \
      -k "cuda-cuda and (oracle or layouts) and not 20000"
  done
fi
step bench $PYTHON -m pytest bench --benchmark-only --benchmark-json "$RESULTS/$GPU.json"
exit $failed
