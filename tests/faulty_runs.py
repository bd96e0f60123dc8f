"""Real runs with a fault: in one rank, in the store of machine 0, or in a disk.

The product is unchanged. A folder for PYTHONPATH holds a sitecustomize.py, which Python imports in
every process; a library for LD_PRELOAD delays writing.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from hosts import Launcher

# In the trainers of the ranks RANK_NUMBERS (of all ranks if none is given): FAULT is done after the
# forward and backward pass, and READ_FAULT before a batch is given. They know `made`, the number of
# passes or batches so far, and `seconds`, the CPU time of this pass. LOCATED is done where a rank
# looks up where samples are; it knows their numbers, `samples`.
PROGRAM = """
import os, sys

number = os.environ.get("RANK", "")
if number and int(number) in (RANK_NUMBERS or [int(number)]) and "train" in sys.orig_argv:
    import ctypes, signal, threading, time
    from bert_pretraining.data import loader, order
    from bert_pretraining.training import micro_step

    count = {"passes": 0, "batches": 0}
    compute, read = micro_step.MicroStep.__call__, loader.TrainingLoader.__iter__
    locate = order.SampleOrder.locate

    def hold_the_lock(seconds):
        ctypes.PyDLL(None).sleep(seconds)

    def work(seconds):
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass

    def computed(self, *arguments):
        began = time.thread_time()
        result = compute(self, *arguments)
        seconds = time.thread_time() - began
        count["passes"] += 1
        rank, made = int(number), count["passes"]
        FAULT
        return result

    def batches(self):
        for batch in read(self):
            count["batches"] += 1
            rank, made = int(number), count["batches"]
            READ_FAULT
            yield batch

    def located(self, samples):
        rank = int(number)
        LOCATED
        return locate(self, samples)

    order.SampleOrder.locate = located
    micro_step.MicroStep.__call__, loader.TrainingLoader.__iter__ = computed, batches
"""

# Each write to a file whose path contains SLOW_PATH takes SLOW_MS milliseconds longer.
SLOW_WRITES = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static void delay(int file) {
    char link[64], path[4096];
    const char *part = getenv("SLOW_PATH"), *milliseconds = getenv("SLOW_MS");
    if (!part || !milliseconds) return;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0) return;
    path[length] = 0;
    if (strstr(path, part)) usleep(1000 * atoi(milliseconds));
}

ssize_t write(int file, const void *data, size_t size) {
    delay(file);
    return ((ssize_t (*)(int, const void *, size_t))dlsym(RTLD_NEXT, "write"))(file, data, size);
}

ssize_t writev(int file, const struct iovec *parts, int count) {
    delay(file);
    return ((ssize_t (*)(int, const struct iovec *, int))dlsym(RTLD_NEXT, "writev"))(
        file, parts, count);
}
"""


def faulty(
    folder: Path, ranks: list[int], fault: str = "pass", read: str = "pass", located: str = "pass"
) -> str:
    """A folder for PYTHONPATH, in which these ranks (all, if none is given) have a fault.

    fault, read, located: a statement, see PROGRAM.
    """
    folder.mkdir()
    program = PROGRAM.replace("RANK_NUMBERS", repr(ranks)).replace("READ_FAULT", read)
    program = program.replace("LOCATED", located)
    (folder / "sitecustomize.py").write_text(program.replace("FAULT", fault))
    return str(folder)


def slow_writes(folder: Path, path: str, milliseconds: int) -> dict[str, str]:
    """The environment in which writing to files with `path` in their path is slow."""
    library = folder / "slow_writes.so"
    if not library.exists():
        source = library.with_suffix(".c")
        source.write_text(SLOW_WRITES)
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return {"LD_PRELOAD": str(library), "SLOW_PATH": path, "SLOW_MS": str(milliseconds)}


def launch(folder: Path, name: str, *flags: object, **environment: str) -> Launcher:
    """`launch` of the mini configuration on this machine, with the output in `folder`."""
    words = [sys.executable, "-m", "bert_pretraining", "launch", "--name", "mini", "--config",
             "CPUx1x2", "--device", "cpu", "--bind", "none"]  # fmt: skip
    return Launcher([*words, *map(str, flags)], folder, name, environment)


class SlowStore:
    """Passes connections on to the store of machine 0, each answer some seconds later.

    Attributes:
        port: where it listens, at 127.0.0.1.
        delay: seconds.
        dropped: how many connections it has closed because nobody listens at machine 0's port.
    """

    def __init__(self, port: int, delay: float = 0.0) -> None:
        self.delay, self.dropped = delay, 0
        self._target, self._stopped_until = port, 0.0
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def stop_for(self, seconds: float) -> None:
        """Give no answer for so long."""
        self._stopped_until = time.monotonic() + seconds

    def close(self) -> None:
        self._server.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            try:
                store = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                client.close()  # as a container's port does
                self.dropped += 1
                continue
            for pair, waits in (((client, store), False), ((store, client), True)):
                threading.Thread(target=self._pass_on, args=(*pair, waits), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, waits: bool) -> None:
        try:
            while data := source.recv(2**16):
                if waits:
                    time.sleep(max(self.delay, self._stopped_until - time.monotonic()))
                target.sendall(data)
        except OSError:
            pass  # the other direction was closed
        for one in (source, target):
            try:
                one.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # it was closed already


def signal_group(pids: list[int], signum: int) -> None:
    for pid in pids:
        os.kill(pid, signum)
