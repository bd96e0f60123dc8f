"""Machine 0 allows itself as many connections as the launchers and ranks of a job make."""

from __future__ import annotations

import resource

import pytest

from bert_pretraining.launch import checks

RANKS, MACHINES = 4096, 512
NEEDED = checks.connections(MACHINES, RANKS)


@pytest.mark.parametrize(
    ("limits", "raised", "says"),
    [
        ((1024, 1_000_000), NEEDED, False),
        ((1024, resource.RLIM_INFINITY), NEEDED, False),
        ((1_000_000, 1_000_000), None, False),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), None, False),
        ((1024, 4096), 4096, True),
    ],
)
def test_the_limit_of_open_files_follows_the_job(
    limits: tuple[int, int],
    raised: int | None,
    says: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sets: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: sets.append(new))
    checks.allow_connections(MACHINES, RANKS)
    assert sets == ([] if raised is None else [(raised, limits[1])])
    errors = capsys.readouterr().err
    assert errors.startswith("Notice: ") == says
    if says:
        assert "allows a process 4096 open files" in errors
        assert f"for 4096 ranks on 512 machines may need {NEEDED}; raise nofile" in errors


@pytest.mark.parametrize("error", [ValueError("current limit exceeds maximum limit"), OSError(22)])
def test_a_limit_that_the_system_refuses_ends_nothing(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on macOS, which says "endless" and has a limit of its kernel."""

    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    checks.allow_connections(MACHINES, RANKS)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Notice: ") and "allows a process 256 open files" in line


def test_every_rank_and_launcher_has_its_connections() -> None:
    assert checks.connections(1, 0) < checks.connections(2, 0)
    assert checks.connections(MACHINES, 2 * RANKS) - NEEDED == 2 * RANKS
