"""The measurements run, and count what they say they count."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bert_pretraining.bench import kernels, loader, optimizer, record, step
from bert_pretraining.bench.workload import BERT_LARGE, batch_of, wikipedia_lengths
from bert_pretraining.errors import UserError
from bert_pretraining.model.flops import Amount, step_flops
from helpers import command


def test_lengths_have_the_data_sets_mean_at_any_batch_size() -> None:
    for batch_size in (8, 48, 192):
        assert wikipedia_lengths(batch_size).mean() == pytest.approx(255.8, rel=0.04)
    assert (wikipedia_lengths(1000) == 512).mean() == pytest.approx(0.234, abs=0.005)


def test_work_of_a_step() -> None:
    """docs: forward and backward of BERT-large take 500 GFLOP a sequence of the data set."""
    lengths = wikipedia_lengths(480)
    squares = int((lengths.astype(np.int64) ** 2).sum())
    work = Amount(int(lengths.sum()), squares, int(38.2 * 480))
    assert step_flops(work, BERT_LARGE) / 480 == pytest.approx(500e9, rel=0.01)
    padded = step_flops(Amount(512 * 480, 512**2 * 480, 76 * 480), BERT_LARGE) / 480
    assert padded == pytest.approx(1.02e12, rel=0.02)


def test_batches_hold_what_was_asked_for() -> None:
    lengths = np.array([3, 64, 17])
    config = BERT_LARGE
    batch = batch_of(lengths, config)
    assert batch.cu_seqlens.tolist() == [0, 3, 67, 84]
    assert batch.num_masked == 1 + 10 + 3
    assert batch.token_pairs == 3**2 + 64**2 + 17**2


SMALL = ["--device", "cpu", "--batch_size", "2", "--repeats", "1", "--precision", "fp32"]


@pytest.fixture
def small_config(tmp_path: Path) -> list[str]:
    path = tmp_path / "bert_config.json"
    sizes = {
        "vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": 64,
    }  # fmt: skip
    path.write_text(json.dumps(sizes))
    return ["--bert_config_path", str(path), "--output", str(tmp_path / "out.json")]


def test_step_and_kernels_write_their_figures(
    small_config: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # other tests set it; too slow here
    assert step.main([*SMALL, *small_config]) == 0
    shown = capsys.readouterr()
    assert "bench:" not in shown.out
    for line in ("reference fp32: warming up", "auto fp32: repeat 1 of 1"):
        assert f"bench: {line}" in shown.err.splitlines()
    figures = json.loads((tmp_path / "out.json").read_text())
    assert set(figures["results"]["fp32"]) == {"reference fp32", "auto fp32"}
    # With the build: 2.13.0+cu130, where pip may know only 2.13.0.
    assert figures["versions"]["torch"] == torch.__version__
    for values in figures["results"]["fp32"].values():
        assert values["seconds"]["n"] == 1
        assert values["sequences_per_second"] == pytest.approx(2 / values["seconds"]["median"])
    assert kernels.main([*SMALL, *small_config]) == 0
    figures = json.loads((tmp_path / "out.json").read_text())
    assert {"reference", "torch"} <= set(figures["results"]["fp32"]["attention"])
    shown = capsys.readouterr()
    assert "(fastest)" in shown.out
    assert "bench: attention, torch.float32" in shown.err.splitlines()


def test_optimizer_says_what_it_does(
    small_config: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--device", "cpu", "--repeats", "2", "--optimizers", "reference", "foreach"]
    assert optimizer.main([*words, *small_config]) == 0
    assert "bench: foreach: repeat 2 of 2" in capsys.readouterr().err.splitlines()
    assert json.loads((tmp_path / "out.json").read_text())["seconds"]["foreach"]["n"] == 2


def test_an_output_that_cannot_be_written_is_one_line(
    small_config: list[str], tmp_path: Path, mini_data: Path
) -> None:
    shards = mini_data / "2048_shards_uncompressed"
    words = ["--train_dir", str(shards), "--seconds", "0.1", "--output", str(tmp_path)]
    with pytest.raises(UserError, match=r"cannot write .*; name another file"):
        loader.main(words)


def test_loader_measures_a_data_set(mini_data: Path, tmp_path: Path) -> None:
    shards = mini_data / "2048_shards_uncompressed"
    out = tmp_path / "out.json"
    loader.main(["--train_dir", str(shards), "--seconds", "0.2", "--output", str(out)])
    for values in json.loads(out.read_text())["results"].values():
        assert values["tokens_per_second"] > values["sequences_per_second"] > 0
    with pytest.raises(UserError, match="no such data directory"):
        loader.main(["--train_dir", str(tmp_path / "absent")])


def test_bad_flags(small_config: list[str]) -> None:
    with pytest.raises(UserError, match="--repeats 0: it must be at least 1; pass"):
        step.main([*SMALL, *small_config, "--repeats", "0"])
    with pytest.raises(UserError, match="--graph: a device of type cpu"):
        step.main([*SMALL, *small_config, "--graph"])
    with pytest.raises(UserError, match="--num_layers 0: it must be at least 1"):
        optimizer.main([*small_config, "--num_layers", "0"])
    with pytest.raises(UserError, match=r"--seconds 0\.0: it must be above 0"):
        loader.main(["--train_dir", "absent", "--seconds", "0"])


def test_a_step_that_fails_takes_no_other_figures_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(step, "matrix_rate", lambda _device, _dtype: (1e12, (1, 1, 1)))
    kept = []

    def breaks() -> None:
        raise torch.OutOfMemoryError("too little memory\nand more")

    figures = step.compare(
        {"a": lambda: lambda: None, "b": lambda: breaks, "c": lambda: lambda: None},
        torch.device("cpu"), BERT_LARGE, np.array([3, 5]), 2, torch.float32, 1,
        lambda found: kept.append({name: "failed" in one for name, one in found.items()}),
    )  # fmt: skip
    assert figures["b"] == {"failed": "OutOfMemoryError: too little memory"}
    assert figures["a"]["seconds"]["n"] == figures["c"]["seconds"]["n"] == 1
    # After each candidate, so that a run that is stopped loses nothing.
    assert kept[:3] == [
        {"a": False},
        {"a": False, "b": True},
        {"a": False, "b": True, "c": False},
    ]
    assert "b                                  failed: OutOfMemoryError" in step.table(figures, "a")
    assert "nan" in step.table(figures, "b")  # no ratio to a baseline that failed


def test_a_pretended_gpu_is_named_in_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRETENDED_GPU", raising=False)
    assert "pretended_gpu" not in record.circumstances()
    monkeypatch.setenv("PRETENDED_GPU", "/stubs")
    assert record.circumstances()["pretended_gpu"] is True


def test_bench_from_the_command_line(tmp_path: Path) -> None:
    done = command("bench", "loader", "--train_dir", "absent", cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
