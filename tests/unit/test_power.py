"""The counters of energy: which are found, what they count, and why they cannot be read."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch

from bert_pretraining.runtime import power, power_nvml
from bert_pretraining.runtime.power import CounterError, State, describe, find_rapl, kinds_of
from bert_pretraining.runtime.power_nvml import Identity, find_nvml, identify, reasons_of
from energy_counters import RANGE, Gpu, make_rapl, nvml_module

TWO_PACKAGES = {
    "0": "package-0", "0:0": "core", "0:1": "uncore", "0:2": "dram", "1": "package-1",
    "1:0": "dram", "2": "psys",
}  # fmt: skip


def count(zone: Path, microjoules: int) -> None:
    (zone / "energy_uj").write_text(f"{microjoules}\n")


# ---- RAPL


def test_packages_and_their_memory_count_and_no_part_counts_twice(tmp_path: Path) -> None:
    root = make_rapl(tmp_path, TWO_PACKAGES)
    found = find_rapl(root)
    names = ["package-0", "package-0 dram", "package-1", "package-1 dram"]
    assert [counter.device for counter in found.counters] == names
    assert found.reason == ""
    kinds = kinds_of(found.counters)
    assert describe(kinds) == "RAPL of 2 CPU packages and 2 memory domains"
    count(root / "intel-rapl:1", 2_500_000)
    count(root / "intel-rapl:0:0", 9_000_000)  # a part of package-0, which says itself what it took
    assert [counter.joules(0.0) for counter in found.counters] == [0.0, 0.0, 2.5, 0.0]


def test_the_places_of_zones_are_numbers(tmp_path: Path) -> None:
    zones = {str(number): f"package-{number}" for number in range(11)}
    found = find_rapl(make_rapl(tmp_path, zones))
    assert [counter.device for counter in found.counters] == list(zones.values())


def test_amd_has_the_same_names(tmp_path: Path) -> None:
    found = find_rapl(make_rapl(tmp_path, {"0": "package-0", "0:0": "core"}))
    assert [counter.device for counter in found.counters] == ["package-0"]


def test_a_counter_that_begins_again_goes_on(tmp_path: Path) -> None:
    root = make_rapl(tmp_path, {"0": "package-0"}, RANGE - 1_000_000)
    (counter,) = find_rapl(root).counters
    count(root / "intel-rapl:0", 3_000_000)
    assert counter.joules(0.0) == pytest.approx(4.0)
    count(root / "intel-rapl:0", 5_000_000)
    assert counter.joules(0.0) == pytest.approx(6.0)


def test_without_permission_the_command_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_rapl(tmp_path, {"0": "package-0"})
    read = Path.read_text

    def refuse(path: Path, **how: str) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, **how)

    monkeypatch.setattr(Path, "read_text", refuse)
    found = find_rapl(root)
    assert found.counters == []
    assert "no permission" in found.reason
    assert f"sudo chmod a+r {root}/intel-rapl:*/energy_uj" in found.reason


@pytest.mark.parametrize(
    ("zones", "said"),
    [({}, "has no intel-rapl:*"), ({"0": "psys"}, "has only psys, no package-*, which")],
)
def test_a_machine_without_rapl_says_so(tmp_path: Path, zones: dict, said: str) -> None:
    found = find_rapl(make_rapl(tmp_path, zones))
    assert found.counters == [] and said in found.reason
    assert found.absent


def test_a_container_that_hides_it_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "intel-rapl:0").symlink_to("/nowhere/at/all")
    found = find_rapl(tmp_path)
    assert found.counters == [] and "systempaths=unconfined" in found.reason
    assert not found.absent, "a user can do something about it"


def test_a_reading_that_fails_names_the_file(tmp_path: Path) -> None:
    root = make_rapl(tmp_path, {"0": "package-0"})
    (counter,) = find_rapl(root).counters
    count(root / "intel-rapl:0", 7)
    (root / "intel-rapl:0/energy_uj").unlink()
    with pytest.raises(CounterError, match=r"cannot read .*energy_uj \(No such file"):
        counter.joules(0.0)


def test_a_variable_gives_tests_another_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    assert power.powercap() == Path("/sys/class/powercap")
    monkeypatch.setenv(power.POWERCAP_VARIABLE, "/elsewhere")
    assert power.powercap() == Path("/elsewhere")


# ---- NVML

FIRST = Gpu("GPU-aaaa-1", "00000000:3b:00.0")
SECOND = Gpu("GPU-bbbb-2", "00000000:d8:00.0", mig=("MIG-cccc-3", "MIG-dddd-4"))


def use(monkeypatch: pytest.MonkeyPatch, *gpus: Gpu, starts: bool = True) -> None:
    monkeypatch.setitem(sys.modules, power_nvml.MODULE, nvml_module(list(gpus), starts))


@pytest.mark.parametrize(
    ("identity", "gpu"),
    [
        (Identity("bbbb-2", None, "0"), "GPU 1"),
        (Identity("dddd-4", None, "0"), "GPU 1"),  # a MIG instance: the GPU that it is a part of
        (Identity(None, "00000000:d8:00.0", "0"), "GPU 1"),
        (Identity("unknown", "00000000:d8:00.0", "0"), "GPU 1"),
        (Identity(None, None, "1"), "GPU 1"),
        (Identity(None, None, "GPU-bbbb-2"), "GPU 1"),
        (Identity(None, None, "GPU-bb"), "GPU 1"),
        (Identity(None, None, "MIG-cccc-3"), "GPU 1"),
        (Identity(None, None, "7"), None),
        (Identity(None, None, "GPU-"), None),  # both begin so
    ],
)
def test_a_device_is_found_by_what_is_known_of_it(
    monkeypatch: pytest.MonkeyPatch, identity: Identity, gpu: str | None
) -> None:
    use(monkeypatch, FIRST, SECOND)
    found = find_nvml([identity])
    assert [counter.device for counter in found.counters] == ([gpu] if gpu else [])
    assert ("NVML does not know the device" in found.reason) is (gpu is None)


def test_a_gpu_that_two_ranks_share_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FIRST, SECOND)
    parts = [Identity("cccc-3", None, "0"), Identity("dddd-4", None, "1")]
    assert len(find_nvml(parts).counters) == 1


def test_the_counter_of_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu("GPU-1", "00000000:3b:00.0")
    use(monkeypatch, gpu)
    (counter,) = find_nvml([Identity("1", None, "0")]).counters
    gpu.millijoules += 2_500
    assert counter.joules(100.0) == 2.5
    gpu.reasons = 0x4 | 0x40 | 0x200
    reasons = ("power_cap", "hardware_heat", "0x200")
    assert counter.state() == State(61, 1755, 97, reasons)
    gpu.lacks = ["nvmlDeviceGetCurrentClocksEventReasons"]  # a driver before 535
    assert counter.state().reasons == reasons
    gpu.lacks += ["nvmlDeviceGetUtilizationRates", "nvmlDeviceGetCurrentClocksThrottleReasons"]
    assert counter.state() == State(61, 1755, None, ())
    gpu.lacks = ["nvmlDeviceGetTotalEnergyConsumption"]
    with pytest.raises(CounterError, match=r"NVML cannot read GPU 0 \(Not Supported\)"):
        counter.joules(101.0)


def test_without_that_counter_power_is_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu("GPU-1", "00000000:3b:00.0", lacks="nvmlDeviceGetTotalEnergyConsumption")
    use(monkeypatch, gpu)
    (counter,) = find_nvml([Identity("1", None, "0")]).counters
    gpu.milliwatts = 300_000
    assert [counter.joules(now) for now in (10.0, 11.0, 11.5)] == [0.0, 300.0, 450.0]


def test_why_nvml_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    one = [Identity("1", None, "0")]
    assert find_nvml([]) == power.Found()
    monkeypatch.setitem(sys.modules, power_nvml.MODULE, None)
    assert "-m pip install nvidia-ml-py" in find_nvml(one).reason
    use(monkeypatch, starts=False)
    assert find_nvml(one).reason == "NVML does not start (NVML Shared Library Not Found)"
    silent = "nvmlDeviceGetTotalEnergyConsumption nvmlDeviceGetPowerUsage"
    use(monkeypatch, Gpu("GPU-1", "00000000:3b:00.0", lacks=silent))
    assert find_nvml(one).reason == "NVML cannot read GPU 0 (Not Supported)"


def test_the_cpu_has_no_identity() -> None:
    assert identify(torch.device("cpu")) is None


def test_reasons_have_words() -> None:
    assert reasons_of(0) == ()
    assert reasons_of(0x1 | 0x80) == ("idle", "power_brake")


@pytest.mark.parametrize(
    ("visible", "listed"),
    [(None, "1"), ("", "1"), ("5,7", "7"), ("GPU-aa, GPU-bb", "GPU-bb"), ("3", "1")],
)
def test_the_identity_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, listed: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    newest = {"uuid": "bbbb-2", "pci_domain_id": 1, "pci_bus_id": 0xD8, "pci_device_id": 0}
    for known, identity in (
        (newest, Identity("bbbb-2", "00000001:d8:00.0", listed)),
        ({}, Identity(None, None, listed)),  # PyTorch 2.4
        ({"pci_bus_id": 0xD8}, Identity(None, None, listed)),  # a vendor's PyTorch
    ):
        properties = types.SimpleNamespace(**known)
        monkeypatch.setattr(
            power_nvml, "function_of", lambda kind, name, found=properties: lambda device: found
        )
        assert identify(torch.device("cuda", 1)) == identity
