"""Text files of others: compressed, hidden, damaged, of another kind, in another encoding."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from bert_pretraining.errors import UserError
from bert_pretraining.preparation import text_files
from bert_pretraining.preparation.text_files import (
    expanded,
    folder_texts,
    missing_parts,
    read_start,
    read_text,
    require_all_parts,
)
from bert_pretraining.preparation.vocabulary import Vocabulary
from helpers import in_process

TEXT = "One sentence. Caf\u00e9s are two.\n"
ZSTD = b"\x28\xb5\x2f\xfd"


@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_compressed_text_is_read(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "text"
    path.write_bytes(compress(b"\xef\xbb\xbf" + TEXT.encode()))
    assert read_text(path) == TEXT
    assert read_start(path) == TEXT


def test_zstd_is_read_with_a_module_and_names_one_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.zst").write_bytes(ZSTD)
    for module in ("compression.zstd", "backports.zstd", "pyzstd", "zstandard"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        UserError, match=r"no module for it; install one: .* zstandard; or .*unzstd"
    ):
        read_text(tmp_path / "text.zst")
    stream = SimpleNamespace(ZstdFile=lambda file: io.BytesIO(TEXT.encode()))
    monkeypatch.setitem(sys.modules, "pyzstd", stream)
    assert read_text(tmp_path / "text.zst") == TEXT


def tar_gz() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    return content.getvalue()


NOT_TEXT = {
    "utf16": ("One".encode("utf-16"), "UTF-16, not text; convert it: iconv -f UTF-16 -t UTF-8"),
    "utf16_bare": ("One two.\n".encode("utf-16-le"), "9 of 18 characters are NUL"),
    "latin1": (b"One\nTwo caf\xe9", r"not UTF-8 text \(byte 11\), in line 2; convert .* iconv"),
    "pdf": (b"%PDF-1.4\nabc", "a PDF document, not text; leave it out"),
    "html": (b"<!DOCTYPE html><html>", r"a web page \(HTML\), not text; leave it out"),
    "zip": (b"PK\x03\x04" + bytes(40), "a zip archive, not text; unpack it: unzip"),
    "tar_gz": (tar_gz(), "a tar archive, not text; unpack it: tar -xf"),
    "cut_gz": (gzip.compress(os.urandom(5000))[:-9], "a damaged or cut-off gzip file"),
    "bad_bz2": (b"BZh9" + b"x" * 50, "a damaged or cut-off bz2 file"),
    "mediawiki": (b"<mediawiki xmlns=...>\n", "a MediaWiki XML dump, not text; extract .*WikiEx"),
    "xml": (b'<?xml version="1.0"?>\n<mediawiki>\n', "a MediaWiki XML dump"),
    "dump_bz2": (bz2.compress(b"\n<mediawiki>\n"), "a MediaWiki XML dump"),
    "old_mac": (b"One.\rTwo.\r", "lines end in CR alone"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
}


@pytest.mark.parametrize("kind", NOT_TEXT)
def test_what_is_no_text_is_named_in_one_line(tmp_path: Path, kind: str) -> None:
    content, message = NOT_TEXT[kind]
    path = tmp_path / "given"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_text(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [kind for kind in NOT_TEXT if kind not in ("old_mac",)])
@pytest.mark.parametrize(
    "command",
    [
        "data segment --input given --output_dir out --num_eval_articles 0",
        "data create-examples --input_file given --output_file out --vocab vocab.txt",
        "data prepare --text_dir . --eval_text given --output_dir out --vocab vocab.txt",
        "data prepare --text_dir folder --eval_text good --output_dir out --vocab vocab.txt",
        "data make-mini --output_dir out --text given",
    ],
)
def test_every_command_refuses_it(tmp_path: Path, kind: str, command: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    (tmp_path / "good").write_text("a\na\n\na\n")
    for path in (tmp_path / "given", tmp_path / "folder" / "given"):
        path.write_bytes(NOT_TEXT[kind][0])
    done = in_process(*command.split(), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: ")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "text: empty; give"), (" \n\r\n", "text: empty; give"),
     ('{"text": "One."}', "text: JSON, not text of one sentence a line; turn it into"),
     ("<doc id=1>\nT\n", "text: WikiExtractor's output, not text of one sentence")],
)  # fmt: skip
@pytest.mark.parametrize("where", ["train", "eval"])
def test_prepare_refuses_it_before_it_writes(
    tmp_path: Path, content: str, message: str, where: str
) -> None:
    (tmp_path / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    for folder in ("train", "eval"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "text").write_text("a\na\n" if folder == "train" else "a a\na\n")
    (tmp_path / where / "text").write_text(content)
    done = in_process(
        *"data prepare --text_dir train --eval_text eval/text --output_dir out".split(),
        "--vocab", "vocab.txt", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "vocab.txt: does not exist"), (b"caf\xe9", "not UTF-8"), (b"a\n", "lacks .CLS."),
     (b"PK\x03\x04" + bytes(40), "a zip archive, not text")],
)  # fmt: skip
def test_a_vocabulary_that_is_none(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        Vocabulary.load(tmp_path / "vocab.txt")


def test_a_vocabulary_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_bytes(b"\xef\xbb\xbf[PAD]\r\n[UNK]\r\n[CLS]\r\n[SEP]\r\n[MASK]\r\n")
    assert Vocabulary.load(path).ids["[PAD]"] == 0


def test_hidden_and_other_files_are_never_text(tmp_path: Path) -> None:
    for name in ("part-0", ".DS_Store", "._part-0", "part-0.md5", "b.tmp", "c~", "Thumbs.db", "v"):
        (tmp_path / name).write_text(TEXT)
    (tmp_path / ".ipynb_checkpoints").mkdir()
    found = folder_texts(
        tmp_path, "--text_dir", lambda path: "the vocabulary" if path.name == "v" else None
    )
    assert [path.name for path in found.files] == ["part-0"]
    assert set(found.left_out) == {
        "._part-0 (hidden)",
        ".DS_Store (hidden)",
        ".ipynb_checkpoints (a folder)",
        "Thumbs.db (made by a file manager)",
        "b.tmp (an unfinished or temporary file)",
        "c~ (an unfinished or temporary file)",
        "part-0.md5 (a checksum)",
        "v (the vocabulary)",
    }


def test_folders_of_inputs_are_read_with_their_folders(tmp_path: Path) -> None:
    for name in ("AA/wiki_00", "AA/wiki_01", "AB/wiki_00", ".git/config", "AB/.wiki_00.swp"):
        path = tmp_path / "raw" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(TEXT)
    (tmp_path / "one").write_text(TEXT)
    found = expanded([tmp_path / "one", tmp_path / "raw"])
    assert [str(path.relative_to(tmp_path)) for path in found.files] == [
        "one", "raw/AA/wiki_00", "raw/AA/wiki_01", "raw/AB/wiki_00"
    ]  # fmt: skip
    assert len(found.left_out) == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no text file in this folder"):
        expanded([tmp_path / "empty"])


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["part-00000-of-00002", "part-00001-of-00002", "eval.txt"], None),
        (["a-1-of-2.gz", "a-2-of-2.gz"], None),
        (["part-00000-of-00500", "part-00007-of-00500"],
         r"2 of 500 parts are there \(not number 1, 2, 3, 4, 5 and 493 more\)"),
        (["part_0_of_3.hdf5", "part_2_of_3.hdf5"], r"2 of 3 parts are there \(not number 1\)"),
        (["speech-1", "speech-3"], None),
        (["a-0-of-2", "a-1-of-2", "b-0-of-2"], r"1 of 2 parts b-\* is there \(not number 1\)"),
        (["a-0-of-4", "a-1-of-4", "b-2-of-4", "b-3-of-4"],
         r"2 of 4 parts a-\* are there \(not number 2, 3\)"),
    ],
)  # fmt: skip
def test_parts_that_are_missing(names: list[str], missing: str | None) -> None:
    if missing is None:
        assert missing_parts(names) is None
        return
    with pytest.raises(UserError, match=f"here: {missing}; .* --allow_missing_parts"):
        require_all_parts(names, "here", allowed=False)
    (warning,) = require_all_parts(names, "here", allowed=True)
    assert warning.startswith("here: ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(UserError, match="closed: no permission to read it"):
        expanded([tmp_path / "closed"])


def test_folders_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text(TEXT)
    with pytest.raises(UserError, match=r"--text_dir .*file is a file, not a directory; pass --te"):
        folder_texts(tmp_path / "file", "--text_dir", lambda path: None)
    assert text_files.listed(["a", "b", "c"], most=2) == "a, b and 1 more"
