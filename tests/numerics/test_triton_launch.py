"""Direct launches take the variant that Triton would take; a counting kernel stands for it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

# Imported first: it selects Triton's interpreter before any kernel is defined.
from triton_helpers import NATIVE

# isort: split
from bert_pretraining.kernels import triton_launch
from bert_pretraining.kernels.triton_launch import launched_directly
from bert_pretraining.runtime import device as devices

pytestmark = pytest.mark.skipif(NATIVE, reason="on a GPU the real kernels are launched directly")
MEMORY = torch.zeros(64)  # aligned to 16 bytes
ARGUMENTS = ("x", "seed", "rows", "stride", "epsilon", "SIZE")


class Compiled:
    """What a launch gives: the grid, the stream, and the arguments."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, launches: list[tuple]) -> None:
        self.launches = launches

    def run(self, *given: Any) -> None:
        grid, stream, values = given[:3], given[3], given[9:]
        assert given[4:9] == ("function", "metadata", None, None, None)
        self.launches.append((grid, stream, values))


class Kernel:
    """Counts how often Triton would look for a variant."""

    __name__, device_caches = "counted", ()

    def __init__(self, constants: tuple[str, ...] = ("SIZE",)) -> None:
        free = ("seed", "rows")
        self.params = [
            SimpleNamespace(is_constexpr=name in constants, do_not_specialize=name in free)
            for name in ARGUMENTS
        ]
        self.looked, self.launches = 0, []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
        def run(*_: Any, **__: Any) -> Compiled:
            self.looked += 1
            return Compiled(self.launches)

        return run


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_cuda_getDevice", 0), ("_cuda_getCurrentRawStream", 77)):
        monkeypatch.setattr(torch._C, name, lambda *_, value=value: value, raising=False)
    monkeypatch.setattr(triton_launch.compat, "release", lambda version: triton_launch.OLDEST)
    monkeypatch.setattr(devices, "built_with", lambda: "CUDA 13.0")
    hooks = SimpleNamespace(runtime=SimpleNamespace(launch_enter_hook=None))
    monkeypatch.setattr(triton_launch.triton, "knobs", hooks, raising=False)


FIRST = (MEMORY, MEMORY[:2], 7, 32, 1e-6, 64)


def test_a_known_variant_is_launched_without_triton() -> None:
    kernel = Kernel()
    direct = launched_directly(kernel)
    direct[(5,)](*FIRST, num_warps=4)
    assert (kernel.looked, kernel.launches) == (1, [])
    others = (MEMORY[4:], MEMORY[1:3], 1_000_000, 48, 1e-6, 64)  # aligned, free, free, by 16
    direct[(3, 2)](*others, num_warps=4)
    addresses = (MEMORY[4:].data_ptr(), MEMORY[1:3].data_ptr())
    assert kernel.looked == 1
    assert kernel.launches == [((3, 2, 1), 77, (*addresses, 1_000_000, 48, 1e-6, 64))]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, MEMORY[1:]),
        (0, MEMORY.bfloat16()),
        (1, None),
        (2, 2**40),
        (3, 33),
        (3, 1),
        (4, 1e-12),
        (5, 128),
    ],
    ids=["address", "dtype", "none", "wide number", "no multiple", "one", "float", "constant"],
)
def test_what_triton_compiles_another_variant_for_is_looked_up(place: int, value: object) -> None:
    kernel = Kernel()
    direct = launched_directly(kernel)
    direct[(5,)](*FIRST)
    other = [*FIRST]
    other[place] = value
    for looked in (2, 2):
        direct[(5,)](*other)
        assert kernel.looked == looked


def test_options_are_part_of_the_variant() -> None:
    kernel = Kernel()
    direct = launched_directly(kernel)
    for warps in (4, 8, 4):
        direct[(5,)](*FIRST, num_warps=warps)
    assert kernel.looked == 2


def test_an_empty_grid_launches_nothing() -> None:
    kernel = Kernel()
    direct = launched_directly(kernel)
    for grid in ((5,), (0,), (3, 0)):
        direct[grid](*FIRST)
    assert kernel.launches == []


@pytest.mark.parametrize("build", ["ROCm 6.1", None])
def test_elsewhere_triton_launches(monkeypatch: pytest.MonkeyPatch, build: str | None) -> None:
    monkeypatch.setattr(devices, "built_with", lambda: build)
    kernel = Kernel()
    direct = launched_directly(kernel)
    for _ in range(2):
        direct[(5,)](*FIRST)
    assert kernel.looked == 2


def test_a_profiler_is_told_of_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    direct = launched_directly(kernel)
    direct[(5,)](*FIRST)
    hook = SimpleNamespace(calls=[print])
    monkeypatch.setattr(triton_launch.triton.knobs.runtime, "launch_enter_hook", hook)
    direct[(5,)](*FIRST)
    assert kernel.looked == 2


def test_arguments_must_be_complete_and_constants_the_last() -> None:
    with pytest.raises(ValueError, match="longer"):
        launched_directly(Kernel())[(5,)](*FIRST[:3])
    with pytest.raises(TypeError, match="constants of counted must be its last arguments"):
        launched_directly(Kernel(constants=("rows",)))


def test_older_versions_and_interpreted_kernels_stay_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interpreted = SimpleNamespace()
    assert launched_directly(interpreted) is interpreted
    monkeypatch.setattr(triton_launch.compat, "release", lambda version: (3, 1))
    kernel = Kernel()
    assert launched_directly(kernel) is kernel
