"""Which packages are installed, as `doctor` and the shell scripts ask."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bert_pretraining import __main__ as command_line
from bert_pretraining.commands import training
from bert_pretraining.runtime import packages
from installations import add_package


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages that comes before all others."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_package_with_metadata_and_one_without(folder: Path) -> None:
    add_package(folder, "acme", "1.2.3")
    (folder / "bare.py").touch()
    assert packages.installed_version("acme") == "1.2.3"
    assert packages.installed_version("bare") == packages.UNKNOWN
    assert packages.installed_version("absent") is None
    assert packages.folder_of("acme") == folder


@pytest.mark.parametrize("with_metadata", [True, False])
def test_torch_names_its_build(
    with_metadata: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    add_package(folder, "torch", "2.4.1", with_metadata=with_metadata)
    line = "__version__: str = '2.4.1+corex.4.3.0'\n"
    (folder / "torch" / "version.py").write_text(f"__all__ = ['__version__']\n{line}")
    assert packages.installed_version("torch") == "2.4.1+corex.4.3.0"
    assert packages.folder_of("torch") == folder


def test_a_mere_folder_is_no_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "nothing_in_it").mkdir()
    assert packages.installed_version("nothing_in_it") is None


@pytest.mark.parametrize(
    ("version", "than", "expected"),
    [
        ("2.4.1+corex.4.3.0", "2.4", False),
        ("2.10.0+cpu", "2.9", False),
        ("2.3.1+cu121", "2.4", True),
        ("1.13.0a0+git1", "2.4", True),
        (packages.UNKNOWN, "2.4", False),
    ],
)
def test_versions_are_compared(version: str, than: str, expected: bool) -> None:
    assert packages.is_older(version, than) == expected


def test_advice_replaces_nothing() -> None:
    pip = f"{sys.executable} -m pip install"
    assert packages.how_to_install(["h5py", "tqdm"]) == f"{pip} --no-deps h5py tqdm"
    assert packages.how_to_install(["matplotlib"]) == f"{pip} matplotlib"
    assert "pip install" not in packages.how_to_install(["torch", "h5py"])


def test_the_error_of_a_missing_module(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module, expected in (
        ("h5py", f"makes, or: {sys.executable} -m pip install --no-deps h5py"),
        ("mlperf_logging.sub", f"makes, or: {sys.executable} -m pip install mlperf-logging"),
        ("torch", "use .venv/bin/python, which 'bash run_training.sh' makes"),
    ):
        error = ModuleNotFoundError("", name=module)

        def raise_it(_: list[str], error: Exception = error) -> None:
            raise error

        monkeypatch.setitem(training.COMMANDS, "config list", raise_it)
        monkeypatch.setattr(sys, "argv", ["bert_pretraining", "config", "list"])
        assert command_line.main() == 2
        assert capsys.readouterr().err.endswith(f"{expected}\n")
