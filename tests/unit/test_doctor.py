"""`doctor`: each result on a machine that has it, and the command's exit codes."""

from __future__ import annotations

import json
import re
import resource
import shutil
import socket
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from bert_pretraining import config, doctor, kernels
from bert_pretraining.config import Config
from bert_pretraining.doctor import hardware, run, software
from bert_pretraining.doctor.report import NOTE, OK, PROBLEM, CheckResult
from bert_pretraining.launch import LaunchFlags
from bert_pretraining.topology import Core, Gpu, Machine, Node
from helpers import ROOT, command

MACHINE = Machine((Core((0, 2), 0), Core((1, 3), 0)), (Node(0, True, {}),))
WITH_GPUS = Machine(MACHINE.cores, MACHINE.nodes, (Gpu("NVIDIA H100", "0000:07:00.0", 0),) * 4)


def settings(**flags: object) -> Config:
    return config.resolve({"name": "mini", "config": "CPUx1x1", "device": "auto", **flags}).config


def by_name(results: object) -> dict[str, CheckResult]:
    return {result.what: result for result in results}


def test_requirements_are_those_of_the_package() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    named = text.partition("dependencies = [")[2].partition("]")[0]
    pairs = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', named))
    assert pairs == software.REQUIRED | software.OPTIONAL


def test_packages_that_are_missing_or_old(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {**software.REQUIRED, "torch": "2.9.1+cu128", "h5py": None, "triton": None}
    monkeypatch.setattr(software, "installed_version", installed.get)
    found = by_name(software.results())
    assert found["torch"].status == PROBLEM
    assert found["torch"].text == "2.9.1+cu128 is older than 2.11"
    assert (found["h5py"].status, found["h5py"].text) == (PROBLEM, "not installed")
    assert "pip install -r requirements.txt" in found["h5py"].fix
    assert found["tqdm"].status == OK
    assert found["triton"].status == NOTE


def test_the_wrong_apex_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(__import__("sys").modules, "apex", raising=False)
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("web = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = by_name(software.results())["apex"]
    assert found.status == NOTE
    assert "another project" in found.text
    assert found.fix.startswith("pip uninstall apex")


Properties = namedtuple("Properties", "name major minor total_memory")


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    properties = Properties("NVIDIA H100", 9, 0, 80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    found = by_name(hardware.gpus(settings(nproc_per_node=4), WITH_GPUS))
    assert found["GPU 3"].text == "NVIDIA H100, capability 9.0, 80 GiB, NUMA node 0"
    assert found["device"].status == OK
    short = by_name(hardware.gpus(settings(nproc_per_node=8), WITH_GPUS))["device"]
    assert (short.status, short.fix) == (PROBLEM, "pass --nproc_per_node 4, or --device cpu")


@pytest.mark.parametrize(
    ("device", "machine", "cuda", "status", "words"),
    [
        ("auto", MACHINE, None, OK, "training on the CPU"),
        ("cuda", MACHINE, None, PROBLEM, "no GPU here"),
        ("auto", WITH_GPUS, None, NOTE, "built without CUDA"),
        ("cuda", WITH_GPUS, None, PROBLEM, "built without CUDA"),
        ("cuda", WITH_GPUS, "13.0", PROBLEM, "PyTorch (CUDA 13.0) cannot use them"),
        ("cpu", WITH_GPUS, None, OK, "as --device asks"),
    ],
)
def test_no_gpu_that_pytorch_can_use(
    device: str, machine: Machine, cuda: str | None, status: str, words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    found = by_name(hardware.gpus(settings(device=device), machine))["device"]
    assert found.status == status
    assert words in found.text
    assert bool(found.fix) == (status != OK)


def test_kernels_and_precisions() -> None:
    found = by_name(hardware.kernels(settings(device="cpu")))
    assert "attention=torch" in found["kernels bf16"].text
    assert found["kernels fp16"].status == NOTE
    refused = by_name(hardware.kernels(settings(device="cpu", kernels="apex")))["kernels fp32"]
    assert refused.status == PROBLEM
    assert "apex" in refused.text


def test_kernels_on_a_gpu(mini_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    properties = Properties("NVIDIA H100", 9, 0, 80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    asked = []
    real_select = kernels.select

    def select_on_the_cpu(
        provider: str, device: torch.device, dtype: torch.dtype, head_size: int, *rest: object
    ) -> kernels.Kernels:
        assert device.type == "cuda"
        torch.ones(2, head_size)  # as the kernels' trial does: TypeError for what is no number
        asked.append(head_size)
        return real_select(provider, torch.device("cpu"), dtype, head_size)

    monkeypatch.setattr(kernels, "select", select_on_the_cpu)
    sizes = json.loads((mini_data / "bert_config.json").read_text())
    (tmp_path / "bert_config.json").write_text(json.dumps({**sizes, "num_attention_heads": 1}))
    for flags, looks_at_data, expected in (
        ({}, False, 64),
        ({"data_dir": str(tmp_path)}, True, sizes["hidden_size"]),
        ({"data_dir": str(tmp_path / "absent")}, True, 64),
        ({"bert_config_path": str(tmp_path / "bert_config.json")}, True, sizes["hidden_size"]),
    ):
        found = by_name(doctor.examine(settings(**flags), LaunchFlags(), WITH_GPUS, looks_at_data))
        assert found["kernels fp16"].status == OK
        assert "attention=torch" in found["kernels fp16"].text
        assert set(asked) == {expected}
        asked.clear()


def test_binding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = by_name(hardware.binding(settings(nproc_per_node=2), LaunchFlags(), MACHINE))
    assert found["numactl"].status == NOTE
    assert found["numactl"].text.startswith("numactl is not installed")
    assert found["CPUs"].text == "2 cores, 4 hardware threads, 1 NUMA nodes"
    assert "Binding: affinity" in found["NUMA map"].text
    strict = LaunchFlags(bind="required")
    crowded = by_name(hardware.binding(settings(nproc_per_node=3), strict, MACHINE))
    assert crowded["numactl"].status == PROBLEM
    assert crowded["CPUs"].status == NOTE


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run.open_files((256, 4096)).fix == "ulimit -n 1024"
    assert run.open_files((256, 512)).fix == "raise nofile in limits.conf"
    assert run.open_files((1024, 1024)).status == OK
    assert run.open_files((resource.RLIM_INFINITY,) * 2).text == "no limit"
    assert run.shared_memory(8, tmp_path / "absent").status == NOTE
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=64 * 2**20))
    assert run.shared_memory(8, tmp_path).fix == "docker run --shm-size=1g, or --ipc=host"
    assert run.shared_memory(1, tmp_path).status == OK
    assert run.disk("output", tmp_path / "a" / "b").status == PROBLEM
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2 * 2**30))
    assert run.disk("output", tmp_path / "a" / "b").status == NOTE
    monkeypatch.undo()
    (tmp_path / "file").touch()
    assert run.disk("output", tmp_path / "file").fix == "pass another --output_dir"
    assert run.disk("log_dir", tmp_path / "file").fix == "pass another --log_dir"


def test_a_busy_port() -> None:
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        busy = LaunchFlags(master_port=holder.getsockname()[1])
        (result,) = run.port(settings(), busy)
    assert result.status == PROBLEM
    assert "holds it" in result.text
    assert result.fix.startswith("choose another")


def test_the_command(mini_data: Path, tmp_path: Path) -> None:
    good = command("doctor", "--data_dir", mini_data, "--device", "cpu", cwd=tmp_path)
    assert good.returncode == 0, good.stdout + good.stderr
    assert "16 training and 1 evaluation shards" in good.stdout
    assert good.stdout.splitlines()[-1].startswith("Training can start. Problems: 0, notes: ")
    assert list(tmp_path.iterdir()) == [], "it leaves nothing behind"


def test_problems_end_with_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert doctor.main(["--data_dir", "absent", "--device", "cpu", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    (problem,) = [found for found in report["findings"] if found["status"] == PROBLEM]
    assert problem.keys() == {"what", "status", "text", "fix"}
    assert problem["text"] == "no such data_dir: absent"
    assert "data make-mini --output_dir absent" in problem["fix"]
    assert doctor.main(["--device", "cpu"]) == 0, "data is looked at where it is named"
    assert doctor.main(["--name", "mini", "--config", "CPUx1x2"]) == 1, "or by a configuration"
