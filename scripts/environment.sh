# shellcheck shell=bash
# Sourced by run_training.sh, run_tests.sh and examples/smoke_test.sh: finds a Python 3.10
# to 3.13, and makes .venv. Needs $root. Sets $PYTHON.
: "${root:?}"

modules_needed="torch numpy h5py tqdm tokenizers safetensors"

fail() {
    echo "Error: $*" >&2
    exit 2
}

# Whether $1 is a Python that this package runs on.
is_right_python() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

# The required modules that Python $1 lacks, on one line. Looks them up; imports nothing.
missing_modules() {
    # shellcheck disable=SC2086  # a list of words
    "$1" - $modules_needed ${2:-} <<'END'
import sys
from importlib.util import find_spec

names = sys.argv[1:] + (["tomli"] if sys.version_info < (3, 11) else [])
print(" ".join(name for name in names if find_spec(name) is None))
END
}

# $PYTHON: the one the user exported, else .venv's, else the first suitable one on the path.
find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        is_right_python "$PYTHON" || fail "PYTHON=$PYTHON is not Python 3.10 to 3.13"
    else
        for candidate in "$root/.venv/bin/python" python3 python3.13 python3.12 python3.11 python3.10; do
            if command -v "$candidate" >/dev/null && is_right_python "$candidate"; then
                PYTHON=$candidate
                break
            fi
        done
        [ -n "${PYTHON:-}" ] || fail "no Python 3.10 to 3.13 found; install one, or set PYTHON"
    fi
    local missing
    missing=$(missing_modules "$PYTHON" "${extra_modules:-}")
    [ -z "$missing" ] || [ -n "${may_install:-}" ] || [ -n "${needs_no_modules:-}" ] || fail \
        "$PYTHON lacks $missing; run 'bash run_training.sh' once without flags, or: $PYTHON -m pip install -r requirements.txt"
}

# Like find_python; where modules are missing, or .venv was made of other requirements,
# installs the given requirement files into .venv.
prepare_python() {
    local venv="$root/.venv" file wanted
    may_install=1 find_python
    wanted=$(cd "$root" && cat "$@" | cksum)
    if [ -z "$(missing_modules "$PYTHON" "${extra_modules:-}")" ]; then
        [ "$PYTHON" = "$venv/bin/python" ] || return 0
        case "$(cat "$venv/installed-requirements" 2>/dev/null)" in *"$wanted"*) return 0 ;; esac
    fi
    if [ ! -x "$venv/bin/python" ]; then
        echo "First use: creating $venv with $("$PYTHON" --version)" >&2
        "$PYTHON" -m venv "$venv" || {
            rm -rf "$venv"
            fail "cannot create $venv; on Debian and Ubuntu install python3-venv"
        }
    fi
    PYTHON=$venv/bin/python
    for file in "$@"; do
        echo "Installing $file into $venv (some minutes on first use)" >&2
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$root/$file" >&2 ||
            fail "cannot install $file; see pip's message above"
    done
    echo "$wanted" >>"$venv/installed-requirements"
}
