"""From text to training shards, stage by stage, as the MLPerf reference makes them.

    create_file    one text file -> examples          (create_pretraining_data.py)
    shard          all examples -> N equal shards     (chop_hdf5_files.py)
    pick_file      evaluation examples -> 10,000      (pick_eval_samples.py)
    to_varlength   a shard -> its variable-length form (convert_fixed2variable.py)
    checksum       a shard's published md5            (hdf5_md5.py)
    prepare        all of them, in parallel, resumable

Same arguments, same bytes in every dataset. Files appear whole or not at all.
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
    replace_file,
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
from bert_pretraining.preparation.text_sources import read_text
from bert_pretraining.preparation.verify_report import md5_of

REFERENCE_SEED = 12345


@dataclass(frozen=True)
class TextSettings:
    """What one text file's examples depend on, beside the text."""

    vocab: Path
    examples: ExampleSettings = field(default_factory=ExampleSettings)
    seed: int = REFERENCE_SEED
    lower_case: bool = True


@dataclass(frozen=True)
class PrepareSettings:
    """What `data prepare` can be told."""

    text_dir: Path
    eval_text: Path
    output_dir: Path
    text: TextSettings
    num_shards: int = 2048
    num_eval_examples: int = 10_000
    jobs: int = 1


def create_file(inputs: Sequence[Path], output: Path, settings: TextSettings) -> int:
    """Examples of text files (one sentence a line, blank lines between documents).

    The documents of all inputs form one corpus. Returns the number of examples.
    Raises UserError for text that is missing, empty or not UTF-8.

    Memory: about 100 bytes for every byte of text at the reference's dupe factor of 10.
    """
    lines: list[str] = []
    for path in inputs:
        lines += _lines(path)
    vocabulary = Vocabulary.load(settings.vocab, settings.lower_case)
    documents = vocabulary.documents_of_lines(lines)
    if not documents:
        raise UserError(f"{inputs[0]}: no sentences; give text with one sentence a line")
    generator = random.Random(settings.seed)
    examples = create_examples(documents, vocabulary, settings.examples, generator)
    write_shard(output, to_arrays(examples, settings.examples))
    return len(examples)


def pick_file(source: Path, output: Path, num_examples: int) -> None:
    """`num_examples` spread evenly over the examples in `source`.

    Raises UserError if there are fewer than that.
    """
    available = shard_rows(source)
    if not 1 <= num_examples <= available:
        raise UserError(
            f"{source} has {available} examples, {num_examples} are wanted; "
            "give more text, or a smaller --num_examples"
        )
    write_shard(output, pick(read_arrays(source), num_examples))


def shard_sizes(num_examples: int, num_shards: int) -> list[int]:
    """How many examples each shard gets.

    The reference tests its place in the shard where it means the shard's number, so all
    but an exact division come out one short, and up to one example a shard is dropped.
    The published checksums depend on it.

    Raises UserError if a shard would be empty.
    """
    nominal = -(-num_examples // num_shards)
    excess = num_shards * nominal - num_examples
    if nominal < 2:
        raise UserError(
            f"{num_examples} examples do not fill {num_shards} shards; "
            "give more text, or a smaller --num_shards"
        )
    return [nominal - 1] + [nominal - (excess > 0)] * (num_shards - 1)


def shard(inputs: Sequence[Path], output_dir: Path, num_shards: int) -> tuple[int, int]:
    """Chop the examples of `inputs`, in this order, into equal shards.

    Writes `part_<number>_of_<count>.hdf5`; a shard that is there with the right number of
    rows is kept. Holds one input file and one shard in memory.
    Returns how many shards were written, and how many were there.
    """
    sizes = shard_sizes(sum(shard_rows(path) for path in inputs), num_shards)
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
    """A fixed-length shard without its padding: one array a row, no input_mask."""
    write_varlength_shard(output, read_arrays(source))


def checksum(path: Path) -> str:
    """The md5 that is published for a shard: of its rows' md5s, each of its token ids.

    The text that is hashed is Python's own of a list, as in the reference's script.
    """
    return md5_of([md5_of(row.tolist()) for row in read_token_rows(path)])


def prepare(settings: PrepareSettings) -> list[str]:
    """Text files -> `2048_shards_uncompressed/` and `eval_set_uncompressed/`.

    Every file in text_dir is a text file; the examples of each go to `output_dir/work/`,
    which is removed at the end. A rerun with the same settings keeps what is whole.
    Needs disk for the examples twice; memory: `jobs` times `create_file`'s.

    Returns lines that say what was made and what was there already.
    Raises UserError for bad input, and if output_dir was begun with other settings.
    """
    texts = _texts(settings.text_dir)
    output_dir = settings.output_dir
    work = output_dir / "work"
    shards_dir = output_dir / "2048_shards_uncompressed"
    eval_path = output_dir / "eval_set_uncompressed" / _eval_name(settings.num_eval_examples)
    _claim(settings, texts)
    done = output_dir / "prepare_finished.json"
    if done.is_file():
        return [f"{output_dir} is finished already: nothing to do"]

    messages = []
    for directory in (work, shards_dir, eval_path.parent):
        directory.mkdir(parents=True, exist_ok=True)
    eval_all = work / "eval_all.hdf5"
    tasks = {text: work / f"{text.name}.hdf5" for text in texts}
    tasks[settings.eval_text] = eval_all
    missing = {text: output for text, output in tasks.items() if not output.is_file()}
    _create_all(missing, settings)
    messages.append(f"examples: {len(missing)} files made, {len(tasks) - len(missing)} there")
    if not eval_path.is_file():
        pick_file(eval_all, eval_path, settings.num_eval_examples)
    examples = [tasks[text] for text in texts]
    made, there = shard(examples, shards_dir, settings.num_shards)
    messages.append(f"shards: {made} made, {there} there")
    sizes = [shard_rows(path) for path in examples]
    kept = sum(shard_sizes(sum(sizes), settings.num_shards))
    messages.append(f"{kept} training examples in {settings.num_shards} shards")
    messages.append(f"{settings.num_eval_examples} evaluation examples: {eval_path}")
    shutil.copyfile(settings.text.vocab, output_dir / "vocab.txt")
    replace_file(done, json.dumps({"training_examples": kept}) + "\n")
    shutil.rmtree(work)
    return messages


def _lines(path: Path) -> list[str]:
    """The lines of one text file, without the line ends."""
    text = read_text(path)
    if not text.strip():
        raise UserError(f"{path}: empty; give text with one sentence a line")
    return text.removesuffix("\n").split("\n")


def _chop(inputs: Sequence[Path], sizes: list[int]) -> Iterator[dict[str, np.ndarray]]:
    """Rows of the inputs end to end, `sizes[i]` of them at a time."""
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
        raise UserError(f"no such directory of text files: {text_dir}; pass --text_dir")
    texts = sorted(
        path for path in text_dir.iterdir() if path.is_file() and path.name != "eval.txt"
    )
    if not texts:
        raise UserError(f"no text files in {text_dir}; expected part-00000-of-00500 and so on")
    return texts


def _eval_name(count: int) -> str:
    return f"part_eval_{count // 1000}k.hdf5" if count % 1000 == 0 else f"part_eval_{count}.hdf5"


def _claim(settings: PrepareSettings, texts: list[Path]) -> None:
    """Write down what output_dir is made with, or find that it is the same."""
    values = {
        "texts": {text.name: text.stat().st_size for text in texts},
        "eval_text": _size(settings.eval_text),
        "vocab": hashlib.md5(_bytes(settings.text.vocab)).hexdigest(),
        "examples": dataclasses.asdict(settings.text.examples),
        "seed": settings.text.seed,
        "lower_case": settings.text.lower_case,
        "num_shards": settings.num_shards,
        "num_eval_examples": settings.num_eval_examples,
    }
    record = settings.output_dir / "prepare.json"
    if record.is_file():
        before = json.loads(record.read_text())
        changed = [key for key in values if before.get(key) != values[key]]
        if changed:
            raise UserError(
                f"{settings.output_dir} was begun with another {changed[0]}; delete it, "
                "or choose another --output_dir"
            )
        return
    try:
        settings.output_dir.mkdir(parents=True, exist_ok=True)
        replace_file(record, json.dumps(values, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to {settings.output_dir} ({error.strerror})") from error


def _size(path: Path) -> int:
    return len(_bytes(path))


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from error


def _create_all(tasks: dict[Path, Path], settings: PrepareSettings) -> None:
    """Create examples of every text in parallel processes; the first error ends all."""
    total = sum(text.stat().st_size for text in tasks)
    bar = tqdm(total=total, desc="examples", unit="B", unit_scale=True)
    # spawn: a forked child would share the parent's HDF5 state and threads
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
