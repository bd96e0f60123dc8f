"""From text to training shards, stage by stage, as the MLPerf reference makes them.

    create_file    one text file -> examples          (create_pretraining_data.py)
    shard          all examples -> N equal shards     (chop_hdf5_files.py)
    pick_file      evaluation examples -> 10,000      (pick_eval_samples.py)
    to_varlength   a shard -> its variable-length form (convert_fixed2variable.py)
    checksum       a shard's published md5            (hdf5_md5.py)
    prepare        all of them, in parallel, resumable

The same arguments give the same bytes in every dataset. Every file is written whole or
not at all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import random
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bert_pretraining.data.shards import (
    SCHEMA,
    read_arrays,
    read_token_rows,
    shard_rows,
    write_shard,
    write_varlength_shard,
)
from bert_pretraining.errors import UserError
from bert_pretraining.preparation.examples import (
    ExampleSettings,
    Vocabulary,
    create_examples,
    pick,
    to_arrays,
)
from bert_pretraining.preparation.manifest import OutputFiles, write_manifest
from bert_pretraining.preparation.text_sources import read_bytes, read_text
from bert_pretraining.preparation.verify_report import md5_of
from bert_pretraining.runtime.files import write_whole

REFERENCE_SEED = 12345
ONE_A_LINE = "give text with one sentence a line"


@dataclass(frozen=True)
class TextSettings:
    """What the examples of a text file depend on besides the text."""

    vocab: Path
    examples: ExampleSettings = field(default_factory=ExampleSettings)
    seed: int = REFERENCE_SEED
    lower_case: bool = True


@dataclass(frozen=True)
class PrepareSettings:
    """The flags of `data prepare`."""

    text_dir: Path
    eval_text: Path
    output_dir: Path
    text: TextSettings
    num_shards: int = 2048
    num_eval_examples: int = 10_000
    jobs: int = 1


def create_file(inputs: Sequence[Path], output: Path, settings: TextSettings) -> int:
    """Make the examples of text files (one sentence a line, blank lines between documents).

    The documents of all inputs form one corpus. Returns the number of examples.
    Raises UserError for text that is missing, empty or not UTF-8.

    It needs about 100 bytes of memory for every byte of text, at the reference's dupe
    factor of 10.
    """
    lines: list[str] = []
    for path in inputs:
        lines += _lines(path)
    vocabulary = Vocabulary.load(settings.vocab, settings.lower_case)
    documents = vocabulary.documents_of_lines(lines)
    if not documents:
        raise UserError(f"{inputs[0]}: no sentences", ONE_A_LINE)
    generator = random.Random(settings.seed)
    examples = create_examples(documents, vocabulary, settings.examples, generator)
    write_shard(output, to_arrays(examples, settings.examples))
    return len(examples)


def pick_file(source: Path, output: Path, num_examples: int, flag: str = "--num_examples") -> None:
    """Pick `num_examples` that are spread evenly over the examples in `source`.

    Raises UserError, which names `flag`, if `source` has fewer than that.
    """
    available = shard_rows(source)
    if not 1 <= num_examples <= available:
        raise UserError(
            f"{source} has {available} examples, {num_examples} are wanted",
            f"give more text, or a smaller {flag}",
        )
    write_shard(output, pick(read_arrays(source), num_examples))


def shard_sizes(num_examples: int, num_shards: int, flag: str = "--num_shards") -> list[int]:
    """How many examples each shard gets.

    The reference compares the wrong index: where the number of examples is no multiple of
    the number of shards, every shard gets one example less, and up to one example for each
    shard is dropped. The published checksums depend on that.

    Raises UserError, which names `flag`, if a shard would be empty.
    """
    nominal = -(-num_examples // num_shards)
    excess = num_shards * nominal - num_examples
    if nominal < 2:
        raise UserError(
            f"{num_examples} examples do not fill {num_shards} shards",
            f"give more text, or a smaller {flag}",
        )
    return [nominal - 1] + [nominal - (excess > 0)] * (num_shards - 1)


def shard(
    inputs: Sequence[Path], output_dir: Path, num_shards: int, flag: str = "--num_shards"
) -> tuple[int, int]:
    """Chop the examples of `inputs`, in this order, into equal shards.

    Writes `part_<number>_of_<count>.hdf5`, and keeps a shard that exists already with the
    right number of rows. Holds one input file and one shard in memory.
    Returns how many shards were written, and how many existed already.
    """
    sizes = shard_sizes(sum(shard_rows(path) for path in inputs), num_shards, flag)
    output_dir.mkdir(parents=True, exist_ok=True)
    paths = [
        output_dir / f"part_{number:05d}_of_{num_shards:05d}.hdf5" for number in range(num_shards)
    ]
    there = [
        path.is_file() and shard_rows(path) == size for path, size in zip(paths, sizes, strict=True)
    ]
    if not all(there):
        pieces = _chop(inputs, sizes)
        for path, skip in tqdm(list(zip(paths, there, strict=True)), "shards", unit="file"):
            arrays = next(pieces)
            if not skip:
                write_shard(path, arrays)
    return there.count(False), there.count(True)


def to_varlength(source: Path, output: Path) -> None:
    """Write a fixed-length shard in the form without padding: no input_mask."""
    write_varlength_shard(output, read_arrays(source))


def checksum(path: Path) -> str:
    """The md5 of a shard, in the form in which it is published.

    It is the md5 of the list of the rows' md5s, and a row's is that of its list of token
    ids. A list is hashed as Python prints it, as in the reference's script.
    """
    return md5_of([md5_of(row.tolist()) for row in read_token_rows(path)])


def prepare(settings: PrepareSettings) -> list[str]:
    """Text files -> `2048_shards_uncompressed/` and `eval_set_uncompressed/`.

    Every file in text_dir is a text file. The examples of each go to `output_dir/work/`,
    which is removed at the end. A rerun keeps every whole file that its settings would
    make in the same way. It needs disk space for the examples twice, and `jobs` times the
    memory of `create_file`.

    Returns lines that say what was made and what existed already.
    Raises UserError for bad input, and where `write_manifest` refuses changed settings.
    """
    texts = _texts(settings.text_dir)
    files = OutputFiles(settings.output_dir)
    messages = write_manifest(files, _manifest(settings, texts))
    if files.finished.is_file():
        return [f"{settings.output_dir} is finished already: nothing to do"]

    for directory in (files.work, files.shards, files.evaluation):
        directory.mkdir(parents=True, exist_ok=True)
    examples = {text: files.examples(text.name) for text in texts}
    tasks = {**examples, settings.eval_text: files.eval_examples}
    missing = {text: output for text, output in tasks.items() if not output.is_file()}
    _create_all(missing, settings)
    messages.append(f"examples: {len(missing)} files made, {len(tasks) - len(missing)} there")
    picked = files.picked(settings.num_eval_examples)
    if not picked.is_file():
        pick_file(files.eval_examples, picked, settings.num_eval_examples, "--num_eval_examples")
    inputs = list(examples.values())
    made, there = shard(inputs, files.shards, settings.num_shards, "--shards")
    messages.append(f"shards: {made} made, {there} there")
    kept = sum(shard_sizes(sum(shard_rows(path) for path in inputs), settings.num_shards))
    messages.append(f"{kept} training examples in {settings.num_shards} shards")
    messages.append(f"{settings.num_eval_examples} evaluation examples: {picked}")
    write_whole(settings.output_dir / "vocab.txt", read_bytes(settings.text.vocab))
    write_whole(files.finished, json.dumps({"training_examples": kept}) + "\n")
    shutil.rmtree(files.work)
    return messages


def _manifest(settings: PrepareSettings, texts: list[Path]) -> dict:
    """What the data set depends on, for `prepare.json`."""
    return {
        "texts": {text.name: text.stat().st_size for text in texts},
        "eval_text": len(read_bytes(settings.eval_text)),
        "vocab": hashlib.md5(read_bytes(settings.text.vocab)).hexdigest(),
        "examples": dataclasses.asdict(settings.text.examples),
        "seed": settings.text.seed,
        "lower_case": settings.text.lower_case,
        "num_shards": settings.num_shards,
        "num_eval_examples": settings.num_eval_examples,
    }


def _lines(path: Path) -> list[str]:
    """The lines of one text file, without the line ends."""
    text = read_text(path)
    if not text.strip():
        raise UserError(f"{path}: empty", ONE_A_LINE)
    return text.removesuffix("\n").split("\n")


def _chop(inputs: Sequence[Path], sizes: list[int]) -> Iterator[dict[str, np.ndarray]]:
    """Yield the rows of the inputs in order, `sizes[i]` of them as piece i."""
    remaining = iter(inputs)
    held: list[dict[str, np.ndarray]] = []
    rows = 0
    for size in sizes:
        while rows < size:
            held.append(read_arrays(next(remaining)))
            rows += len(held[-1]["next_sentence_labels"])
        whole = {key: np.concatenate([part[key] for part in held]) for key in SCHEMA}
        yield {key: array[:size] for key, array in whole.items()}
        held = [{key: array[size:] for key, array in whole.items()}]
        rows -= size


def _texts(text_dir: Path) -> list[Path]:
    if not text_dir.is_dir():
        raise UserError(f"no such directory of text files: {text_dir}", "pass --text_dir DIR")
    texts = sorted(
        path for path in text_dir.iterdir() if path.is_file() and path.name != "eval.txt"
    )
    if not texts:
        raise UserError(
            f"no text files in {text_dir}; expected part-00000-of-00500 and so on",
            "make them with data segment, or pass another --text_dir",
        )
    return texts


def _create_all(tasks: dict[Path, Path], settings: PrepareSettings) -> None:
    """Create the examples of every text, in parallel processes; the first error ends all."""
    total = sum(text.stat().st_size for text in tasks)
    bar = tqdm(total=total, desc="examples", unit="B", unit_scale=True)
    # spawn, because a forked child would share the parent's HDF5 state and threads
    context = multiprocessing.get_context("spawn")
    with bar, ProcessPoolExecutor(settings.jobs, mp_context=context) as pool:
        futures = {
            pool.submit(create_file, [text], output, settings.text): text
            for text, output in tasks.items()
        }
        for finished, future in enumerate(as_completed(futures), start=1):
            try:
                future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            bar.set_postfix_str(f"{finished}/{len(futures)} files", refresh=False)
            bar.update(futures[future].stat().st_size)
