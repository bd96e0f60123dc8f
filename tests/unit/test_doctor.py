"""`doctor`: each result on a machine that has it, and the command's exit codes."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from bert_pretraining import config, doctor, kernels, topology
from bert_pretraining.config import Config
from bert_pretraining.doctor import hardware, run, software
from bert_pretraining.doctor.report import NOTE, OK, PROBLEM, CheckResult
from bert_pretraining.kernels import fp8_engine, fp8_linear
from bert_pretraining.launch import LaunchFlags, network
from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime import packages
from bert_pretraining.topology import Accelerator, Core, Gpu, Machine, Node
from helpers import ROOT, command

MACHINE = Machine((Core((0, 2), 0), Core((1, 3), 0)), (Node(0, True, {}),))
WITH_GPUS = Machine(MACHINE.cores, MACHINE.nodes, (Gpu("NVIDIA H100", "0000:07:00.0", 0),) * 4)


def settings(**flags: object) -> Config:
    return config.resolve({"name": "mini", "config": "CPUx1x1", "device": "auto", **flags}).config


def by_name(results: object) -> dict[str, CheckResult]:
    return {result.what: result for result in results}


def test_requirements_are_those_of_the_package() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    named = dict(re.findall(r'"([\w-]+)>=([\d.]+)[";]', text))
    expected = {**packages.REQUIRED, **software.OPTIONAL, "tomli": "2"}
    assert {name: named.get(name) for name in expected} == expected
    range_of_python = re.search(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', text).groups()
    oldest, newest = software.OLDEST_PYTHON, software.NEWEST_PYTHON
    assert (oldest, newest) == ((3, int(range_of_python[0])), (3, int(range_of_python[1]) - 1))
    beside = (ROOT / "requirements-beside-torch.txt").read_text()
    lower_bounds = dict(re.findall(r"^([\w-]+)>=([\d.]+)", beside, re.MULTILINE))
    assert lower_bounds == {
        name: oldest
        for name, oldest in {**packages.REQUIRED, "tomli": "2"}.items()
        if name != "torch"
    }


def test_packages_that_are_missing_or_old(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {**packages.REQUIRED, "torch": "2.3.1+cu121", "h5py": None, "triton": None}
    monkeypatch.setattr(packages, "installed_version", installed.get)
    found = by_name(software.results())
    assert found["torch"].status == PROBLEM
    assert found["torch"].text.startswith("2.3.1+cu121 of /")
    assert found["torch"].text.endswith(" is older than 2.4")
    assert "pip install" not in found["torch"].fix, "it would replace a vendor's torch"
    assert (found["h5py"].status, found["h5py"].text) == (PROBLEM, "not installed")
    assert found["h5py"].fix == f"{sys.executable} -m pip install --no-deps h5py"
    assert found["tqdm"].status == OK
    assert found["triton"].status == NOTE


def test_one_remedy_for_all_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHON", sys.executable)  # no .venv then
    for lacking, remedy in (
        ({"torch", "h5py", "tqdm"}, packages.how_to_install(["torch"])),
        ({"h5py", "tqdm"}, f"{sys.executable} -m pip install --no-deps h5py tqdm"),
    ):
        installed = {**packages.REQUIRED, **dict.fromkeys(lacking)}
        monkeypatch.setattr(packages, "installed_version", installed.get)
        found = [one for one in software.results() if one.what in lacking]
        assert {one.text for one in found} == {"not installed"}
        assert {one.status for one in found} == {PROBLEM}
        assert [one.fix for one in found] == [*[""] * (len(lacking) - 1), remedy]


def test_the_python_of_the_script_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where .venv has what this Python lacks."""
    monkeypatch.delenv("PYTHON", raising=False)
    monkeypatch.chdir(tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    installed = {**packages.REQUIRED, "torch": None, "h5py": None}
    monkeypatch.setattr(packages, "installed_version", installed.get)
    python.write_text("#!/bin/sh\nexit 1\n")  # as where it lacks packages, too
    python.chmod(0o755)
    assert by_name(software.results(tmp_path))["torch"].status == PROBLEM
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    first, *others = software.results(tmp_path)
    assert (first.what, first.status) == ("Python", PROBLEM)
    assert first.text == f"{sys.executable} is not the Python that run_training.sh uses"
    assert first.fix == "run 'PYTHONPATH=base .venv/bin/python -m bert_pretraining doctor'"
    assert [one.what for one in others if one.status == PROBLEM] == []
    assert by_name(others)["torch"] == CheckResult("torch", NOTE, "not installed")
    monkeypatch.setenv("PYTHON", "/usr/bin/python3")  # then run_training.sh uses that one
    assert next(iter(software.results(tmp_path))).status == OK
    monkeypatch.delenv("PYTHON")
    monkeypatch.setattr(sys, "executable", str(python))
    assert next(iter(software.results(tmp_path))).status == OK


def test_a_vendors_torch_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {**packages.REQUIRED, "torch": "2.4.1+corex.4.3.0", "numpy": packages.UNKNOWN}
    monkeypatch.setattr(packages, "installed_version", installed.get)
    found = by_name(software.results())
    assert found["torch"].status == OK and found["torch"].text.startswith("2.4.1+corex.4.3.0 of /")
    assert (found["numpy"].status, found["numpy"].text) == (OK, "version unknown")


def test_it_starts_without_any_package(tmp_path: Path) -> None:
    """-S leaves site-packages out, -E variables; only the standard library is there."""
    program = f"import sys; sys.path.append({str(ROOT / 'base')!r})\n"
    program += "from bert_pretraining.__main__ import main; sys.exit(main())"

    def findings(*flags: str) -> dict[str, dict[str, str]]:
        done = subprocess.run(
            [sys.executable, "-S", "-E", "-c", program, "doctor", "--json", *flags], cwd=tmp_path,
            capture_output=True, text=True, timeout=600,
            env={**os.environ, "PYTHON": sys.executable},  # no .venv then
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (1, "")
        return {each["what"]: each for each in json.loads(done.stdout)["findings"]}

    found = findings()
    for name in packages.REQUIRED:
        assert (found[name]["status"], found[name]["text"]) == (PROBLEM, "not installed")
    assert found["CPUs"]["status"] in (OK, NOTE)
    whole = findings("--name", "iluvatar", "--config", "V100x1x8")
    if "tomli" in packages.REQUIRED:
        assert "the other checks need tomli" in whole["launch"]["text"]
    else:
        assert whole["CPUs"]["status"] in (OK, NOTE)


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


ILUVATAR = (Accelerator("Iluvatar", "/dev/iluvatar0"),)
NVIDIA = (Accelerator("NVIDIA", "/dev/nvidia0"),) * 4


@pytest.mark.parametrize(
    ("config_name", "device", "machine", "cuda", "status", "words"),
    [
        ("CPUx1x1", "auto", (), None, OK, "no accelerator here: training on the CPU"),
        ("GPUx1x1", "auto", (), None, NOTE, "no accelerator: --config GPUx1x1 trains on the CPU"),
        ("GPUx1x1", "cuda", (), None, PROBLEM, "--device cuda, but this machine has no"),
        ("GPUx1x1", "gpu", (), None, PROBLEM, "has no accelerator; did you mean cuda?"),
        ("CPUx1x1", "auto", NVIDIA, None, NOTE, "does not see this machine's 4 NVIDIA accel"),
        ("GPUx1x1", "auto", ILUVATAR, None, PROBLEM, "does not see this machine's 1 Iluvatar acc"),
        ("CPUx1x1", "cuda", ILUVATAR, "12.1", PROBLEM, "(CUDA 12.1) of "),
        ("GPUx1x1", "cpu", NVIDIA, None, OK, "as --device asks"),
    ],
)  # fmt: skip
def test_no_device_that_pytorch_can_use(
    config_name: str, device: str, machine: tuple, cuda: str | None, status: str, words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices, "seen", lambda: None)
    monkeypatch.setattr(topology, "find_accelerators", lambda: machine)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    found = by_name(hardware.gpus(settings(config=config_name, device=device), MACHINE))["device"]
    assert found.status == status
    assert words in found.text
    if status == PROBLEM and machine:
        assert "install the vendor's PyTorch again: another one has probably replaced" in found.fix


def test_a_torch_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "find_accelerators", lambda: ILUVATAR)
    monkeypatch.setattr(packages, "folder_of", lambda module: Path("/usr/lib"))
    monkeypatch.setitem(sys.modules, "torch", None)
    found = by_name(hardware.results(settings(), LaunchFlags(), MACHINE, False))
    assert (found["PyTorch"].status, found["device"].status) == (PROBLEM, NOTE)
    assert found["device"].text == "this machine has 1 Iluvatar accelerator (/dev/iluvatar0)"


def test_kernels_and_precisions() -> None:
    found = by_name(hardware.kernels(settings(device="cpu")))
    assert "attention=torch" in found["kernels bf16"].text
    assert found["kernels fp16"].status == NOTE
    refused = by_name(hardware.kernels(settings(device="cpu", kernels="apex")))["kernels fp32"]
    assert refused.status == PROBLEM
    assert "apex" in refused.text


def test_fp8_is_one_of_the_precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_cpu = by_name(hardware.kernels(settings(device="cpu")))["kernels fp8"]
    assert on_a_cpu.status == NOTE
    assert "a CPU has no fp8: its rounding is emulated" in on_a_cpu.text
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(devices, "name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(devices, "capability", lambda device: (8, 0))
    monkeypatch.setattr(devices, "supports", lambda *_: True)
    monkeypatch.setattr(devices, "emulates_bf16", lambda device: False)
    old = hardware.fp8(settings(), gpu)
    assert (old.status, old.text[:55]) == (
        NOTE, "--precision fp8: NVIDIA A100 has compute capability 8.0"
    )  # fmt: skip
    assert old.fix.startswith("pass --precision bf16")
    assert hardware.fp8(settings(precision="fp8"), gpu).status == PROBLEM, "the run asks for it"
    emulated = fp8_engine.engine_for(torch.device("cpu"))
    monkeypatch.setattr(fp8_engine, "engine_for", lambda device: emulated)
    checked: list[tuple] = []
    monkeypatch.setattr(fp8_linear, "check", lambda *given: checked.append(given))
    assert hardware.fp8(settings(), gpu).status == OK
    assert checked == [(gpu, torch.bfloat16, hardware.FP8_LAYERS)], "by a small layer, in fp8"

    def broken(*given: object) -> float:
        raise RuntimeError("CUDA error: no kernel image\nis available")

    monkeypatch.setattr(fp8_linear, "check", broken)
    defect = hardware.fp8(settings(), gpu)
    assert (defect.status, defect.text) == (NOTE, "CUDA error: no kernel image is available")


def test_kernels_on_a_gpu(mini_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(devices, "supports", lambda *_: True)
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
    emulated = fp8_engine.engine_for(torch.device("cpu"))
    monkeypatch.setattr(fp8_engine, "engine_for", lambda device: emulated)
    monkeypatch.setattr(fp8_linear, "check", lambda *_: 0.0)
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
    assert found["CPUs"].text == "2 cores, 4 hardware threads, 1 NUMA node"
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
    assert "16 training shards, 1 evaluation shard" in good.stdout
    assert good.stdout.splitlines()[-1].startswith("Training can start. Problems: 0, notes: ")
    assert list(tmp_path.iterdir()) == [], "it leaves nothing behind"


def test_each_data_folder_is_listed_once(mini_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network disk takes seconds for a folder of 2048 shards."""
    listed: list[str] = []
    real_listdir, real_scandir = os.listdir, os.scandir

    def listdir(path: str | Path = ".") -> list[str]:
        listed.append(Path(path).name)
        return real_listdir(path)

    def scandir(path: str | Path = ".") -> object:
        listed.append(Path(path).name)
        return real_scandir(path)

    monkeypatch.setattr(os, "listdir", listdir)
    monkeypatch.setattr(os, "scandir", scandir)
    found = by_name(run.data(settings(data_dir=str(mini_data))))
    assert found["data"].text.startswith("16 training shards, 1 evaluation shard")
    assert found["checkpoint"].text == str(mini_data / "model.ckpt-28252.apex.pt")
    assert sorted(listed) == ["2048_shards_uncompressed", "eval_set_uncompressed"]


def test_a_machine_without_a_network_is_told_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(network, "loopback_fault", lambda: "Network is unreachable")
    assert doctor.main(["--device", "cpu", "--json"]) == 1, "no launch could start on it"
    findings = json.loads(capsys.readouterr().out)["findings"]
    (problem,) = [found for found in findings if found["status"] == PROBLEM]
    assert problem["what"] == "loopback"
    assert problem["fix"].startswith("run 'ip link set lo up' as root")
    assert findings[-1]["what"] == "port", "the other checks are made all the same"


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
    assert problem["fix"].startswith("check the path, or pass the folder with 2048_shards")
    assert doctor.main(["--device", "cpu"]) == 0, "data is looked at where it is named"
    assert doctor.main(["--name", "mini", "--config", "CPUx1x2"]) == 1, "or by a configuration"
