"""Run a function in several processes, so that an error or Ctrl-C ends them all at once."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from bert_pretraining.errors import UserError

Key = TypeVar("Key")
Result = TypeVar("Result")
SECONDS_BETWEEN_LOOKS = 0.2  # for a Ctrl-C


def run_in_processes(
    function: Callable[..., Result],
    calls: Mapping[Key, tuple],
    jobs: int,
    done: Callable[[Key, Result], None],
) -> None:
    """Call `function(*calls[key])` for every key, `jobs` calls at a time.

    done: called in this process with each key and its result, in the order of their ends.

    The first error of a call ends all processes, and so does Ctrl-C (KeyboardInterrupt). Another
    Ctrl-C in the meantime changes nothing. The processes themselves never see it, and they end when
    this process is killed. Raises UserError for a process that was killed.
    """
    # spawn, because a forked child would share the parent's HDF5 state and threads
    context = multiprocessing.get_context("spawn")
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_end_with_parent)
    with _noting_interrupts() as interrupts:
        try:
            with _children_without_interrupts():
                futures = {pool.submit(function, *call): key for key, call in calls.items()}
            waiting: set[Future[Result]] = set(futures)
            while waiting:
                ended, waiting = wait(waiting, SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED)
                for future in ended:
                    done(futures[future], future.result())
                if interrupts:
                    raise KeyboardInterrupt
        except BrokenProcessPool as error:
            raise UserError(
                "a process that works on a text was killed, most likely because memory ran out",
                "pass a smaller --jobs, or give the text in smaller files",
            ) from error
        finally:
            # After a whole pass the processes are idle; after an error nobody wants their work.
            for child in multiprocessing.active_children():
                if child not in others:
                    child.kill()
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _noting_interrupts() -> Iterator[list[int]]:
    """Inside, Ctrl-C only adds to the list. Not in a thread, nor where Ctrl-C is ignored."""
    noted: list[int] = []
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None):
        yield noted
        return
    before = signal.signal(signal.SIGINT, lambda number, _: noted.append(number))
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _children_without_interrupts() -> Iterator[None]:
    """Processes that are started inside never get Ctrl-C: they inherit that it is blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    """End this process when its parent ends, for example by a signal."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    if parent is not None:
        threading.Thread(target=watch, daemon=True).start()
