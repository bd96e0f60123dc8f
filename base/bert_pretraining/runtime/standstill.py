"""Whether this process stood still: stopped by a signal, or with its interpreter lock held."""

from __future__ import annotations

import threading
import time

TICK = 0.25  # seconds between two looks at the clock


class Standstill(threading.Thread):
    """A thread that looks at the clock all the time, and finds when it could not do so.

    It runs until `stop`, or until the process ends. It takes microseconds of a CPU four times a
    second.
    """

    def __init__(self) -> None:
        super().__init__(name="standstill", daemon=True)
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._last, self._longest = time.monotonic(), 0.0

    def start(self) -> None:
        """Begin to look; what was before does not count."""
        self._last = time.monotonic()
        super().start()

    def run(self) -> None:
        while not self._ended.wait(TICK):
            self._look()

    def stop(self) -> None:
        """End the thread, if it has begun, and wait for its end: a moment."""
        self._ended.set()
        if self.is_alive():
            self.join()

    def take(self) -> float:
        """The longest standstill since the last call, in seconds."""
        self._look()  # the main thread may be the first to go on
        with self._lock:
            longest, self._longest = self._longest, 0.0
        return longest

    def _look(self) -> None:
        with self._lock:
            now = time.monotonic()
            self._longest = max(self._longest, now - self._last - TICK)
            self._last = now
