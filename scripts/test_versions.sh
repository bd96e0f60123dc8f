#!/usr/bin/env bash
# Runs the tests on another PyTorch, in a virtual environment of its own under .venv-versions/:
#   bash scripts/test_versions.sh OLDEST          PyTorch 2.4.1 and packages of its time, Python 3.10
#   bash scripts/test_versions.sh NEWEST          the newest PyTorch and packages, Python 3.13
#   bash scripts/test_versions.sh 2.7.1           that PyTorch; PYTHON=python3.12 names the Python
# Further arguments go to pytest. After the tests it trains on two ranks to the target, and runs the
# first command of README's "Training". Most builds fetch about 5 GB of CUDA packages.
# Exit codes: 0 all passed, 77 the packages could not be fetched, else what failed.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # where sh is another shell, such as dash
set -euo pipefail
root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
cd "$root"
not_possible=77

say() {
    echo "test_versions: $*"
}

# Prints the first Python of the given versions that runs: from PATH, or one of pyenv's.
first_python() {
    local version candidate
    for version in "$@"; do
        for candidate in "python$version" "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/"$version".*/bin/python3; do
            if "$candidate" -c 'import venv' 2>/dev/null; then
                echo "$candidate"
                return
            fi
        done
    done
}

wanted=${1:-OLDEST}
[ $# -eq 0 ] || shift
tools="pytest pytest-xdist mlperf-logging PyYAML pandas scipy matplotlib pillow tensorboard"
case $wanted in
    OLDEST | 2.4.*)
        [ "$wanted" != OLDEST ] || wanted=2.4.1
        pythons="3.10 3.11 3.12"
        packages="torch==$wanted numpy==1.26.4 h5py==3.11.0 tokenizers==0.20.3 safetensors==0.4.5 tqdm"
        ;;
    NEWEST)
        pythons="3.13 3.14 3.12 3.11"
        packages="torch numpy h5py tokenizers safetensors tqdm"
        # The others have a tokenizers for whose huggingface_hub there is no Trackio of today.
        tools="$tools wandb mlflow-skinny sqlalchemy alembic trackio"
        ;;
    2.[5-9].*)
        pythons="3.12 3.11 3.10"
        packages="torch==$wanted numpy==1.26.4 h5py tokenizers safetensors tqdm"
        ;;
    [0-9]*)
        pythons="3.12 3.13 3.11 3.10"
        packages="torch==$wanted numpy h5py tokenizers safetensors tqdm"
        ;;
    *)
        echo "Error: '$wanted' is no version of PyTorch; usage: test_versions.sh [OLDEST|NEWEST|VERSION]" >&2
        exit 2
        ;;
esac
# shellcheck disable=SC2086  # lists of words
python=${PYTHON:-$(first_python $pythons)}
if [ -z "$python" ]; then
    say "NOT RUN: none of Python $pythons is here"
    exit $not_possible
fi

venv=$root/.venv-versions/torch-$wanted
log=$venv/pip.log
[ "$wanted" != NEWEST ] || rm -f "$venv/complete" # there may be a newer one
if [ ! -e "$venv/complete" ]; then
    [ "$wanted" = NEWEST ] || rm -rf "$venv"
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    say "installing PyTorch $wanted for $("$python" --version) into $venv (up to 5 GB)"
    # shellcheck disable=SC2086  # a list of words
    if ! "$venv/bin/python" -m pip install --upgrade --disable-pip-version-check $packages $tools tomli >"$log" 2>&1; then
        tail -n 3 "$log"
        say "NOT RUN: the packages could not be fetched; pip's whole output is in $log"
        exit $not_possible
    fi
    touch "$venv/complete"
fi

export PYTHON="$venv/bin/python" PYTHONPATH="$root/base"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$PYTHON" - <<'END'
import importlib.metadata, platform

names = "torch triton numpy h5py tokenizers safetensors".split()
print("Python", platform.python_version(), *(f"{n} {importlib.metadata.version(n)}" for n in names))
END
"$PYTHON" -m pytest -n logical --maxprocesses 8 --dist worksteal "$@"

"$PYTHON" -m bert_pretraining data make-mini --output_dir "$work/bert_mini"
say "two ranks to the target"
bash run_training.sh --name mini --config CPUx1x2 --data_dir "$work/bert_mini" \
    --output_dir "$work/output" >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
grep -a "reached after" "$work/log"
say "the first command of README's Training"
bash run_training.sh --name default --config V100x1x8 --data_dir "$work/bert_mini/" \
    --max_steps 500 --train_batch_size 10 --target_mlm_accuracy 0.33 \
    --init_checkpoint "$work/bert_mini/model.ckpt-28252.apex.pt" --output_dir "$work/output" \
    >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
grep -a "reached after" "$work/log"
say "passed on PyTorch $wanted; 'rm -r $venv' frees its disk space"
