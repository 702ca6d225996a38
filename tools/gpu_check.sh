#!/usr/bin/env bash
# Builds, tests, checks and times the kernels on a machine with an NVIDIA GPU, in one go.
#
#     OUT=out/gpu tools/gpu_check.sh
#
# Needs nvcc, compute-sanitizer, and a Python with torch, triton, pytest, hypothesis, pybind11 and
# ninja (with pytest-xdist the tests take a fraction of the time); installs and downloads nothing,
# and leaves the GPU's settings alone. Where the build fails it ends there; else it runs every step,
# all of them in about nine and a half minutes, and fails at the end if one did.
# Leaves in $OUT: ops-cuda.jsonl and .png, models-cuda.jsonl, .html and .png (the benchmarks),
# logs.tar.gz and summary.txt.
#
# PREBUILT=1 takes the extension that lies there, built elsewhere for that Python, torch and GPU.
# DEADLINE_S changes that time, DRY_RUN=1 prints the commands instead of running them. In a
# copy without .git, REFUSAL_KERNELS_COMMIT says which commit the results are of.
#
# shellcheck disable=SC2329  # machine and sanitize are called through bash -c, under a time limit
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-out/gpu}
DEADLINE_S=${DEADLINE_S:-570}
LOGS=$(mktemp -d)
trap 'rm -rf "$LOGS"' EXIT
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$OUT"
: > "$OUT/summary.txt"
FAILED=0

say() { printf '%s\n' "$*" | tee -a "$OUT/summary.txt"; }

# run_for LIMIT_S COMMAND...: as timeout does, but it does not wait for what can't be killed, as a
# process whose GPU hangs may be
run_for() {
  local limit=$1 started=$SECONDS code=0
  shift
  setsid "$@" &
  local pid=$!
  while kill -0 "$pid" 2> /dev/null; do
    if ((SECONDS - started >= limit)); then
      pkill -9 -s "$pid" || true
      return 124
    fi
    sleep 0.5
  done
  wait "$pid" || code=$?
  return "$code"
}

# step NAME LIMIT_S COMMAND...: its output in a log of its own, its verdict in the summary
step() {
  local name=$1 limit=$2 started=$SECONDS left=$((DEADLINE_S - SECONDS)) code=0
  shift 2
  if ((left < 10)); then
    say "$(printf '%-12s %-14s no time was left' "$name" 'NOT RUN')"
    FAILED=1
    return 0
  fi
  [[ -z ${DRY_RUN:-} ]] || set -- echo "$@"
  echo "== $name (at most $((limit < left ? limit : left)) s)"
  run_for "$((limit < left ? limit : left))" "$@" > "$LOGS/$name.log" 2>&1 || code=$?
  case $code in
    0) say "$(printf '%-12s %-14s %4d s' "$name" passed $((SECONDS - started)))" ;;
    124) say "$(printf '%-12s %-14s %4d s' "$name" 'TIMED OUT' $((SECONDS - started)))" ;;
    *) say "$(printf '%-12s %-14s %4d s' "$name" "FAILED ($code)" $((SECONDS - started)))" ;;
  esac
  if ((code != 0)); then
    FAILED=1
    tail -n 25 "$LOGS/$name.log"
  fi
  # after every step, so that a run that is cut short leaves its logs too
  tar -czf "$OUT/logs.tar.gz" -C "$LOGS" .
}

machine() {
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
  nvcc --version | tail -n 2
  "$PYTHON" - << 'EOF'
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

print("python", sys.version.split()[0])
for name in ("torch", "triton", "transformers", "pytest", "hypothesis", "pybind11", "ninja"):
    try:
        print(name, version(name))
    except PackageNotFoundError:
        print(name, "not installed")
print("device", torch.cuda.get_device_name(), torch.cuda.get_device_capability())
EOF
}

# only for the GPU that is here: other targets would cost build time and prove nothing
capability() {
  "$PYTHON" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))'
}

sanitize() { # TOOL TESTS: without the caching allocator every tensor has bounds of its own
  env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 99 \
    --print-limit 20 "$PYTHON" -m pytest tests/ops/test_ops.py tests/ops/test_moments_op.py -x \
    -p no:cacheprovider -k "cuda and ($2)"
}
export -f machine sanitize
export PYTHON

step machine 60 bash -c machine
if [[ -z ${DRY_RUN:-} ]]; then
  TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$(capability || true)}
  export TORCH_CUDA_ARCH_LIST
fi
build=(build_ext --inplace)
[[ -z ${PREBUILT:-} ]] || build=()
step build 200 "$PYTHON" setup.py egg_info "${build[@]}"
((FAILED == 0)) || exit 1 # without an extension no step after this one says anything
step extension 60 "$PYTHON" -c \
  'from refusal_kernels import _C, ops; print(_C.build_summary()); print(ops.explain(device="cuda"))'
# most of the time is Triton's compiler; the other backends are tested where there is no GPU
parallel=()
! "$PYTHON" -c 'import xdist' 2> /dev/null || parallel=(-n 12)
step tests 120 "$PYTHON" -m pytest tests/ops/test_ops.py tests/ops/test_accuracy.py tests/ops/test_gradients.py \
  tests/ops/test_moments_op.py tests/ops/test_registration.py -k "cuda or triton" -p no:cacheprovider \
  --tb=short "${parallel[@]}"
step memcheck 90 bash -c 'sanitize memcheck "route or test_scores_come or test_moments"'
step racecheck 90 bash -c 'sanitize racecheck "test_route or test_scores_come"' # the slower by far
step bench 200 "$PYTHON" benchmarks/bench_ops.py --device cuda --out "$OUT" --limit-s 165
brief=(bench --profile models --device cuda --dtypes bfloat16 --rounds 31
  --methods refusal_kernels:cuda,norms_apart,hooks)
step models 150 "$PYTHON" -m refusal_kernels "${brief[@]}" --modes eager,graph --minutes 2 \
  --out "$OUT"
# compiling takes as long as there are layers; its results are among the logs
step compiled 120 "$PYTHON" -m refusal_kernels "${brief[@]}" --modes compile --minutes 1.5 \
  --models qwen2.5-0.5b --layers 2 --out "$LOGS/compiled"

echo
echo "===== summary ====="
{
  head -n 2 "$LOGS/machine.log" 2> /dev/null | tail -n 1
  cat "$LOGS/extension.log" 2> /dev/null
  grep -E '(passed|failed|error).* in |op tests passed' "$LOGS/tests.log" 2> /dev/null
  for tool in memcheck racecheck; do
    grep -hE 'ERROR SUMMARY|RACECHECK SUMMARY|(passed|failed).* in ' "$LOGS/$tool.log" 2> /dev/null |
      sed "s/^/$tool: /"
  done
  if [[ -f $OUT/ops-cuda.jsonl ]]; then
    "$PYTHON" - "$OUT/ops-cuda.jsonl" << 'EOF'
import json
import sys

for bar in json.loads(open(sys.argv[1]).readline())["bars"]:
    value = f"{bar['value']:.3f}" if "value" in bar else ""
    print(f"{bar['verdict']:<13}{value:>7} {bar['target']:>8}  {bar['name']}")
EOF
  fi
} > "$LOGS/summary" || true # a line that is missing is no failure of its own
cat "$OUT/summary.txt" "$LOGS/summary"
cat "$LOGS/summary" >> "$OUT/summary.txt"
tar -czf "$OUT/logs.tar.gz" -C "$LOGS" .
ls -l "$OUT"
exit "$FAILED"
