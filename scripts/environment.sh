# shellcheck shell=bash
# Finds a Python that pyproject.toml allows, and creates .venv. Sets $PYTHON; needs $root.
# run_training.sh, run_tests.sh and examples/smoke_test.sh source it. A torch that is installed is
# kept: .venv sees it, and nothing replaces it.
: "${root:?}"

modules_needed="torch numpy h5py tqdm tokenizers safetensors"
# pyproject.toml says: requires-python = ">=3.OLDEST,<3.AFTER"
minors=$(sed -n 's/^requires-python = ">=3\.\([0-9]*\),<3\.\([0-9]*\)"$/\1 \2/p' "$root/pyproject.toml")
oldest_minor=${minors% *} newest_minor=$((${minors#* } - 1))
pythons="Python 3.$oldest_minor to 3.$newest_minor"
venv=$root/.venv
users_python=${PYTHON:-}
# "~" at its start is left as it is by everything but a shell's own assignment.
case $users_python in "~/"*) users_python=${HOME:-}${users_python#"~"} ;; esac
# Python 3.11 and later then find no module in the folder where the user stands, such as a queue.py.
export PYTHONSAFEPATH=1
why_not="" # what the last Python said that look() could not use

fail() {
    echo "Error: $*" >&2
    exit 2
}

# Looks at Python $1. Sets prefix, torch (its version, or "none"), is_old (whether that torch is too
# old), torch_folder and missing (the required modules that this Python lacks). False if this
# package does not run on it.
look() {
    local found name
    # shellcheck disable=SC2086  # a list of words
    found=$("$1" "$root/scripts/installed.py" look "$root/pyproject.toml" \
        $modules_needed ${extra_modules:-} 2>/dev/null) || {
        why_not=$("$1" "$root/scripts/installed.py" look "$root/pyproject.toml" 2>&1 >/dev/null |
            grep -i error | tail -n 1) || true
        for name in PYTHONHOME PYTHONPATH PYTHONIOENCODING; do
            [ -z "$why_not" ] || [ -z "${!name:-}" ] || why_not="$why_not, with $name=${!name}"
        done
        return 1
    }
    {
        read -r prefix && read -r torch && read -r is_old && read -r torch_folder || return 1
        read -r missing || true # the last line may be empty
    } <<<"$found"
}

# Sets PYTHON and missing: the user's Python, if exported; else that of .venv; else the first
# suitable one on PATH, or one with a torch before one without. Sets kept and kept_folder too: the
# version and place of the torch that is kept, or nothing.
choose_python() {
    local base_missing=""
    base="" kept="" kept_folder="" old_torch="" venv_state=absent venv_torch="" missing=""
    if [ -n "$users_python" ]; then
        look "$users_python" || refuse_python "$users_python"
        take_as_base "$users_python"
    else
        find_base
    fi
    look_at_venv
    if [ "$venv_state" = usable ] && [ -z "$users_python" ]; then
        PYTHON=$venv/bin/python
    else
        PYTHON=$base missing=$base_missing
    fi
    [ -n "$PYTHON" ] ||
        fail "no $pythons found; install one, or set PYTHON${why_not:+ (the last one: $why_not)}"
}

# Says why Python $1, which the user has named, cannot be used.
refuse_python() {
    local found version
    found=$(command -v -- "$1") || found=$1
    [ -e "$found" ] || fail "PYTHON=$1 names no file that this user can reach; set it to $pythons, or run 'unset PYTHON'"
    [ ! -d "$found" ] ||
        fail "PYTHON=$1 is a folder; set it to the program in it, such as $1/bin/python"
    [ -x "$found" ] || fail "PYTHON=$1 is not executable; set it to $pythons, or 'chmod +x' it"
    version=$("$1" -c 'import sys; print("Python %d.%d" % sys.version_info[:2])' 2>/dev/null) || version=""
    case $version in
        "Python 3."*) ;;
        "Python "*) fail "PYTHON=$1 is $version, and this program needs $pythons" ;;
        *) fail "PYTHON=$1 does not start as a Python${why_not:+ ($why_not)}; set it to $pythons" ;;
    esac
    if [ "${version#Python 3.}" -lt "$oldest_minor" ] || [ "${version#Python 3.}" -gt "$newest_minor" ]; then
        fail "PYTHON=$1 is $version, and this program needs $pythons; set PYTHON to one of them"
    fi
    fail "PYTHON=$1 ($version) does not work here${why_not:+: $why_not}; mend that, or set PYTHON to" \
        "another $pythons"
}

find_base() {
    local candidate minor more="" venv_folder
    venv_folder=$(cd "$venv" 2>/dev/null && pwd -P) || true
    for ((minor = newest_minor; minor >= oldest_minor; minor--)); do more="$more python3.$minor"; done
    for candidate in python3 python $more; do
        if [ -n "$base" ] && { [ -n "$kept" ] || [ "${candidate#python3.}" != "$candidate" ]; }; then
            break
        fi
        if ! command -v "$candidate" >/dev/null || ! look "$candidate"; then continue; fi
        [ "$prefix" != "$venv_folder" ] || continue # .venv is activated
        if [ -z "$base" ] || { [ "$torch" != none ] && [ -z "$is_old" ]; }; then
            take_as_base "$candidate"
        fi
    done
}

# Takes Python $1, which look() has looked at.
take_as_base() {
    base=$1 base_missing=$missing
    if [ -n "$is_old" ]; then
        old_torch="Notice: not using torch $torch of $torch_folder, which is too old"
        base_missing="torch $missing"
    elif [ "$torch" != none ]; then
        kept=$torch kept_folder=$torch_folder
    fi
}

# Looks at .venv. Sets missing, venv_torch and venv_state: absent, usable, or other_torch where it
# would hide the torch that is kept.
look_at_venv() {
    [ -x "$venv/bin/python" ] && look "$venv/bin/python" || return 0
    venv_state=usable venv_torch=$torch
    if [ -n "$kept" ]; then
        [ "$torch $torch_folder" = "$kept $kept_folder" ] || venv_state=other_torch
    elif [ "$torch" != none ] && [ -f "$venv/constraints.txt" ]; then
        kept=$torch kept_folder=$torch_folder # of a Python that another run was given
    fi
}

# Sets PYTHON, as choose_python does. Ends with an error if it lacks modules.
find_python() {
    choose_python
    if [ "$venv_state" = other_torch ] && [ -z "$users_python" ]; then
        echo "Notice: not using .venv: its torch $venv_torch would hide torch $kept of" \
            "$kept_folder; PYTHON=$venv/bin/python uses it all the same" >&2
    fi
    [ -n "$missing" ] && [ -z "${needs_no_modules:-}" ] || return 0
    [ -z "$old_torch" ] || echo "$old_torch" >&2
    fail "$PYTHON lacks $missing; $(advice)"
}

# What to do about missing modules. It leaves every installed package as it is.
advice() {
    local run="run 'bash run_training.sh' once without flags, which installs into .venv"
    case " $missing " in
        *" torch "*) echo "$run; or set PYTHON to a Python that has torch" ;;
        *) echo "$run and keeps torch $kept; or: $PYTHON -m pip install --no-deps$(distributions)" ;;
    esac
}

# The names under which pip knows the missing modules.
distributions() {
    local name
    for name in $missing; do
        case $name in
            xdist) name=pytest-xdist ;;
            mlperf_logging) name=mlperf-logging ;;
        esac
        printf ' %s' "$name"
    done
}

# As find_python; but if modules are missing, or if .venv was created from other requirements, it
# installs the given requirement files into .venv. Where a torch is kept,
# requirements-beside-torch.txt takes the place of requirements.txt.
prepare_python() {
    ! is_prepared "$@" || return 0
    # mpirun and srun start run_training.sh once a rank, at the same time: one process installs,
    # the others wait for it. The lock ends with the subshell.
    (
        ! command -v flock >/dev/null || flock 9 || true
        is_prepared "$@" || install_requirements "$@"
    ) 9<"$root"
    PYTHON=$venv/bin/python
}

# Sets PYTHON. True if it has the required modules and, if it is that of .venv, has them from the
# given requirement files.
is_prepared() {
    choose_python
    if [ "$PYTHON" != "$venv/bin/python" ]; then
        [ -n "$missing" ] || return 0
        look_at_venv
        [ "$venv_state" = usable ] || return 1
        PYTHON=$venv/bin/python
    fi
    [ -z "$missing" ] || return 1
    case "$(cat "$venv/installed-requirements" 2>/dev/null)" in
        *"$(fingerprint "$@")"*) return 0 ;;
    esac
    return 1
}

# The given requirement files, as they are to be installed.
requirement_files() {
    local file
    for file in "$@"; do
        [ -z "$kept" ] || [ "$file" != requirements.txt ] || file=requirements-beside-torch.txt
        echo "$file"
    done
}

fingerprint() {
    # shellcheck disable=SC2046  # a list of words
    (cd "$root" && cat $(requirement_files "$@") | cksum)
}

# Installs the given requirement files into .venv.
install_requirements() {
    local file constraints="" python=${base:-$venv/bin/python}
    [ -z "$old_torch" ] || echo "$old_torch" >&2
    if [ "$venv_state" = other_torch ]; then
        [ -f "$venv/installed-requirements" ] || fail "$venv, which this script did not create, has" \
            "torch $venv_torch and would hide torch $kept of $kept_folder; move it away, or set" \
            "PYTHON=$venv/bin/python to use it"
        echo "Removing .venv, made for torch $venv_torch: here is torch $kept of $kept_folder" >&2
        rm -rf "$venv"
    fi
    if [ ! -x "$venv/bin/python" ]; then
        echo "First use: creating $venv with $("$python" --version)" >&2
        "$python" -m venv "$venv" || {
            rm -rf "$venv"
            fail "cannot create $venv; on Debian and Ubuntu install python3-venv"
        }
    fi
    if [ -n "$kept" ]; then
        echo "Keeping torch $kept of $kept_folder" >&2
        share_packages "$python"
        constraints=$venv/constraints.txt
    else
        tell_size
    fi
    PYTHON=$venv/bin/python
    for file in $(requirement_files "$@"); do
        echo "Installing $file into $venv (some minutes on first use)" >&2
        "$PYTHON" -m pip install --quiet --disable-pip-version-check \
            ${constraints:+-c "$constraints"} -r "$root/$file" >&2 || fail "cannot install $file;" \
            "see pip's message above. Without a network: on another machine with the same" \
            "$("$PYTHON" -c 'import sys; print("Python %d.%d" % sys.version_info[:2])') and system," \
            "run 'python3 -m pip download --dest wheels -r $file', copy wheels/ to here, and run" \
            "this command again after 'export PIP_NO_INDEX=1 PIP_FIND_LINKS=\$PWD/wheels'"
    done
    look "$PYTHON"
    [ -z "$kept" ] || [ "$torch $torch_folder" = "$kept $kept_folder" ] ||
        fail "$venv now has torch $torch of $torch_folder in place of torch $kept of $kept_folder;" \
            "remove $venv and install ${constraints##*/} by hand"
    fingerprint "$@" >>"$venv/installed-requirements"
}

# Lets .venv see the packages of Python $1, if these hold the torch that is kept.
share_packages() {
    look "$1" && [ "$torch_folder" = "$kept_folder" ] || return 0
    "$1" "$root/scripts/installed.py" share "$("$venv/bin/python" -c \
        'import sysconfig; print(sysconfig.get_path("purelib"))')" "$venv/constraints.txt"
}

# Says how much pip will fetch, and how to fetch less.
tell_size() {
    [ "$(uname -s)" = Linux ] || return 0
    case "${PIP_EXTRA_INDEX_URL:-}${PIP_INDEX_URL:-}${PIP_FIND_LINKS:-}" in
        *download.pytorch.org*) return 0 ;;
    esac
    echo "No torch is installed. The one on PyPI brings CUDA's libraries: pip fetches up to 5 GB." >&2
    echo "For the CPU only, 0.3 GB is enough: stop this with Ctrl-C, and run it again after" >&2
    echo "    export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu" >&2
    echo "A vendor's device needs the vendor's torch: install that first, or set PYTHON to it." >&2
}
