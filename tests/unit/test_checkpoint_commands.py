"""`checkpoint inspect` and `diff`, as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bert_pretraining.checkpoint import save_checkpoint, write_weights
from bert_pretraining.commands import checkpoint
from bert_pretraining.errors import UserError
from helpers import REFERENCE, ROOT, command, needs_reference

CHECKPOINT = REFERENCE / "checkpoint"
APEX = CHECKPOINT / "model.ckpt-28252.apex.pt"
TF1 = CHECKPOINT / "tf1/model.ckpt-28252"
EMBEDDING = "bert.embeddings.word_embeddings.weight"
POOLER = "bert.pooler.dense.weight"


# ---- inspect


def test_inspect_tells_names_shapes_types_and_norms(
    run_checkpoint: object, source: Path, weights: dict
) -> None:
    code, out, _ = run_checkpoint("inspect", source)
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


def test_inspect_as_json(run_checkpoint: object, tmp_path: Path, weights: dict) -> None:
    weights[POOLER][0, 0] = float("nan")
    optimizer = {"updates": 3, "master": weights, "first_moment": weights}
    state = {"global_steps": 3, "eval_loss": float("nan"), "converged": False}
    save_checkpoint(tmp_path / "model.ckpt-3.pt", weights, optimizer, state)
    code, out, _ = run_checkpoint("inspect", tmp_path / "model.ckpt-3.pt", "--json")
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
    _, out, _ = run_checkpoint("inspect", tmp_path / "model.ckpt-3.pt")
    assert "Step: 3\nOptimizer state: updates: 3, master: 47 tensors, first_moment: 47 te" in out
    assert f"Warning: numbers that are not finite in {POOLER}\n" in out


def test_inspect_of_tensors_that_are_no_bert(run_checkpoint: object, tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.full((3, 4), 2.0), "count": torch.tensor(7)}, tmp_path / "a.pt")
    code, out, _ = run_checkpoint("inspect", tmp_path / "a.pt")
    assert code == 0
    assert "Model: unknown; the tensors are no BERT, or not all of one" in out
    assert "fc.weight  3 x 4" in out
    assert out.splitlines()[-1].split() == ["count", "number", "int64", "7"]


@needs_reference
def test_inspect_of_a_tensorflow_checkpoint(run_checkpoint: object) -> None:
    code, out, _ = run_checkpoint("inspect", TF1, "--json")
    assert code == 0
    found = json.loads(out)
    assert (found["step"], found["has_optimizer_state"], len(found["tensors"])) == (28252, True, 46)
    assert len(found["left_out"]["optimizer state"]) == 88
    _, apex, _ = run_checkpoint("inspect", APEX, "--json")
    theirs = json.loads(apex)["tensors"]
    for name, figures in found["tensors"].items():
        assert figures["norm"] == pytest.approx(theirs[name]["norm"], rel=1e-12), name


def test_a_reader_that_leaves_early_ends_it_without_a_word(tmp_path: Path, source: Path) -> None:
    program = f"{sys.executable} -m bert_pretraining checkpoint inspect {source.name} | true"
    done = subprocess.run(
        ["bash", "-c", f"{program}; exit ${{PIPESTATUS[0]}}"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "base")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (141, "")


# ---- diff


def test_diff_of_equals_pads_and_types(
    run_checkpoint: object, tmp_path: Path, source: Path, weights: dict
) -> None:
    bare = {name: value for name, value in weights.items() if "decoder" not in name}
    for name in (EMBEDDING, "cls.predictions.bias"):
        bare[name] = bare[name][:101].clone()
    torch.save({name: value.double() for name, value in bare.items()}, tmp_path / "wide.pt")
    code, out, _ = run_checkpoint("diff", source, tmp_path / "wide.pt")
    assert code == 0
    assert out.splitlines() == [
        f"Equal: {source} and {tmp_path / 'wide.pt'} hold the same numbers, 46 tensors",
        f"Note: {EMBEDDING}: {source} has 3 more rows, all 0: padding",
        f"Note: cls.predictions.bias: {source} has 3 more rows, all 0: padding",
        "Note: types: float32 against float64; compared as numbers",
    ]


def test_diff_shows_the_largest_first(
    run_checkpoint: object, tmp_path: Path, source: Path, weights: dict
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
    code, out, _ = run_checkpoint("diff", source, tmp_path / "changed.pt")
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
    code, out, _ = run_checkpoint("diff", source, tmp_path / "changed.pt", "--json")
    found = json.loads(out)
    assert (code, found["equal"]) == (1, False)
    assert found["values"][POOLER]["differing"] == 2
    assert found["values"]["bert.pooler.dense.bias"]["largest"] is None


def test_diff_of_the_training_state(run_checkpoint: object, tmp_path: Path, weights: dict) -> None:
    def save(name: str, moment: float, **state: object) -> Path:
        optimizer = {"updates": 3, "first_moment": {POOLER: torch.full((2, 2), moment)}}
        save_checkpoint(tmp_path / name, weights, optimizer, {"global_steps": 3, **state})
        return tmp_path / name

    one = save("one.pt", 0.5, eval_loss=float("nan"), config="abc", big=2**100)
    same = save("same.pt", 0.5, eval_loss=float("nan"), config="abc", big=2**100)
    other = save("other.pt", 0.75, eval_loss=1.0, config="abd", big=2**100 + 1)
    code, out, _ = run_checkpoint("diff", one, other)
    assert code == 0
    assert "Note: the weights alone were compared; --training_state compares the rest" in out
    code, out, _ = run_checkpoint("diff", one, same, "--training_state")
    assert (code, "46 tensors" in out, "Note" in out) == (0, False, False)
    code, out, _ = run_checkpoint("diff", one, other, "--training_state")
    assert code == 1
    differing = [line.split(": ")[0].strip() for line in out.splitlines()[1:]]
    assert differing[0] == "state.eval_loss"
    assert set(differing) == {
        "state.eval_loss", "state.config", "state.big", f"optimizer.first_moment.{POOLER}"
    }  # fmt: skip


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
def test_the_reference_fixtures_are_the_same_weights(run_checkpoint: object) -> None:
    code, out, _ = run_checkpoint("diff", TF1, APEX)
    assert code == 0
    assert out.startswith(f"Equal: {TF1} and {APEX} hold the same numbers, 46 tensors\n")


def test_help_and_unknown_words(tmp_path: Path) -> None:
    done = command("checkpoint", "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert [line.split()[1] for line in done.stdout.splitlines()[2:5]] == [
        "inspect", "convert", "diff"
    ]  # fmt: skip
    assert set(checkpoint.COMMANDS) == {"inspect", "convert", "diff"}
    with pytest.raises(UserError, match="unknown flag --jsn; did you mean --json"):
        checkpoint.inspect(["a.pt", "--jsn"])
    with pytest.raises(UserError, match="required: DST, --to"):
        checkpoint.convert(["a.pt"])
    with pytest.raises(UserError, match="invalid choice: 'tf'"):
        checkpoint.convert(["a.pt", "b", "--to", "tf"])


def test_a_model_without_heads_is_the_same_to_every_command(
    run_checkpoint: object, tmp_path: Path, source: Path, weights: dict
) -> None:
    """As BertModel of Hugging Face, with the head of a classifier."""
    named = {name.removeprefix("bert."): value for name, value in weights.items() if "bert" in name}
    torch.save({**named, "classifier.weight": torch.ones(2, 32)}, tmp_path / "encoder.bin")
    code, out, _ = run_checkpoint("inspect", tmp_path / "encoder.bin")
    assert code == 0
    assert "Model: 2 layers, hidden 32, intermediate 48, vocabulary 104, positions 512\n" in out
    assert (
        "Heads of pretraining that it lacks: cls.seq_relationship.*, cls.predictions.*; to train "
        "from it, pass --missing_weights random\n"
    ) in out
    for target, made in (("apex", tmp_path / "a.pt"), ("hf", tmp_path / "hf")):
        code, out, _ = run_checkpoint("convert", tmp_path / "encoder.bin", made, "--to", target)
        assert code == 0
        assert "Not in the source: cls.seq_relationship.*, cls.predictions.*; to train from" in out
        assert "Left out: tensors that the model lacks, 1 entry of the source" in out
        code, out, _ = run_checkpoint("diff", made, source)
        assert code == 1
        only = [line for line in out.splitlines() if "  only in " in line]
        assert len(only) == 7
        assert all(f"only in {source}: cls." in line for line in only)
    assert json.loads((tmp_path / "hf/config.json").read_text())["architectures"] == ["BertModel"]


def test_inspect_warns_of_weights_that_no_training_made(
    run_checkpoint: object, tmp_path: Path, weights: dict
) -> None:
    weights[POOLER] = torch.zeros(32, 32)
    write_weights(tmp_path / "a.pt", weights)
    _, out, _ = run_checkpoint("inspect", tmp_path / "a.pt")
    assert f"Warning: all numbers are the same in {POOLER}: these were never trained\n" in out
