"""`qualify` with real ranks of which one is at fault: the stage that it concerns names it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from bert_pretraining.errors import TrainingError
from bert_pretraining.qualify import endurance, step, workers
from bert_pretraining.qualify.record import FAIL, NOTE
from qualify_doubles import ignored
from qualify_faults import context_of, faulty_ranks


def inject(monkeypatch: pytest.MonkeyPatch, folder: Path, fault: str) -> None:
    """Ranks that are started from here on have this fault."""
    monkeypatch.setenv("PYTHONPATH", str(faulty_ranks(folder, fault)), prepend=":")


@pytest.mark.slow
def test_a_rank_that_sleeps_and_gets_no_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """At 1 sequence rank 1 sleeps in each step, much longer than a step; 2 do not fit."""
    inject(
        monkeypatch,
        tmp_path / "fault",
        "time.sleep(1.0) if self.size == 1 else torch.empty(2**60)",
    )
    # A busy machine may need so long for the first batch size that the stage ends with it.
    monkeypatch.setattr(step, "ranks_limit", lambda *_: 600.0)
    finding = step.run(context_of(tmp_path / "out"), ignored)
    assert finding.verdict == NOTE, finding
    assert "rank 1 is " in finding.reason
    assert "slower than the others" in finding.reason
    own = finding.figures["by_batch_size"]["1"]["rank_own_seconds"]
    assert own[1] > 1.0
    assert own[0] < own[1] - 0.5
    assert finding.figures["too_large_batch_size"] == 2
    assert finding.figures["largest_batch_size"] == 1
    (line,) = [note for note in finding.notes if "do not fit" in note]
    assert line.startswith("2 sequences a rank do not fit into the memory (rank 1: no memory: ")


def test_a_rank_that_dies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    inject(monkeypatch, tmp_path / "fault", "os.kill(os.getpid(), signal.SIGKILL)")
    finding = endurance.run(context_of(tmp_path / "out", batch_sizes=(1,)), ignored)
    assert finding.verdict == FAIL
    assert finding.reason == (
        "the steps fail: rank 1 was killed by SIGKILL (by a user, or because memory ran out)"
    )


@pytest.mark.slow
def test_a_rank_that_hangs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The clock jumps to the end of the limit once rank 1 has hung for some seconds."""
    hung = tmp_path / "hung"
    inject(monkeypatch, tmp_path / "fault", f"open({str(hung)!r}, 'w').close(); time.sleep(600)")
    monotonic = time.monotonic

    def jumps() -> float:
        is_late = hung.exists() and time.time() - hung.stat().st_mtime > 3
        return monotonic() + (1e6 if is_late else 0.0)

    monkeypatch.setattr(time, "monotonic", jumps)
    context = context_of(tmp_path / "out", batch_sizes=(1,))
    given = {"size": 1, "precision": "", "seconds": 1.0, "least": 3, "evaluations": 0}
    with pytest.raises(TrainingError) as raised:
        workers.run_ranks(context, step.PROGRAM, 2, given, 1000.0)
    message = str(raised.value)
    assert message.startswith("rank 0, 1 did not end within 1000 s")
    assert "rank 1 is not in a collective: in qualify/measuring.py" in message
