"""Real gloo processes: the same training and the same evaluation on any number of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import ROOT, command

STEPS = 12


def events(output: str, name: str) -> list[dict]:
    lines = [line for line in output.splitlines() if line.startswith("[PerfLog] ")]
    records = [json.loads(line.removeprefix("[PerfLog] ")) for line in lines]
    return [record["value"] for record in records if record["event"] == name]


def launch(data: Path, cwd: Path, *flags: object) -> tuple[int, str, str]:
    done = command(
        "launch", "--name", "mini", "--config", "CPUx1x2", "--device", "cpu", "--data_dir", data,
        "--seed", 11, "--max_steps", STEPS, "--log_freq", 1, *flags, cwd=cwd,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


# ranks, batch a rank, accumulation: 48 sequences an update each, dealt from 12 lanes
SPLITS = [(1, 48, 1), (3, 16, 1), (1, 12, 4), (2, 12, 2), (4, 12, 1)]


@pytest.fixture(scope="module")
def runs(mini_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Final weights and output of the same run, split in several ways over ranks."""
    results = {}
    for ranks, batch, accumulation in SPLITS:
        cwd = tmp_path_factory.mktemp("run")
        code, output, errors = launch(
            mini_data, cwd, "--nproc_per_node", ranks, "--train_batch_size", batch,
            "--gradient_accumulation_steps", accumulation, "--data_lanes", 12,
            "--mlm_loss_normalization", "global", "--save_checkpoint", "--output_dir", "out",
        )  # fmt: skip
        assert code == 3, errors
        content = torch.load(next(cwd.glob(f"out/run-*/model.ckpt-{STEPS}.pt")), weights_only=True)
        results[ranks, batch, accumulation] = content["model"], output
    return results


@pytest.mark.parametrize("split", SPLITS[1:])
def test_the_same_weights_on_the_same_global_batches(runs: dict, split: tuple) -> None:
    alone, together = runs[SPLITS[0]][0], runs[split][0]
    for name, value in alone.items():
        # A key's bias moves all of a query's scores alike, which softmax takes back: its
        # gradient is 0 but for rounding, which LAMB then blows up to a step's full length.
        if not name.endswith("key.bias"):
            torch.testing.assert_close(together[name], value, rtol=2e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize("split", SPLITS[1:])
def test_the_same_losses(runs: dict, split: tuple) -> None:
    alone, together = (events(runs[which][1], "STEP_END") for which in (SPLITS[0], split))
    assert len(alone) == STEPS
    for one, other in zip(alone, together, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert other["mlm_acc"] == pytest.approx(one["mlm_acc"], abs=5e-3)


@pytest.mark.parametrize("split", SPLITS[1:])
def test_the_same_gradient_norms(runs: dict, split: tuple) -> None:
    """LAMB hides a constant factor in the gradients; their norm before clipping does not."""
    alone, together = (events(runs[which][1], "STEP_END") for which in (SPLITS[0], split))
    for one, other in zip(alone, together, strict=True):
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("split", SPLITS[1:])
def test_the_start_evaluation_is_the_same_to_the_last_bit(runs: dict, split: tuple) -> None:
    alone, together = (events(runs[which][1], "INIT_EVALUATION")[0] for which in (SPLITS[0], split))
    assert together["eval_loss"] == alone["eval_loss"]
    assert together["eval_mlm_accuracy"] == alone["eval_mlm_accuracy"]


@pytest.mark.parametrize("fault", ["damaged shard", "damaged eval set", "vocabulary"])
def test_bad_data_ends_all_ranks_with_one_line(mini_data: Path, tmp_path: Path, fault: str) -> None:
    flags: list[object] = ["--output_dir", "out"]
    if fault == "damaged shard":
        shards = tmp_path / "shards"
        shards.mkdir()
        source = sorted((mini_data / "2048_shards_uncompressed").iterdir())[:2]
        for path in source:
            (shards / path.name).write_bytes(path.read_bytes())
        broken = shards / source[1].name
        content = bytearray(broken.read_bytes())
        content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
        broken.write_bytes(content)
        flags += ["--train_dir", shards]
    elif fault == "damaged eval set":
        (tmp_path / "eval").mkdir()
        (tmp_path / "eval" / "part_eval.hdf5").write_bytes(b"not hdf5")
        flags += ["--eval_dir", tmp_path / "eval"]
    else:
        bert_config = json.loads((mini_data / "bert_config.json").read_text())
        bert_config["vocab_size"] = 200
        (tmp_path / "bert_config.json").write_text(json.dumps(bert_config))
        flags += [
            "--bert_config_path",
            tmp_path / "bert_config.json",
            "--init_checkpoint",
            "random",
        ]
    code, _, errors = launch(mini_data, tmp_path, *flags)
    assert code == 2, errors
    lines = [line for line in errors.splitlines() if not line.startswith("Notice: ")]
    assert len(lines) == 1
    assert lines[0].startswith("Error: ")
    (log,) = (tmp_path / "out").glob("run-*/mllog.txt")
    assert '"status": "aborted"' in log.read_text() or "run_start" not in log.read_text()


def test_a_replica_that_differs_is_named(tmp_path: Path) -> None:
    program = tmp_path / "ranks.py"
    program.write_text(
        "import sys\n"
        "import torch\n"
        "from bert_pretraining.runtime import process_group\n"
        "ranks = process_group.start('cpu', 'gloo')\n"
        "named = {'same': torch.ones(5), 'moved': torch.arange(7.0)}\n"
        "named['half'] = torch.ones(3).half()\n"
        "same = process_group.differing_replica(named)\n"
        "if ranks.rank == 1:\n"
        "    named['moved'] = named['moved'].flip(0)  # the same numbers in other places\n"
        "    named['half'][1] = 2.0\n"
        "line = f'{ranks.rank} {same} {process_group.differing_replica(named)}\\n'\n"
        "sys.stdout.write(line)\n"
        "process_group.stop()\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         str(program)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "base")}, capture_output=True, text=True,
        timeout=120, check=True,
    )  # fmt: skip
    assert sorted(done.stdout.split("\n"))[1:] == [
        "0 None moved on rank 1",
        "1 None moved on rank 1",
    ]


def test_every_optimizer_gives_the_same_loss_curve(mini_data: Path, tmp_path: Path) -> None:
    curves = {}
    for name in ("reference", "foreach", "flat"):
        code, output, errors = launch(
            mini_data, tmp_path, "--optimizer", name, "--output_dir", name, "--data_lanes", 2
        )
        assert code == 3, errors
        assert f"\nOptimizer: {name} (as asked)\n" in output
        curves[name] = [event["loss"] for event in events(output, "STEP_END")]
        assert len(curves[name]) == STEPS
    assert curves["reference"][-1] < curves["reference"][0]
    for curve in curves.values():
        assert curve == pytest.approx(curves["reference"], rel=1e-4)


def trained_weights(
    mini_data: Path, tmp_path: Path, ranks: int, *flags: object
) -> tuple[dict[str, torch.Tensor], dict]:
    """The final weights and optimizer state of a run."""
    folder = tmp_path / "-".join(str(flag).strip("-") for flag in (ranks, *flags))
    code, _, errors = launch(
        mini_data, tmp_path, "--nproc_per_node", ranks, "--train_batch_size", 8, *flags,
        "--save_checkpoint", "--output_dir", folder,
    )  # fmt: skip
    assert code == 3, errors
    (path,) = folder.glob(f"run-*/model.ckpt-{STEPS}.pt")
    content = torch.load(path, weights_only=True)
    return content["model"], content["optimizer"]


@pytest.mark.parametrize(("ranks", "clip"), [(2, "after"), (4, "before")])
def test_distributed_lamb_trains_to_the_same_weights(
    mini_data: Path, tmp_path: Path, ranks: int, clip: str
) -> None:
    flags = ("--gradient_accumulation_steps", 2, "--clip_gradients", f"{clip}_reduction")
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
