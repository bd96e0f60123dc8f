"""scripts/environment.sh: which Python it takes, what it installs, and that it keeps a torch.

Each test has a checkout without code but the scripts, and packages that hold nothing. pip finds
them as wheels in a folder, and no network.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT
from installations import add_package, make_environment, make_wheel

BESIDE = "h5py tqdm tokenizers safetensors".split()
COREX = "2.4.1+corex.4.3.0"
PROGRAM = """set -euo pipefail
root=$PWD
source scripts/environment.sh
%s
echo "$PYTHON"
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The scripts, and wheels of everything; the newest torch among them must not be taken."""
    folder = tmp_path / "a checkout"
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    for name in ("errors.py", "__init__.py", "runtime/__init__.py", "runtime/packages.py"):
        target = folder / "base/bert_pretraining" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "base/bert_pretraining" / name, target)
    for name in ("pyproject.toml", "requirements-beside-torch.txt"):
        shutil.copy(ROOT / name, folder)
    (folder / "requirements.txt").write_text("\n".join(["torch", "numpy", "tomli", *BESIDE]))
    for name in ("torch", "numpy", "triton", "tomli", *BESIDE):
        make_wheel(tmp_path / "wheels", name, "9.0")
    return folder


def run(
    checkout: Path, *pythons: Path, program: str = "prepare_python requirements.txt", **more: str
) -> subprocess.CompletedProcess[str]:
    """Run a program after sourcing environment.sh. pythons: environments that are on PATH."""
    wheels = checkout.parent / "wheels"
    path = [*(str(python / "bin") for python in pythons), "/usr/bin", "/bin"]
    environment = {
        "PATH": ":".join(path), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels),
        "PIP_CONFIG_FILE": os.devnull, "HOME": str(checkout.parent), **more,
    }  # fmt: skip
    return subprocess.run(
        ["bash", "-c", PROGRAM % program], cwd=checkout, env=environment, capture_output=True,
        text=True, timeout=300, check=False,
    )  # fmt: skip


def python_with(folder: Path, **versions: str) -> Path:
    """An environment with these packages in a folder beside it, as an SDK has them."""
    packages = make_environment(folder)
    for name, version in versions.items():
        add_package(folder / "sdk", name, version)
    (packages / "sdk.pth").write_text(f"{folder / 'sdk'}\n")
    return folder


def version_in(python: Path, package: str) -> str:
    program = f"import {package}; print({package}.__version__, {package}.__file__)"
    return subprocess.run(
        [python, "-c", program], capture_output=True, text=True, check=True
    ).stdout


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts)


def test_a_vendors_torch_is_kept(checkout: Path, tmp_path: Path) -> None:
    vendor = python_with(tmp_path / "vendor", torch=COREX, numpy="1.26.4", triton="3.0.0")
    before = files_below(vendor)
    done = run(checkout, vendor)
    assert done.returncode == 0, done.stderr
    assert f"Keeping torch {COREX} of {vendor}/sdk\n" in done.stderr
    assert "5 GB" not in done.stderr
    python = checkout / ".venv/bin/python"
    assert done.stdout == f"{python}\n"
    for package in ("torch", "numpy", "triton"):
        assert str(vendor) in version_in(python, package), "that of the vendor"
    for package in BESIDE:
        assert version_in(python, package).startswith("9.0 ")
    assert files_below(vendor) == before
    pins = (checkout / ".venv/constraints.txt").read_text().split()
    assert pins == ["numpy==1.26.4", f"torch=={COREX}", "triton==3.0.0"]
    # Again, with and without the Python on PATH: nothing is installed, and torch stays.
    for pythons, program in (
        ([vendor], "prepare_python requirements.txt"),
        ([vendor], "find_python"),
        ([], "find_python"),
    ):
        again = run(checkout, *pythons, program=program)
        assert (again.returncode, again.stdout, again.stderr) == (0, f"{python}\n", "")


@pytest.mark.slow
def test_a_venv_with_another_torch_hides_nothing(checkout: Path, tmp_path: Path) -> None:
    empty = python_with(tmp_path / "empty")
    assert run(checkout, empty).returncode == 0
    python = checkout / ".venv/bin/python"
    assert version_in(python, "torch").startswith("9.0 ")
    vendor = python_with(tmp_path / "vendor", torch=COREX, numpy="1.26.4")
    flagged = run(checkout, vendor, program="find_python")
    assert flagged.returncode == 2
    notice, error = flagged.stderr.splitlines()
    assert notice.startswith(f"Notice: not using .venv: its torch 9.0 would hide torch {COREX} of")
    assert error.startswith("Error: python3 lacks h5py tqdm tokenizers safetensors")
    assert run(checkout, vendor, program="find_python", PYTHON=str(python)).returncode == 0
    flagless = run(checkout, vendor)
    assert flagless.returncode == 0, flagless.stderr
    assert f"Removing .venv, made for torch 9.0: here is torch {COREX} of" in flagless.stderr
    assert version_in(python, "torch").startswith(COREX)


def test_a_venv_of_the_user_is_not_removed(checkout: Path, tmp_path: Path) -> None:
    add_package(make_environment(checkout / ".venv"), "torch", "2.9.0")
    vendor = python_with(tmp_path / "vendor", torch=COREX)
    done = run(checkout, vendor)
    assert done.returncode == 2
    assert "which this script did not create, has torch 2.9.0 and would hide" in done.stderr
    assert version_in(checkout / ".venv/bin/python", "torch").startswith("2.9.0")


def test_with_flags_nothing_is_installed_and_the_advice_does_no_harm(
    checkout: Path, tmp_path: Path
) -> None:
    vendor = python_with(tmp_path / "vendor", torch=COREX, numpy="1.26.4", tqdm="4.66", tomli="2.0")
    done = run(checkout, vendor, program="find_python")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line == (
        "Error: python3 lacks h5py tokenizers safetensors; run 'bash run_training.sh' once without "
        f"flags, which installs into .venv and keeps torch {COREX}; or: python3 -m pip install "
        "--no-deps h5py tokenizers safetensors"
    )
    assert not (checkout / ".venv").exists()
    without = run(checkout, python_with(tmp_path / "empty"), program="find_python")
    assert "pip install" not in without.stderr, "it might bring the wrong torch"
    assert "set PYTHON to a Python that has torch" in without.stderr


def test_a_python_with_torch_is_taken_before_one_without(checkout: Path, tmp_path: Path) -> None:
    all_of_it = dict.fromkeys(["torch", "numpy", "tomli", *BESIDE], "9.0")
    pythons = {
        "python3": python_with(tmp_path / "empty"),
        "python": python_with(tmp_path / "vendor", **all_of_it),
    }
    (tmp_path / "on_path/bin").mkdir(parents=True)
    for name, environment in pythons.items():
        script = tmp_path / "on_path/bin" / name
        script.write_text(f'#!/bin/sh\nexec "{environment}/bin/python" "$@"\n')
        script.chmod(0o755)
    done = run(checkout, tmp_path / "on_path")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "python\n"


def test_an_old_torch_is_not_used(checkout: Path, tmp_path: Path) -> None:
    done = run(checkout, python_with(tmp_path / "old", torch="2.3.1+cu121", numpy="1.26.4"))
    assert done.returncode == 0, done.stderr
    assert "Notice: not using torch 2.3.1+cu121 of " in done.stderr
    assert version_in(checkout / ".venv/bin/python", "torch").startswith("9.0 ")


def test_the_size_is_said_before_a_torch_is_fetched(checkout: Path, tmp_path: Path) -> None:
    done = run(checkout, python_with(tmp_path / "empty"))
    assert done.returncode == 0, done.stderr
    said = done.stderr
    assert said.index("up to 5 GB") < said.index("Installing requirements.txt")
    assert "export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu" in said


def test_without_an_index_it_says_what_to_do_by_hand(checkout: Path, tmp_path: Path) -> None:
    vendor = python_with(tmp_path / "vendor", torch=COREX, numpy="1.26.4")
    done = run(checkout, vendor, PIP_FIND_LINKS=str(tmp_path / "no wheels"))
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert line.startswith("Error: cannot install requirements-beside-torch.txt; see pip's message")
    assert "pip download --dest wheels -r requirements-beside-torch.txt" in line
    assert run(checkout, vendor).returncode == 0, "the next attempt goes on"


def test_the_range_of_pythons(checkout: Path, tmp_path: Path) -> None:
    path = checkout / "pyproject.toml"
    path.write_text(path.read_text().replace(">=3.10,<3.15", ">=3.98,<3.99"))
    done = run(checkout, python_with(tmp_path / "empty"), program="find_python")
    assert done.returncode == 2
    assert done.stderr == "Error: no Python 3.98 to 3.98 found; install one, or set PYTHON\n"
    named = run(checkout, program="find_python", PYTHON=sys.executable)
    version = f"Python 3.{sys.version_info.minor}"
    assert named.stderr == (
        f"Error: PYTHON={sys.executable} is {version}, and this program needs Python 3.98 to 3.98; "
        "set PYTHON to one of them\n"
    )


def test_what_is_wrong_with_the_python_that_is_named(checkout: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.txt"
    plain.write_text("no program\n")
    for value, said in (
        (tmp_path / "absent", "names no file that this user can reach; set it to Python 3."),
        ("no-such-command", "names no file"),
        (tmp_path, f"is a folder; set it to the program in it, such as {tmp_path}/bin/python"),
        (plain, "is not executable"),
        ("/bin/false", "does not start as a Python; set it to Python 3.10 to 3.14"),
        ("/bin/echo", "does not start as a Python"),
    ):
        done = run(checkout, program="find_python", PYTHON=str(value))
        assert done.returncode == 2
        assert done.stderr.startswith(f"Error: PYTHON={value} {said}")
        assert done.stderr.count("\n") == 1
    home = run(checkout, program="find_python", PYTHON="~/absent", HOME=str(tmp_path))
    assert home.stderr.startswith(f"Error: PYTHON={tmp_path}/absent names no file")


def test_a_python_that_does_not_start(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "email.py").write_text("")  # hides a package that every Python needs for this
    done = run(checkout, program="find_python", PYTHON=sys.executable, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith(f"Error: PYTHON={sys.executable} (Python 3.")
    assert f"'email' is not a package, with PYTHONPATH={tmp_path};" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_docker_image_keeps_the_torch_of_its_base_image(checkout: Path, tmp_path: Path) -> None:
    """The image's own command, with a Python in the place of the base image's."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    (command,) = (line for line in text.splitlines() if "prepare_python" in line)
    vendor = python_with(tmp_path / "vendor", torch=COREX, numpy="1.26.4")
    done = run(
        checkout, vendor, program=command.removeprefix("RUN "), PYTHON="python3",
        TORCH_INDEX="https://download.pytorch.org/whl/cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"Keeping torch {COREX} of {vendor}/sdk" in done.stderr
    for needed in ("ARG BASE_IMAGE=", "FROM ${BASE_IMAGE}", "gcc"):
        assert needed in text
