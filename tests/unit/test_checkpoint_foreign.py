"""Files that are no checkpoint, or a part of one: each command says what they are, in one line."""

from __future__ import annotations

import gzip
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bert_pretraining.checkpoint import read_weights, write_weights
from bert_pretraining.errors import UserError
from bert_pretraining.runtime.files import checkpoint_kind
from helpers import assert_same_tensors, distinct_weights, tiny_config

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1344997306\n"


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return distinct_weights(tiny_config())


def a_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("bert/readme.txt", "text")


def a_tar(path: Path) -> None:
    (path.parent / "inside").write_text("text")
    with tarfile.open(path, "w") as archive:
        archive.add(path.parent / "inside", "inside")


def half(path: Path) -> None:
    torch.save({"a": torch.ones(5000)}, path)
    path.write_bytes(path.read_bytes()[:10_000])


def half_safetensors(path: Path) -> None:
    save_file({"a": torch.ones(5000)}, path)
    path.write_bytes(path.read_bytes()[:10_000])


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "lfs.pt": (lambda p: p.write_text(LFS), "a Git LFS pointer .*; fetch .*git lfs pull"),
    "lfs.safetensors": (lambda p: p.write_text(LFS), "a Git LFS pointer .*; fetch .*git lfs pull"),
    "page.bin": (lambda p: p.write_text("<!DOCTYPE html><html>"), r"a web page \(HTML\), not a ch"),
    "a.pt.gz": (lambda p: p.write_bytes(gzip.compress(b"abc")), "gzip-compressed .*; decompress"),
    "a.zip": (a_zip, "a zip archive, not a checkpoint of PyTorch; unpack it"),
    "a.tar": (a_tar, "a tar file, which is not safe to read; "),
    "config.json": (lambda p: p.write_text('{"hidden_size": 8}'), "JSON text, not a checkpoint; "),
    "vocab.txt": (
        lambda p: p.write_text("[PAD]\n[UNK]\n"),
        "plain text .*, not a checkpoint; pass",
    ),
    "part.hdf5": (
        lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(900)),
        "an HDF5 file.*not a",
    ),
    "half.pt": (half, "damaged, its end is missing; download or copy it again"),
    "half.safetensors": (half_safetensors, "damaged or no file of safetensors .*; download or"),
    "none.pt": (lambda p: None, "no checkpoint at"),
    "empty.pt": (lambda p: p.touch(), "an empty file, not a checkpoint; copy it again"),
    "link.pt": (lambda p: p.symlink_to("gone"), r"a link to nothing \(gone\); make the link again"),
    "directory": (lambda p: p.mkdir(), "a directory, not a checkpoint; "),
    "model.safetensors.index.json": (lambda p: p.write_text("{}"), "in parts; pass its folder, "),
    "pytorch_model-00001-of-00002.bin": (
        lambda p: p.write_text("x"),
        "in parts; pass its folder, ",
    ),
    "model.ckpt-5.meta": (lambda p: p.touch() or p.write_text("x"), "one part of a TensorFlow"),
    "pipe.pt": (os.mkfifo, "no regular file, so no checkpoint"),
    "object.pt": (
        lambda p: torch.save(torch.nn.Linear(2, 2), p),
        "a whole model: it would call",
    ),
    "picture.pt": (lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50)), "a PNG picture, not"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_every_command_names_what_it_was_given(
    run_checkpoint: object, source: Path, name: str
) -> None:
    path = source.parent / "given" / name
    path.parent.mkdir()
    make, words = FOREIGN[name]
    make(path)
    destination = source.parent / "made"
    with pytest.raises(UserError, match=words):
        read_weights(path)
    for arguments in (
        ("inspect", path),
        ("diff", path, source),
        ("diff", source, path),
        ("convert", path, destination, "--to", "apex"),
        ("convert", path, destination, "--to", "hf"),
    ):
        code, out, err = run_checkpoint(*arguments)
        assert (code, out, len(err.splitlines())) == (2, "", 1), err
        assert err.startswith("Error: "), err
        assert name in err
        assert "Traceback" not in err
    assert not destination.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_a_file_without_permission_is_no_damage(tmp_path: Path, weights: dict) -> None:
    for name in ("a.pt", "a.safetensors"):
        write_weights(tmp_path / name, weights)
        (tmp_path / name).chmod(0)
        with pytest.raises(UserError, match=r"no permission to read it .*; give it: chmod"):
            read_weights(tmp_path / name)


# ---- what a name or the bytes of a file tell


def test_the_bytes_of_a_file_count_and_not_its_ending(tmp_path: Path, weights: dict) -> None:
    kept = {name: value for name, value in weights.items() if "decoder" not in name}
    save_file(kept, tmp_path / "pytorch_model.bin")
    torch.save(kept, tmp_path / "model.safetensors")
    for path in (tmp_path / "pytorch_model.bin", tmp_path / "model.safetensors", tmp_path):
        assert_same_tensors(read_weights(path), kept)


@pytest.mark.parametrize(
    "name", [b"caf\xe9", "\u65e5\u672c\u8a9e".encode(), b"a b'c", b"line\nbreak"]
)
@pytest.mark.parametrize("ending", [b".pt", b".safetensors"])
def test_any_name_of_a_path_is_read(
    tmp_path: Path, weights: dict, name: bytes, ending: bytes
) -> None:
    """The first is no UTF-8, as an older system writes it."""
    kept = {name: value for name, value in weights.items() if "decoder" not in name}
    plain = tmp_path / "plain"
    (save_file if ending == b".safetensors" else torch.save)(kept, plain)
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    folder.mkdir()
    path = folder / os.fsdecode(name + ending)
    plain.rename(path)
    assert_same_tensors(read_weights(path), kept)


def test_parts_of_a_tensorflow_checkpoint_lead_to_its_name(tmp_path: Path) -> None:
    prefix = tmp_path / "model.ckpt-5"
    for ending in (".index", ".meta", ".data-00000-of-00001"):
        (tmp_path / f"model.ckpt-5{ending}").write_text("x")
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "/elsewhere/model.ckpt-5"\n')
    for path in (prefix, tmp_path / "model.ckpt-5.index"):
        assert checkpoint_kind(path) == "tensorflow"
    for name in ("model.ckpt-5.meta", "model.ckpt-5.data-00000-of-00001", "checkpoint"):
        with pytest.raises(UserError, match=rf"one part of a TensorFlow .*; pass {prefix}$"):
            checkpoint_kind(tmp_path / name)
    with pytest.raises(UserError, match=rf"directory, not a .*; pass --init_checkpoint {prefix}$"):
        checkpoint_kind(tmp_path)
    (tmp_path / "model.ckpt-5.index").unlink()
    with pytest.raises(
        UserError, match=r"no .*ckpt-5\.index, which .* beside model\.ckpt-5\.meta; "
    ):
        checkpoint_kind(prefix)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["model.ckpt-9.pt", "model.ckpt-10.pt"], r"pass --init_checkpoint .*/model\.ckpt-10\.pt$"),
        (["run-1/model.ckpt-9.pt", "run-1/model.ckpt-10.pt"], r"pass --init_ch.*ckpt-10\.pt$"),
        (["epoch_3.pth"], r"pass --init_checkpoint .*/epoch_3\.pth$"),
        (["__0_0.distcp", ".metadata"], "in parts, one for each rank, of FSDP .*; join them: "),
        (["global_step5/mp_rank_00_model_states.pt"], "in parts, one for each rank, of FSDP"),
        (["snapshots/1a2b/config.json"], r"pass --init_checkpoint .*/snapshots/1a2b$"),
        (["config.json", "tf_model.h5"], "pass --init_checkpoint FILE"),
    ],
)
def test_a_directory_says_what_to_pass_of_it(tmp_path: Path, files: list, words: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=words):
        checkpoint_kind(tmp_path)


def test_a_directory_of_links_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("../../blobs/abc")
    with pytest.raises(UserError, match=r"model\.safetensors: a link to nothing .*blobs/abc"):
        checkpoint_kind(tmp_path)


def test_a_name_on_the_hub_is_not_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("bert-large-uncased", "google/bert_uncased_L-2"):
        with pytest.raises(UserError, match="hub is not downloaded: pass a local directory"):
            checkpoint_kind(Path(name))
