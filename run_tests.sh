#!/usr/bin/env bash
# Lint and all tests. Installs what is missing into .venv. Arguments go to pytest.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$root"
extra_modules="pytest ruff mlperf_logging"
# shellcheck source=scripts/environment.sh
source scripts/environment.sh
prepare_python requirements.txt requirements-dev.txt
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
exec "$PYTHON" -m pytest "$@"
