"""Files are written whole, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from bert_pretraining.runtime.files import write_whole


@pytest.mark.parametrize(
    "content", ["caf\u00e9\n", "caf\u00e9\n".encode(), lambda path: path.write_text("caf\u00e9\n")]
)
def test_text_bytes_and_a_function_are_written(tmp_path: Path, content: object) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    write_whole(path, content)
    assert path.read_text(encoding="utf-8") == "caf\u00e9\n"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt, ValueError])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, kind: type[BaseException]
) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half of the")
        raise kind("disk is full")

    with pytest.raises(kind, match="disk is full"):
        write_whole(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_function_finds_no_rest_of_a_killed_process(tmp_path: Path) -> None:
    (tmp_path / "file.partial").write_text("the rest of a process that was killed")
    write_whole(tmp_path / "file", lambda temporary: temporary.open("x").close())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "folder" / "file", "text")
