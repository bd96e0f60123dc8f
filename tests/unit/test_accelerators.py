"""Accelerators that a machine has, found without PyTorch, and what a launch makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from bert_pretraining import config
from bert_pretraining.__main__ import main
from bert_pretraining.config import Config
from bert_pretraining.errors import UserError
from bert_pretraining.launch import cpu_instead
from bert_pretraining.runtime import device as devices
from bert_pretraining.topology import Accelerator, accelerators, find_accelerators, hidden_by
from bert_pretraining.topology.accelerators import ask_tools, describe, read_accelerators


def add_pci(root: Path, address: str, vendor: str, kind: str, memory: int | None = None) -> None:
    folder = root / "sys/bus/pci/devices" / address
    folder.mkdir(parents=True)
    (folder / "vendor").write_text(f"{vendor}\n")
    (folder / "class").write_text(f"{kind}\n")
    if memory is not None:
        (folder / "mem_info_vram_total").write_text(f"{memory}\n")


def add_devices(root: Path, *names: str) -> None:
    for name in names:
        path = root / "dev" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.mark.parametrize(
    ("files", "vendor", "count"),
    [
        (["nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"], "NVIDIA", 2),
        (["iluvatar0", "iluvatar1"], "Iluvatar", 2),
        (["davinci0", "davinci7", "davinci_manager"], "Huawei Ascend", 2),
        (["mthreads0"], "Moore Threads", 1),
        (["cambricon_dev0", "cambricon_ctl"], "Cambricon", 1),
        (["hl0", "hl_controlD0"], "Habana", 1),
        (["kfd", "dri/renderD128"], "AMD", 1),
    ],
)
def test_device_files(tmp_path: Path, files: list[str], vendor: str, count: int) -> None:
    add_devices(tmp_path, *files)
    assert [found.vendor for found in read_accelerators(tmp_path)] == [vendor] * count


@pytest.mark.parametrize(
    "files", [[], ["null", "nvidiactl"], ["dri/renderD128", "dri/card0"], ["kfd"], ["accel/accel0"]]
)
def test_files_of_other_devices(tmp_path: Path, files: list[str]) -> None:
    """Graphics in a CPU have files in /dev/dri too, and a laptop's neural unit has accel0."""
    add_devices(tmp_path, *files)
    assert read_accelerators(tmp_path) == ()


@pytest.mark.parametrize(
    ("address", "vendor", "kind", "memory", "expected"),
    [
        ("0000:07:00.0", "0x10de", "0x030200", None, "NVIDIA"),  # H100
        ("0000:01:00.0", "0x10de", "0x030000", None, "NVIDIA"),  # GeForce
        ("0000:19:00.0", "0x1e3e", "0x120000", None, "Iluvatar"),
        ("0000:c1:00.0", "0x19e5", "0x120000", None, "Huawei Ascend"),
        ("0000:03:00.0", "0x1002", "0x038000", 64 * 2**30, "AMD"),  # MI200
        ("0000:03:00.0", "0x1002", "0x030000", None, "AMD"),  # without its driver
        ("0000:3a:00.0", "0x8086", "0x038000", None, "Intel"),
        ("0000:05:00.0", "0xabcd", "0x120000", None, "PCI vendor 0xabcd"),
        ("0000:05:00.0", "0x1002", "0x030000", 512 * 2**20, None),  # graphics in a CPU
        ("0000:00:02.0", "0x8086", "0x030000", None, None),  # graphics in a CPU
        ("0000:00:0b.0", "0x8086", "0x120000", None, None),  # neural unit in a CPU
        ("0000:00:02.0", "0x1af4", "0x038000", None, None),  # virtio
        ("0000:00:02.0", "0x1234", "0x030000", None, None),  # QEMU
        ("0000:00:0f.0", "0x15ad", "0x030000", None, None),  # VMware
        ("5582:00:00.0", "0x1414", "0x030200", None, None),  # Hyper-V
        ("0000:04:00.0", "0x1a03", "0x030000", None, None),  # a server's console adapter
        ("0000:07:00.0", "0x19e5", "0x030000", None, None),  # a server's console adapter
        ("0000:05:00.0", "0x10ee", "0x120000", None, None),  # FPGA
        ("0000:07:00.1", "0x10de", "0x040300", None, None),  # sound of a GPU
    ],
)
def test_pci_devices(
    tmp_path: Path, address: str, vendor: str, kind: str, memory: int | None, expected: str | None
) -> None:
    add_pci(tmp_path, address, vendor, kind, memory)
    found = read_accelerators(tmp_path)
    assert [each.vendor for each in found] == ([expected] if expected else [])


def test_a_device_with_a_file_counts_once(tmp_path: Path) -> None:
    add_pci(tmp_path, "0000:07:00.0", "0x10de", "0x030200")
    add_pci(tmp_path, "0000:19:00.0", "0x1e3e", "0x120000")
    add_devices(tmp_path, "nvidia0")
    found = read_accelerators(tmp_path)
    assert found == (
        Accelerator("NVIDIA", "/dev/nvidia0"),
        Accelerator("Iluvatar", "PCI device 0000:19:00.0"),
    )


def test_the_driver_of_graphics_in_a_cpu_is_no_sign(tmp_path: Path) -> None:
    add_pci(tmp_path, "0000:05:00.0", "0x1002", "0x030000", 512 * 2**20)
    add_devices(tmp_path, "kfd", "dri/renderD128")
    assert read_accelerators(tmp_path) == ()


def add_tool(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_the_vendors_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ask_tools() == ()
    add_tool(tmp_path, "nvidia-smi", "echo 'NVIDIA-SMI has failed'; exit 9")
    add_tool(tmp_path, "rocm-smi", "echo 'No AMD GPUs'")
    assert ask_tools() == ()
    add_tool(tmp_path, "ixsmi", '[ "$1" = -L ] && echo "GPU 0: BI-V150" && echo "GPU 1: BI-V150"')
    assert ask_tools() == (Accelerator("Iluvatar", "ixsmi -L"),) * 2
    assert find_accelerators(tmp_path) == ask_tools()
    add_devices(tmp_path, "nvidia0")
    assert find_accelerators(tmp_path) == (Accelerator("NVIDIA", "/dev/nvidia0"),)


def test_they_are_described() -> None:
    two = (Accelerator("Iluvatar", "/dev/iluvatar0"), Accelerator("Iluvatar", "/dev/iluvatar1"))
    one = (Accelerator("AMD", "/dev/kfd"),)
    assert describe(one + two) == (
        "1 AMD accelerator (/dev/kfd) and 2 Iluvatar accelerators (/dev/iluvatar0, ...)"
    )


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, None),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8d1c"}, None),
        ({"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES"),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, "CUDA_VISIBLE_DEVICES"),
        ({"ASCEND_RT_VISIBLE_DEVICES": ""}, "ASCEND_RT_VISIBLE_DEVICES"),
    ],
)
def test_devices_that_the_user_hides(variables: dict[str, str], expected: str | None) -> None:
    assert hidden_by(variables) == expected


# ---- what a launch makes of it

ILUVATAR = (Accelerator("Iluvatar", "/dev/iluvatar0"),)
CPU_BUILD = "PyTorch 2.14.0+cpu (without CUDA) of /usr/lib/python3"


def settings(name: str, stem: str, **flags: object) -> Config:
    return config.resolve({"name": name, "config": stem, **flags}).config


def test_a_configuration_named_after_a_gpu_is_refused() -> None:
    for name, stem in (("iluvatar", "V100x1x8"), ("mini", "GPUx1x1")):
        with pytest.raises(UserError) as caught:
            cpu_instead.judge(settings(name, stem, device="auto"), ILUVATAR, None, CPU_BUILD)
        assert caught.value.problem == (
            f"--config {stem}: {CPU_BUILD} does not see this machine's 1 Iluvatar accelerator "
            "(/dev/iluvatar0)"
        )
        assert "another one has probably replaced it" in caught.value.fix
        assert caught.value.fix.endswith("; or pass --device cpu to train on the CPU")


def test_the_remedy_for_a_build_that_fits_the_device() -> None:
    nvidia = (Accelerator("NVIDIA", "PCI device 0000:07:00.0"),)
    cuda_build = "PyTorch 2.13.0+cu130 (CUDA 13.0) of /usr/lib/python3"
    assert cpu_instead.remedy(nvidia, cuda_build).startswith("look at nvidia-smi: the driver may")
    for found, build in ((nvidia, CPU_BUILD), (ILUVATAR, cuda_build)):
        assert cpu_instead.remedy(found, build).startswith("install the vendor's PyTorch again")


def test_what_goes_on_with_one_notice() -> None:
    judge, gpu = cpu_instead.judge, settings("default", "V100x1x8")
    cpu = settings("mini", "CPUx1x2")
    assert judge(gpu, (), None, CPU_BUILD) == (
        "this machine has no accelerator: --config V100x1x8 trains on the CPU"
    )
    assert judge(gpu, ILUVATAR, "CUDA_VISIBLE_DEVICES", CPU_BUILD) == (
        "CUDA_VISIBLE_DEVICES hides all devices: --config V100x1x8 trains on the CPU"
    )
    assert judge(cpu, ILUVATAR, None, CPU_BUILD).endswith("(/dev/iluvatar0): training on the CPU")
    assert judge(cpu, (), None, CPU_BUILD) is None


@pytest.fixture
def unseen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine with a device that this PyTorch does not see."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices, "seen", lambda: None)
    monkeypatch.setattr(accelerators, "read_accelerators", lambda root: ILUVATAR)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("command", ["launch", "train"])
def test_the_commands_refuse(
    command: str, unseen: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--name", "iluvatar", "--config", "V100x1x8", "--data_dir", "absent"]
    monkeypatch.setattr("sys.argv", ["bert_pretraining", command, *words])
    assert main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Error: --config V100x1x8: PyTorch ")
    assert "does not see this machine's 1 Iluvatar accelerator (/dev/iluvatar0); install" in line
    monkeypatch.setattr("sys.argv", ["bert_pretraining", command, *words, "--device", "cpu"])
    assert main() == 2
    assert "no such data_dir: absent" in capsys.readouterr().err.splitlines()[-1]


def test_a_dry_run_says_what_would_be_refused(
    unseen: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "launch --name iluvatar --config V100x1x8 --data_dir absent --dry_run".split()
    monkeypatch.setattr("sys.argv", ["bert_pretraining", *words])
    assert main() == 0
    said = capsys.readouterr()
    assert "# 8 ranks: 1 machine x 8" in said.out
    assert "Note: a launch on this machine would be refused: --config V100x1x8: " in said.err


def test_a_seen_device_is_taken(unseen: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "seen", lambda: "cuda")
    assert cpu_instead.notice(settings("iluvatar", "V100x1x8")) is None
