#!/usr/bin/env bash
# Run everything that needs a GPU: tests, parity, then the measurements. It should take ten
# minutes; the time limits of the steps add up to thirteen.
#
#     bash benchmarks/gpu_check.sh [OUTPUT_FOLDER]
#
# It needs Python with torch (CUDA), triton, h5py, numpy and pytest, and transformers for the
# comparison. It writes figures as JSON and output as text into OUTPUT_FOLDER. Where a step fails,
# the script says so and runs the next one. The exit code is the number of failed steps.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
out=${1:-results/$(date -u +%F)_gpu}
mkdir -p "$out"
python=${PYTHON:-python3}
export PYTHONPATH="$PWD/base${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
failed=0

step() { # step NAME SECONDS COMMAND...
  local name=$1 limit=$2 started=$SECONDS
  shift 2
  if timeout "$limit" "$@" >"$out/$name.txt" 2>&1; then
    echo "ok      $name ($((SECONDS - started)) s)"
  else
    echo "FAILED  $name (exit $?, $((SECONDS - started)) s): $out/$name.txt"
    tail -n 5 "$out/$name.txt" | sed 's/^/        /'
    failed=$((failed + 1))
  fi
}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "Error: PyTorch of $python sees no GPU; set PYTHON to one that does" >&2
  exit 2
fi
nvidia-smi >"$out/nvidia_smi.txt" 2>&1

step tests 150 "$python" -m pytest -q -p no:cacheprovider tests/numerics
step kernels 60 "$python" -m bert_pretraining bench kernels --batch_size 48 --precision bf16 fp16 \
  --repeats 20 --output "$out/kernels.json"
step step_48 120 "$python" -m bert_pretraining bench step --batch_size 48 --precision bf16 \
  --kernels torch auto --compile --graph --repeats 20 --output "$out/step_48.json"
for size in 96 192; do
  step "step_$size" 90 "$python" -m bert_pretraining bench step --batch_size "$size" \
    --precision bf16 --kernels auto --compile --repeats 10 --output "$out/step_$size.json"
done
step extra 120 "$python" benchmarks/gpu_extra.py --batch_size 48 --repeats 10 \
  --output "$out/extra.json"
for precision in fp32 bf16; do
  step "optimizer_$precision" 60 "$python" -m bert_pretraining bench optimizer \
    --precision "$precision" --output "$out/optimizer_$precision.json"
done
step transformers 90 "$python" benchmarks/compare_transformers.py --batch_size 48 \
  --precision bf16 --compile --repeats 10 --output "$out/compare_transformers.json"
echo "Figures: $out; failed steps: $failed"
exit "$failed"
