#!/usr/bin/env bash
# A smoke test for your CI: it trains on the mini data set for a few steps, and checks the exit code
# and the logs. It needs no GPU and no network, and takes about a minute.
#   bash examples/smoke_test.sh [flags of run_training.sh]
# It needs a Python with the requirements: PYTHON=..., or the .venv that `bash run_training.sh`
# creates.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # where sh is another shell, such as dash
set -euo pipefail
root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
# shellcheck source=scripts/environment.sh
source "$root/scripts/environment.sh"
find_python
export PYTHON
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

export PYTHONPATH="$root/base${PYTHONPATH:+:$PYTHONPATH}"
"$PYTHON" -m bert_pretraining data make-mini --output_dir "$work/bert_mini"
"$PYTHON" -m bert_pretraining doctor --device cpu --data_dir "$work/bert_mini"

code=0
bash "$root/run_training.sh" --name mini --config CPUx1x2 --device cpu \
    --data_dir "$work/bert_mini" --output_dir "$work/output" --log_dir "$work/logs" \
    --max_steps 40 --seed 1 "$@" || code=$?
# Exit code 3: training finished, and 40 steps are too few to reach the target.
[ "$code" -eq 3 ] || fail "the run ended with exit code $code, not 3"

logs=("$work"/output/run-*/mllog.txt)
[ "${#logs[@]}" -eq 1 ] && [ -s "${logs[0]}" ] || fail "no log in $work/output"
grep -q '"key": "run_stop"' "${logs[0]}" || fail "the log has no run_stop"
grep -q '"event": "FINISHED"' "$work"/output/run-*/perflog.txt || fail "the log has no FINISHED"
[ -s "$work/logs/rank_0.log" ] && [ -e "$work/logs/rank_1.log" ] || fail "a rank's log is missing"
echo "Smoke test passed."
