#!/usr/bin/env bash
# Lint and all tests but the slow ones, on all cores. Installs what is missing into .venv.
# Arguments go to pytest: bash run_tests.sh tests/unit -k name; -m slow runs the slow tests;
# -n 0 runs all in one process.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # where sh is another shell, such as dash
set -euo pipefail
root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
cd "$root"
extra_modules="pytest xdist ruff mlperf_logging"
# shellcheck source=scripts/environment.sh
source scripts/environment.sh
prepare_python requirements.txt requirements-dev.txt
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
exec "$PYTHON" -m pytest -n logical --maxprocesses 8 --dist worksteal "$@"
