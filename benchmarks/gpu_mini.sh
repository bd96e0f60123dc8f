#!/usr/bin/env bash
# Train the mini model to its target on one GPU, then once more in two parts, the second resumed.
#
#     bash benchmarks/gpu_mini.sh FOLDER [CONFIG] [FLAGS]
#
# CONFIG: of configs/mini; by default GPUx1x1. FLAGS go to every training run. The data set is made
# in FOLDER, without a download. With --dry_run, the commands are only checked.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # where sh is another shell, such as dash
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
folder=$1 config=${2:-GPUx1x1}
shift $(($# < 2 ? $# : 2))
export PYTHON=${PYTHON:-python3} PYTHONPATH="$PWD/base${PYTHONPATH:+:$PYTHONPATH}"
"$PYTHON" -m bert_pretraining data make-mini --output_dir "$folder/bert_mini"

train() { # train NAME WANTED_EXIT_CODE FLAGS...
  local name=$1 wanted=$2 code=0
  shift 2
  bash run_training.sh --name mini --config "$config" --data_dir "$folder/bert_mini" --seed 1 \
    --output_dir "$folder/$name" "$@" >"$folder/$name.txt" 2>&1 || code=$?
  case " $* " in *" --dry_run "*) wanted=0 ;; esac
  grep -E "^(Evaluation|Target|Notice|Kernels|Micro-steps|Optimizer|Resum|Error)|^\| BERT" \
    "$folder/$name.txt" | sed "s/^/$name: /" | cut -c1-160 | tail -n 12 || true
  if [ "$code" -ne "$wanted" ]; then
    echo "$name: exit code $code, not $wanted" >&2
    tail -n 5 "$folder/$name.txt" >&2
    exit 1
  fi
}

train whole 0 "$@"
train first_part 3 --max_steps 200 --save_checkpoint "$@"
rm -rf "$folder/second_part"
if [ -d "$folder/first_part" ]; then cp -r "$folder/first_part" "$folder/second_part"; fi
train second_part 0 --save_checkpoint --resume auto "$@"
