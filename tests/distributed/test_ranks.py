"""Real gloo processes: the same training and the same evaluation on any number of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers import ROOT, MakeOnce, command, error_lines, in_process, perf_events

STEPS = 6


def launch(data: Path, cwd: Path, ranks: int, *flags: object) -> subprocess.CompletedProcess[str]:
    """A run of STEPS steps; of one rank, in this process."""
    words = (
        "--name", "mini", "--config", "CPUx1x2", "--device", "cpu", "--data_dir", data,
        "--nproc_per_node", ranks, "--seed", 11, "--max_steps", STEPS, "--log_freq", 1, *flags,
    )  # fmt: skip
    return (
        in_process("train", *words, cwd=cwd) if ranks == 1 else command("launch", *words, cwd=cwd)
    )


# ranks, batch a rank, accumulation: 48 sequences an update each, dealt from 12 lanes
ALONE = (1, 48, 1)
SPLITS = [
    (1, 12, 4),
    (2, 12, 2),
    pytest.param((3, 16, 1), marks=pytest.mark.slow),
    pytest.param((4, 12, 1), marks=pytest.mark.slow),
]
GetRun = Callable[[tuple], tuple[dict[str, torch.Tensor], str]]


@pytest.fixture
def run_of(mini_data: Path, make_once: MakeOnce) -> GetRun:
    """Final weights and output of the same run, split in this way over ranks.

    Neither 3 nor 4 ranks get equal parts of the evaluation's sequences.
    """

    def get(split: tuple) -> tuple[dict[str, torch.Tensor], str]:
        ranks, batch, accumulation = split

        def make(cwd: Path) -> None:
            cwd.mkdir()
            done = launch(
                mini_data, cwd, ranks, "--train_batch_size", batch, "--gradient_accumulation_steps",
                accumulation, "--data_lanes", 12, "--mlm_loss_normalization", "global",
                "--num_eval_examples", 301, "--save_checkpoint", "--output_dir", "out",
            )  # fmt: skip
            assert done.returncode == 3, done.stderr
            (cwd / "output.txt").write_text(done.stdout)

        folder = make_once(f"split_{ranks}_{batch}_{accumulation}", make)
        (path,) = folder.glob(f"out/run-*/model.ckpt-{STEPS}.pt")
        return torch.load(path, weights_only=True)["model"], (folder / "output.txt").read_text()

    return get


@pytest.mark.parametrize("split", SPLITS)
def test_the_same_weights_on_the_same_global_batches(run_of: GetRun, split: tuple) -> None:
    alone, together = run_of(ALONE)[0], run_of(split)[0]
    for name, value in alone.items():
        # A key's bias moves all of a query's scores alike, which softmax takes back: its
        # gradient is 0 but for rounding, which LAMB then blows up to a step's full length.
        if not name.endswith("key.bias"):
            torch.testing.assert_close(together[name], value, rtol=2e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize("split", SPLITS)
def test_the_same_losses(run_of: GetRun, split: tuple) -> None:
    alone, together = (perf_events(run_of(which)[1], "STEP_END") for which in (ALONE, split))
    assert len(alone) == STEPS
    for one, other in zip(alone, together, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert other["mlm_acc"] == pytest.approx(one["mlm_acc"], abs=5e-3)


@pytest.mark.parametrize("split", SPLITS)
def test_the_same_gradient_norms(run_of: GetRun, split: tuple) -> None:
    """LAMB hides a constant factor in the gradients; their norm before clipping does not."""
    alone, together = (perf_events(run_of(which)[1], "STEP_END") for which in (ALONE, split))
    for one, other in zip(alone, together, strict=True):
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("split", SPLITS)
def test_the_start_evaluation_is_the_same_to_the_last_bit(run_of: GetRun, split: tuple) -> None:
    alone, together = (
        perf_events(run_of(which)[1], "INIT_EVALUATION")[0] for which in (ALONE, split)
    )
    assert together["eval_loss"] == alone["eval_loss"]
    assert together["eval_mlm_accuracy"] == alone["eval_mlm_accuracy"]


def damaged_shard(data: Path, folder: Path) -> list[object]:
    """Of the two ranks only one reads it."""
    shards = folder / "shards"
    shards.mkdir()
    good, broken = sorted((data / "2048_shards_uncompressed").iterdir())[:2]
    shutil.copyfile(good, shards / good.name)
    content = bytearray(broken.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    (shards / broken.name).write_bytes(content)
    return ["--train_dir", shards]


def damaged_evaluation_set(data: Path, folder: Path) -> list[object]:
    (folder / "eval").mkdir()
    (folder / "eval" / "part_eval.hdf5").write_bytes(b"not hdf5")
    return ["--eval_dir", folder / "eval"]


def smaller_vocabulary(data: Path, folder: Path) -> list[object]:
    bert_config = json.loads((data / "bert_config.json").read_text())
    path = folder / "bert_config.json"
    path.write_text(json.dumps({**bert_config, "vocab_size": 200}))
    return ["--bert_config_path", path, "--init_checkpoint", "random"]


@pytest.mark.parametrize(
    ("ranks", "fault"),
    [
        (2, damaged_shard),
        (1, damaged_evaluation_set),
        (1, smaller_vocabulary),
        pytest.param(2, damaged_evaluation_set, marks=pytest.mark.slow),
        pytest.param(2, smaller_vocabulary, marks=pytest.mark.slow),
    ],
)
def test_bad_data_ends_all_ranks_with_one_line(
    mini_data: Path, tmp_path: Path, ranks: int, fault: Callable[[Path, Path], list[object]]
) -> None:
    done = launch(mini_data, tmp_path, ranks, *fault(mini_data, tmp_path), "--output_dir", "out")
    assert done.returncode == 2, done.stderr
    (line,) = error_lines(done.stderr)
    assert line.startswith("Error: ")
    assert list((tmp_path / "out").glob("run-*")) == [], "nothing stays of a refused run"


def test_what_differs_between_ranks_is_named(tmp_path: Path) -> None:
    """Settings and weights; and what else ranks find out, by real messages."""
    program = tmp_path / "ranks.py"
    program.write_text(
        "import os, sys\n"
        "import torch\n"
        "from bert_pretraining.errors import UserError\n"
        "from bert_pretraining.runtime import agreement, process_group, replicas\n"
        "rank = int(os.environ['RANK'])\n"
        "try:\n"
        "    process_group.start('cpu', 'gloo', {'seed': rank // 2})\n"
        "except UserError as error:\n"
        "    found = [str(error).split(' (')[0]]\n"
        "ranks = process_group.start('cpu', 'gloo')\n"
        "cpu = ranks.device\n"
        "named = {'same': torch.ones(5), 'moved': torch.arange(7.0)}\n"
        "named['half'] = torch.ones(3).half()\n"
        "found += [replicas.differing_replica(named)]\n"
        "if rank == 1:\n"
        "    named['moved'] = named['moved'].flip(0)  # the same numbers in other places\n"
        "    named['half'][1] = 2.0\n"
        "found += [replicas.differing_replica(named)]\n"
        "found += [process_group.total([rank, 0.5], cpu), process_group.largest([rank], cpu)]\n"
        "found += [process_group.smallest([rank], cpu)]\n"
        "found += [agreement.median([4.0, 1.5, 2.5][rank], cpu)]\n"
        "found += [agreement.first_said([None, 'one', 'two'][rank], cpu)]\n"
        "found += [agreement.distinct([['a'], ['b', 'a'], []][rank], cpu)]\n"
        "gathered = process_group.gather_to_main(rank)\n"
        "assert gathered == ([0, 1, 2] if rank == 0 else None)\n"
        "sys.stdout.write(repr(found) + '\\n')\n"
        "process_group.stop()\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3",
         str(program)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "base")}, capture_output=True, text=True,
        timeout=600, check=True,
    )  # fmt: skip
    expected = [
        "--seed is 0 on rank 0", None, "moved on rank 1", [3.0, 1.5], [2.0], [0.0], 2.5, "one",
        ["a", "b"],
    ]  # fmt: skip
    assert done.stdout.splitlines() == [repr(expected)] * 3


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_every_optimizer_gives_the_same_loss_curve(
    mini_data: Path, tmp_path: Path, ranks: int
) -> None:
    """Of two ranks, DDP owns the gradients of all but flat."""
    curves = {}
    for name in ("reference", "foreach", "flat"):
        done = launch(
            mini_data, tmp_path, ranks, "--optimizer", name, "--output_dir", name,
            "--num_eval_examples", 64,
        )  # fmt: skip
        assert done.returncode == 3, done.stderr
        assert f"\nOptimizer: {name} (as asked)\n" in done.stdout
        curves[name] = [event["loss"] for event in perf_events(done.stdout, "STEP_END")]
        assert len(curves[name]) == STEPS
    assert len(set(curves["reference"])) == STEPS
    for curve in curves.values():
        assert curve == pytest.approx(curves["reference"], rel=1e-4)


def trained_weights(
    mini_data: Path, tmp_path: Path, ranks: int, *flags: object
) -> tuple[dict[str, torch.Tensor], dict]:
    """The final weights and optimizer state of a run."""
    folder = tmp_path / "-".join(str(flag).strip("-") for flag in (ranks, *flags))
    done = launch(
        mini_data, tmp_path, ranks, "--train_batch_size", 8, *flags, "--num_eval_examples", 64,
        "--save_checkpoint", "--output_dir", folder,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    (path,) = folder.glob(f"run-*/model.ckpt-{STEPS}.pt")
    content = torch.load(path, weights_only=True)
    return content["model"], content["optimizer"]


IN_FP32 = ("--precision", "bf16", "--gradient_dtype", "fp32")


@pytest.mark.parametrize(
    ("ranks", "clip", "more"),
    [
        (2, "after", ()),
        pytest.param(2, "after", IN_FP32, marks=pytest.mark.slow),
        pytest.param(4, "before", (), marks=pytest.mark.slow),
    ],
)
def test_distributed_lamb_trains_to_the_same_weights(
    mini_data: Path, tmp_path: Path, ranks: int, clip: str, more: tuple[str, ...]
) -> None:
    flags = ("--gradient_accumulation_steps", 2, "--clip_gradients", f"{clip}_reduction", *more)
    plain, its_state = trained_weights(mini_data, tmp_path, ranks, *flags)
    sharded, state = trained_weights(mini_data, tmp_path, ranks, *flags, "--distributed_lamb")
    # With two ranks a sum has one order only; the norm before the reduction has another, though.
    tolerance = 0.0 if (ranks, clip) == (2, "after") else 1e-4
    for name, weight in plain.items():
        if tolerance == 0.0 or not name.endswith("key.bias"):  # see the test of the splits
            torch.testing.assert_close(sharded[name], weight, rtol=tolerance, atol=tolerance / 10)
    assert state["updates"] == its_state["updates"] == STEPS
    if tolerance == 0.0:
        for key in ("master", "first_moment", "second_moment"):
            for name, value in its_state[key].items():
                assert torch.equal(state[key][name], value), (key, name)
