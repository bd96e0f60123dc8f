"""The process that reads many headers at once; `headers.read_headers` starts it.

Its arguments are the process id of its parent and the number of readers. Standard input is a JSON
list of paths; the last line of standard output a JSON list of answers in the same order: the header
of a shard, the UserError of one that cannot be read, or null where a reader had ended with that.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from bert_pretraining.data.shards import inspect_shard
from bert_pretraining.errors import UserError
from bert_pretraining.runtime.parent import end_with_parent


def main() -> None:
    end_with_parent(int(sys.argv[1]))
    count = int(sys.argv[2])
    paths = json.load(sys.stdin)
    answers: list[dict | None] = [None] * len(paths)
    context = multiprocessing.get_context("fork")  # cheap here: nothing but imports has happened
    readers = []
    for number in range(count):
        receiving, sending = context.Pipe(duplex=False)
        arguments = (paths[number::count], sending, os.getpid())
        context.Process(target=_read, args=arguments, daemon=True).start()
        sending.close()  # so that the end of the reader is the end of the pipe
        readers.append(receiving)
    for number, receiving in enumerate(readers):
        try:
            part = receiving.recv()
        except EOFError:
            raise SystemExit("a reader was killed") from None
        answers[number::count] = part
    print(json.dumps(answers))


def _read(paths: list[str], sending: Connection, parent: int) -> None:
    """Send the answers for these files; after the first fault they are None."""
    end_with_parent(parent)
    answers: list[dict | None] = [None] * len(paths)
    for index, path in enumerate(paths):
        try:
            info = inspect_shard(Path(path))
        except UserError as error:
            answers[index] = {"problem": error.problem, "fix": error.fix}
            break
        answers[index] = {
            "num_sequences": info.num_sequences,
            "max_seq_length": info.max_seq_length,
            "forms": info.forms,
        }
    sending.send(answers)


if __name__ == "__main__":
    main()
