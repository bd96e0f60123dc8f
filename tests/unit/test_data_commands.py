"""The commands of `data`, `checkpoint` and `bench` as a user types them."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import pytest

from bert_pretraining import __main__ as command_line
from bert_pretraining.commands import checkpoint, data
from bert_pretraining.config import FlagParser

COMMANDS = [
    *(f"data {name}" for name in data.COMMANDS),
    *(f"checkpoint {name}" for name in checkpoint.COMMANDS),
    *(f"bench {name}" for name in ("step", "kernels", "optimizer", "loader")),
]


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr("sys.argv", ["bert_pretraining", *(str(word) for word in words)])
    return command_line.main()


def test_verify_draws_the_lengths(
    mini_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "lengths.png"
    assert run(monkeypatch, "data", "verify", mini_data, "--plot", picture) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"{mini_data}: good" in capsys.readouterr().out


def test_verify_cannot_draw_without_matplotlib(
    mini_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run(monkeypatch, "data", "verify", mini_data, "--plot", tmp_path / "lengths.png") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Error: the plot needs matplotlib; install it: ")


def test_make_mini_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("data", "make-mini", "--output_dir", tmp_path / "mini")
    assert run(monkeypatch, *words) == 0
    assert capsys.readouterr().out.startswith(f"Made {tmp_path}/mini: ")
    assert run(monkeypatch, *words) == 0
    done = capsys.readouterr()
    assert done.out == f"{tmp_path}/mini holds this data set already, complete: nothing to do\n"
    assert done.err == ""
    assert run(monkeypatch, *words, "--num_shards", 8) == 2
    assert capsys.readouterr().err == (
        f"Error: {tmp_path}/mini exists and has --num_shards 16, not 8; choose another "
        "--output_dir, or delete it\n"
    )


@pytest.mark.parametrize(
    ("words", "missing"), [(("data", "verify", "--json"), "DIR"), (("data", "checksum"), "FILE")]
)
def test_a_missing_name_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    missing: str,
) -> None:
    assert run(monkeypatch, *words) == 2
    assert f"arguments are required: {missing}" in capsys.readouterr().err


def options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [
        action
        for action in parser._actions  # argparse shows its actions nowhere else
        if action.option_strings and action.dest != "help"
    ]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_tells_defaults_and_allowed_values(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsers: list[FlagParser] = []
    monkeypatch.setattr(FlagParser, "print_help", lambda parser, file=None: parsers.append(parser))
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *command.split(), "--help")
    assert ended.value.code == 0
    (parser,) = parsers
    assert parser.description
    text = " ".join(parser.format_help().split())
    for action in options(parser):
        flag = action.option_strings[0]
        told = (action.help or "") % {"default": action.default}
        if action.required:
            assert told.endswith("(required)"), flag
        else:
            assert "(default: " in told, flag
        if action.choices:
            assert "{" + ",".join(action.choices) + "}" in text, flag
        elif isinstance(action.default, int | float) and not isinstance(action.default, bool):
            assert re.search(r"at least|above|\d to \d|any integer", told), flag
