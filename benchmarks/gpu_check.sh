#!/usr/bin/env bash
# Run everything that needs a GPU: tests and parity first, then the measurements.
#
#     bash benchmarks/gpu_check.sh [OUTPUT_FOLDER] [PART]
#
# PART: 1 (tests, parity, the step, LAMB), 2 (profile, operators, compiled, comparison, a training
# run), or all, the default. The time limits of a part's steps add up to nine minutes at most.
# OUTPUT_FOLDER: by default $OUT, else results/DATE_gpu. It gets one archive of everything, kept up
# to date after each step, and a summary. Where a step fails, the script says so and runs the next
# one. The exit code is the number of failed steps.
#
# It needs Python with torch (CUDA), triton, h5py, numpy and pytest (with pytest-xdist, tests run
# in parallel), and transformers for the comparison. PYTHON names another interpreter.
#
# On the pretended GPU (see benchmarks/pretended.py) the model has few layers, what needs right
# numbers is skipped, and the limits are three times as long, since all is work of a CPU.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # where sh is another shell, such as dash
set -uo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." || exit
out=${1:-${OUT:-results/$(date -u +%F)_gpu}}
part=${2:-all}
export PYTHON=${PYTHON:-python3} PYTHONPATH="$PWD/base${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
case $part in
  1 | 2 | all) ;;
  *) echo "Error: part $part: there are 1, 2 and all; pass one of them" >&2; exit 2 ;;
esac
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "Error: PyTorch of $PYTHON sees no GPU; set PYTHON to one that does" >&2
  exit 2
fi
mkdir -p "$out" || exit
work=$(mktemp -d) || exit
archive=$out/gpu_check_$part.tar.gz
summary=$out/gpu_check_$part.txt
: >"$summary"
failed=0
running=

keep() { # all files so far, and nothing large, in one archive
  tar -czf "$archive.partial" -C "$work" --exclude=mini . && mv "$archive.partial" "$archive"
}

finish() {
  if [ -n "$running" ]; then kill "$running"; fi
  keep
  rm -rf "$work"
}
trap finish EXIT
trap 'exit 143' INT TERM

say() { echo "$*" | tee -a "$summary"; }

step() { # step NAME SECONDS COMMAND...
  local name=$1 limit=$(($2 * slower)) started=$SECONDS code
  shift 2
  # In the background, so that a signal to this script is acted on at once.
  timeout -k 10 "$limit" "$@" >"$work/$name.txt" 2>"$work/$name.log" &
  running=$!
  wait "$running"
  code=$? running=
  if [ "$code" -eq 0 ]; then
    say "ok      $name ($((SECONDS - started)) s)"
  else
    say "FAILED  $name (exit $code, $((SECONDS - started)) s)"
    tail -n 4 "$work/$name.log" | cut -c1-160 | sed 's/^/        /' | tee -a "$summary"
    failed=$((failed + 1))
  fi
  # What a program prints is short; progress and warnings go to stderr.
  tail -n 24 "$work/$name.txt" | cut -c1-190 | sed 's/^/    /' | tee -a "$summary"
  keep
}

skip() { # skip NAME: needs right numbers
  say "skipped $1: the pretended GPU computes no numbers"
}

tests=(-m pytest -q -p no:cacheprovider --tb=short --durations=5)
"$PYTHON" -c 'import xdist' 2>/dev/null && tests+=(-n 8)
bench() { # bench NAME SECONDS FLAGS...: one of the package's measurements
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" "$PYTHON" ${stub[@]+"${stub[@]}"} -m bert_pretraining bench "$@" \
    --output "$work/$name.json"
}
script() { # script NAME SECONDS FILE FLAGS...: one of benchmarks/
  local name=$1 limit=$2 file=$3
  shift 3
  step "$name" "$limit" "$PYTHON" ${stub[@]+"${stub[@]}"} "benchmarks/$file.py" "$@" \
    --output "$work/$name.json"
}

describe='
import json, subprocess, torch
from bert_pretraining.bench.record import circumstances
print(json.dumps(circumstances()))
print(torch.cuda.get_device_properties(0))
try:
    print(subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout)
except OSError as error:
    print(error)
'
stub=()
layers=24 repeats=10 slower=1
if [ -n "${PRETENDED_GPU:-}" ]; then
  stub=(benchmarks/pretended.py)
  layers=2 repeats=1 slower=3
  say "The GPU is pretended: $layers layers, and no time of it means anything."
fi

part_1() {
  step card 20 "$PYTHON" -c "$describe"
  if [ -n "${PRETENDED_GPU:-}" ]; then
    step tests 60 "$PYTHON" "${tests[@]}" --collect-only tests/numerics
    skip parity
  else
    # Those that use the GPU come first.
    step tests 150 "$PYTHON" "${tests[@]}" tests/numerics/test_triton_*.py \
      tests/numerics/test_lamb_triton.py tests/numerics/test_kernels.py tests/numerics
    script parity 75 gpu_extra --parts proof --batch_size 48
  fi
  # The whole update, LAMB included, eager and captured; then forward and backward alone.
  script update_96 60 update_cost --batch_size 96 --num_layers "$layers" --repeats 20
  bench step_96 60 step --batch_size 96 --precision bf16 --kernels auto --graph \
    --num_layers "$layers" --repeats "$repeats"
  bench step_48 60 step --batch_size 48 --precision bf16 --kernels auto torch --graph \
    --num_layers "$layers" --repeats "$repeats"
  bench lamb 40 optimizer --precision bf16 --num_layers "$layers" --optimizers triton foreach
  script update_fp8 60 update_cost --precision fp8 --batch_size 96 --num_layers "$layers" \
    --repeats 20
}

part_2() {
  script profile 60 update_cost --batch_size 48 --num_layers "$layers" --ways eager \
    --repeats 3 --trace "$work"
  bench kernels 45 kernels --batch_size 48 --precision bf16 --repeats "$repeats"
  bench compiled 75 step --batch_size 48 --precision bf16 --kernels auto --compile --graph \
    --num_layers "$layers" --repeats "$repeats"
  script transformers 75 compare_transformers --batch_size 48 --precision bf16 --graph \
    --hugging_face_compile --num_layers "$layers" --repeats "$repeats"
  if [ -n "${PRETENDED_GPU:-}" ]; then
    skip "training run"
    step mini 60 bash benchmarks/gpu_mini.sh "$work/mini" GPUx1x1 --dry_run
  else
    step mini 90 bash benchmarks/gpu_mini.sh "$work/mini"
  fi
  bench step_192 45 step --batch_size 192 --precision bf16 --kernels auto --graph \
    --num_layers "$layers" --repeats 5
  script attention 75 gpu_extra --parts attention operators --batch_size 48 --repeats "$repeats"
  script tf32 45 gpu_extra --parts tf32 --batch_size 48 --num_layers "$layers" --repeats 5
  script fp8 30 gpu_extra --parts fp8 --batch_size 48 --repeats "$repeats"
}

[ "$part" = 2 ] || part_1
[ "$part" = 1 ] || part_2
say "Failed steps: $failed. All output and figures: $archive"
exit "$failed"
