"""A rank's batches with a reserve, so that all ranks can stop together when one cannot read.

Every update needs every rank. So a rank whose data cannot be read any more has to go on until all
ranks know that they are to stop; see `Outcomes.updates_to_agree`. It goes on with its reserve.
"""

from __future__ import annotations

import collections
import sys
import time
import traceback
from collections.abc import Callable, Iterator

from bert_pretraining.errors import TrainingError, UserError
from bert_pretraining.model.batch import PackedBatch
from bert_pretraining.runtime.file_kind import may_come_back
from bert_pretraining.runtime.signals import StopRequest

SECONDS_TO_RETRY = 10.0  # for a network disk that is away for a moment


class Feed:
    """An endless iterator over one rank's batches, in main memory.

    What cannot be read is tried once more after a while; not so wrong content, which would stay as
    it is. If that fails too, `stop` is told, and `reserve` more batches follow. Iterating raises
    that error only when nothing was given yet, so that nothing can be lost, or when the reserve is
    used up.

    Args:
        read_from: the batches from the one of this number on; 0 is the first of this run.
        reserve: how many batches to read ahead.
        stop: what ends the run.
        rank: for the notice, which every rank prints itself; None where there is only one.
    """

    def __init__(
        self,
        read_from: Callable[[int], Iterator[PackedBatch]],
        reserve: int,
        stop: StopRequest,
        rank: int | None = None,
    ) -> None:
        self._read_from, self._reserve, self._stop = read_from, reserve, stop
        self._whose = "" if rank is None else f"rank {rank}: "

    def __iter__(self) -> Iterator[PackedBatch]:
        ahead: collections.deque[PackedBatch] = collections.deque()
        failure: UserError | TrainingError | None = None
        batches = self._reading()
        given = False
        while True:
            while failure is None and len(ahead) <= self._reserve:
                try:
                    ahead.append(next(batches))
                except Exception as error:
                    failure = _failure(error)
                    if not given:
                        raise failure from error
                    self._stop.fail(failure)
            if not ahead:
                raise failure
            given = True
            yield ahead.popleft()

    def _reading(self) -> Iterator[PackedBatch]:
        """The batches as they are read; at an error, once more from the first one not yet read."""
        count, retried_at = 0, -1
        while True:
            try:
                for batch in self._read_from(count):
                    count += 1
                    yield batch
            except (UserError, OSError) as error:
                if retried_at == count or not may_come_back(error):
                    raise
                retried_at = count
                self._wait(error)

    def _wait(self, error: UserError | OSError) -> None:
        what, seconds = getattr(error, "problem", error), SECONDS_TO_RETRY
        print(
            f"Notice: {self._whose}{what}; trying again in {seconds:g} s",
            file=sys.stderr,
            flush=True,
        )
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._stop.asked:
            time.sleep(min(0.1, seconds))


def _failure(error: Exception) -> UserError | TrainingError:
    """The error that ends the run."""
    afterwards = "then go on with --resume auto"
    if isinstance(error, UserError):
        # The file may be sound, and its disk away.
        fix = "see that its folder and disk are there" if may_come_back(error) else error.fix
        return UserError(error.problem, f"{fix}, {afterwards}")
    if isinstance(error, OSError):
        return UserError(
            f"cannot read the training data ({error})", f"see to its disk, {afterwards}"
        )
    detail = "".join(traceback.format_exception(error))
    return TrainingError(f"reading the training data: {type(error).__name__}: {error}", detail)
