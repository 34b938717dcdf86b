#!/usr/bin/env bash
# All that a machine with a GPU is needed for, in one go of under ten minutes:
#
#     benchmarks/gpu_visit.sh FOLDER [PART...]
#
# PART: tests, runs, kernels, data, train; all, in this order, unless some are named: what there is no time for says so, and
# is for another visit. FOLDER gets visit.log, steps.csv (exit code and seconds of each step; 124: it ran out of time), the
# metrics of the runs and the benches' CSVs.
# What fails is written down, and the next step runs; the exit code is then 1. Works without a network, and without what
# only preparing data takes. PYTHON: an interpreter that has torch and triton (default: python3).
set -uo pipefail
[ $# -ge 1 ] || { echo "usage: $0 FOLDER [PART...]" >&2; exit 2; }
parts=" ${*:2} "
for part in $parts; do
  case $part in tests | runs | kernels | data | train) ;; *) echo "$0: $part: no such part" >&2; exit 2 ;; esac
done
[ "$parts" != "  " ] || parts=" tests runs kernels data train "
mkdir -p "$1" && folder=$(cd "$1" && pwd) && cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
last=560 # seconds after the start, by which the last step ends
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
export PYTHONSAFEPATH=1 HF_HUB_OFFLINE=1 # safe: our kernels/ must not answer to other packages' `import kernels`
unset TRITON_INTERPRET
echo "step,exit_code,seconds" >"$folder/steps.csv"
: >"$folder/visit.log"

say() { echo "$*" | tee -a "$folder/visit.log"; }

# run NAME SECONDS COMMAND...: at most so long, and no longer than there is time. `report` then writes it down.
run() {
  local name=$1 limit=$2 start=$SECONDS code=0
  shift 2
  if [ "$limit" -gt $((last - SECONDS)) ]; then limit=$((last - SECONDS)); fi
  if [ "$limit" -lt 5 ]; then
    echo "no time left" >"$logs/$name.log"
    code=124
  else
    timeout --kill-after=5 "$limit" "$@" >"$logs/$name.log" 2>&1 || code=$?
  fi
  echo "$name,$code,$((SECONDS - start))" >"$logs/$name.step"
}

report() {
  cat "$logs/$1.step" >>"$folder/steps.csv"
  say "== $(cat "$logs/$1.step")"
  cat "$logs/$1.log" >>"$folder/visit.log"
}

step() { run "$@" && report "$1"; }

is_asked() { [[ $parts == *" $1 "* ]]; }

# 1. The machine, and fastcpt on it.
gpu=false
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then gpu=true; fi
if command -v nvidia-smi >/dev/null; then
  step nvidia_smi 30 nvidia-smi --query-gpu=name,driver_version,power.limit,clocks.max.sm,clocks.max.mem,memory.total \
    --format=csv
fi
if ! "$python" -c 'import fastcpt.kernels' 2>/dev/null; then
  step install 120 "$python" -m pip install --no-deps --no-build-isolation --no-index --editable .
fi
if ! "$python" -c 'import fastcpt.kernels' 2>/dev/null; then
  say "not installed: a folder of links takes the place of the package"
  mkdir "$logs/fastcpt"
  ln -s "$PWD"/fastcpt/* "$PWD"/{kernels,data_prep,benchmarks} "$logs/fastcpt/"
  export PYTHONPATH=$logs${PYTHONPATH:+:$PYTHONPATH}
fi
step versions 60 "$python" - <<'PYTHON'
import importlib.metadata as metadata
import platform

import torch

print("python", platform.python_version(), "cuda", torch.version.cuda, "cudnn", torch.backends.cudnn.version())
for name in ("torch", "triton", "transformers", "liger-kernel", "flash-attn", "flash-attn-3", "flash-attn-4", "pytest"):
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        print(name, "is not installed")
PYTHON

# 2. Native tests, each file in a process of its own, which an illegal access takes down alone; all at once, and beside
#    them what the compiler makes of the kernels.
kernels="cross_entropy layer_norm gelu qkv_rotary attention adamw linear_cross_entropy"
models="pythia-410m pythia-70m pythia-160m pythia-1.4b"
started=""
if ! is_asked tests; then
  say "tests were not asked for"
elif $gpu; then
  for name in gpu optim $kernels; do
    if [ -f "tests/test_$name.py" ]; then
      run "test_$name" 180 "$python" -m pytest "tests/test_$name.py" -q --durations 3 &
      started="$started test_$name"
    fi
  done
  run static 180 "$python" -m fastcpt.benchmarks.static --output "$folder" &
  started="$started static"
  wait
  for name in $started; do report "$name"; done
else
  say "no GPU: native tests are skipped, and so is the static table, which needs none"
fi
if ! $gpu; then
  say "no GPU: runs of training and their benches are skipped"
fi

# 3. Short runs of training: data, checkpoint and all. Nothing runs beside them, nor beside what follows.
if is_asked runs && $gpu; then
  for model in $models; do
    step "run_$model" 75 "$python" -m fastcpt.benchmarks.visit "$model" "$folder"
  done
fi

# 4. Benches. Without a GPU those that need one say so, and the others take longer.
if is_asked kernels; then
  limit=$($gpu && echo 60 || echo 300)
  for kernel in $kernels; do
    step "bench_$kernel" "$limit" "$python" -m fastcpt.benchmarks.bench_kernels "$kernel" --output "$folder"
  done
fi
if is_asked data; then step bench_data 60 "$python" -m fastcpt.cli bench data --output "$folder"; fi

# 5. The training step beside its rivals, compilation included: a model may take all the time that is left.
if is_asked train && $gpu; then
  for model in $models; do
    step "bench_train_$model" "$last" "$python" -m fastcpt.cli bench train --model "$model" --output "$folder"
  done
fi

say "$SECONDS seconds; of the steps, $(awk -F, 'NR > 1 && $2 != 0' "$folder/steps.csv" | wc -l) failed"
! awk -F, 'NR > 1 && $2 != 0 { found = 1 } END { exit !found }' "$folder/steps.csv"
