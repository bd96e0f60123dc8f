"""Log files or a reader of stdout that are so slow that training waits for them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Protocol

SHARE = 0.1  # of the time between logged steps
SECONDS, LOGGED_STEPS = 0.05, 5  # so long for each of so many logged steps
ONCE = 2.0  # seconds that are too long for one logged step


class Output(Protocol):
    """name: that a user knows. seconds: that writing to it has taken so far."""

    name: str
    seconds: float


class SlowOutputs:
    """Looks at what writing the logs of a step takes: the main rank waits for it, and the others
    for that rank.
    """

    def __init__(self, outputs: Sequence[Output]) -> None:
        self._outputs = outputs
        self._at: list[tuple[float, dict[str, float]]] = []  # time, seconds; of logged steps
        self._latest = self._look()  # at the latest call

    def count_anew(self) -> None:
        """Training began, or goes on after an evaluation: what was before is no step's time."""
        self._at.clear()
        self._latest = self._look()

    def logged(self) -> Iterator[str]:
        """A line where writing takes too long, after a logged step was written."""
        before, self._latest = self._latest, self._look()
        self._at = [*self._at[-LOGGED_STEPS:], self._latest]
        now, written = self._latest
        for first, steps in (([before], 1), (self._at[:-LOGGED_STEPS], LOGGED_STEPS)):
            if not first:
                continue
            began, earlier = first[0]
            seconds = {name: (written[name] - earlier[name]) / steps for name in written}
            between, taken = (now - began) / steps, sum(seconds.values())
            if taken >= ONCE or (steps > 1 and taken > max(SECONDS, SHARE * between)):
                slowest = max(seconds, key=lambda name: seconds[name])
                yield (
                    f"writing the logs of a step took {taken:.2g} s of {between:.2g} s between two "
                    f"logged steps, {seconds[slowest]:.2g} s of it for {slowest}, and all ranks "
                    "wait meanwhile: pass a larger --log_freq, an --output_dir on a faster disk, "
                    "or send stdout to a file"
                )
                return

    def _look(self) -> tuple[float, dict[str, float]]:
        return time.monotonic(), {output.name: output.seconds for output in self._outputs}
