"""One rank of 64, 1,024 and 4,096, through the real `train`: what it does, keeps and exchanges."""

from __future__ import annotations

import collections
import datetime
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from bert_pretraining.data.shards import write_shard
from bert_pretraining.launch.port import port_holder
from bert_pretraining.runtime import process_group
from fake_ranks import FakeRanks
from helpers import ROOT, MakeOnce, in_process, padded_arrays, perf_events, run_port

LONGEST, VOCABULARY, SEQUENCES = 16, 101, 2**15
MODEL = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": LONGEST, "type_vocab_size": 2,
    "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu",
    "initializer_range": 0.02,
}  # fmt: skip


@pytest.fixture(scope="module")
def small_data(make_once: MakeOnce) -> Path:
    """Four shards, fewer than there are ranks, and 300 evaluation sequences."""

    def write(path: Path, rows: int, seed: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        lengths = np.random.RandomState(seed).randint(5, LONGEST + 1, 256).tolist()
        arrays = padded_arrays(lengths, LONGEST, VOCABULARY, seed)
        write_shard(path, {key: np.resize(of, (rows, *of.shape[1:])) for key, of in arrays.items()})

    def make(folder: Path) -> None:
        for number in range(4):
            name = f"part_{number:05d}_of_00004.hdf5"
            write(folder / "2048_shards_uncompressed" / name, SEQUENCES // 4, number)
        write(folder / "eval_set_uncompressed" / "part_eval.hdf5", 300, 9)
        (folder / "bert_config.json").write_text(json.dumps(MODEL))

    return make_once("one_rank_of_many", make)


class Way(NamedTuple):
    """How the ranks train."""

    world: int
    flags: tuple[object, ...]


GetMain = Callable[[Way], tuple[FakeRanks, str, Path]]

ACCUMULATED = ("--gradient_accumulation_steps", 2, "--batching", "balanced")
WAYS = [
    Way(64, ACCUMULATED),
    Way(1024, ("--mlm_loss_normalization", "global")),
    Way(4096, (*ACCUMULATED, "--distributed_lamb")),
]
STEPS, RESUMED_STEPS = 3, 4
each_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way.world} ranks")


def train(data: Path, cwd: Path, ranks: FakeRanks, way: Way, *more: object) -> str:
    """What this rank printed."""
    cwd.mkdir(exist_ok=True)
    done = ranks.run(
        "--name", "mini", "--config", "CPUx1x2", "--data_dir", data, "--init_checkpoint", "random",
        "--output_dir", "out", "--seed", 11, "--log_freq", 1, "--eval_steps", 2,
        "--num_eval_examples", 300, "--eval_batch_size", 16, "--train_batch_size", 1,
        "--prove_kernels", "off", "--save_checkpoint", *way.flags, *more, cwd=cwd,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "standstill" not in [thread.name for thread in threading.enumerate()]
    return done.stdout


@pytest.fixture(scope="module")
def main_rank(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> GetMain:
    """Rank 0 of a way after its run, with what it printed and its folder; each way runs once."""

    @functools.cache
    def get(way: Way) -> tuple[FakeRanks, str, Path]:
        folder = tmp_path_factory.mktemp("main")
        ranks = FakeRanks(0, way.world)
        return ranks, train(small_data, folder, ranks, way, "--max_steps", STEPS), folder

    return get


@each_way
def test_every_rank_takes_part_in_the_same_exchanges(
    small_data: Path, tmp_path: Path, main_rank: GetMain, way: Way
) -> None:
    """Also with balanced batches, and where most ranks have nothing to evaluate."""
    main, output, _ = main_rank(way)
    assert [event["iter_dataloader_idx"] for event in perf_events(output, "STEP_END")] == [0] * 3
    for rank in (way.world // 2, way.world - 1):
        other = FakeRanks(rank, way.world, main)
        assert train(small_data, tmp_path, other, way, "--max_steps", STEPS) == ""
        assert other.calls == main.calls
    assert list(tmp_path.iterdir()) == []  # rank 0 alone writes


def test_no_exchange_grows_with_the_number_of_ranks(main_rank: GetMain) -> None:
    few, many = main_rank(WAYS[0])[0], main_rank(Way(4096, WAYS[0].flags))[0]
    assert few.calls == many.calls
    # Objects of all ranks are sent three times: who shares a machine, for the energy; for the
    # checkpoint; and for the energy of the run.
    names = collections.Counter(call.name for call in many.calls)
    assert names["all_gather_object"] == 3
    assert names["all_gather"] == names["reduce_scatter"] == 0


def test_one_more_step_is_a_few_exchanges_of_the_same_size(
    small_data: Path, tmp_path: Path, main_rank: GetMain
) -> None:
    """Between log lines: gradients, and what reading the outcome takes, here after each update."""
    way, seldom = WAYS[0], ("--log_freq", 100, "--eval_steps", 100)
    runs = []
    for steps in (2, 3):
        runs.append(FakeRanks(0, way.world))
        train(small_data, tmp_path / str(steps), runs[-1], way, *seldom, "--max_steps", steps)
    more = collections.Counter(runs[1].calls) - collections.Counter(runs[0].calls)
    assert collections.Counter(runs[0].calls) - collections.Counter(runs[1].calls) == {}
    assert sorted(call.size for call in more.elements()) == [
        1,
        6,
        31 * 1024,
    ]  # the parameters, in blocks
    assert {call.name for call in more} == {"all_reduce"}


def test_a_sharded_run_goes_on_on_every_rank(
    small_data: Path, tmp_path: Path, main_rank: GetMain
) -> None:
    way = WAYS[-1]
    folder = tmp_path / "copy"
    shutil.copytree(main_rank(way)[2], folder)
    (saved,) = folder.glob(f"out/run-*/model.ckpt-{STEPS}.pt")
    state = torch.load(saved, weights_only=True)
    assert len(state["state"]["random"]) == way.world
    model, master = state["model"], state["optimizer"]["master"]
    assert {name: value.shape for name, value in master.items()} == {
        name: model[name].shape for name in master
    }
    more = ("--resume", "required", "--max_steps", RESUMED_STEPS)
    main = FakeRanks(0, way.world)
    steps = perf_events(train(small_data, folder, main, way, *more), "STEP_END")
    assert [step["num_trained_samples"] for step in steps] == [RESUMED_STEPS * 2 * way.world]
    last = FakeRanks(way.world - 1, way.world, main)
    train(small_data, folder, last, way, *more)
    # The faked exchange leaves the ranks with different weights, so that they send checksums too.
    kept = [[one for one in of.calls if one.name != "all_gather_object"] for of in (main, last)]
    assert kept[0] == kept[1]


def test_a_fault_of_the_data_that_one_rank_finds_ends_all(small_data: Path, tmp_path: Path) -> None:
    """The first rank of a machine alone lists the shards."""
    (tmp_path / "empty").mkdir()
    words = (
        "--name", "mini", "--config", "CPUx1x2", "--data_dir", small_data,
        "--init_checkpoint", "random", "--train_dir", "empty", "--output_dir", "out",
    )  # fmt: skip
    main = FakeRanks(0, 2)
    last = FakeRanks(1, 2, main)
    for ranks in (main, last):
        done = ranks.run(*words, cwd=tmp_path)
        assert done.returncode == 2
        *before, error = done.stderr.splitlines()
        assert error.startswith("Error: no shards in empty: ")
        assert len(before) == (1 if ranks is main else 0)  # a notice before it waits for others
    assert last.calls == main.calls


def test_a_rank_without_the_others_tells_a_fault_of_the_data_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the variables of a rank are left over in a shell."""
    monkeypatch.setattr(process_group, "CONNECT_TIMEOUT", datetime.timedelta(seconds=1))
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**variables, "MASTER_PORT": str(run_port())}.items():
        monkeypatch.setenv(name, value)
    words = ("train", "--name", "mini", "--config", "CPUx1x2", "--data_dir", "absent")
    done = in_process(*words, cwd=tmp_path)
    assert done.returncode == 2
    notice, error = done.stderr.splitlines()
    assert re.match(r"Notice: no .*absent.*; this rank ends once it has told the others", notice)
    assert notice.removeprefix("Notice: ").startswith(error.removeprefix("Error: "))


def shape_of(text: str) -> list[str]:
    """The lines without their numbers, and without the width of columns of numbers."""
    lines = [re.sub(r"[-+\d.,e]*\d", "#", line) for line in text.splitlines()]
    return [re.sub(r" +|-{3,}", " ", line) for line in lines]


def test_logs_do_not_grow_with_the_number_of_ranks(main_rank: GetMain) -> None:
    alone, few, many = (main_rank(Way(world, WAYS[0].flags)) for world in (1, 64, 4096))
    assert shape_of(many[1]) == shape_of(few[1])
    name = '"reduction": "{}"'
    assert shape_of(many[1].replace(name.format("DuringBackward"), name.format("NoReduction"))) == (
        shape_of(alone[1])
    )
    files = [
        {re.sub(r"\d{8}-\d{6}", "", path.name): path for path in done[2].glob("out/run-*/*")}
        for done in (alone, few, many)
    ]
    assert files[0].keys() == files[1].keys() == files[2].keys()
    assert files[0].keys() >= {"perflog.txt", "mllog.txt", "console.txt"}
    for file, path in files[0].items():
        if not file.endswith(".pt"):  # a checkpoint holds each rank's random generators
            assert files[2][file].stat().st_size < path.stat().st_size + 200, file


def test_a_signal_ends_the_wait_for_ranks_that_do_not_come(mini_data: Path, tmp_path: Path) -> None:
    """It is a wait in C++, which no handler in Python would end."""
    ports = {signal.SIGTERM: run_port(), signal.SIGINT: run_port()}
    assert len(set(ports.values())) == 2
    words = ("train", "--name", "mini", "--config", "CPUx1x2", "--data_dir", str(mini_data))
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    waiting = {
        number: subprocess.Popen(
            [sys.executable, "-m", "bert_pretraining", *words], cwd=tmp_path,
            env={**os.environ, **variables, "MASTER_PORT": str(port),
                 "PYTHONPATH": str(ROOT / "base")},
        )
        for number, port in ports.items()
    }  # fmt: skip
    try:
        for number, process in waiting.items():
            while port_holder(ports[number]) is None:  # rank 0 listens, and waits
                assert process.poll() is None
                time.sleep(0.1)
            process.send_signal(number)
            # A shell shows these as 143 and 130.
            assert process.wait(timeout=600) == -number
    finally:
        for process in waiting.values():
            process.kill()
            process.wait()
    assert list(tmp_path.iterdir()) == [], "no folder of a run"
