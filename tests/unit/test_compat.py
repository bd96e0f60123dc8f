"""The differences between versions of PyTorch that runtime/compat.py levels."""

from __future__ import annotations

import os
import pickle
import signal
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bert_pretraining.runtime import compat

CALLED: list[tuple[float, bool]] = []


@compat.custom_op("bert_pretraining_tests::noisy", random=True)
def noisy(x: Tensor, bias: Tensor | None, count: int, scale: float) -> tuple[Tensor, Tensor]:
    CALLED.append((scale, bias is None))
    return x * scale + torch.rand(count), x + (0.0 if bias is None else bias)


@compat.custom_op("bert_pretraining_tests::plain")
def plain(x: Tensor) -> Tensor:
    return x + 1


@pytest.mark.parametrize(
    ("version", "release"),
    [("2.4.1", (2, 4)), ("2.4.1+corex.4.3.0", (2, 4)), ("2.13.0a0+git1", (2, 13)), ("3.0", (3, 0))],
)
def test_releases(version: str, release: tuple[int, int]) -> None:
    assert compat.release(version) == release


def test_operators_have_schemas_from_annotations_that_are_strings() -> None:
    schema = str(torch.ops.bert_pretraining_tests.noisy.default._schema)
    assert schema == (
        "bert_pretraining_tests::noisy(Tensor x, Tensor? bias, SymInt count, float scale) "
        "-> (Tensor, Tensor)"
    )
    assert torch.equal(plain(torch.zeros(2)), torch.ones(2))
    noisy(torch.zeros(3), None, 3, 0.5)
    assert CALLED[-1] == (0.5, True)


def test_only_random_operators_are_tagged_as_random() -> None:
    random = torch.Tag.nondeterministic_seeded
    assert random in torch.ops.bert_pretraining_tests.noisy.default.tags
    assert random not in torch.ops.bert_pretraining_tests.plain.default.tags


class Hostile:
    def __reduce__(self) -> tuple:
        return (os.mkdir, ("never-made",))


def test_the_functions_that_a_file_would_call(tmp_path: Path) -> None:
    path = tmp_path / "hostile.pt"
    torch.save({"payload": Hostile()}, path)
    with pytest.raises(pickle.UnpicklingError) as caught:
        torch.load(path, weights_only=True)
    assert compat.called_functions(path, caught.value) == ["posix.mkdir"]
    path.write_bytes(b"no archive")
    assert compat.called_functions(path, pickle.UnpicklingError("cut")) == []


def test_torchrun_changes_no_signal_handlers() -> None:
    """torchrun's agent runs on a thread, and the launcher's own handlers stay."""
    from torch.distributed.elastic.multiprocessing import api

    before = signal.getsignal(signal.SIGTERM)
    errors = []

    def as_the_agent() -> None:
        try:
            with compat.torchrun_without_signal_handlers():
                if compat.TORCH < (2, 5):  # what PContext.start does there
                    api.signal.signal(api.signal.SIGTERM, lambda *_: None)
                assert api.signal.SIGKILL == signal.SIGKILL
                assert api.signal.Signals(15) == signal.SIGTERM
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=as_the_agent)
    thread.start()
    thread.join()
    assert not errors
    assert signal.getsignal(signal.SIGTERM) is before
    assert api.signal is signal
