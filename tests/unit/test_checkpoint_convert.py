"""`checkpoint convert`, as a user runs it."""

from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch

from bert_pretraining.checkpoint import read_weights, save_checkpoint, write_weights
from helpers import REFERENCE, assert_same_tensors, needs_reference

CHECKPOINT = REFERENCE / "checkpoint"
APEX = CHECKPOINT / "model.ckpt-28252.apex.pt"
TF1 = CHECKPOINT / "tf1/model.ckpt-28252"
EMBEDDING = "bert.embeddings.word_embeddings.weight"


@pytest.mark.parametrize("target", ["apex", "resume", "hf"])
def test_convert_there_and_back(
    run_checkpoint: object, tmp_path: Path, source: Path, weights: dict, target: str
) -> None:
    there, back = tmp_path / "there", tmp_path / "back.pt"
    code, out, _ = run_checkpoint("convert", source, there, "--to", target)
    assert code == 0
    assert out.startswith(f"Wrote {there}: ")
    assert f"Sizes from {tmp_path / 'bert_config.json'}" in out
    code, _, _ = run_checkpoint("convert", there, back, "--to", "apex")
    assert code == 0
    assert_same_tensors(read_weights(back), weights)
    content = torch.load(back, weights_only=True)
    assert list(content) == ["model"]
    assert list(content["model"]) == list(weights)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "back.pt", "bert_config.json", "source.pt", "there"
    ]  # fmt: skip


@needs_reference
def test_the_apex_file_made_of_the_tensorflow_one(tmp_path: Path, run_checkpoint: object) -> None:
    """No bert_config.json lies beside it; the weights tell what is needed."""
    code, out, _ = run_checkpoint("convert", TF1, tmp_path / "made.pt", "--to", "apex")
    assert code == 0
    assert out.splitlines() == [
        f"Wrote {tmp_path / 'made.pt'}: 47 tensors of TensorFlow 1 checkpoint",
        "Vocabulary: 30522 rows, padded to 30528 with rows of 0",
        "Left out: optimizer state, 88 entries of the source",
    ]
    theirs = torch.load(APEX, weights_only=True)["model"]
    ours = torch.load(tmp_path / "made.pt", weights_only=True)["model"]
    assert_same_tensors(ours, theirs)
    assert list(ours) == list(theirs)
    assert (tmp_path / "made.pt").stat().st_size < 1.01 * APEX.stat().st_size


def test_convert_to_resume_says_what_starts_fresh(
    run_checkpoint: object, tmp_path: Path, source: Path, weights: dict
) -> None:
    code, out, _ = run_checkpoint("convert", source, tmp_path / "a.pt", "--to", "resume")
    assert code == 0
    assert "In it: the weights alone\n" in out
    assert "Starts fresh: step 0, optimizer moments, loss scale, random states and data p" in out
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert (content["optimizer"], content["state"]) == ({}, {"global_steps": 0})
    # An upstream resume file: the state goes on, its optimizer does not.
    upstream = {"state": {0: {"exp_avg": torch.ones(1)}}, "param_groups": []}
    state = {"global_steps": 1234, "epoch": 2, "learning_rate": 3e-4}
    named = {f"module.{name}": value for name, value in weights.items()}
    save_checkpoint(tmp_path / "upstream.pt", named, upstream, state)
    code, out, _ = run_checkpoint(
        "convert", tmp_path / "upstream.pt", tmp_path / "b.pt", "--to=resume"
    )
    assert code == 0
    assert "In it: the weights and global_steps 1234, epoch 2, learning_rate 0.0003\n" in out
    assert "(another program's optimizer state cannot be taken over)" in out
    content = torch.load(tmp_path / "b.pt", weights_only=True)
    assert_same_tensors(content["model"], weights)
    assert (content["optimizer"], content["state"]) == ({}, state)
    own = {"updates": 1, "master": dict(weights)}
    save_checkpoint(tmp_path / "own.pt", weights, own, state)
    code, _, err = run_checkpoint(
        "convert", tmp_path / "own.pt", tmp_path / "c.pt", "--to", "resume"
    )
    assert code == 2
    assert "is a resume file of this package already; use it as it is" in err
    assert not (tmp_path / "c.pt").exists()


def test_sizes_from_the_run_in_whose_folder_it_is(
    run_checkpoint: object, tmp_path: Path, source: Path
) -> None:
    run = tmp_path / "run-1"
    run.mkdir()
    shutil.move(source, run / "model.ckpt-3.pt")
    words = ("convert", run / "model.ckpt-3.pt", tmp_path / "hf", "--to", "hf")
    for settings in ([], {"data_dir": 5}, {"data_dir": str(tmp_path / "gone")}):
        (run / "config.json").write_text(json.dumps(settings))
        code, _, err = run_checkpoint(*words)
        assert (code, "no bert_config.json beside the source" in err) == (2, True)
    (run / "config.json").write_text(json.dumps({"data_dir": str(tmp_path)}))
    code, out, _ = run_checkpoint(*words)
    assert (code, f"Sizes from {tmp_path / 'bert_config.json'}\n" in out) == (0, True)
    named = {"data_dir": str(tmp_path), "bert_config_path": str(tmp_path / "sizes.json")}
    shutil.copy(tmp_path / "bert_config.json", tmp_path / "sizes.json")
    (run / "config.json").write_text(json.dumps(named))
    code, out, _ = run_checkpoint(*words, "--overwrite")
    assert (code, f"Sizes from {tmp_path / 'sizes.json'}\n" in out) == (0, True)


def test_convert_without_padding(run_checkpoint: object, tmp_path: Path, source: Path) -> None:
    code, out, _ = run_checkpoint("convert", source, tmp_path / "hf", "--to", "hf", "--trim_vocab")
    assert code == 0
    assert "Vocabulary: 101 rows, without padding; losses differ a little" in out
    assert json.loads((tmp_path / "hf/config.json").read_text())["vocab_size"] == 101
    assert read_weights(tmp_path / "hf")[EMBEDDING].shape == (101, 32)
    code, out, _ = run_checkpoint(
        "convert", tmp_path / "hf", tmp_path / "again", "--to", "hf", "--trim_vocab",
        "--bert_config", tmp_path / "bert_config.json",
    )  # fmt: skip
    assert (code, "Vocabulary: 101 rows, without padding" in out) == (0, True)
    sizes = json.loads((tmp_path / "bert_config.json").read_text())
    (tmp_path / "bert_config.json").write_text(json.dumps({**sizes, "vocab_size": 104}))
    code, out, _ = run_checkpoint("convert", source, tmp_path / "all", "--to", "hf", "--trim_vocab")
    assert (code, "104 rows; by bert_config.json none of them is padding" in out) == (0, True)
    code, _, err = run_checkpoint("convert", source, tmp_path / "x", "--to", "apex", "--trim_vocab")
    assert (code, "--trim_vocab is for --to hf" in err) == (2, True)


def test_nothing_is_overwritten_unasked(
    run_checkpoint: object, tmp_path: Path, source: Path, weights: dict
) -> None:
    (tmp_path / "file.pt").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("precious")
    for name, target in (("file.pt", "apex"), ("folder", "hf")):
        code, _, err = run_checkpoint("convert", source, tmp_path / name, "--to", target)
        assert code == 2
        assert f"{tmp_path / name} is there already; name another DST, or pass --overwrite" in err
    for name, target in (("file.pt", "hf"), ("folder", "apex")):
        code, _, err = run_checkpoint(
            "convert", source, tmp_path / name, "--to", target, "--overwrite"
        )
        assert (code, f"which --to {target} cannot replace" in err) == (2, True)
    assert (tmp_path / "file.pt").read_text() == "precious"
    for name, target in (("file.pt", "apex"), ("folder", "hf")):
        code, _, _ = run_checkpoint(
            "convert", source, tmp_path / name, "--to", target, "--overwrite"
        )
        assert code == 0
    assert_same_tensors(read_weights(tmp_path / "file.pt"), weights)
    assert (tmp_path / "folder" / "notes.txt").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    assert run_checkpoint("convert", source, tmp_path / "empty", "--to", "hf")[0] == 0


def test_what_does_not_fit_is_reported_and_not_written(
    run_checkpoint: object, tmp_path: Path, source: Path
) -> None:
    sizes = json.loads((tmp_path / "bert_config.json").read_text())
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**sizes, "intermediate_size": 64}))
    code, _, err = run_checkpoint(
        "convert", source, tmp_path / "x.pt", "--to", "apex", "--bert-config-path", other
    )
    assert code == 2
    assert "  wrong shape: bert.encoder.layer.1.output.dense.weight is (32, 48), the" in err
    (tmp_path / "bert_config.json").unlink()
    (tmp_path / "config.json").write_text("{}")  # a run's settings, beside its checkpoints
    code, _, err = run_checkpoint("convert", source, tmp_path / "x.pt", "--to", "hf")
    assert code == 2
    assert "no bert_config.json beside the source, " in err
    assert "pass --bert_config FILE" in err
    torch.save({"fc": torch.ones(1)}, tmp_path / "fc.pt")
    code, _, err = run_checkpoint("convert", tmp_path / "fc.pt", tmp_path / "x.pt", "--to", "apex")
    assert code == 2
    assert "its tensors do not show the model's sizes" in err
    assert not (tmp_path / "x.pt").exists()


@pytest.mark.parametrize("target", ["apex", "resume", "hf"])
def test_a_write_that_fails_leaves_nothing(
    tmp_path: Path, source: Path, target: str, run_checkpoint: object
) -> None:
    """As on a full disk: no file may grow beyond 20 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = sorted(os.listdir(tmp_path))
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        code, _, err = run_checkpoint("convert", source, tmp_path / "x", "--to", target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    assert err.startswith(f"Error: cannot write {tmp_path / 'x'} (")
    assert len(err.splitlines()) == 1
    assert sorted(os.listdir(tmp_path)) == before


def test_a_hugging_face_config_gives_the_sizes(
    run_checkpoint: object, tmp_path: Path, source: Path
) -> None:
    assert run_checkpoint("convert", source, tmp_path / "hf", "--to", "hf")[0] == 0
    path = tmp_path / "hf" / "config.json"
    text = path.read_text().replace("gelu_pytorch_tanh", "gelu")
    path.write_text(text.replace('"layer_norm_eps": 1e-12', '"layer_norm_eps": 1e-07'))
    code, out, _ = run_checkpoint("convert", tmp_path / "hf", tmp_path / "a.pt", "--to", "apex")
    assert code == 0
    assert f"Sizes from {path}\nNote: its hidden_act 'gelu' means the erf form" in out
    assert run_checkpoint("convert", tmp_path / "hf", tmp_path / "again", "--to", "hf")[0] == 0
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (again["layer_norm_eps"], again["hidden_act"]) == (1e-7, "gelu_pytorch_tanh")


def test_a_source_may_be_its_own_destination(
    run_checkpoint: object, source: Path, weights: dict
) -> None:
    """The source is mapped while the result is written; it is replaced at the end."""
    shutil.copyfile(source, source.with_name("copy.pt"))
    code, _, _ = run_checkpoint("convert", source, source, "--to", "apex", "--overwrite")
    assert code == 0
    assert_same_tensors(read_weights(source), weights)


@pytest.mark.parametrize("target", ["apex", "hf", "resume"])
def test_a_checkpoint_without_next_sentence_head(
    run_checkpoint: object, tmp_path: Path, weights: dict, source: Path, target: str
) -> None:
    """As --objective mlm trains it: it stays such a checkpoint in every layout."""
    head = ("bert.pooler.", "cls.seq_relationship.")
    kept = {name: value for name, value in weights.items() if not name.startswith(head)}
    write_weights(tmp_path / "mlm.pt", kept)
    code, out, error = run_checkpoint(
        "convert", tmp_path / "mlm.pt", tmp_path / "made", "--to", target
    )
    assert (code, error) == (0, "")
    assert "No next-sentence head in the source: a checkpoint for --objective mlm" in out
    if target == "hf":
        del kept["cls.predictions.decoder.weight"]  # Hugging Face ties it by itself
    assert_same_tensors(read_weights(tmp_path / "made"), kept)
    if target == "hf":
        config = json.loads((tmp_path / "made/config.json").read_text())
        assert config["architectures"] == ["BertForMaskedLM"]
