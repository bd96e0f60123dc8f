# shellcheck shell=bash
# Finds a Python 3.10 to 3.13, and creates .venv. Sets $PYTHON; needs $root.
# run_training.sh, run_tests.sh and examples/smoke_test.sh source it.
: "${root:?}"

modules_needed="torch numpy h5py tqdm tokenizers safetensors"

fail() {
    echo "Error: $*" >&2
    exit 2
}

# True if this package runs on Python $1.
is_right_python() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

# Prints the required modules that Python $1 lacks, on one line. It imports none of them.
missing_modules() {
    # shellcheck disable=SC2086  # a list of words
    "$1" - $modules_needed ${2:-} <<'END'
import sys
from importlib.util import find_spec

names = sys.argv[1:] + (["tomli"] if sys.version_info < (3, 11) else [])
print(" ".join(name for name in names if find_spec(name) is None))
END
}

# Sets $PYTHON: the user's, if exported; else that of .venv; else the first suitable one on PATH.
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

# Like find_python. If modules are missing, or .venv was created from other requirements, it
# installs the given requirement files into .venv.
prepare_python() {
    may_install=1 find_python
    ! is_prepared "$@" || return 0
    # mpirun and srun start run_training.sh once a rank, at the same time: one process installs,
    # the others wait for it. The lock ends with the subshell.
    (
        ! command -v flock >/dev/null || flock 9 || true
        base=$PYTHON
        PYTHON=$root/.venv/bin/python
        if [ ! -x "$PYTHON" ] || ! is_prepared "$@"; then
            PYTHON=$base
            install_requirements "$@"
        fi
    ) 9<"$root"
    PYTHON=$root/.venv/bin/python
}

# True if $PYTHON has the required modules and, if it is that of .venv, has them from the given
# requirement files.
is_prepared() {
    [ -z "$(missing_modules "$PYTHON" "${extra_modules:-}")" ] || return 1
    [ "$PYTHON" = "$root/.venv/bin/python" ] || return 0
    case "$(cat "$root/.venv/installed-requirements" 2>/dev/null)" in
        *"$(cd "$root" && cat "$@" | cksum)"*) return 0 ;;
    esac
    return 1
}

# Installs the given requirement files into .venv.
install_requirements() {
    local venv="$root/.venv" file
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
    (cd "$root" && cat "$@" | cksum) >>"$venv/installed-requirements"
}
