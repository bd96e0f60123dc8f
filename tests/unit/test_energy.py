"""A run's energy: what is sampled and written, what it comes to, and that it never ends a run."""

from __future__ import annotations

import csv
import itertools
import json
import threading
from pathlib import Path

import pytest
import torch

from bert_pretraining.errors import UserError
from bert_pretraining.logs import energy, energy_sampler
from bert_pretraining.logs.energy import add_up, measure
from bert_pretraining.logs.energy_sampler import (
    CLOCK_STARTED,
    CLOCK_STOPPED,
    TRAINING_BEGAN,
    TRAINING_ENDED,
    EnergyMonitor,
    MachineEnergy,
    Mark,
    Sampler,
    Span,
)
from bert_pretraining.logs.line_file import LineFile
from bert_pretraining.logs.mlperf_power import MlperfPower
from bert_pretraining.logs.power_file import COLUMNS, PowerFile
from bert_pretraining.logs.sinks import Energy
from bert_pretraining.runtime import power
from bert_pretraining.runtime.power import Found, State
from bert_pretraining.runtime.process_group import gather
from energy_counters import Broken, Steady, make_rapl
from helpers import command, in_process, perf_events

KINDS = {("RAPL", "CPU package"): 1}
CPU = torch.device("cpu")
NOW = 1_700_000_000.0


def rows(path: Path) -> list[dict]:
    with path.open() as file:
        return list(csv.DictReader(file))


# ---- one machine


def test_a_line_a_second_and_the_joules_between_two_marks(tmp_path: Path) -> None:
    gpu, cpu = Steady(600.0, "GPU 0", "NVML", "GPU"), Steady(200.0)
    gpu.now_state = State(61, 1755, 97, ("power_cap", "software_heat"))
    sampler = Sampler([gpu, cpu], file=PowerFile(LineFile(tmp_path / "power.csv")))
    sampler.sample(NOW)
    sampler.sample(NOW + 1)
    sampler.sample(NOW + 1.25, Mark(TRAINING_BEGAN, NOW + 1.25))
    sampler.sample(NOW + 2)
    sampler.sample(NOW + 2.25, Mark(TRAINING_ENDED, NOW + 2.25))
    sampler.sample(NOW + 3.5)
    sampler.close()
    assert sampler.total == Span(pytest.approx(2800.0), 3.5)
    assert sampler.training == Span(pytest.approx(800.0), 1.0)
    lines = rows(tmp_path / "power.csv")
    assert tuple(lines[0]) == COLUMNS
    of_gpu = [line for line in lines if line["device"] == "GPU 0"]
    # The marks have no line of their own.
    assert [float(line["time_s"]) - NOW for line in of_gpu] == [0.0, 1.0, 2.0, 3.5]
    assert [line["watts"] for line in of_gpu] == ["", "600.0", "600.0", "600.0"]
    assert [float(line["joules"]) for line in of_gpu] == [0.0, 600.0, 1200.0, 2100.0]
    states = {tuple(line.values())[4:] for line in of_gpu}
    assert states == {("61", "1755", "97", "power_cap|software_heat")}
    assert {tuple(line.values())[4:] for line in lines if line not in of_gpu} == {("",) * 4}


def test_a_failing_reading_ends_the_sampling_and_not_the_run(tmp_path: Path) -> None:
    file = PowerFile(LineFile(tmp_path / "power.csv"))
    told: list[str] = []
    monitor = EnergyMonitor(Sampler([Broken(2)], 1e-3, file), KINDS)
    run = energy.RunEnergy(told.append, energy.Begun(monitor, "RAPL"))
    monitor.close()
    run.mark(TRAINING_BEGAN)  # a run goes on telling what happens
    run.check()
    run.check()
    assert run.finish(100) is None
    run.close()
    reason = "cannot read package-0 (Input/output error)"
    assert told == [f"Energy is not measured any more: {reason}"]
    assert len(rows(tmp_path / "power.csv")) == 1


def test_a_counter_that_hangs_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy_sampler, "PATIENCE", 0.01)
    never, entered = threading.Event(), threading.Event()

    class Hanging(Steady):
        def joules(self, now: float) -> float:
            entered.set()
            never.wait()
            return 0.0

    monitor = EnergyMonitor(Sampler([Hanging(1.0)]), KINDS)
    entered.wait()
    found = monitor.finish()
    never.set()
    assert "gave no answer" in found.failure
    assert add_up([found], 1) == (None, f"on {found.host} {found.failure}")


# ---- MLPerf's power log


def power_log(path: Path, seconds: float) -> Path:
    """The log of a run of so long that takes 700 W, between times at which nothing is due."""
    sampler = Sampler([Steady(700.0)], 0.5, mlperf=MlperfPower(LineFile(path), "node_0", 0.25))
    sampler.sample(NOW)
    start = NOW + 0.3
    sampler.sample(start + 0.01, Mark(CLOCK_STARTED, start))
    sampler.sample(start + 0.02, Mark(TRAINING_BEGAN, start + 0.02))
    ticks = int(seconds / 0.5)
    for tick in range(1, ticks + 1):
        sampler.sample(start + 0.5 * tick)
    sampler.sample(start + seconds + 0.02, Mark(CLOCK_STOPPED, start + seconds))
    sampler.sample(start + seconds + 3)
    sampler.close()
    assert sampler.mlperf_readings == ticks
    return path


def test_the_power_log_has_mlperf_s_keys(tmp_path: Path) -> None:
    text = power_log(tmp_path / "node_0.txt", 40.1).read_text()
    events = [json.loads(line.removeprefix(":::MLLOG ")) for line in text.splitlines()]
    first, efficiency, *readings, last = events
    assert (first["event_type"], first["key"]) == ("INTERVAL_START", "power_measurement_start")
    assert first["time_ms"] == int((NOW + 0.3) * 1000)
    assert (efficiency["key"], efficiency["value"]) == ("conversion_eff", 1.0)
    assert efficiency["metadata"]["measurement_type"] == "DC"
    assert len(readings) == 80
    assert {(each["event_type"], each["key"]) for each in readings} == {
        ("POINT_IN_TIME", "power_reading")
    }
    assert {each["metadata"]["host"] for each in readings} == {"node_0"}
    # A short rest at the end is a part of the last reading. The first stands for 10 ms less than
    # it says: the counters are read just after the clock has started. Times are whole ms.
    assert [each["value"] for each in readings[1:]] == [pytest.approx(700.0, rel=2e-3)] * 79
    assert readings[0]["value"] == pytest.approx(700 * 0.49 / 0.5, rel=2e-3)
    times = [each["time_ms"] for each in readings]
    assert max(after - before for before, after in itertools.pairwise(times)) <= 1000
    assert (last["event_type"], last["key"]) == ("INTERVAL_END", "power_measurement_stop")
    assert last["time_ms"] == times[-1] >= int((NOW + 40.4) * 1000)


def test_the_official_tools_take_it(tmp_path: Path) -> None:
    pytest.importorskip("mlperf_logging", reason="the official tools are not installed")
    from mlperf_logging.compliance_checker.mlp_parser import parse_file
    from mlperf_logging.package_checker.power_checker import PowerChecker
    from mlperf_logging.result_summarizer.result_summarizer import _compute_power_node

    results = tmp_path / "system" / "bert"
    for run in range(2):
        folder = results / "power" / f"result_{run}"
        folder.mkdir(parents=True)
        path = power_log(folder / "node_0.txt", 60)
        lines, errors = parse_file(str(path), "5.0.0")
        assert errors == []
        assert _compute_power_node(lines, 60_000) == pytest.approx(60 * 700, rel=1e-3)
    files = [str(results / f"result_{run}.txt") for run in range(2)]
    assert PowerChecker("5.0.0").check_power(str(results / "power"), files) == (True, set())
    (results / "power/result_1/node_0.txt").rename(results / "power/result_1/node_7.txt")
    assert PowerChecker("5.0.0").check_power(str(results / "power"), files)[0] is False


# ---- all machines


def machine(host: str = "a", **changes: object) -> MachineEnergy:
    values = {
        "kinds": {("NVML", "GPU"): 8, ("RAPL", "CPU package"): 2},
        "run": Span(9_000.0, 12.0),
        "training": Span(8_000.0, 10.0),
    }
    return MachineEnergy(host, **{**values, **changes})


def test_machines_add_up() -> None:
    other = machine("b", run=Span(7_000.0, 12.0), training=Span(6_000.0, 10.5))
    found, reason = add_up([machine(), other], 7_000)
    source = "NVML of 16 GPUs, RAPL of 4 CPU packages"
    assert (found, reason) == (Energy(source, 16_000.0, 14_000.0, 7_000, 10.5), "")
    assert found.named() == {
        "joules_per_sequence": 2.0,
        "joules_per_sequence_run": pytest.approx(16 / 7),
        "mean_watts": pytest.approx(14_000 / 10.5),
        "energy_source": source,
    }
    nothing_trained = Energy(source, 16_000.0, 0.0, 0)
    assert list(nothing_trained.named().values()) == [None, None, None, source]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"kinds": {}}, "b has no counter that can be read"),
        ({"failure": "the devices of type cuda are not counted"}, "on b the devices"),
        ({"run": Span(0.0, 12.0)}, "the counters of b stood still"),
    ],
)
def test_a_sum_that_would_be_too_small_is_not_told(other: dict, said: str) -> None:
    found, reason = add_up([machine(), machine("b", **other)], 100)
    assert found is None and said in reason
    assert add_up([machine(**{"kinds": {}})], 100) == (None, "")


def test_two_containers_of_a_machine_count_its_cpus_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(power.POWERCAP_VARIABLE, str(make_rapl(tmp_path, {"0": "package-0"})))
    told: list[str] = []

    def second_container(item: object) -> list:
        if not isinstance(item, energy.Rank):
            return gather(item)
        return [item._replace(rank=0, host="first", folder=tmp_path), item]

    monkeypatch.setattr(energy.process_group, "gather", second_container)
    run = measure("auto", 1, CPU, None, told.append)
    assert told == []  # the first one says what it counts
    assert run.finish(10) is None
    assert list(tmp_path.glob("power*.csv")) == []


def test_another_machine_with_the_same_disks_writes_a_file_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy.power, "find_rapl", lambda root: Found([Steady(50.0)]))

    def second_machine(item: object) -> list:
        if not isinstance(item, energy.Rank):
            return gather(item)
        first = item._replace(rank=0, host="first", boot="other", folder=tmp_path)
        return [first, item._replace(host="second")]

    monkeypatch.setattr(energy.process_group, "gather", second_machine)
    monkeypatch.setattr(energy.socket, "gethostname", lambda: "second")
    measure("mlperf", 1, CPU, None, lambda text: None).close()
    assert (tmp_path / "power-second.csv").is_file()
    assert (tmp_path / "power/node_1.txt").is_file()


# ---- a run


def test_off_measures_nothing(tmp_path: Path) -> None:
    run = measure("off", 0, CPU, tmp_path, lambda text: None)
    run.mark(TRAINING_BEGAN)
    assert run.finish(10) is None
    assert list(tmp_path.iterdir()) == []


def test_without_counters_one_line_says_so_and_another_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(power.POWERCAP_VARIABLE, str(tmp_path))
    told: list[str] = []
    assert measure("auto", 0, CPU, tmp_path, told.append).finish(10) is None
    short, why = told
    assert short == "Energy: not measured (this machine shows no power counters)"
    assert why.startswith(f"Power counters: {tmp_path} has no intel-rapl:*, which would count")
    with pytest.raises(UserError, match=r"--energy mlperf: on .* no energy counter can be read"):
        measure("mlperf", 0, CPU, tmp_path, told.append)


def test_a_power_log_without_the_devices_that_train_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would look like one of the whole machine."""
    monkeypatch.setattr(energy.power, "find_rapl", lambda root: Found([Steady(50.0)]))
    device = torch.device("meta")  # one that NVML does not know
    with pytest.raises(UserError, match=r"the devices of type meta are not counted: NVML does not"):
        measure("mlperf", 0, device, tmp_path, lambda text: None)
    assert list(tmp_path.iterdir()) == []
    measure("auto", 0, device, tmp_path, lambda text: None).close()
    assert (tmp_path / "power.csv").is_file()


def test_a_vendor_s_library_that_fails_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(root: Path) -> Found:
        raise OSError("undefined symbol")

    monkeypatch.setattr(energy.power, "find_rapl", fail)
    told: list[str] = []
    assert measure("auto", 0, CPU, tmp_path, told.append).finish(10) is None
    assert told == ["Energy: not measured: OSError: undefined symbol"]


def test_a_run_tells_its_joules(
    mini_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy.power, "find_rapl", lambda root: Found([Steady(50.0)]))
    done = in_process(
        "train", "--config", "CPUx1x2", "--data_dir", mini_data, "--output_dir", "out",
        "--max_steps", 2, "--train_batch_size", 4, "--eval_steps", 100, "--energy", "mlperf",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    (finished,) = perf_events(done.stdout, "FINISHED")
    assert finished["mean_watts"] == pytest.approx(50.0)
    assert finished["energy_source"] == "RAPL of 1 CPU"
    (step,) = perf_events(done.stdout, "STEP_END")[-1:]
    trained = step["num_trained_samples"]
    # The counters are read a moment after training began and ended: no bound can be tighter.
    assert finished["joules_per_sequence"] * trained < 50 * finished["e2e_time"]
    assert finished["joules_per_sequence_run"] > finished["joules_per_sequence"] > 0
    (folder,) = (tmp_path / "out").glob("run-*")
    assert rows(folder / "power.csv")[0]["device"] == "package-0"
    power_lines = (folder / "power/node_0.txt").read_text().splitlines()
    mllog = (folder / "mllog.txt").read_text().splitlines()
    times = {
        json.loads(line.removeprefix(":::MLLOG "))["key"]: json.loads(
            line.removeprefix(":::MLLOG ")
        )["time_ms"]
        for line in (*mllog, *power_lines)
    }
    assert times["power_measurement_start"] <= times["run_start"]
    assert times["power_measurement_stop"] >= times["run_stop"]
    assert "MLPerf wants at least 60" in done.stdout


def test_several_ranks_read_the_counters_of_their_machine_once(
    mini_data: Path, tmp_path: Path
) -> None:
    """A launch of two ranks, with counters that stand still, as in a virtual machine."""
    root = make_rapl(tmp_path / "powercap", {"0": "package-0", "0:0": "dram"})
    done = command(
        "launch", "--config", "CPUx1x2", "--data_dir", mini_data, "--output_dir", "out",
        "--max_steps", 2, "--train_batch_size", 4, "--eval_steps", 100, "--energy", "mlperf",
        cwd=tmp_path, **{power.POWERCAP_VARIABLE: str(root)},
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    # The counters stood still: no joules a sequence.
    said = [line for line in done.stdout.splitlines() if "nergy" in line and line[0] not in "[:"]
    assert said[0] == "Energy: RAPL of 1 CPU package and 1 memory domain"
    assert len(said) == 2 and said[1].startswith("No energy of the run: the counters of")
    (finished,) = perf_events(done.stdout, "FINISHED")
    assert "joules_per_sequence" not in finished
    (folder,) = (tmp_path / "out").glob("run-*")
    assert [path.name for path in folder.glob("power*.csv")] == ["power.csv"]
    assert {line["device"] for line in rows(folder / "power.csv")} == {
        "package-0", "package-0 dram",
    }  # fmt: skip


def test_a_power_log_that_cannot_be_had_refuses_the_run(
    mini_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(power.POWERCAP_VARIABLE, str(tmp_path))
    done = in_process(
        "train", "--config", "CPUx1x2", "--data_dir", mini_data, "--output_dir", "out",
        "--energy", "mlperf", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: --energy mlperf: on ") and "no intel-rapl:*" in line
    assert list((tmp_path / "out").glob("run-*")) == []
