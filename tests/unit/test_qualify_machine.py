"""The stages `machine` and `software`: what is a fail, what is a note, and what is only told."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from bert_pretraining import topology
from bert_pretraining.config import Config
from bert_pretraining.doctor import run as run_checks
from bert_pretraining.doctor.report import NOTE, OK, PROBLEM, CheckResult
from bert_pretraining.errors import UserError
from bert_pretraining.qualify import machine, software
from bert_pretraining.qualify.record import FAIL, PASS
from bert_pretraining.qualify.record import NOTE as NOTED
from bert_pretraining.runtime import packages
from qualify_doubles import context_of, ignored

Usage = namedtuple("Usage", "total used free")
GOOD = CheckResult("disk", OK, "much")
VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "built_with": "CUDA 13.0", "driver": "580"}


def test_a_machine_without_a_free_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(port: int) -> int:
        raise UserError("no port is free", "end other programs")

    monkeypatch.setattr(run_checks, "free_port", taken)
    found = machine.run(context_of(tmp_path), ignored)
    assert found.verdict == FAIL
    told = "port: no port is free; end other programs"
    assert found.reason == f"no run can start: 1 problem; {told}"
    assert told not in found.notes
    assert found.figures["checks"]["port"] == PROBLEM
    assert found.figures["problems"] == 1


def test_a_machine_without_disk_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage

    def full(path: Path) -> Usage:
        return Usage(100, 100, 0) if Path(path) == tmp_path else usage(path)

    monkeypatch.setattr(shutil, "disk_usage", full)
    found = machine.run(context_of(tmp_path), ignored)
    assert found.verdict == FAIL
    assert f"output: 0.0 GiB free for {tmp_path}" in found.reason


def test_data_that_is_missing(tmp_path: Path) -> None:
    config = Config(device="cpu", data_dir=str(tmp_path / "nowhere"))
    found = machine.run(context_of(tmp_path, config=config), ignored)
    assert found.verdict == FAIL
    assert "data: " in found.reason


def test_this_machine_can_start_a_run(tmp_path: Path) -> None:
    found = machine.run(context_of(tmp_path), ignored)
    assert found.verdict in (PASS, NOTED)
    assert found.figures["problems"] == 0
    assert found.figures["checks"]["port"] == OK


def test_the_verdict_of_machine() -> None:
    fp16 = CheckResult("kernels fp16", NOTE, "fp16 needs a GPU")
    little = CheckResult("memory", NOTE, "1 GiB available", "end other programs")
    settings = Config(device="cpu")
    found = machine.judged([GOOD, fp16], settings, "cpu")
    assert (found.verdict, found.reason) == (PASS, "a run can start: 2 checks")
    assert (found.figures["checks"]["kernels fp16"], found.notes) == (NOTE, [])  # none uses it here
    found = machine.judged([GOOD, fp16, little], settings, "cpu")
    assert (found.verdict, found.figures["notes"], found.notes) == (NOTED, 1, [])
    assert found.reason == "a run can start; 1 note; memory: 1 GiB available; end other programs"
    numactl = CheckResult("numactl", NOTE, "numactl is not installed: others bind", "install it")
    found = machine.judged([GOOD, numactl, fp16, little], settings, "cpu")
    assert found.reason == (
        "a run can start; 2 notes; the first: numactl is not installed: others bind; install it"
    )
    assert found.notes == ["memory: 1 GiB available; end other programs"]
    found = machine.judged([fp16], Config(precision="fp16"), "cuda")
    assert found.verdict == NOTED, "a run uses it there"


# ---- software


def test_this_software_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    found = software.run(context_of(tmp_path), ignored)
    assert found.verdict != FAIL
    versions = found.figures["versions"]
    assert versions["torch"] == packages.installed_version("torch")
    assert versions["collectives"] == "gloo"
    assert "driver" not in versions
    assert found.figures["variables"] == {}


def test_a_torch_that_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = packages.installed_version
    monkeypatch.setattr(
        packages,
        "installed_version",
        lambda name: "2.3.1+cu121" if name == "torch" else installed(name),
    )
    found = software.run(context_of(tmp_path), ignored)
    assert found.verdict == FAIL
    assert "torch: 2.3.1+cu121 of " in found.reason
    assert "is older than 2.4" in found.reason
    assert found.figures["versions"]["torch"] == "2.3.1+cu121"


def test_a_torch_that_does_not_see_the_accelerator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        topology, "find_accelerators", lambda: (topology.Accelerator("Iluvatar", "/dev/iluvatar0"),)
    )
    monkeypatch.setattr(topology, "hidden_by", lambda _: None)
    context = context_of(tmp_path, config=Config(device="auto"))
    found = list(software.own_results(context, {}))
    assert [one.status for one in found] == [PROBLEM]
    assert "does not see this machine's 1 Iluvatar accelerator (/dev/iluvatar0)" in found[0].text
    asked_for = context_of(tmp_path, config=Config(device="cpu"))
    assert list(software.own_results(asked_for, {})) == []


@pytest.mark.parametrize(
    ("name", "value", "status"),
    [
        ("CUDA_LAUNCH_BLOCKING", "1", PROBLEM),
        ("PYTORCH_NO_CUDA_MEMORY_CACHING", "1", PROBLEM),
        ("NCCL_DEBUG", "trace", NOTE),
        ("TORCH_DISTRIBUTED_DEBUG", "DETAIL", NOTE),
        ("NCCL_P2P_DISABLE", "1", NOTE),
    ],
)
def test_a_variable_that_slows_a_run_down(
    tmp_path: Path, name: str, value: str, status: str
) -> None:
    (found,) = software.own_results(context_of(tmp_path), {name: value})
    assert (found.what, found.status, found.fix) == (name, status, f"unset {name}")
    assert found.text.startswith(f"{name}={value} slows down a run: ")


@pytest.mark.parametrize(("name", "value"), [("CUDA_LAUNCH_BLOCKING", "0"), ("NCCL_DEBUG", "INFO")])
def test_a_variable_that_does_no_harm(tmp_path: Path, name: str, value: str) -> None:
    assert list(software.own_results(context_of(tmp_path), {name: value})) == []


def test_more_threads_than_cpus(tmp_path: Path) -> None:
    cpus = len(os.sched_getaffinity(0))
    (found,) = software.own_results(context_of(tmp_path), {"OMP_NUM_THREADS": str(cpus)})
    assert (found.what, found.status) == ("OMP_NUM_THREADS", NOTE)
    assert f"on 2 ranks is more than this machine's {cpus} CPUs" in found.text
    alone = context_of(tmp_path, ranks=1)
    assert list(software.own_results(alone, {"OMP_NUM_THREADS": str(cpus)})) == []


def test_triton_is_needed_on_a_gpu_only() -> None:
    triton = CheckResult("triton", NOTE, "not installed", "install it")
    logging = CheckResult("mlperf-logging", NOTE, "not installed", "install it")
    found = software.judged([GOOD, triton, logging], "cpu", VERSIONS, {})
    assert found.verdict == PASS
    assert found.reason == "Python 3.11.7, torch 2.13.0 (built for CUDA 13.0), driver 580"
    found = software.judged([GOOD, triton, logging], "cuda", VERSIONS, {})
    assert found.verdict == NOTED
    assert found.reason.endswith("; triton: not installed; install it")
    assert found.notes == ["mlperf-logging: not installed; install it"]


def test_the_driver_by_its_own_file(tmp_path: Path) -> None:
    file = tmp_path / "version"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06\nGCC version: 12\n")
    assert software.driver((str(tmp_path / "none"), str(file))).endswith("580.65.06")
    assert software.driver((str(tmp_path / "none"),)) == "unknown"
