"""The choice of kernels by proof: fallbacks, errors, the child process, the cache, all ranks."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bert_pretraining.errors import UserError
from bert_pretraining.kernels import OPERATORS, Target, proof_cache, table
from bert_pretraining.kernels import proven as choosing
from bert_pretraining.kernels.proof_problem import Sizes, lengths_of
from bert_pretraining.kernels.proof_process import Limits, Prover, Verdict
from bert_pretraining.kernels.proven import select_proven
from bert_pretraining.runtime import process_group
from rank_threads import as_ranks

TARGET = Target(torch.device("cpu"), torch.float32, 16)
SIZES = Sizes(lengths_of(4, 64, 140), 21, 4, 16, 256, 512, 64, 2, 1e-12, 0.1)
ALL_RIGHT: dict[str, str] = {}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bert_pretraining" / "kernel_proofs"


@pytest.fixture
def no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no process can be started")

    monkeypatch.setattr(subprocess, "Popen", refuse)


@pytest.mark.slow
def test_every_kind_of_fault_is_passed_over(use_fake: Callable, cache: Path) -> None:
    """In children: one that hangs, raises or dies takes nothing else with it."""
    kinds = ("hangs", "raises", "nan", "dies", "element")
    faults = dict(zip(OPERATORS, kinds, strict=True))
    use_fake("fake", faults)
    kernels, notices = select_proven("auto", TARGET, SIZES, limits=Limits(case=30.0))
    assert all(choice.startswith("torch") for choice in kernels.choice.values())
    texts = {
        "hangs": "no answer within 30 s at 53 x 3 x 16 fp32, dropout 0",
        "raises": "RuntimeError: no kernel image for this device at 53 x 192 fp32",
        "nan": "gradient of x is nan at [0, 3] at 53 x 48 fp32, dropout 0",
        "dies": "its process ended by signal 11",
        "element": "gradient of logits differs by ",
    }
    assert len(notices) == len(faults)
    for notice, (operator, kind) in zip(notices, faults.items(), strict=True):
        assert notice.startswith(f"fake {operator}: {texts[kind]}")
        assert notice.endswith(": passed over, torch runs it")
    assert "\n" not in "".join(notices)
    # What raised, died or gave no answer may pass another time, and is not kept.
    kept = sorted(path.name.rpartition("-")[0] for path in cache.iterdir() if "fake" in path.name)
    assert kept == sorted(
        f"fake-{operator}" for operator, kind in faults.items() if kind in ("nan", "element")
    )


def test_two_right_providers_are_timed(use_fake: Callable) -> None:
    use_fake("fake", ALL_RIGHT)
    kernels, notices = select_proven("auto", TARGET, SIZES)
    assert notices == []
    for choice in kernels.choice.values():
        assert choice.count(" ms") == 2
        assert choice.startswith(("torch", "fake"))
    again, _ = select_proven("auto", TARGET, SIZES)
    assert again.choice == kernels.choice  # known times, so that the choice is stable


@pytest.mark.usefixtures("no_child")
def test_the_last_resort_is_the_reference(use_fake: Callable) -> None:
    use_fake("torch", {"bias_gelu": "element"})
    kernels, notices = select_proven("auto", TARGET, SIZES)
    assert kernels.choice["bias_gelu"] == "reference"
    assert kernels.choice["masked_cross_entropy"] == "torch"
    assert "reference runs it" in notices[-1]


@pytest.mark.usefixtures("no_child")
def test_nothing_right_is_an_error(use_fake: Callable) -> None:
    use_fake("torch", {"bias_gelu": "element"})
    use_fake("reference", {"bias_gelu": "raises"})
    with pytest.raises(UserError, match=r"no provider's bias_gelu is right on cpu .torch bias_gel"):
        select_proven("auto", TARGET, SIZES)


@pytest.mark.usefixtures("no_child")
def test_a_wrong_provider_that_was_asked_for_is_an_error(use_fake: Callable) -> None:
    use_fake("fake", {"bias_gelu": "element"})
    for general, named in (("fake", None), ("auto", {"bias_gelu": "fake"})):
        with pytest.raises(UserError, match=r"fake: gradient of x differs by .*prove_kernels off"):
            select_proven(general, TARGET, SIZES, named)
    kernels, _ = select_proven("auto", TARGET, SIZES, {"masked_cross_entropy": "fake"})
    assert kernels.choice["masked_cross_entropy"] == "fake"


@pytest.mark.usefixtures("no_child")
def test_errors_of_the_choice_are_the_same_with_proof() -> None:
    with pytest.raises(UserError, match="--kernels cuda: no such provider"):
        select_proven("cuda", TARGET, SIZES)
    for general, named in (("apex", None), ("torch", {"attention": "apex"})):
        with pytest.raises(UserError) as plain:
            table.select(general, TARGET.device, TARGET.dtype, 16, named)
        with pytest.raises(UserError) as proven:
            select_proven(general, TARGET, SIZES, named)
        assert str(proven.value) == str(plain.value)


@pytest.mark.usefixtures("no_child")
def test_without_a_child_this_process_proves() -> None:
    """As on a device that only one process may use. Random states stay as they were."""
    before = torch.get_rng_state()
    kernels, notices = select_proven("auto", TARGET, SIZES)
    assert torch.equal(torch.get_rng_state(), before)
    assert kernels.choice["bias_gelu"] == "torch"
    assert len(notices) == 1
    assert "in this process" in notices[0]
    assert "no process can be started" in notices[0]


def test_known_verdicts_need_no_process(
    use_fake: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the user asks for those that were wrong."""
    use_fake("fake", {"bias_gelu": "element"})
    first, notices = select_proven("auto", TARGET, SIZES)
    started: list[object] = []

    def refuse(*arguments: object, **_: object) -> None:
        started.append(arguments)
        raise OSError("not now")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    second, more = select_proven("auto", TARGET, SIZES)
    assert (second.choice, more) == (first.choice, notices)
    assert not started
    third, more = select_proven("auto", TARGET, SIZES, again=True)
    assert len(started) == 1
    assert third.choice == first.choice
    assert len(more) == 2  # that it was proven here, and the fault


@pytest.mark.usefixtures("no_child")
@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": 1}', "other key", "other types"])
def test_a_broken_cache_is_proven_anew(cache: Path, content: str) -> None:
    _, notices = select_proven("auto", TARGET, SIZES)
    assert len(notices) == 1
    assert select_proven("auto", TARGET, SIZES)[1] == []
    (path,) = cache.glob("torch-bias_gelu-*.json")
    right = path.read_text()
    changed = {
        "other key": right.replace('"torch.float32"', '"torch.float64"'),
        "other types": right.replace('"fault": ""', '"fault": 7'),
    }
    path.write_text(changed.get(content, content))
    assert path.read_text() != right
    assert len(select_proven("auto", TARGET, SIZES)[1]) == 1
    assert path.read_text() == right
    assert [found.suffix for found in cache.iterdir()] == [".json"] * len(OPERATORS)


@pytest.mark.usefixtures("no_child")
def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")
    for _ in range(2):
        kernels, notices = select_proven("auto", TARGET, SIZES)
        assert len(notices) == 1
        assert kernels.choice["bias_gelu"] == "torch"


def test_a_verdict_depends_on_its_circumstances(monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = Verdict(seconds=0.25)
    proof_cache.store("torch", "bias_gelu", TARGET, SIZES, verdict)
    assert proof_cache.load("torch", "bias_gelu", TARGET, SIZES) == verdict
    other = Target(TARGET.device, torch.bfloat16, 16)
    assert proof_cache.load("torch", "bias_gelu", other, SIZES) is None
    assert proof_cache.load("torch", "attention", TARGET, SIZES) is None
    monkeypatch.setattr(torch, "__version__", "2.4.1+vendor")
    assert proof_cache.load("torch", "bias_gelu", TARGET, SIZES) is None


def on_two_machines(
    monkeypatch: pytest.MonkeyPatch, there: Callable[[dict], None], idle: int = 1
) -> list:
    """What three ranks choose or raise; the last is alone on its machine, where `there` differs.

    idle: the rank that proves nothing.
    """

    def prove_here(*given: object) -> tuple[dict, list[str]]:
        assert dist.get_rank() != idle
        with here:
            verdicts, _ = proves(*given)
        copies = {operator: dict(found) for operator, found in verdicts.items()}
        if dist.get_rank() < 2:
            return copies, ["the same on both"]
        there(copies)
        return copies, ["the same on both", "there alone"]

    here, proves = threading.Lock(), choosing.prove_here
    monkeypatch.setattr(process_group, "is_first_of_its_machine", lambda: dist.get_rank() != idle)
    monkeypatch.setattr(choosing, "prove_here", prove_here)
    return as_ranks(3, lambda rank: select_proven("auto", TARGET, SIZES))


@pytest.mark.parametrize("idle", [0, 1])
@pytest.mark.usefixtures("no_child")
def test_what_is_wrong_on_one_machine_is_used_on_none(
    use_fake: Callable, monkeypatch: pytest.MonkeyPatch, idle: int
) -> None:
    use_fake("fake", ALL_RIGHT)

    def there(verdicts: dict) -> None:
        verdicts["bias_gelu"]["fake"] = Verdict(fault="is broken there")
        verdicts["masked_cross_entropy"]["torch"] = Verdict(seconds=1000.0)

    found = on_two_machines(monkeypatch, there, idle)
    assert [notices for _, notices in found] == [found[0][1]] * 3
    assert [kernels.choice for kernels, _ in found] == [found[0][0].choice] * 3
    kernels, notices = found[0]
    assert notices.count("the same on both") == 1
    assert "there alone" in notices
    assert kernels.choice["bias_gelu"] == "torch"
    assert "fake bias_gelu: is broken there: passed over, torch runs it" in notices
    assert kernels.choice["masked_cross_entropy"].startswith("fake (")
    assert kernels.choice["masked_cross_entropy"].endswith("torch 1e+06 ms)")


@pytest.mark.usefixtures("no_child")
def test_an_error_on_another_machine_is_this_ranks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them proves nothing itself."""

    def there(verdicts: dict) -> None:
        raise UserError("cuda:0 cannot be used any more", "restart it")

    found = on_two_machines(monkeypatch, there)
    assert [type(error) for error in found] == [UserError] * 3
    assert {str(error) for error in found} == {"cuda:0 cannot be used any more; restart it"}


@pytest.mark.parametrize(
    ("other", "chosen"), [(0.95, "torch"), (0.85, "fake"), (1.5, "torch")], ids=str
)
@pytest.mark.usefixtures("no_child")
def test_a_near_tie_is_no_reason_to_leave_the_preferred_provider(
    use_fake: Callable, monkeypatch: pytest.MonkeyPatch, other: float, chosen: str
) -> None:
    """Timings are noisy, and a resumed run should compute with the same kernels."""
    use_fake("fake", ALL_RIGHT)

    def measure(self: Prover, operator: str, provider: str) -> Verdict:
        return Verdict(seconds=other if provider == "fake" else 1.0)

    monkeypatch.setattr(Prover, "measure", measure)
    kernels, _ = select_proven("auto", TARGET, SIZES)
    assert {choice.split()[0] for choice in kernels.choice.values()} == {chosen}
    kernels, _ = select_proven("auto", TARGET, SIZES, by_time=False)
    assert {choice.split()[0] for choice in kernels.choice.values()} == {"torch"}


def test_kernels_are_proven_as_deterministic_as_they_are_used(use_fake: Callable) -> None:
    """In the child too; and what is known of the one mode is not taken for the other."""
    use_fake("fake", {"bias_gelu": "unsteady"})
    assert select_proven("auto", TARGET, SIZES)[1] == []
    torch.use_deterministic_algorithms(True)
    try:
        _, notices = select_proven("auto", TARGET, SIZES)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(notices) == 1
    assert notices[0].startswith("fake bias_gelu: RuntimeError: no deterministic implementation")


@pytest.mark.usefixtures("no_child")
def test_a_provider_that_another_machine_lacks_is_not_used(
    use_fake: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_fake("fake", ALL_RIGHT)

    def there(verdicts: dict) -> None:
        for found in verdicts.values():
            del found["fake"]

    for kernels, _ in on_two_machines(monkeypatch, there):
        assert all(choice.startswith("torch") for choice in kernels.choice.values())
