#!/usr/bin/env bash
# On a machine with a GPU: build for it, test, sanitize, measure, profile, and write bench/results/<gpu>.json, .log and
# the report. Uses the python3 that has torch, and fetches nothing.
#
#   make gpu                       # everything, in under nine minutes
#   make gpu PART=bench            # a part: build, tests, sanitize, bench, ncu, report; several as "bench report"
#   make gpu PART="bench report"   # goes on where an earlier call ran out of time: what is in $WORK is not run again
#
# SECONDS_IN_ALL (530) bounds the call, RESULTS (bench/results) takes what is to be kept, WORK (build/gpu) the rest.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
RESULTS=${RESULTS:-bench/results}
WORK=${WORK:-build/gpu}
LIMIT=${SECONDS_IN_ALL:-530}
PARTS=${PART:-build tests sanitize bench ncu report}
# The figures that most is asked of first, should the time run out.
BENCHES=${BENCHES:-total_correlation min_goal goal_set loss_section gaussian_kl consistency_variance covariance_penalty latent_statistics active_units step}
OPS="min_goal goal_set_op total_correlation gaussian_kl consistency_variance active_units latent_statistics covariance_penalty"
failed=""
mkdir -p "$RESULTS" "$WORK/bench"

GPU=$($PYTHON -c 'import re, torch; print(re.sub(r"\W+", "-", torch.cuda.get_device_name()).strip("-"))') || {
  echo "no GPU that torch can use; make gpu needs one"
  exit 1
}
LOG="$RESULTS/$GPU.log"

# step NAME SECONDS COMMAND...: the end of what it printed goes into the log, all of it into $WORK.
step() {
  local name=$1 most=$2 left=$((LIMIT - SECONDS))
  shift 2
  if ((left < 15)); then
    echo "== $name: no time left; run it with make gpu PART=..." | tee -a "$LOG"
    failed+=" $name"
    return 1
  fi
  local begun=$SECONDS status=0
  timeout --kill-after=5 $((most < left ? most : left)) "$@" >"$WORK/$name.txt" 2>&1 || status=$?
  echo "== $name: exit status $status, $((SECONDS - begun)) s" | tee -a "$LOG"
  tail -n 12 "$WORK/$name.txt" | tee -a "$LOG"
  ((status == 0)) || failed+=" $name"
  return $status
}

part_build() {
  BOMKERN_BUILD_CUDA=1 step build 400 $PYTHON -m pip install --quiet --no-build-isolation --no-deps -e . || exit 1
  $PYTHON -m bomkern info >"$WORK/info.txt" && head -n 4 "$WORK/info.txt" | tee -a "$LOG"
}

part_tests() {
  local spread=""
  $PYTHON -c 'import xdist' 2>/dev/null && spread="-n 8 --dist worksteal"
  step tests 300 $PYTHON -m pytest tests -q -p no:cacheprovider $spread -k "not (train or study or report or diagnose)"
}

part_sanitize() {
  command -v compute-sanitizer >/dev/null || { echo "== no compute-sanitizer here" | tee -a "$LOG"; return; }
  local files="" op
  for op in $OPS; do files+=" tests/test_$op.py"; done
  for tool in memcheck racecheck; do
    step "$tool" 150 compute-sanitizer --tool "$tool" --error-exitcode 1 $PYTHON -m pytest $files -q -p no:cacheprovider \
      -k "cuda-cuda and (oracle or layouts) and not 20000"
  done
}

part_bench() {
  local name
  for name in $BENCHES; do
    [[ -s $WORK/bench/$name.json ]] && continue
    step "bench_$name" 300 $PYTHON -m pytest "bench/bench_$name.py" -q --benchmark-only \
      --benchmark-json "$WORK/bench/$name.json"
  done
}

part_ncu() {
  command -v ncu >/dev/null || { echo "== no ncu here" | tee -a "$LOG"; return; }
  step ncu 120 ncu --profile-from-start off --clock-control none --csv --metrics "$($PYTHON -m bench.kernels --metrics)" \
    $PYTHON -m bench.kernels && $PYTHON -m bench.kernels --read "$WORK/ncu.txt" >"$RESULTS/${GPU}_kernels.json"
}

part_report() {
  local made=("$WORK"/bench/*.json)
  [[ -s ${made[0]} ]] || { echo "== no bench has run: nothing to report" | tee -a "$LOG"; return; }
  step report 60 $PYTHON -m bench.report "${made[@]}"
}

for part in $PARTS; do
  case $part in
    build) : >"$LOG"; part_build ;;
    tests | sanitize | bench | ncu | report) "part_$part" ;;
    *) echo "no part $part: build, tests, sanitize, bench, ncu, report"; exit 2 ;;
  esac
done
if [[ -n $failed ]]; then
  echo "== FAILED or cut short:$failed" | tee -a "$LOG"
  exit 1
fi
echo "== all done in $SECONDS s" | tee -a "$LOG"
