"""How ranks tell the launcher how they ended: small files in a folder it names.

torchrun knows only success and failure of its children; exit code 3 (finished without
reaching the target) is no failure, and the first failure's own words are worth more than
the last one's.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER_VARIABLE = "BERT_PRETRAINING_OUTCOME"


@dataclass(frozen=True)
class Failure:
    """One rank's end by an error. `detail` is a traceback, or empty for a UserError."""

    rank: int
    attempt: int
    time: float
    exit_code: int
    message: str
    detail: str


def record_finish(rank: int, exit_code: int) -> bool:
    """Tell the launcher, if there is one, what this rank earned."""
    return _write(f"finish-{rank}.json", {"exit_code": exit_code})


def record_failure(rank: int, exit_code: int, message: str, detail: str = "") -> bool:
    """Tell the launcher why this rank ends; False if nobody launched it."""
    failure = Failure(rank, _attempt(), time.time(), exit_code, message, detail)
    return _write(f"failure-{rank}.json", asdict(failure))


def read_finish(folder: Path) -> int | None:
    """The exit code of the lowest rank here that finished."""
    ranks = sorted((int(path.stem.split("-")[1]), path) for path in folder.glob("finish-*.json"))
    return json.loads(ranks[0][1].read_text())["exit_code"] if ranks else None


def read_failures(folder: Path) -> list[Failure]:
    """The failures of the last attempt (torchrun may restart the ranks), earliest first."""
    failures = [Failure(**json.loads(path.read_text())) for path in folder.glob("failure-*.json")]
    last = max((failure.attempt for failure in failures), default=0)
    failures = [failure for failure in failures if failure.attempt == last]
    return sorted(failures, key=lambda failure: failure.time)


def _attempt() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def _write(name: str, content: dict) -> bool:
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        return False
    path = Path(folder) / name
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(content))
    os.replace(temporary, path)
    return True
