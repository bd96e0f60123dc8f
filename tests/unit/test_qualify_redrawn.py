"""`qualify page`: a page drawn again from its figures, and files that it refuses."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

import qualifications
from bert_pretraining.errors import UserError
from bert_pretraining.qualify import command
from bert_pretraining.qualify.record import FAIL
from bert_pretraining.qualify.stages import STAGES
from qualifications import complete, page_of, stage


@pytest.fixture
def quick_png(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return qualifications.quick_png(monkeypatch)


@pytest.mark.skipif(not find_spec("matplotlib"), reason="the pictures need matplotlib")
def test_a_page_drawn_again_is_the_same_to_the_last_byte(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    done = replace(complete(learning=None), asked=[one.name for one in STAGES[:-1]])
    file = tmp_path / "before.json"
    done.write(file)
    text = page_of(done, tmp_path)
    assert text.count("not asked for") == 1
    assert command.main(["page", str(file), "--output", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_bytes() == (tmp_path / "page.html").read_bytes()
    assert capsys.readouterr().out == f"Page: {tmp_path / 'again.html'}\n"


def test_a_page_stands_beside_its_file(tmp_path: Path, quick_png: list[str]) -> None:
    done = complete(learning=None)
    done.write(tmp_path / "qualification.json")
    assert command.main(["page", str(tmp_path / "qualification.json")]) == 0
    text = (tmp_path / "qualification.html").read_text()
    assert text == page_of(done, tmp_path)
    assert text.count("did not run") == 1  # all were asked for


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema": 0}, "schema 0, but this version reads schema 1; qualify that machine again"),
        ({"schema": None}, "schema None, but this version"),
        ({"started": 7}, "not a qualification \\('7' is not a text\\)"),
        ({"stages": [{"name": "step"}]}, "not a qualification \\("),
        ({"stages": [stage("step", notes=[1]).__dict__]}, "'1' is not a text"),
        ({"settings": {"minutes": "long"}}, "its figures are not those of a qualification"),
        ({"settings": {"ranks": 0, "layers": 24}}, "its figures are not those of a qualification"),
        (
            {"stages": [replace(stage("step"), seconds=float("inf")).__dict__]},
            "its figures are not those of a qualification",
        ),
        (
            {"stages": [stage("kernels", figures={"kernels": {"a": 1}}).__dict__]},
            "its figures are not those of a qualification",
        ),
    ],
)
def test_a_page_of_another_file_is_refused(
    tmp_path: Path, quick_png: list[str], changes: dict, words: str
) -> None:
    file = tmp_path / "qualification.json"
    complete().write(file)
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(UserError, match=words):
        command.main(["page", str(file)])
    assert not (tmp_path / "qualification.html").exists()


def test_a_page_shows_the_words_of_its_file_as_text(tmp_path: Path, quick_png: list[str]) -> None:
    words = "<script>'\"&"
    wrong = stage(words, FAIL, reason=words, notes=[words], figures={"versions": {words: words}})
    done = complete(software=replace(wrong, name="software"), other=wrong)
    done.machine["device"] = done.machine["host"] = done.machine["cpu"] = words
    done.settings["precision"] = done.machine["versions"]["torch"] = words
    assert "<script>" not in page_of(done, tmp_path)


def test_what_is_no_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for words in (["page", str(pipe)], ["compare", str(pipe), str(pipe)]):
        with pytest.raises(UserError, match="pipe: a named pipe, not a file"):
            command.main(words)


def test_a_page_that_cannot_be_drawn_or_written(tmp_path: Path, quick_png: list[str]) -> None:
    file = tmp_path / "a.json"
    complete().write(file)
    content, cut = file.read_bytes(), tmp_path / "cut.json"
    cut.write_bytes(content[: len(content) // 2])
    for words, told in (
        (["page"], "page needs one file, but there are 0"),
        (["page", str(file), str(file)], "page needs one file, but there are 2"),
        (["page", str(tmp_path / "b.json")], "cannot read .*b.json"),
        (["page", str(cut)], r"not a qualification that can be read \(not valid JSON"),
        (["page", str(file), "--output", str(file)], "the page would replace the figures"),
        (["page", str(file), "--output", str(tmp_path / "no/a.html")], "its folder does not exist"),
        (["page", str(file), "--output", str(tmp_path)], "no regular file"),
    ):
        with pytest.raises(UserError, match=told):
            command.main(words)
    assert file.read_bytes() == content
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.json", "cut.json"]
