"""What is no checkpoint, or no longer one: refused in one line, and nothing of it is run."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import tarfile
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bert_pretraining.checkpoint import read_weights
from bert_pretraining.checkpoint.formats import read_checkpoint
from bert_pretraining.errors import UserError
from helpers import (
    REFERENCE,
    assert_same_tensors,
    distinct_weights,
    needs_reference,
    tiny_config,
)

CHECKPOINT = REFERENCE / "checkpoint"
APEX = CHECKPOINT / "model.ckpt-28252.apex.pt"
TF1 = CHECKPOINT / "tf1/model.ckpt-28252"


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return distinct_weights(tiny_config())


class Hostile:
    """Runs code when unpickled the careless way."""

    def __reduce__(self) -> tuple:
        return (os.mkdir, ("hostile-code-ran",))


@pytest.mark.parametrize(
    "place", ["model", "optimizer", "state", "directory", "old format", "plain pickle"]
)
def test_hostile_files_do_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: dict, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    content: dict = {"model": dict(weights), "optimizer": {}, "state": {}}
    path = tmp_path / "start.pt"
    content[place if place in content else "model"]["payload"] = Hostile()
    if place == "directory":
        path = tmp_path / "pytorch_model.bin"
    if place == "plain pickle":
        path.write_bytes(pickle.dumps(content))
        pickle.loads(path.read_bytes())
    else:
        torch.save(content, path, _use_new_zipfile_serialization=place != "old format")
        torch.load(path, weights_only=False)
    # The payload works: the careless way has run it.
    assert (tmp_path / "hostile-code-ran").exists()
    (tmp_path / "hostile-code-ran").rmdir()
    with warnings.catch_warnings(), pytest.raises(UserError, match="not safe to read") as caught:
        warnings.simplefilter("error")
        read_weights(tmp_path if place == "directory" else path)
    assert not (tmp_path / "hostile-code-ran").exists()
    assert "\n" not in str(caught.value)
    if place not in ("old format", "plain pickle"):
        assert "it would call posix.mkdir, which" in str(caught.value)


@pytest.mark.parametrize("kind", ["a tar file", "TorchScript"])
def test_formats_that_may_hold_code_are_refused(tmp_path: Path, weights: dict, kind: str) -> None:
    """torch.load(weights_only=True) restricts neither before PyTorch 2.6."""
    path = tmp_path / "start.pt"
    if kind == "TorchScript":
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    else:
        torch.save(weights, tmp_path / "pickle")
        with tarfile.open(path, "w") as archive:
            for name in ("storages", "tensors", "pickle"):
                archive.add(tmp_path / "pickle", name)
    with pytest.raises(UserError, match=rf"start\.pt: {kind}.* not safe to read; load it in"):
        read_weights(path)


def flip(path: Path, position: int, bit: int = 4) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def test_a_flipped_bit_in_the_tensors_is_found(tmp_path: Path, weights: dict) -> None:
    """torch.load takes such a file without a word."""
    path = tmp_path / "start.pt"
    torch.save({"model": weights}, path)
    with zipfile.ZipFile(path) as archive:
        record = max(archive.infolist(), key=lambda record: record.file_size)
    flip(path, record.header_offset + 4096)
    torch.load(path, weights_only=True)
    with pytest.raises(UserError, match=r"start\.pt: .* a damaged one .*CRC-32.*; .*copy it again"):
        read_weights(path)


@pytest.mark.skipif(
    not hasattr(torch.serialization, "set_crc32_options"), reason="PyTorch has it from 2.6 on"
)
def test_files_written_without_checksums_are_read(tmp_path: Path, weights: dict) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"model": weights}, tmp_path / "start.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same_tensors(read_weights(tmp_path / "start.pt"), weights)


@pytest.mark.parametrize("form", ["pt", "old", "safetensors"])
def test_spoiled_files_are_one_line_or_unharmed(tmp_path: Path, weights: dict, form: str) -> None:
    """Cuts and flips anywhere: a UserError of one line, or all the tensors still."""
    path = tmp_path / ("start.safetensors" if form == "safetensors" else "start.pt")
    small = {name: value for name, value in weights.items() if value.numel() < 2000}
    if form == "safetensors":
        save_file(small, path)
    else:
        torch.save(small, path, _use_new_zipfile_serialization=form == "pt")
    good = path.read_bytes()
    draw = random.Random(1)
    refused = 0
    for attempt in range(120):
        if attempt % 3 == 0:
            spoiled = good[: draw.randrange(1, len(good))]
        else:
            # The first 3,000 bytes hold the names and shapes.
            position = draw.randrange(3000 if attempt % 3 == 1 else len(good))
            flipped = bytearray(good)
            flipped[position] ^= 1 << draw.randrange(8)
            spoiled = bytes(flipped)
        path.write_bytes(spoiled)
        try:
            found = read_weights(path)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
            continue
        assert all(isinstance(value, torch.Tensor) for value in found.values())
        if form == "pt":
            assert_same_tensors(found, small)
    assert refused >= 40


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "a.pt",
            b"some text\n" * 100,
            "text that begins 'some text', not a checkpoint; pass",
        ),
        ("a.pt", b"PK\x03\x04" + bytes(500), "damaged, its end is missing"),
        ("a.pt", bytes(5000), "zeros where data begins: .*, not a checkpoint; download or copy"),
        ("a.pt", b"\x89HDF\r\n\x1a\n" + bytes(500), "an HDF5 file, not a checkpoint; "),
        ("a.pt", b"\x80\x02}.", "not a checkpoint of PyTorch"),
        ("a.safetensors", b"\x01\xff" * 90, "damaged or no file of safetensors"),
        ("a.safetensors", b"some text", "plain text .*, not a checkpoint"),
        ("a.index", b"some text", "text .*, not the index of a TensorFlow checkpoint"),
        ("a.index", bytes(500), "zeros .*, not the index of a TensorFlow checkpoint"),
        ("a.index", b"\x01\xff" * 90, "no index of a TensorFlow checkpoint"),
    ],
)
def test_foreign_files(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        read_weights(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_foreign_archive(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("word/document.xml", "<text/>")
    with pytest.raises(UserError, match=r"a\.pt: a zip archive, not a checkpoint of PyTorch; unp"):
        read_weights(tmp_path / "a.pt")


def test_an_archive_with_a_damaged_end(tmp_path: Path, weights: dict) -> None:
    """One byte of the archive's directory, which says that it goes on on another disk."""
    path = tmp_path / "start.pt"
    torch.save(weights, path)
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\x06\x07") + 4] = 77
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"start\.pt: damaged at its end \(.*disk.*copy it again"):
        read_weights(path)


def test_tensors_that_no_weights_are(tmp_path: Path) -> None:
    torch.save({"a": torch.eye(3).to_sparse()}, tmp_path / "sparse.pt")
    with pytest.raises(UserError, match="holds no named tensors"):
        read_weights(tmp_path / "sparse.pt")


def test_a_directory_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="a directory, not a checkpoint; pass --init_checkpoint"):
        read_weights(tmp_path)


@needs_reference
def test_reading_copies_nothing(tmp_path: Path) -> None:
    """8 MB of weights are mapped, not read into memory, by each kind of file that allows it."""
    shutil.copyfile(APEX, tmp_path / "start.pt")
    weights = dict(read_weights(APEX))
    weights.pop("cls.predictions.decoder.weight")
    save_file(weights, tmp_path / "start.safetensors")
    for path in (tmp_path / "start.pt", tmp_path / "start.safetensors", TF1):
        read_checkpoint(path)  # tables and modules are made once
        before = anonymous_memory()
        tracemalloc.start()
        found = read_checkpoint(path)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 4 << 20, path  # pieces, and not tensors: the largest has 7.8 MB
        assert anonymous_memory() - before < 3 << 20, path
        assert len(found.weights) >= 46


def anonymous_memory() -> int:
    """Bytes of memory that are this process's own and no file's."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024
