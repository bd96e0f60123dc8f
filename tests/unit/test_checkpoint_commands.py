"""`checkpoint inspect`, `convert` and `diff`, as a user runs them."""

from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch

from bert_pretraining import __main__ as command_line
from bert_pretraining import checkpoint_commands
from bert_pretraining.checkpoint import read_weights, save_checkpoint, write_weights
from bert_pretraining.errors import UserError
from helpers import (
    REFERENCE,
    assert_same_tensors,
    command,
    distinct_weights,
    needs_reference,
    tiny_config,
)

CHECKPOINT = REFERENCE / "checkpoint"
APEX = CHECKPOINT / "model.ckpt-28252.apex.pt"
TF1 = CHECKPOINT / "tf1/model.ckpt-28252"
SIZES = {
    "vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 512, "type_vocab_size": 2,
}  # fmt: skip
EMBEDDING = "bert.embeddings.word_embeddings.weight"
POOLER = "bert.pooler.dense.weight"


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    """Of a vocabulary of 101, padded with rows of 0 to 104."""
    made = distinct_weights(tiny_config())
    for name in (EMBEDDING, "cls.predictions.bias"):
        made[name][101:] = 0.0
    return made


@pytest.fixture
def source(tmp_path: Path, weights: dict) -> Path:
    write_weights(tmp_path / "source.pt", weights)
    (tmp_path / "bert_config.json").write_text(json.dumps(SIZES))
    return tmp_path / "source.pt"


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command line, in this process."""
    words = ["bert_pretraining", "checkpoint", *(str(part) for part in arguments)]
    monkeypatch.setattr("sys.argv", words)
    code = command_line.main()
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def checkpoint(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> object:
    return lambda *arguments: run(monkeypatch, capsys, *arguments)


# ---- inspect


def test_inspect_tells_names_shapes_types_and_norms(
    checkpoint: object, source: Path, weights: dict
) -> None:
    code, out, _ = checkpoint("inspect", source)
    assert code == 0
    lines = out.splitlines()
    assert lines[:7] == [
        f"Checkpoint: {source}",
        "Format: PyTorch file ('model' key)",
        "Model: 2 layers, hidden 32, intermediate 48, vocabulary 104, positions 512",
        f"Weights: 47 tensors, {sum(v.numel() for v in weights.values()) - 104 * 32:,} numbers, "
        "0.1 MiB, float32; the decoder is the word embedding",
        "Step: not stored",
        "Optimizer state: none",
        "Training state: none",
    ]
    row = next(line for line in lines if line.startswith(POOLER)).split()
    assert row[1:5] == ["32", "x", "32", "float32"]
    assert float(row[5]) == pytest.approx(weights[POOLER].norm().item(), rel=1e-5)


def test_inspect_as_json(checkpoint: object, tmp_path: Path, weights: dict) -> None:
    weights[POOLER][0, 0] = float("nan")
    optimizer = {"updates": 3, "master": weights, "first_moment": weights}
    state = {"global_steps": 3, "eval_loss": float("nan"), "converged": False}
    save_checkpoint(tmp_path / "model.ckpt-3.pt", weights, optimizer, state)
    code, out, _ = checkpoint("inspect", tmp_path / "model.ckpt-3.pt", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["step"] == 3
    assert found["has_optimizer_state"] is True
    assert found["optimizer"] == {
        "updates": 3, "master": "47 tensors", "first_moment": "47 tensors"
    }  # fmt: skip
    assert found["state"] == {"global_steps": 3, "eval_loss": "nan", "converged": False}
    assert found["sizes"]["num_layers"] == 2
    assert found["tensors"][POOLER] == {
        "shape": [32, 32], "dtype": "float32", "norm": None, "non_finite": 1
    }  # fmt: skip
    assert {name: tuple(t["shape"]) for name, t in found["tensors"].items()} == {
        name: tuple(value.shape) for name, value in weights.items()
    }
    _, out, _ = checkpoint("inspect", tmp_path / "model.ckpt-3.pt")
    assert "Step: 3\nOptimizer state: updates: 3, master: 47 tensors, first_moment: 47 te" in out
    assert f"Warning: numbers that are not finite in {POOLER}\n" in out


def test_inspect_of_tensors_that_are_no_bert(checkpoint: object, tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.full((3, 4), 2.0), "count": torch.tensor(7)}, tmp_path / "a.pt")
    code, out, _ = checkpoint("inspect", tmp_path / "a.pt")
    assert code == 0
    assert "Model: not told by these tensors; no BERT, or not all of one" in out
    assert "fc.weight  3 x 4" in out
    assert out.splitlines()[-1].split() == ["count", "number", "int64", "7"]


@needs_reference
def test_inspect_of_a_tensorflow_checkpoint(checkpoint: object) -> None:
    code, out, _ = checkpoint("inspect", TF1, "--json")
    assert code == 0
    found = json.loads(out)
    assert (found["step"], found["has_optimizer_state"], len(found["tensors"])) == (28252, True, 46)
    assert len(found["left_out"]["optimizer state"]) == 88
    _, apex, _ = checkpoint("inspect", APEX, "--json")
    theirs = json.loads(apex)["tensors"]
    for name, figures in found["tensors"].items():
        assert figures["norm"] == pytest.approx(theirs[name]["norm"], rel=1e-12), name


# ---- diff


def test_diff_of_equals_pads_and_types(
    checkpoint: object, tmp_path: Path, source: Path, weights: dict
) -> None:
    bare = {name: value for name, value in weights.items() if "decoder" not in name}
    for name in (EMBEDDING, "cls.predictions.bias"):
        bare[name] = bare[name][:101].clone()
    torch.save({name: value.double() for name, value in bare.items()}, tmp_path / "wide.pt")
    code, out, _ = checkpoint("diff", source, tmp_path / "wide.pt")
    assert code == 0
    assert out.splitlines() == [
        f"Equal: {source} and {tmp_path / 'wide.pt'} hold the same weights, 46 tensors",
        f"Note: {EMBEDDING}: {source} has 3 more rows, all 0: padding",
        f"Note: cls.predictions.bias: {source} has 3 more rows, all 0: padding",
        "Note: types: float32 against float64; compared as numbers",
    ]


def test_diff_shows_the_largest_first(
    checkpoint: object, tmp_path: Path, source: Path, weights: dict
) -> None:
    changed = {name: value.clone() for name, value in weights.items()}
    changed["cls.predictions.decoder.weight"] = changed[EMBEDDING]
    changed[POOLER][3, 4] += 0.25
    changed[POOLER][5, 6] -= 0.5
    changed["bert.pooler.dense.bias"][0] = float("nan")
    changed["cls.seq_relationship.bias"] = torch.ones(3)
    changed[EMBEDDING][103, 0] = 1.0
    changed["extra"] = changed.pop("bert.embeddings.LayerNorm.bias")
    write_weights(tmp_path / "changed.pt", changed)
    code, out, _ = checkpoint("diff", source, tmp_path / "changed.pt")
    assert code == 1
    verdict, *lines = out.splitlines()
    assert verdict.endswith(
        f"3 tensors differ in value, 1 in shape, 1 only in {source}, 1 only in "
        f"{tmp_path / 'changed.pt'}; 45 compared"
    )
    greatest = weights[POOLER].abs().max().item()
    assert lines == [
        f"  only in {source}: bert.embeddings.LayerNorm.bias",
        f"  only in {tmp_path / 'changed.pt'}: extra",
        "  cls.seq_relationship.bias: shape (2,) against (3,)",
        "  bert.pooler.dense.bias: 1 of 32 numbers, by up to nan (nan of the largest)",
        f"  {EMBEDDING}: 1 of 3,328 numbers, by up to 1 "
        f"({1 / weights[EMBEDDING].abs().max().item():.2g} of the largest)",
        f"  {POOLER}: 2 of 1,024 numbers, by up to 0.5 ({0.5 / greatest:.2g} of the largest)",
    ]
    code, out, _ = checkpoint("diff", source, tmp_path / "changed.pt", "--json")
    found = json.loads(out)
    assert (code, found["equal"]) == (1, False)
    assert found["values"][POOLER]["differing"] == 2
    assert found["values"]["bert.pooler.dense.bias"]["largest"] is None


def test_diff_of_what_cannot_be_read_is_2(tmp_path: Path, source: Path) -> None:
    (tmp_path / "text.pt").write_text("text")
    for pair in ((source, tmp_path / "text.pt"), (tmp_path / "absent.pt", source)):
        done = command("checkpoint", "diff", *pair, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith("Error: ")
    assert "no checkpoint at" in done.stderr
    assert "--init_checkpoint" not in done.stderr


@needs_reference
def test_the_reference_fixtures_are_the_same_weights(checkpoint: object) -> None:
    code, out, _ = checkpoint("diff", TF1, APEX)
    assert code == 0
    assert out.startswith(f"Equal: {TF1} and {APEX} hold the same weights, 46 tensors\n")


# ---- convert


@pytest.mark.parametrize("target", ["apex", "resume", "hf"])
def test_convert_there_and_back(
    checkpoint: object, tmp_path: Path, source: Path, weights: dict, target: str
) -> None:
    there, back = tmp_path / "there", tmp_path / "back.pt"
    code, out, _ = checkpoint("convert", source, there, "--to", target)
    assert code == 0
    assert out.startswith(f"Wrote {there}: ")
    assert f"Sizes from {tmp_path / 'bert_config.json'}" in out
    code, _, _ = checkpoint("convert", there, back, "--to", "apex")
    assert code == 0
    assert_same_tensors(read_weights(back), weights)
    content = torch.load(back, weights_only=True)
    assert list(content) == ["model"]
    assert list(content["model"]) == list(weights)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "back.pt", "bert_config.json", "source.pt", "there"
    ]  # fmt: skip


@needs_reference
def test_the_apex_file_made_of_the_tensorflow_one(tmp_path: Path, checkpoint: object) -> None:
    """No bert_config.json lies beside it; the weights tell what is needed."""
    code, out, _ = checkpoint("convert", TF1, tmp_path / "made.pt", "--to", "apex")
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
    checkpoint: object, tmp_path: Path, source: Path, weights: dict
) -> None:
    code, out, _ = checkpoint("convert", source, tmp_path / "a.pt", "--to", "resume")
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
    code, out, _ = checkpoint("convert", tmp_path / "upstream.pt", tmp_path / "b.pt", "--to=resume")
    assert code == 0
    assert "In it: the weights and global_steps 1234, epoch 2, learning_rate 0.0003\n" in out
    assert "(another program's optimizer state cannot be taken over)" in out
    content = torch.load(tmp_path / "b.pt", weights_only=True)
    assert_same_tensors(content["model"], weights)
    assert (content["optimizer"], content["state"]) == ({}, state)
    own = {"updates": 1, "master": dict(weights)}
    save_checkpoint(tmp_path / "own.pt", weights, own, state)
    code, _, err = checkpoint("convert", tmp_path / "own.pt", tmp_path / "c.pt", "--to", "resume")
    assert code == 2
    assert "is a resume file of this package already; copy it" in err
    assert not (tmp_path / "c.pt").exists()


def test_convert_without_padding(checkpoint: object, tmp_path: Path, source: Path) -> None:
    code, out, _ = checkpoint("convert", source, tmp_path / "hf", "--to", "hf", "--trim_vocab")
    assert code == 0
    assert "Vocabulary: 101 rows, without padding; losses differ a little" in out
    assert json.loads((tmp_path / "hf/config.json").read_text())["vocab_size"] == 101
    assert read_weights(tmp_path / "hf")[EMBEDDING].shape == (101, 32)
    code, _, err = checkpoint("convert", source, tmp_path / "x", "--to", "apex", "--trim_vocab")
    assert (code, "--trim_vocab is for --to hf" in err) == (2, True)


def test_nothing_is_overwritten_unasked(
    checkpoint: object, tmp_path: Path, source: Path, weights: dict
) -> None:
    (tmp_path / "file.pt").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("precious")
    for name, target in (("file.pt", "apex"), ("folder", "hf")):
        code, _, err = checkpoint("convert", source, tmp_path / name, "--to", target)
        assert code == 2
        assert f"{tmp_path / name} is there already; name another, or pass --overwrite" in err
    for name, target in (("file.pt", "hf"), ("folder", "apex")):
        code, _, err = checkpoint("convert", source, tmp_path / name, "--to", target, "--overwrite")
        assert (code, f"which --to {target} cannot replace" in err) == (2, True)
    assert (tmp_path / "file.pt").read_text() == "precious"
    for name, target in (("file.pt", "apex"), ("folder", "hf")):
        code, _, _ = checkpoint("convert", source, tmp_path / name, "--to", target, "--overwrite")
        assert code == 0
    assert_same_tensors(read_weights(tmp_path / "file.pt"), weights)
    assert (tmp_path / "folder" / "notes.txt").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    assert checkpoint("convert", source, tmp_path / "empty", "--to", "hf")[0] == 0


def test_what_does_not_fit_is_reported_and_not_written(
    checkpoint: object, tmp_path: Path, source: Path
) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**SIZES, "intermediate_size": 64}))
    code, _, err = checkpoint(
        "convert", source, tmp_path / "x.pt", "--to", "apex", "--bert_config", other
    )
    assert code == 2
    assert "  wrong shape: bert.encoder.layer.1.output.dense.weight is (32, 48), the" in err
    (tmp_path / "bert_config.json").unlink()
    code, _, err = checkpoint("convert", source, tmp_path / "x.pt", "--to", "hf")
    assert code == 2
    assert "no bert_config.json beside the source: " in err
    assert "pass --bert_config FILE" in err
    torch.save({"fc": torch.ones(1)}, tmp_path / "fc.pt")
    code, _, err = checkpoint("convert", tmp_path / "fc.pt", tmp_path / "x.pt", "--to", "apex")
    assert code == 2
    assert "its tensors do not tell the model's sizes" in err
    assert not (tmp_path / "x.pt").exists()


@pytest.mark.parametrize("target", ["apex", "resume", "hf"])
def test_a_write_that_fails_leaves_nothing(
    tmp_path: Path, source: Path, target: str, checkpoint: object
) -> None:
    """As on a full disk: no file may grow beyond 20 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = sorted(os.listdir(tmp_path))
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        code, _, err = checkpoint("convert", source, tmp_path / "x", "--to", target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    assert err.startswith(f"Error: cannot write {tmp_path / 'x'} (")
    assert len(err.splitlines()) == 1
    assert sorted(os.listdir(tmp_path)) == before


def test_a_hugging_face_config_gives_the_sizes(
    checkpoint: object, tmp_path: Path, source: Path
) -> None:
    assert checkpoint("convert", source, tmp_path / "hf", "--to", "hf")[0] == 0
    path = tmp_path / "hf" / "config.json"
    path.write_text(path.read_text().replace("gelu_pytorch_tanh", "gelu"))
    code, out, _ = checkpoint("convert", tmp_path / "hf", tmp_path / "a.pt", "--to", "apex")
    assert code == 0
    assert f"Sizes from {path}\nNote: its hidden_act 'gelu' means the erf form" in out


def test_help_and_unknown_words(tmp_path: Path) -> None:
    done = command("checkpoint", "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert [line.split()[1] for line in done.stdout.splitlines()[2:5]] == [
        "inspect", "convert", "diff"
    ]  # fmt: skip
    assert set(checkpoint_commands.COMMANDS) == {"inspect", "convert", "diff"}
    with pytest.raises(UserError, match="unknown flag --jsn; did you mean --json"):
        checkpoint_commands.inspect(["a.pt", "--jsn"])
    with pytest.raises(UserError, match="required: DST, --to"):
        checkpoint_commands.convert(["a.pt"])
    with pytest.raises(UserError, match="invalid choice: 'tf'"):
        checkpoint_commands.convert(["a.pt", "b", "--to", "tf"])


def test_a_source_may_be_its_own_destination(
    checkpoint: object, source: Path, weights: dict
) -> None:
    """The source is mapped while the result is written; it is replaced at the end."""
    shutil.copyfile(source, source.with_name("copy.pt"))
    code, _, _ = checkpoint("convert", source, source, "--to", "apex", "--overwrite")
    assert code == 0
    assert_same_tensors(read_weights(source), weights)
