"""Helpers of all tests: reference data, random batches, the command line."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from bert_pretraining import __main__ as command_line
from bert_pretraining.data.flat_shard import flatten
from bert_pretraining.data.packing import pack_rows
from bert_pretraining.kernels import select
from bert_pretraining.model.batch import PackedBatch
from bert_pretraining.model.bert_config import BertConfig
from bert_pretraining.model.heads import BertForPreTraining

ROOT = Path(__file__).resolve().parents[1]
_run_ports = itertools.count()
# Kinds of notices that a run gives where other programs keep its ranks or its logs waiting.
OF_A_BUSY_MACHINE = ("slow_output", "rank_delayed", "straggler")
REFERENCE = ROOT.parent / "shared" / "reference"

# The fixture `make_once` of conftest.py.
MakeOnce = Callable[[str, Callable[[Path], object]], Path]

needs_reference = pytest.mark.skipif(
    not REFERENCE.is_dir(), reason=f"reference data absent: {REFERENCE}"
)


def run_port() -> int:
    """A port for a run; the next one, which a restart takes, is free too.

    It is below those that Linux gives to clients, and other workers of pytest take others.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for _ in range(400):
        port = 20_000 + 200 * (worker % 45) + (os.getpid() + 2 * next(_run_ports)) % 198
        with socket.socket() as one, socket.socket() as other, contextlib.suppress(OSError):
            one.bind(("", port))
            other.bind(("", port + 1))
            return port
    raise AssertionError("no free port")


def padded_arrays(
    lengths: list[int], max_seq_length: int, vocab_size: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Random sequences of the given lengths, as in a shard; a fifth of the tokens is masked."""
    random = np.random.RandomState(seed)
    count, predictions = len(lengths), max(1, max_seq_length // 5)
    arrays = {
        "input_ids": np.zeros((count, max_seq_length), "i2"),
        "input_mask": np.zeros((count, max_seq_length), "i1"),
        "segment_ids": np.zeros((count, max_seq_length), "i1"),
        "masked_lm_positions": np.zeros((count, predictions), "i2"),
        "masked_lm_ids": np.zeros((count, predictions), "i2"),
        "next_sentence_labels": random.randint(0, 2, count).astype("i1"),
    }
    for row, length in enumerate(lengths):
        arrays["input_ids"][row, :length] = random.randint(5, vocab_size, length)
        arrays["input_mask"][row, :length] = 1
        arrays["segment_ids"][row, length // 2 : length] = 1
        masked = np.sort(random.permutation(length)[: max(1, length // 5)])
        arrays["masked_lm_positions"][row, : len(masked)] = masked
        arrays["masked_lm_ids"][row, : len(masked)] = random.randint(1, vocab_size, len(masked))
    return arrays


def packed(arrays: dict[str, np.ndarray], rows: slice = slice(None)) -> PackedBatch:
    """Some rows of padded arrays as one batch."""
    shard = flatten(arrays, vocab_size=2**15, where="test")
    return pack_rows(shard, np.arange(shard.num_sequences)[rows])


def tiny_config(**changes: object) -> BertConfig:
    """A model that runs in milliseconds, without dropout."""
    values = {
        "vocab_size": 101,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 512,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.2,
    }
    return BertConfig(**{**values, **changes})


def make_model(
    config: BertConfig, provider: str = "reference", dtype: torch.dtype = torch.float32
) -> BertForPreTraining:
    """A model with random weights on the CPU."""
    kernels = select(provider, torch.device("cpu"), dtype)
    return BertForPreTraining(config, kernels, seed=1).to(dtype)


def distinct_weights(config: BertConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights for a model of this config under the apex names, padding of the vocabulary included.

    All tensors differ, except for the tied decoder.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.randn(value.shape, generator=generator)
        for name, value in make_model(config).state_dict().items()
    }
    embedding = weights["bert.embeddings.word_embeddings.weight"]
    return {**weights, "cls.predictions.decoder.weight": embedding}


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Both have the same names, and the same numbers under each."""
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def command(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m bert_pretraining ...` as a user would."""
    return subprocess.run(
        [sys.executable, "-m", "bert_pretraining", *(str(part) for part in arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT / "base"), **environment},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )


def in_process(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command as `command` does, but in this process, which saves a start and the imports.

    For commands that start no rank processes: `train` of one rank, errors, data commands.
    """
    words = [str(part) for part in arguments]
    output, errors = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["bert_pretraining", *words]),
        mock.patch.dict(os.environ),
        working_directory(cwd),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
        random_state_kept(),
    ):
        try:
            code = command_line.main()
        except SystemExit as end:
            code = int(end.code or 0)
    return subprocess.CompletedProcess(words, code, output.getvalue(), errors.getvalue())


@contextlib.contextmanager
def working_directory(path: Path) -> Iterator[None]:
    """As contextlib.chdir of Python 3.11."""
    before = os.getcwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore the random generators' states afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def error_lines(errors: str) -> list[str]:
    """The lines of stderr without notices, which differ by machine (for example, numactl's)."""
    return [line for line in errors.splitlines() if not line.startswith("Notice: ")]


def perf_events(output: str, name: str | None = None) -> list[dict]:
    """The records of PerfLog in what a run printed; with a name, the values of that event."""
    lines = [line for line in output.splitlines() if line.startswith("[PerfLog] ")]
    records = [json.loads(line.removeprefix("[PerfLog] ")) for line in lines]
    return [record["value"] for record in records if record["event"] == name] if name else records
