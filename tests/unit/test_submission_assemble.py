"""Logs to a submission's tree that passes, its system description, and its score."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bert_pretraining.errors import UserError
from bert_pretraining.submission import assemble as assembling
from bert_pretraining.submission import system
from bert_pretraining.submission.check import check
from bert_pretraining.submission.score import run_figures, score
from bert_pretraining.submission.summarize import summarize
from bert_pretraining.submission.system_checks import check_scaling
from bert_pretraining.submission.tree import read_result, systems
from helpers import command, needs_reference
from submission_defects import edit, log, set_status
from submission_tree import SYSTEM, make_submission

pytestmark = needs_reference
pytest.importorskip("mlperf_logging")

FLAGS = ["--name", "nvidia", "--config", "H200x1x8", "--submission_org", "NVIDIA"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_submission(tmp_path_factory.mktemp("submission"))


@pytest.fixture(scope="module")
def series(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A series as `submission run` leaves it, of real logs."""
    folder = tmp_path_factory.mktemp("series")
    runs = []
    for run in range(10):
        name = f"run_{run:02d}"
        target = folder / name / "run-20261123-000000" / "mllog.txt"
        target.parent.mkdir(parents=True)
        shutil.copyfile(log(sound, run), target)
        runs.append({"folder": name, "seed": run, "caches_dropped": True, "started": 0.0,
                     "seconds": 1.0, "exit_code": 0})  # fmt: skip
    state = {"flags": FLAGS, "number_of_runs": 10, "runs": runs}
    (folder / "series.json").write_text(json.dumps(state))
    (folder / "system.json").write_text(json.dumps(system.describe_machine()))
    return folder


def test_an_assembled_series_passes_the_check(series: Path, sound: Path, tmp_path: Path) -> None:
    fields = tmp_path / "fields.json"
    fields.write_text('{"cooling": "air", "host_networking": "none"}')
    done = command(
        "submission", "assemble", "--series", series, "--system", "8xH200", "--output_dir", "out",
        "--system_fields", fields, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    root = tmp_path / "out" / "NVIDIA"
    for run in range(10):
        copied = root / "results" / "8xH200" / "bert" / f"result_{run}.txt"
        assert copied.read_bytes() == log(sound, run).read_bytes()
    report = check(root, "5.0.0")
    assert report.passed and report.findings == [], report.describe()
    description = json.loads((root / "systems" / "8xH200.json").read_text())
    assert list(description) == list(system.FIELDS)
    assert description["cooling"] == "air" and description["division"] == "closed"
    assert description["status"] == "Available on-premise"
    listed = done.stdout.split("8xH200.json: ")[1].splitlines()[0].split(", ")
    assert listed == system.blanks(description) and "cooling" not in listed
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["NVIDIA"]


def test_the_code_comes_along_and_runs(series: Path, tmp_path: Path) -> None:
    made = assembling.assemble(
        assembling.runs_of_series(series), tmp_path, "8xH200", "pytorch", None
    )
    code = made.folder / "benchmarks" / "bert" / "implementations" / "pytorch"
    assert made.remarks == []
    names = [path.relative_to(code).as_posix() for path in code.rglob("*")]
    assert {"README.md", "setup.sh", "init_datasets.sh", "run_and_time.sh"} <= set(names)
    assert (
        "base/bert_pretraining/training/train.py" in names and "configs/nvidia/_base.toml" in names
    )
    assert not any(name.rsplit("/", 1)[-1].startswith(".") or "pycache" in name for name in names)
    assert " ".join(FLAGS) in (code / "README.md").read_text()
    assert "BERT pretraining, MLPerf style" in (code / "README.md").read_text()
    for script in code.glob("*.sh"):
        subprocess.run(["bash", "-n", str(script)], check=True)
    done = subprocess.run(
        ["bash", str(code / "run_and_time.sh"), "--data_dir", "nowhere"],
        cwd=tmp_path,
        env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "nowhere" in done.stderr
    assert done.stdout.startswith("Ruleset 4.1.0, global batch size 448")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not asked again: a process that imports torch."""
    monkeypatch.setattr(assembling, "describe_machine", lambda: {"number_of_nodes": "1"})


def test_logs_in_any_order_are_put_in_launch_order(
    sound: Path, tmp_path: Path, machine: None
) -> None:
    logs = [log(sound, run) for run in (3, 0, 9, 1)]
    runs = assembling.runs_of_logs(logs, FLAGS)
    made = assembling.assemble(runs, tmp_path, SYSTEM, "pytorch", None)
    assert made.remarks == ["4 logs; a submission has 10"]
    for index, run in enumerate((0, 1, 3, 9)):
        copied = log(made.folder, index)
        assert copied.read_bytes() == log(sound, run).read_bytes()


def test_a_configuration_from_outside_comes_along(
    sound: Path, tmp_path: Path, machine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.toml").write_text('train_batch_size = 7\ndata_dir = "nowhere"\n')
    (tmp_path / "my.toml").write_text('extends = "base"\nmax_steps = 99\n')
    flags = ["--config=my.toml", "--seed_of_nothing", "1", "--submission_org", "NVIDIA"]
    runs = assembling.runs_of_logs([log(sound, 0)], flags)
    made = assembling.assemble(runs, tmp_path / "out", SYSTEM, "pytorch", None)
    code = made.folder / "benchmarks" / "bert" / "implementations" / "pytorch"
    assert {path.name for path in (code / "configs" / "submission").iterdir()} == {
        "my.toml",
        "base.toml",
    }
    wanted = "--name submission --config my --seed_of_nothing 1 --submission_org NVIDIA"
    assert wanted in (code / "run_and_time.sh").read_text()
    (tmp_path / "base.toml").unlink()
    with pytest.raises(UserError, match=r"--config base\.toml of the runs cannot be read"):
        assembling.assemble(runs, tmp_path / "other", SYSTEM, "pytorch", None)
    assert list((tmp_path / "other").iterdir()) == []


def test_a_second_system_goes_beside_and_none_is_overwritten(series: Path, tmp_path: Path) -> None:
    runs = assembling.runs_of_series(series)
    first = assembling.assemble(runs, tmp_path, "one", "pytorch", None)
    before = log(first.folder, 0).parent
    second = assembling.assemble(runs, tmp_path, "two", "pytorch", None)
    assert "exists already; its code was kept" in second.remarks[0]
    assert sorted(path.name for path in (first.folder / "results").iterdir()) == ["one", "two"]
    with pytest.raises(UserError, match="is there already"):
        assembling.assemble(runs, tmp_path, "one", "pytorch", None)
    assert before == log(first.folder, 0).parent


@pytest.mark.parametrize("name", ["", ".hidden", "a b", "../x", "a/b"])
def test_names_become_directories(series: Path, tmp_path: Path, name: str) -> None:
    runs = assembling.runs_of_series(series)
    with pytest.raises(UserError, match="cannot be the name of a"):
        assembling.assemble(runs, tmp_path / "out", name, "pytorch", None)
    assert not (tmp_path / "out").exists()


def test_logs_of_two_submitters_are_refused(sound: Path, tmp_path: Path, machine: None) -> None:
    root = shutil.copytree(sound, tmp_path / "NVIDIA")
    edit(log(root, 1), lambda events: [
        {**event, "value": "ACME"} if event["key"] == "submission_org" else event
        for event in events
    ])  # fmt: skip
    runs = assembling.runs_of_logs([log(root, 0), log(root, 1)], FLAGS)
    with pytest.raises(UserError, match=r'submission_org is "NVIDIA" in .* but "ACME" in'):
        assembling.assemble(runs, tmp_path / "out", SYSTEM, "pytorch", None)


def test_unknown_fields_are_refused(series: Path, tmp_path: Path) -> None:
    fields = tmp_path / "fields.json"
    fields.write_text('{"coolings": "air"}')
    runs = assembling.runs_of_series(series)
    with pytest.raises(UserError, match="no such field of a system description: coolings"):
        assembling.assemble(runs, tmp_path / "out", SYSTEM, "pytorch", fields)


# ---- the machine


LSCPU = json.dumps({"lscpu": [
    {"field": "CPU(s):", "data": "224"},
    {"field": "Vendor ID:", "data": "GenuineIntel", "children": [
        {"field": "Model name:", "data": "Intel(R) Xeon(R) Platinum 8480C", "children": [
            {"field": "Core(s) per socket:", "data": "56"},
            {"field": "Socket(s):", "data": "2"},
            {"field": "CPU max MHz:", "data": "3800.0000"}]}]},
    {"field": "Caches (sum of all):", "data": None, "children": [
        {"field": "L3 cache:", "data": "210 MiB (2 instances)"}]},
]})  # fmt: skip


def test_processors() -> None:
    assert system.processors(LSCPU, 224) == {
        "host_processors_per_node": "2",
        "host_processor_model_name": "Intel(R) Xeon(R) Platinum 8480C",
        "host_processor_core_count": "56",
        "host_processor_vcpu_count": "224",
        "host_processor_frequency": "3800 MHz (maximum)",
        "host_processor_caches": "L3 210 MiB (2 instances)",
        "host_processor_interconnect": "",
    }
    assert system.processors("", 8)["host_processor_vcpu_count"] == "8"


def test_memory_storage_and_networks(tmp_path: Path) -> None:
    assert system.memory("MemTotal:       2113406564 kB\nMemFree: 1 kB\n") == "2016 GiB"
    disks = [
        {"name": "nvme0n1", "rota": False, "tran": "nvme", "size": 3840755982336, "type": "disk"},
        {"name": "nvme1n1", "rota": False, "tran": "nvme", "size": 3840755982336, "type": "disk"},
        {"name": "sda", "rota": True, "tran": "sas", "size": 1000204886016, "type": "disk"},
        {"name": "loop0", "rota": False, "tran": None, "size": 4096, "type": "loop"},
    ]
    assert system.storage(json.dumps({"blockdevices": disks})) == {
        "host_storage_type": "HDD, NVMe SSD",
        "host_storage_capacity": "1x 1000 GB HDD + 2x 3841 GB NVMe SSD",
    }
    for port in ("mlx5_0", "mlx5_1"):
        rate = tmp_path / "infiniband" / port / "ports" / "1" / "rate"
        rate.parent.mkdir(parents=True)
        rate.write_text("400 Gb/sec (4X NDR)\n")
    for name, speed in (("eth0", "100000"), ("eth1", "-1")):
        (tmp_path / "net" / name / "device").mkdir(parents=True)
        (tmp_path / "net" / name / "speed").write_text(speed + "\n")
    assert system.networking(tmp_path) == (
        "2x InfiniBand 400 Gb/sec (4X NDR), 1x Ethernet 100000 Mb/s"
    )


def test_accelerators() -> None:
    line = "NVIDIA H200, 143771 MiB, 1980 MHz, 550.54.09, 5, 16\n"
    found = system.accelerators(8, ("NVIDIA H200", 150_754_820_096), line * 8)
    assert found == {
        "accelerators_per_node": "8",
        "accelerator_model_name": "NVIDIA H200",
        "accelerator_memory_capacity": "143771 MiB",
        "accelerator_frequency": "1980 MHz (maximum)",
        "accelerator_host_interconnect": "PCIe Gen5 x16",
    }
    other = system.accelerators(1, ("Iluvatar BI-V100", 34_359_738_368), "")
    assert other["accelerator_model_name"] == "Iluvatar BI-V100"
    assert other["accelerator_memory_capacity"] == "32768 MiB"
    assert system.accelerators(0, None, "")["accelerators_per_node"] == "0"


# ---- the score


def test_the_score_is_that_of_the_official_summarizer(sound: Path, tmp_path: Path) -> None:
    root = shutil.copytree(sound, tmp_path / sound.name)
    # The package checker writes the scaling.json that the summarizer scores with.
    for tool, more in (("package_checker", []), ("result_summarizer", ["--csv", "s.csv"])):
        subprocess.run(
            [sys.executable, "-m", f"mlperf_logging.{tool}", root.name, "training", "4.1.0", *more],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )
    official = next(csv.DictReader((tmp_path / "s_detailed.csv").open()))
    (summary,) = summarize([root], "4.1.0")
    assert summary.score.minutes == pytest.approx(float(official["bert:time_to_train"]), rel=1e-9)
    factor = float(official["bert:rcp_scaling_factor"])
    assert summary.score.scale_factor == pytest.approx(factor, rel=1e-9) and factor > 1.01
    samples = float(official["bert:samples_to_converge"])
    assert summary.score.mean_samples == pytest.approx(samples, rel=1e-12)
    # The scaling.json that is there now says what the logs say.
    assert list(check_scaling(systems(root)[0], summary.score.scale_factor)) == []


def test_one_unconverged_run_counts_as_the_slowest(sound: Path, tmp_path: Path) -> None:
    root = shutil.copytree(sound, tmp_path / sound.name)
    edit(log(root, 3), lambda events: set_status(events, "aborted"))
    logs = [read_result(log(root, run)) for run in range(10)]
    result = score(logs, "4.1.0")
    times = sorted(each.minutes for each in map(run_figures, logs) if each.status == "success")
    assert result.mean_minutes == pytest.approx(sum(times[1:]) / 8)
    edit(log(root, 4), lambda events: set_status(events, "aborted"))
    logs = [read_result(log(root, run)) for run in range(10)]
    assert score(logs, "4.1.0").minutes is None
    assert "8 of 10 runs converged" in score(logs, "4.1.0").fault


def test_summary_as_markdown_and_json(sound: Path, series: Path, tmp_path: Path) -> None:
    done = command("submission", "summarize", sound, cwd=tmp_path)
    assert done.returncode == 0
    text = done.stdout
    assert text.startswith(f"## {SYSTEM}\n") and "mean of 8 of 10 runs" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 12 and sum("dropped" in row for row in rows) == 2
    done = command("submission", "summarize", series, "--json", cwd=tmp_path)
    (summary,) = json.loads(done.stdout)
    assert summary["global_batch_size"] == 768 and len(summary["runs"]) == 10
    assert f"**{summary['score_minutes']:.3f} minutes**" in text
    assert sum(run["counts"] for run in summary["runs"]) == 8


def test_no_score_is_exit_code_1(sound: Path, tmp_path: Path) -> None:
    done = command("submission", "summarize", log(sound, 0), log(sound, 1), cwd=tmp_path)
    assert done.returncode == 1 and "No score" in done.stdout
    done = command("submission", "summarize", tmp_path, cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
