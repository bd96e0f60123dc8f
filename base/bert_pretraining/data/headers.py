"""Many headers of shards at once: the waiting for each file overlaps with that for others.

HDF5 has one lock for all files of a process, so threads would wait for each other, and a rank that
holds a device must not fork. So one new process (`header_reader`) imports what is needed, and forks
readers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic

from bert_pretraining.data.flat_shard import ShardInfo
from bert_pretraining.errors import UserError
from bert_pretraining.runtime.rank_variables import environment_without_rank

READER = "bert_pretraining.data.header_reader"
PROCESSES = 64  # they wait nearly all the time; NFS 4 answers about as many requests at once
MANY = 128  # headers, which go to the processes at once
# The processes take a second or two to begin. So of fewer headers, as many are read here as this
# time allows: on a fast disk that is all. The rest goes to processes, unless it is FEW.
SECONDS_HERE, FEW = 1.0, 16


def read_headers(
    paths: Sequence[Path],
    inspect: Callable[[Path], ShardInfo],
    say: Callable[[str], None] | None = None,
) -> list[ShardInfo]:
    """The headers of the files, in order. Raises UserError for the first that cannot be read.

    Args:
        inspect: reads one header; used in this process while that is quick, for few files, or if
            no other process can be had.
        say: gets a line in the latter case.
    """
    infos: list[ShardInfo] = []
    deadline = monotonic() + (SECONDS_HERE if len(paths) < MANY else 0.0)
    while monotonic() < deadline and len(infos) < len(paths):
        infos.append(inspect(paths[len(infos)]))
    left = paths[len(infos) :]
    if len(left) < FEW:
        return infos + [inspect(path) for path in left]
    return infos + _read_in_processes(left, inspect, say)


def _read_in_processes(
    paths: Sequence[Path],
    inspect: Callable[[Path], ShardInfo],
    say: Callable[[str], None] | None,
) -> list[ShardInfo]:
    readers = min(PROCESSES, len(paths))
    command = [sys.executable, "-m", READER, str(os.getpid()), str(readers)]
    # A second thread of a numeric library would not survive the fork.
    single = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment = {**environment_without_rank(), **single}
    asked = json.dumps([os.fspath(path) for path in paths])  # odd bytes of a name: \udcXX
    try:
        # A session of its own: a Ctrl-C is for this process, which ends the other one.
        done = subprocess.run(
            command, input=asked, env=environment, capture_output=True, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip
        if done.returncode:
            raise OSError((done.stderr.strip().splitlines() or [f"code {done.returncode}"])[-1])
    except OSError as error:
        if say is not None:
            say(
                f"Notice: the headers of {len(paths)} shards are read one after the other, because "
                f"the processes that read many at once have failed ({error})"
            )
        return [inspect(path) for path in paths]
    answers = json.loads(done.stdout.splitlines()[-1])  # a library may have printed before
    for answer in answers:
        if answer is not None and "problem" in answer:
            raise UserError(answer["problem"], answer["fix"])
    return [
        ShardInfo(path, one["num_sequences"], one["max_seq_length"], tuple(one["forms"]))
        for path, one in zip(paths, answers, strict=True)
    ]
