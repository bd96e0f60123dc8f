"""What Linux tells of a process in /proc/PID/stat; proc(5) has its fields."""

from __future__ import annotations

from pathlib import Path

STATE, PARENT, SESSION = 0, 1, 3  # where they are in `fields`
USER, SYSTEM, CHILDREN_SYSTEM = 11, 12, 14  # CPU time in clock ticks; children's: waited for


def fields(pid: int) -> list[str]:
    """The fields behind the process's name; empty if there is no such process, or no Linux."""
    return _fields(Path(f"/proc/{pid}/stat"))


def cpu_ticks(pid: int) -> int | None:
    """The processor time that a process has used, in clock ticks; None where it is not known."""
    found = fields(pid)
    return int(found[USER]) + int(found[SYSTEM]) if found else None


def is_runnable(pid: int) -> bool:
    """Whether one of its threads runs, or waits for a CPU that others use."""
    threads = Path(f"/proc/{pid}/task").glob("*/stat")
    return any(_fields(path)[STATE:][:1] == ["R"] for path in threads)


def _fields(path: Path) -> list[str]:
    try:
        text = path.read_text()
    except OSError:
        return []
    # The name stands in parentheses and may itself contain spaces and parentheses.
    return text.rpartition(")")[2].split()
