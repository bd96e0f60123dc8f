#!/usr/bin/env bash
# Train BERT: bash run_training.sh [flags]; --help lists them.
# Without flags it installs what is missing into .venv, makes the mini data set and trains on it.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # where sh is another shell, such as dash
set -euo pipefail
root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
# shellcheck source=scripts/environment.sh
source "$root/scripts/environment.sh"
case " $* " in *" --help "* | *" -h "* | *" --dry_run "* | *" --dry-run "*) needs_no_modules=1 ;; esac
if [ $# -eq 0 ]; then
    prepare_python requirements.txt
else
    find_python
fi
export PYTHONPATH="$root/base${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m bert_pretraining launch "$@"
