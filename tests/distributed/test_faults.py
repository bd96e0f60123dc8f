"""Real runs with a fault: they go on or end as documented, and the rank at fault is named.

benchmarks/faults.py has more of them, and records what is seen.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bert_pretraining.errors import EXIT_CRASH, EXIT_NOT_CONVERGED, EXIT_STOPPED
from faulty_runs import SlowStore, faulty, launch, slow_writes
from helpers import ROOT, run_port
from hosts import Launcher, end

SHORT = ["--seed", 7, "--log_freq", 1, "--num_eval_examples", 64, "--eval_steps", 100_000,
         "--target_mlm_accuracy", 1, "--train_batch_size", 8, "--machine_lines", "on"]  # fmt: skip
FOR_EVER = 100_000


@pytest.fixture
def started() -> Iterator[list[Launcher]]:
    """The launchers of a test; those that it has left behind are ended, and their ranks too."""
    launchers: list[Launcher] = []
    yield launchers
    for each in launchers:
        if each.process.poll() is None:
            each.process.kill()
            each.process.wait()


def machines(
    folder: Path,
    name: str,
    count: int,
    data: Path,
    *flags: object,
    ports: tuple[int, ...] = (),
    **environment: str,
) -> list[Launcher]:
    """A run of `count` machines with one rank each. ports: the way of each to the first one."""
    ports = ports or (run_port(),) * count
    return [
        launch(
            folder, f"{name}{node}", *SHORT, "--nproc_per_node", 1, "--nnodes", count,
            "--node_rank", node, "--master_addr", "127.0.0.1", "--master_port", ports[node],
            "--data_dir", data, *flags, **environment,
        )
        for node in range(count)
    ]  # fmt: skip


def events(launcher: Launcher, name: str) -> list[dict]:
    found = re.findall(r"^\[PerfLog\] (.*)$", launcher.output, flags=re.MULTILINE)
    return [event["value"] for event in map(json.loads, found) if event["event"] == name]


def notices(launcher: Launcher, kind: str) -> list[str]:
    return [value["text"] for value in events(launcher, "NOTICE") if value["kind"] == kind]


@pytest.mark.slow
def test_ranks_that_hold_up_the_others_for_a_moment_are_named(
    mini_data: Path, tmp_path: Path, started: list[Launcher]
) -> None:
    """Rank 1 of 3 keeps the interpreter lock for 8 s; rank 2 gets a batch 8 s late."""
    path = faulty(
        tmp_path / "fault",
        [1, 2],
        "hold_the_lock(8) if rank == 1 and made == 4 else None",
        "time.sleep(8) if rank == 2 and made == 10 else None",
    )
    run = launch(tmp_path, "run", *SHORT, "--nproc_per_node", 3, "--data_dir", mini_data,
                 "--max_steps", 12, PYTHONPATH=f"{path}:{ROOT / 'base'}")  # fmt: skip
    started.append(run)
    assert end([run]) == [EXIT_NOT_CONVERGED], run.errors
    host = os.uname().nodename
    told = notices(run, "rank_delayed")
    assert any(
        one.startswith(f"rank 1 ({host}) held up all ranks for ") and "its process stood s" in one
        for one in told
    ), told
    assert any(
        one.startswith(f"rank 2 ({host}) held up all ranks for ") and "it waited for a batch" in one
        for one in told
    ), told


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler (cc)")
def test_logs_that_are_slow_are_told(
    mini_data: Path, tmp_path: Path, started: list[Launcher]
) -> None:
    slow = slow_writes(tmp_path, "/run-", 150)
    run = launch(tmp_path, "run", *SHORT, "--nproc_per_node", 1, "--data_dir", mini_data,
                 "--max_steps", 8, **slow)  # fmt: skip
    started.append(run)
    assert end([run]) == [EXIT_NOT_CONVERGED], run.errors
    (line,) = notices(run, "slow_output")
    assert line.startswith("writing the logs of a step took ")
    assert "run-" in line


@pytest.mark.slow
def test_a_rank_is_stopped_and_goes_on(
    mini_data: Path, tmp_path: Path, started: list[Launcher]
) -> None:
    """Also its launcher: neither ends the run."""
    run = launch(tmp_path, "run", *SHORT, "--nproc_per_node", 2, "--data_dir", mini_data,
                 "--max_steps", 400)  # fmt: skip
    started.append(run)
    run.wait_for('"global_steps": 5,')
    for pid in (run.trainers()[0], run.process.pid):
        os.kill(pid, signal.SIGSTOP)
        time.sleep(5)
        os.kill(pid, signal.SIGCONT)
    assert end([run]) == [EXIT_NOT_CONVERGED], run.errors
    told = notices(run, "rank_delayed")
    assert any("held up all ranks for" in one and "its process stood still" in one for one in told)


@pytest.mark.slow
def test_a_lock_that_is_held_for_ever_names_its_rank(
    mini_data: Path, tmp_path: Path, started: list[Launcher]
) -> None:
    path = faulty(tmp_path / "fault", [1], "hold_the_lock(600) if made == 4 else None")
    run = launch(tmp_path, "run", *SHORT, "--nproc_per_node", 3, "--data_dir", mini_data,
                 "--max_steps", FOR_EVER, "--hang_timeout", 20,
                 PYTHONPATH=f"{path}:{ROOT / 'base'}")  # fmt: skip
    started.append(run)
    assert end([run]) == [EXIT_CRASH], run.errors
    assert run.last_line.startswith("Error: rank 1 made no progress for ")
    assert "hold_the_lock" in run.last_line


@pytest.mark.slow
def test_a_store_that_answers_late_and_then_no_more(
    mini_data: Path, tmp_path: Path, started: list[Launcher]
) -> None:
    port = run_port()
    store = SlowStore(port, delay=0.2)
    run = machines(tmp_path, "run", 2, mini_data, "--max_steps", FOR_EVER, "--output_dir", "out",
                   ports=(port, store.port))  # fmt: skip
    started += run
    run[0].wait_for('"global_steps": 5,')
    store.stop_for(600)
    assert end(run) == [EXIT_CRASH] * 2
    host = os.uname().nodename
    assert run[0].last_line.startswith(f"Error: machine 1 ({host}) ")
    store.close()


@pytest.mark.slow
def test_three_machines_go_on_where_four_stopped(
    mini_data: Path, tmp_path: Path, started: list[Launcher]
) -> None:
    flags = ["--max_steps", FOR_EVER, "--output_dir", "out", "--save_checkpoint", "--resume",
             "auto"]  # fmt: skip
    path = faulty(tmp_path / "looks", [], located="print('LOOKS UP', *samples[:8], flush=True)")
    samples = []
    for part, count in enumerate((4, 3, 4)):
        run = machines(tmp_path, f"part{part}_", count, mini_data, *flags,
                       PYTHONPATH=f"{path}:{ROOT / 'base'}")  # fmt: skip
        started += run
        run[0].wait_for('"event": "STEP_END"')
        run[0].process.terminate()
        assert end(run) == [EXIT_STOPPED] * count, run[0].errors
        if part:
            (resumed,) = events(run[0], "RESUMED")
            assert resumed["num_trained_samples"] == samples[-1]
            assert resumed["differences"] == [
                f"ranks {7 - count} -> {count}",
                f"global batch size {8 * (7 - count)} -> {8 * count}",
            ]
            assert events(run[0], "STEP_END")[0]["num_trained_samples"] == samples[-1] + 8 * count
        first = samples[-1] if samples else 0
        looked_up = [re.search("LOOKS UP(.*)", each.output)[1] for each in run]
        numbers = sorted(map(int, " ".join(looked_up).split()))
        assert numbers == list(range(first, first + 8 * count)), "the samples that follow"
        samples.append(events(run[0], "STEP_END")[-1]["num_trained_samples"])
