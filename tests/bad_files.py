"""Every command that reads a file, run on every kind of bad file.

`PYTHONPATH=base:tests python tests/bad_files.py` prints a table: commands x kinds, and what went
wrong.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from bad_kinds import KINDS, fed_pipe, good_files, skipped
from bert_pretraining.preparation import processes
from bert_pretraining.preparation.mini import MiniSettings, make_mini
from helpers import in_process

TRAIN, EVAL = "2048_shards_uncompressed", "eval_set_uncompressed"
CHECKPOINT = "model.ckpt-28252.apex.pt"


@dataclass(frozen=True)
class Command:
    """A command that reads a file.

    words: the command line, from the path of the bad file and that of a good data set. name: of
    the bad file. right: a right file in the data set, whose bytes some kinds are made of. folder:
    the bad file lies in a folder of its own, whose path the command gets. codes: the exit codes
    that are right. taken: kinds that this command may take for what it wants.
    """

    words: Callable[[Path, Path], list[object]]
    name: str
    right: str
    folder: bool = False
    codes: tuple[int, ...] = (2,)
    taken: frozenset[str] = frozenset()


SHARD = f"{TRAIN}/part_00000_of_00016.hdf5"
TRAINING = [
    "train", "--name", "mini", "--config", "CPUx1x1", "--device", "cpu", "--max_steps", "1",
    "--train_batch_size", "2", "--num_eval_examples", "2",
]  # fmt: skip
# HDF5 looks for its signature behind 512 bytes too, the size of a tar file's header.
USER_BLOCK = frozenset({"tar"})
PIPE = frozenset({"pipe"})  # of a command that reads what another program writes


def _train(flag: str, good: Path, bad: Path) -> list[object]:
    return [*TRAINING, "--data_dir", good, flag, bad, "--output_dir", good.parent / "output"]


def _predict(
    good: Path,
    checkpoint: Path | str = CHECKPOINT,
    sizes: Path | str = "bert_config.json",
    words: Path | str = "vocab.txt",
) -> list[object]:
    flags = ["--bert_config", good / sizes, "--vocab", good / words]
    return ["predict", good / checkpoint, "[MASK]", *flags]


PACKED = frozenset({"gzip", "bzip2", "xz"})  # of the right kind: text may be packed


def _texts(*kinds: str) -> frozenset[str]:
    """Kinds that are text, which a command that reads any text cannot refuse; a pipe of text."""
    return frozenset({"plain text", "XML", "JSON list", "pipe", *PACKED, *kinds})


COMMANDS: dict[str, Command] = {
    "train --data_dir": Command(lambda bad, good: [*TRAINING, "--data_dir", bad], "data", SHARD),
    "train --train_dir": Command(
        lambda bad, good: _train("--train_dir", good, bad),
        "part_0.hdf5",
        SHARD,
        folder=True,
        taken=USER_BLOCK,
    ),
    "train --eval_dir": Command(
        lambda bad, good: _train("--eval_dir", good, bad),
        "part_eval.hdf5",
        SHARD,
        folder=True,
        taken=USER_BLOCK,
    ),
    "train --init_checkpoint": Command(
        lambda bad, good: _train("--init_checkpoint", good, bad), "start.pt", CHECKPOINT
    ),
    "train --bert_config_path": Command(
        lambda bad, good: _train("--bert_config_path", good, bad), "sizes.json", "bert_config.json"
    ),
    "config show --config": Command(
        lambda bad, good: ["config", "show", "--config", bad],
        "mine.toml",
        "mine.toml",
        taken=frozenset({"empty", "cut in the middle", "its first 100 bytes"}),
    ),
    "data verify": Command(
        lambda bad, good: ["data", "verify", bad],
        "part_0.hdf5",
        SHARD,
        folder=True,
        codes=(1, 2),
        taken=USER_BLOCK,
    ),
    "data checksum": Command(
        lambda bad, good: ["data", "checksum", bad], "a.hdf5", SHARD, taken=USER_BLOCK
    ),
    "data pick-eval": Command(
        lambda bad, good: ["data", "pick-eval", "--input_file", bad, "--output_file", "out.hdf5"],
        "a.hdf5",
        SHARD,
    ),
    "data to-varlength": Command(
        lambda bad, good: ["data", "to-varlength", "--input_file", bad, "--output_file", "o.hdf5"],
        "a.hdf5",
        SHARD,
        taken=USER_BLOCK,
    ),
    "data shard": Command(
        lambda bad, good: [
            "data",
            "shard",
            "--input_dir",
            bad,
            "--output_dir",
            "made",
            "--num_shards",
            "2",
        ],
        "part-0.hdf5",
        SHARD,
        folder=True,
        taken=USER_BLOCK,
    ),
    "data create-examples --vocab": Command(
        lambda bad, good: [
            "data",
            "create-examples",
            "--input_file",
            good / "text.txt",
            "--output_file",
            "out.hdf5",
            "--vocab",
            bad,
        ],
        "words.txt",
        "vocab.txt",
        taken=frozenset({"cut in the middle", "its first 100 bytes", "pipe", *PACKED}),
    ),
    "data create-examples": Command(
        lambda bad, good: [
            "data",
            "create-examples",
            "--input_file",
            bad,
            "--output_file",
            "out.hdf5",
            "--vocab",
            good / "vocab.txt",
        ],
        "text.txt",
        "text.txt",
        taken=_texts("cut in the middle", "its first 100 bytes"),
    ),
    "data segment": Command(
        lambda bad, good: ["data", "segment", "--input", bad, "--output_dir", "made"],
        "text.txt",
        "text.txt",
        taken=_texts("cut in the middle", "its first 100 bytes"),
    ),
    "data prepare --eval_text": Command(
        lambda bad, good: [
            "data",
            "prepare",
            "--text_dir",
            good / "texts",
            "--eval_text",
            bad,
            "--vocab",
            good / "vocab.txt",
            "--output_dir",
            "made",
            "--shards",
            "2",
            "--num_eval_examples",
            "2",
        ],
        "held.txt",
        "text.txt",
        taken=_texts("cut in the middle", "its first 100 bytes"),
    ),
    "data prepare --text_dir": Command(
        lambda bad, good: [
            *("data", "prepare", "--text_dir", bad, "--eval_text", good / "text.txt"),
            *("--vocab", good / "vocab.txt", "--output_dir", "made", "--shards", "2"),
            *("--num_eval_examples", "2"),
        ],
        "part-0",
        "text.txt",
        folder=True,
        taken=_texts("cut in the middle", "its first 100 bytes"),
    ),
    "data make-mini --text": Command(
        lambda bad, good: ["data", "make-mini", "--text", bad, "--output_dir", "made"],
        "text.txt",
        "text.txt",
        taken=_texts("cut in the middle", "its first 100 bytes"),
    ),
    "checkpoint inspect": Command(
        lambda bad, good: ["checkpoint", "inspect", bad], "start.pt", CHECKPOINT
    ),
    "checkpoint diff": Command(
        lambda bad, good: ["checkpoint", "diff", good / CHECKPOINT, bad], "start.pt", CHECKPOINT
    ),
    "checkpoint convert": Command(
        lambda bad, good: ["checkpoint", "convert", bad, "out.pt", "--to", "apex"],
        "start.pt",
        CHECKPOINT,
    ),
    "checkpoint convert --bert_config": Command(
        lambda bad, good: [
            "checkpoint",
            "convert",
            good / CHECKPOINT,
            "made",
            "--to",
            "hf",
            "--bert_config",
            bad,
        ],
        "sizes.json",
        "bert_config.json",
    ),
    "predict": Command(lambda bad, good: _predict(good, bad), "start.pt", CHECKPOINT),
    "predict --bert_config": Command(
        lambda bad, good: _predict(good, sizes=bad), "sizes.json", "bert_config.json"
    ),
    "predict --vocab": Command(
        lambda bad, good: _predict(good, words=bad),
        "words.txt",
        "vocab.txt",
        taken=frozenset({"pipe", *PACKED}),
    ),
    "report": Command(
        lambda bad, good: ["report", bad, "--output_dir", "made"],
        "run.log",
        "run.log",
        taken=PIPE,
    ),
    "submission check": Command(
        lambda bad, good: ["submission", "check", bad], "run.log", "run.log", codes=(1, 2)
    ),
    "submission assemble --logs": Command(
        lambda bad, good: [
            *("submission", "assemble", "--logs", bad, "--system", "one"),
            *("--output_dir", "made", "--", "--name", "mini", "--config", "CPUx1x1"),
        ],
        "run.log",
        "run.log",
        taken=PIPE,
    ),
    "submission summarize": Command(
        lambda bad, good: ["submission", "summarize", bad],
        "run.log",
        "run.log",
        codes=(1, 2),
        taken=PIPE,
    ),
    "bench loader": Command(
        lambda bad, good: ["bench", "loader", "--train_dir", bad, "--seconds", "0.01"],
        "part_0.hdf5",
        SHARD,
        folder=True,
        taken=USER_BLOCK,
    ),
    "bench step --bert_config_path": Command(
        lambda bad, good: ["bench", "step", "--device", "cpu", "--bert_config_path", bad],
        "sizes.json",
        "bert_config.json",
    ),
}


class InThisProcess:
    """A pool of processes that works in this one, as starting a process takes seconds."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, function: Callable[..., object], *arguments: object) -> Future:
        future: Future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, **_: object) -> None:
        pass


def fault_of(command: Command, kind: str, good: Path, place: Path) -> str | None:
    """Run a command on one bad file; what is wrong with its end, or None.

    place: an empty folder. Right is: one of the exit codes, one line "Error: ..." with the file's
    name in it, no traceback, no hang. With code 1, the finding on stdout names the file.
    """
    bad = place / "bad" / command.name
    bad.parent.mkdir()
    KINDS[kind](bad, (good / command.right).read_bytes())
    target, path = bad.parent if command.folder else bad, bad
    if command.words(target, good)[:2] == ["data", "verify"]:
        (bad.parent / TRAIN).mkdir()
        path = bad.parent / TRAIN / bad.name
        if os.path.lexists(bad):
            bad.rename(path)
        shutil.copytree(good / EVAL, bad.parent / EVAL)
        shutil.copy(good / "bert_config.json", bad.parent)
    (place / "work").mkdir()
    with (
        mock.patch.object(processes, "ProcessPoolExecutor", InThisProcess),
        fed_pipe(path) if kind == "pipe" else contextlib.nullcontext() as opened,
    ):
        done = in_process(*command.words(target, good), cwd=place / "work")
    if opened is not None and opened.is_set() and kind not in command.taken:
        return "waits for a pipe that nobody writes"
    if "Traceback" in done.stderr:
        return f"traceback: {done.stderr.splitlines()[-1][:160]}"
    if kind in command.taken and done.returncode in (0, 3):
        return None
    if done.returncode not in command.codes:
        return f"exit code {done.returncode}"
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    if done.returncode == 1:
        errors += [
            line for line in done.stdout.splitlines() if command.name in line or TRAIN in line
        ][:1]
    if len(errors) != 1:
        return f"{len(errors)} errors"
    names = (command.name, bad.parent.name, TRAIN) if command.folder else (command.name,)
    if not any(name in errors[0] for name in names):
        return f"does not name the file: {errors[0][:160]}"
    return None


def faults_of(name: str, good: Path, root: Path) -> dict[str, str]:
    """Each kind with which the command does not end rightly -> what is wrong."""
    found = {}
    for number, kind in enumerate(KINDS):
        place = root / f"{number}"
        place.mkdir()
        fault = None if skipped(kind) else fault_of(COMMANDS[name], kind, good, place)
        if fault:
            found[kind] = fault
        for path in place.rglob("*"):
            if path.is_file() and not path.is_symlink():
                path.chmod(stat.S_IRUSR | stat.S_IWUSR)
        shutil.rmtree(place)
    return found


def print_table() -> None:
    """The sweep as a table: a line for each command, and each fault below it."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_mini(MiniSettings(root / "mini"))
        good = good_files(root, root / "mini")
        tried = [kind for kind in KINDS if not skipped(kind)]
        print(f"{len(COMMANDS)} commands x {len(tried)} kinds = {len(COMMANDS) * len(tried)}")
        for name in COMMANDS:
            place = root / "place"
            place.mkdir()
            began = time.perf_counter()
            found = faults_of(name, good, place)
            seconds = time.perf_counter() - began
            shutil.rmtree(place)
            print(f"{name:<36} {len(tried) - len(found):>3} of {len(tried)}   {seconds:.1f} s")
            for kind, fault in found.items():
                print(f"    {kind}: {fault}")


if __name__ == "__main__":
    print_table()
