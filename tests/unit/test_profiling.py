"""The parts of profiling: which steps, named ranges, memory snapshots, the table of operators."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.autograd import DeviceType

from bert_pretraining.config import Config, resolve
from bert_pretraining.errors import UserError
from bert_pretraining.runtime import profilers, ranges
from bert_pretraining.runtime.operator_table import operator_table
from bert_pretraining.runtime.process_group import Ranks
from bert_pretraining.training.profiling import Profile

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


# ---- the settings


def test_steps_are_from_the_first_to_before_the_end() -> None:
    resolved = resolve({"name": "mini", "config": "CPUx1x1", "profile_steps": "10:15"})
    assert list(resolved.config.steps_to_profile) == [10, 11, 12, 13, 14]
    assert Config().steps_to_profile is None


@pytest.mark.parametrize("text", ["10", "15:10", "10:10", "0:5", "-1:5", "10-15", "10:15:2", "a:b",
                                  "", ":5", "10:", "1.5:3"])  # fmt: skip
def test_other_forms_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(UserError) as refusal:
        resolve({"name": "mini", "config": "CPUx1x1", "profile_steps": text})
    assert str(refusal.value) == (
        f"--profile_steps {text}: must be FIRST:END, with FIRST at least 1 and END above it; pass, "
        "for example, --profile_steps 10:15 for the steps 10 to 14"
    )


# ---- named ranges


@pytest.fixture
def marks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the ranges of an outside profiler are told: "+name" and "-name"."""
    told: list[str] = []

    @contextlib.contextmanager
    def fake_range(name: str) -> Iterator[None]:
        told.append(f"+{name}")
        yield
        told.append(f"-{name}")

    monkeypatch.setattr(torch.cuda, "nvtx", types.SimpleNamespace(range=fake_range))
    fake_window = types.SimpleNamespace(
        start=lambda: told.append("start"), stop=lambda: told.append("stop")
    )
    monkeypatch.setattr(torch.cuda, "profiler", fake_window)
    for name in profilers.OUTSIDE:
        monkeypatch.delenv(name, raising=False)
    yield told
    ranges.use(None)


class Said:
    """In the place of a RunLog."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def profile(log: Said, device: torch.device = GPU, **settings: object) -> Profile:
    return Profile(Config(**{"max_steps": 100, **settings}), Ranks(0, 1, device), log)


def test_without_a_profiler_a_range_is_nothing(marks: list[str], tmp_path: Path) -> None:
    with profile(Said(tmp_path)), ranges.range_of("data") as nothing:
        assert nothing is None
    assert ranges.range_of("data") is ranges.range_of("optimizer")
    assert marks == []


@pytest.mark.parametrize("variable", profilers.OUTSIDE)
def test_an_outside_profiler_gets_ranges(
    marks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "1")
    with profile(Said(tmp_path)), ranges.range_of("data"):
        marks.append("work")
    with ranges.range_of("after the run"):
        pass
    assert marks == ["+data", "work", "-data"]


def test_a_device_without_such_ranges_gets_none(
    marks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(profilers.NSIGHT_SYSTEMS, "1")
    with profile(Said(tmp_path), CPU), ranges.range_of("data"):
        pass
    assert marks == []


def test_a_library_for_ranges_waits_while_steps_are_to_be_traced(
    marks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may take the device's events for itself, and torch.profiler would get none."""
    monkeypatch.setenv("NVTX_INJECTION64_PATH", "/lib/libcupti.so")
    with profile(Said(tmp_path), profile_steps="3:5"), ranges.range_of("data"):
        pass
    assert marks == []


def test_nsight_systems_is_told_which_steps_to_keep(
    marks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(profilers.NSIGHT_SYSTEMS, "1")
    monkeypatch.setattr("bert_pretraining.runtime.device.synchronize", lambda device: None)
    log = Said(tmp_path)
    with profile(log, profile_steps="3:5") as watching:
        for step in range(1, 8):
            watching.before_update(step)
            marks.append(str(step))
        watching.ended()
    assert marks == ["1", "2", "start", "3", "4", "stop", "5", "6", "7"]
    assert log.lines == [
        "Profile of steps 3 to 4: left to Nsight Systems, which keeps nothing else if it was "
        "started with --capture-range=cudaProfilerApi"
    ]
    assert not (tmp_path / "profile").exists()


# ---- memory


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """torch.cuda.memory, as far as a history of it is concerned; what it was told."""
    told: list[str] = []

    def dump(path: str) -> None:
        told.append("dump")
        Path(path).write_bytes(b"snapshot")

    memory = types.SimpleNamespace(
        _record_memory_history=lambda enabled="all", **_: told.append(
            "record" if enabled else "stop"
        ),
        _dump_snapshot=dump,
    )
    monkeypatch.setattr(torch.cuda, "memory", memory)
    return told


def test_without_steps_memory_is_written_after_the_first_ones(
    recorder: list[str], tmp_path: Path
) -> None:
    log = Said(tmp_path)
    with profile(log, profile_memory=True) as watching:
        recorder.append("build")
        for step in range(21, 27):
            watching.before_update(step)
            recorder.append(str(step))
        watching.ended()
    assert recorder == ["record", "build", "21", "22", "23", "dump", "24", "25", "26", "stop"]
    path = tmp_path / "profile" / "rank0.memory.pickle"
    assert path.read_bytes() == b"snapshot"
    assert log.lines == [f"Memory snapshot: open {path} at https://pytorch.org/memory_viz"]


def test_where_memory_runs_out_it_is_written(
    recorder: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_out() -> None:
        try:
            raise torch.OutOfMemoryError("no memory left")
        except torch.OutOfMemoryError as error:
            raise RuntimeError("the step failed") from error

    with pytest.raises(RuntimeError), profile(Said(tmp_path), profile_memory=True):
        run_out()
    assert recorder == ["record", "dump", "stop"]
    path = tmp_path / "profile" / "rank0.out_of_memory.pickle"
    assert path.read_bytes() == b"snapshot"
    assert capsys.readouterr().err == (
        f"Memory snapshot of rank 0, where memory ran out: open {path} at "
        "https://pytorch.org/memory_viz\n"
    )


def test_another_error_writes_no_memory(recorder: list[str], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), profile(Said(tmp_path), profile_memory=True):
        raise RuntimeError("something else")
    assert recorder == ["record", "stop"]


def test_with_steps_only_their_memory_is_recorded(
    recorder: list[str], marks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(profilers.NSIGHT_SYSTEMS, "1")  # torch.profiler would need a GPU
    monkeypatch.setattr("bert_pretraining.runtime.device.synchronize", lambda device: None)
    with profile(Said(tmp_path), profile_memory=True, profile_steps="3:5") as watching:
        for step in range(1, 8):
            watching.before_update(step)
            recorder.append(str(step))
        watching.ended()
    assert recorder == ["1", "2", "record", "3", "4", "dump", "stop", "5", "6", "7"]


def test_a_cpu_has_no_history_of_memory(tmp_path: Path) -> None:
    log = Said(tmp_path)
    with profile(log, CPU, profile_memory=True) as watching:
        watching.before_update(1)
        watching.ended()
    assert log.lines == [
        "Notice: profile_memory has no effect: PyTorch keeps no history of the memory of a CPU"
    ]
    assert list(tmp_path.iterdir()) == []


# ---- the table


@dataclass
class Called:
    """All calls of one name, as torch.profiler sums them up."""

    key: str
    count: int
    cpu_time_total: float = 0.0
    self_cpu_time_total: float = 0.0
    self_device_time_total: float = 0.0
    scope: int = 0
    device_type: DeviceType = DeviceType.CPU


def test_the_table_has_means_of_a_step_in_the_order_of_cost() -> None:
    events = [
        Called("ProfilerStep*", 2, 100_000, 1000, scope=7),
        Called("data", 4, 20_000, 20_000, scope=7),
        Called("aten::cheap", 2, 5000, 5000),
        Called("aten::dear", 6, 80_000, 75_000, self_device_time_total=30_000),
        Called("data", 4, self_device_time_total=999, device_type=DeviceType.CUDA),
        Called("gemm_kernel", 6, self_device_time_total=30_000, device_type=DeviceType.CUDA),
    ]
    lines = operator_table(events, range(10, 12), "rank 3 of 8 (GPU)").splitlines()
    assert lines[:4] == [
        "Profile of steps 10 to 11, rank 3 of 8 (GPU)",
        "50.000 ms a step by the host's clock, the profiler's own time included",
        "15.000 ms a step of work on the device, 30.0% of the step",
        "Every figure is of one step, as the mean over the steps; times in milliseconds.",
    ]
    tables = [part.splitlines() for part in "\n".join(lines).split("\n\n")[1:]]
    words = [[line.split() for line in table[3:]] for table in tables]
    assert words == [
        [["ProfilerStep*", "1.0", "50.000", "100.0%", "0.500"],
         ["data", "2.0", "10.000", "20.0%", "10.000"]],
        [["aten::dear", "3.0", "37.500", "93.8%"], ["aten::cheap", "1.0", "2.500", "6.2%"],
         ["all", "40.000", "100.0%"]],
        [["aten::dear", "3.0", "15.000", "100.0%"], ["all", "15.000", "100.0%"]],
        [["gemm_kernel", "3.0", "15.000", "100.0%"], ["all", "15.000", "100.0%"]],
    ]  # fmt: skip
    assert [table[0] for table in tables] == [
        "Ranges by the host's clock; one inside another counts in both",
        "Operators by the host's time, without what they call",
        "Operators by the device's time, without what they call",
        "Kernels and copies by the device's time",
    ]


def test_a_long_table_ends_with_what_the_others_take() -> None:
    events = [Called(f"aten::op{n}", 1, n * 1000, n * 1000) for n in range(1, 41)]
    lines = operator_table(events, range(5, 6), "rank 0 of 1 (CPU)").splitlines()
    assert lines[0] == "Profile of step 5, rank 0 of 1 (CPU)"
    assert lines[-2].split() == ["10", "others", "55.000", "6.7%"]
    assert lines[-1].split() == ["all", "820.000", "100.0%"]
    assert sum(line.startswith("aten::") for line in lines) == 30
    long = operator_table([Called("x" * 500, 1, 1, 1)], range(1, 2), "")
    assert max(map(len, long.splitlines())) <= 100
