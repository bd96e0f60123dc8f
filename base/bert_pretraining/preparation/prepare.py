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
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
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
from bert_pretraining.preparation import held_out, text_statistics
from bert_pretraining.preparation.documents import ONE_A_LINE, read_sentences
from bert_pretraining.preparation.examples import (
    ExampleSettings,
    create_examples,
    pick,
    to_arrays,
)
from bert_pretraining.preparation.manifest import (
    OutputFiles,
    figures_of,
    read_notes,
    write_manifest,
)
from bert_pretraining.preparation.processes import run_in_processes
from bert_pretraining.preparation.text_files import listed, read_bytes
from bert_pretraining.preparation.text_statistics import TextStatistics
from bert_pretraining.preparation.verify_report import md5_of
from bert_pretraining.preparation.vocabulary import Vocabulary
from bert_pretraining.runtime.files import write_whole
from bert_pretraining.runtime.words import counted, plural

REFERENCE_SEED = 12345


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
    allow_missing_parts: bool = False


def create_file(
    inputs: Sequence[Path],
    output: Path,
    settings: TextSettings,
    without: frozenset[str] = frozenset(),
    files_are_documents: bool = False,
    figures: Path | None = None,
) -> TextStatistics:
    """Make the examples of text files (one sentence a line, blank lines between documents).

    The documents of all inputs form one corpus.

    without: digests (held_out.document_digest) of documents that are left out.
    files_are_documents: each file is a document, and blank lines do not count.
    figures: also keeps what is returned, as JSON; it is there before `output` is.

    Raises UserError for text that is missing, empty, not UTF-8 or not of one sentence a line.

    It needs about 100 bytes of memory for every byte of text, at the reference's dupe
    factor of 10.
    """
    lines: list[str] = []
    for path in inputs:
        lines += _lines(path, without, files_are_documents)
    vocabulary = Vocabulary.load(settings.vocab, settings.lower_case)
    documents = vocabulary.documents_of_lines(lines)
    if not documents:
        raise UserError(f"{inputs[0]}: no sentences", ONE_A_LINE)
    statistics = text_statistics.count_documents(documents, vocabulary.ids["[UNK]"])
    generator = random.Random(settings.seed)
    examples = create_examples(documents, vocabulary, settings.examples, generator)
    arrays = to_arrays(examples, settings.examples)
    statistics += text_statistics.count_lines(lines) + text_statistics.count_words(lines)
    statistics += text_statistics.count_examples(arrays)
    if figures is not None:
        write_whole(figures, json.dumps(dataclasses.asdict(statistics)) + "\n")
    write_shard(output, arrays)
    return statistics


def pick_file(source: Path, output: Path, num_examples: int, flag: str = "--num_examples") -> None:
    """Pick `num_examples` that are spread evenly over the examples in `source`.

    Raises UserError, which names `flag`, if `source` has fewer than that.
    """
    available = shard_rows(source)
    if not 1 <= num_examples <= available:
        raise UserError(
            f"{source} has {counted(available, 'example')}, "
            f"{num_examples:,} {plural(num_examples, 'is')} wanted",
            f"give more text, or a smaller {flag}",
        )
    arrays = pick(read_arrays(source), num_examples)
    write_shard(output, arrays)
    text_statistics.tell(
        f"the picked examples, {output.name}", text_statistics.count_examples(arrays)
    )


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
            f"{counted(num_examples, 'example')} cannot fill {counted(num_shards, 'shard')}",
            f"give more text, or a smaller {flag}",
        )
    return [nominal - 1] + [nominal - (excess > 0)] * (num_shards - 1)


def shard(
    inputs: Sequence[Path], output_dir: Path, num_shards: int, flag: str = "--num_shards"
) -> tuple[int, int]:
    """Chop the examples of `inputs`, in this order, into equal shards.

    Writes `part_<number>_of_<count>.hdf5`, and keeps a shard that exists already with the
    right number of rows and is not older than the inputs. Holds one input file and one shard in
    memory.

    Returns how many shards were written, and how many existed already.
    """
    sizes = shard_sizes(sum(shard_rows(path) for path in inputs), num_shards, flag)
    output_dir.mkdir(parents=True, exist_ok=True)
    paths = [
        output_dir / f"part_{number:05d}_of_{num_shards:05d}.hdf5" for number in range(num_shards)
    ]
    newest = max(path.stat().st_mtime_ns for path in inputs)
    there = [
        path.is_file() and path.stat().st_mtime_ns >= newest and shard_rows(path) == size
        for path, size in zip(paths, sizes, strict=True)
    ]
    if not all(there):
        pieces = _chop(inputs, sizes)
        statistics = TextStatistics()
        for path, skip in tqdm(list(zip(paths, there, strict=True)), "shards", unit="file"):
            arrays = next(pieces)
            statistics += text_statistics.count_examples(arrays)
            if not skip:
                write_shard(path, arrays)
        text_statistics.tell(f"the {counted(num_shards, 'shard')}", statistics)
    return there.count(False), there.count(True)


def to_varlength(source: Path, output: Path) -> None:
    """Write a fixed-length shard in the form without padding: no input_mask."""
    arrays = read_arrays(source)
    write_varlength_shard(output, arrays)
    text_statistics.tell(output.name, text_statistics.count_examples(arrays))


def checksum(path: Path) -> str:
    """The md5 of a shard, in the form in which it is published.

    It is the md5 of the list of the rows' md5s, and a row's is that of its list of token
    ids. A list is hashed as Python prints it, as in the reference's script.
    """
    return md5_of([md5_of(row.tolist()) for row in read_token_rows(path)])


def prepare(settings: PrepareSettings) -> list[str]:
    """Text files -> `2048_shards_uncompressed/` and `eval_set_uncompressed/`.

    What is trained on is described in held_out.py. The examples of each text go to
    `output_dir/work/`, which is removed at the end. A rerun keeps every whole file that its
    settings would make in the same way. It needs disk space for the examples twice, and `jobs`
    times the memory of `create_file`. Figures and warnings of each stage go to stderr.

    Returns lines that say what was made and what existed already.
    Raises UserError for bad input, and where `write_manifest` refuses changed settings.
    """
    files = OutputFiles(settings.output_dir)
    files.require_apart(settings.text_dir, settings.eval_text, settings.text.vocab)
    vocab = settings.text.vocab
    found = held_out.candidates(
        settings.text_dir, settings.eval_text, vocab, settings.allow_missing_parts
    )
    # before any work, as it may be wrong
    vocabulary = Vocabulary.load(vocab, settings.text.lower_case)
    training = held_out.training_texts(found, settings.eval_text, read_notes(files), settings.jobs)
    if training.left_out:
        print(f"Left out of the training text: {listed(training.left_out, 10)}", file=sys.stderr)
    text_statistics.warn(training.warnings)
    notes = {
        "texts": {text.path.name: text.notes for text in training.texts},
        "eval_bytes": settings.eval_text.stat().st_size,
    }
    messages = write_manifest(files, _manifest(settings, training), notes)
    if files.finished.is_file():
        there = len(list(files.shards.glob("part*.hdf5")))
        if there == settings.num_shards and files.picked(settings.num_eval_examples).is_file():
            return [f"{settings.output_dir} is finished already: nothing to do"]
        messages.append("files of the finished data set are gone: making it again")
        files.finished.unlink()

    for directory in (files.work, files.shards, files.evaluation, files.eval_examples.parent):
        directory.mkdir(parents=True, exist_ok=True)
    inputs = [files.examples(text.path.name) for text in training.texts]
    tasks = {text.path: output for text, output in zip(training.texts, inputs, strict=True)}
    tasks[settings.eval_text] = files.eval_examples
    missing = {text: output for text, output in tasks.items() if not output.is_file()}
    without = {text.path: text.without for text in training.texts}
    _create_all(missing, without, settings)
    messages.append(
        f"examples: {counted(len(missing), 'file')} made, {len(tasks) - len(missing)} there"
    )
    _tell_figures("the training text", inputs, str(vocabulary))
    _tell_figures("the evaluation text", [files.eval_examples], str(vocabulary))
    picked = files.picked(settings.num_eval_examples)
    if not picked.is_file():
        pick_file(files.eval_examples, picked, settings.num_eval_examples, "--num_eval_examples")
    made, there = shard(inputs, files.shards, settings.num_shards, "--shards")
    messages.append(f"shards: {made} made, {there} there")
    kept = sum(shard_sizes(sum(shard_rows(path) for path in inputs), settings.num_shards))
    messages.append(
        f"{counted(kept, 'training example')} in {counted(settings.num_shards, 'shard')}"
    )
    messages.append(f"{counted(settings.num_eval_examples, 'evaluation example')}: {picked}")
    write_whole(settings.output_dir / "vocab.txt", read_bytes(settings.text.vocab))
    write_whole(files.finished, json.dumps({"training_examples": kept}) + "\n")
    shutil.rmtree(files.work)
    return messages


def _tell_figures(what: str, outputs: Sequence[Path], vocabulary: str) -> None:
    """Print the figures that `create_file` kept."""
    kept = [path for path in map(figures_of, outputs) if path.is_file()]
    figures = [TextStatistics(**json.loads(path.read_text(encoding="utf-8"))) for path in kept]
    if len(figures) < len(outputs):  # made by a version that kept none
        what += f" ({len(figures)} of {counted(len(outputs), 'file')})"
    text_statistics.tell(what, sum(figures, TextStatistics()), vocabulary=vocabulary)


def _manifest(settings: PrepareSettings, training: held_out.TrainingTexts) -> dict:
    """What the data set depends on, for `prepare.json`."""
    return {
        "texts": {text.path.name: text.identity for text in training.texts},
        "eval_text": training.eval_digest,
        "vocab": hashlib.md5(read_bytes(settings.text.vocab)).hexdigest(),
        "examples": dataclasses.asdict(settings.text.examples),
        "seed": settings.text.seed,
        "lower_case": settings.text.lower_case,
        "num_shards": settings.num_shards,
        "num_eval_examples": settings.num_eval_examples,
    }


def _lines(path: Path, without: frozenset[str], is_document: bool) -> list[str]:
    """The lines of one text file, without the line ends and without some documents."""
    text = read_sentences(path)
    if without:
        documents = held_out.documents_of(text)
        kept = [text for text in documents if held_out.document_digest(text) not in without]
        text = "\n\n".join(kept)
    lines = text.removesuffix("\n").split("\n")
    return [*filter(str.strip, lines), ""] if is_document else lines


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


def _create_all(
    tasks: dict[Path, Path], without: dict[Path, frozenset[str]], settings: PrepareSettings
) -> None:
    """Create the examples of every text, in parallel processes; the first error ends all."""
    if not tasks:
        return
    total = sum(text.stat().st_size for text in tasks)
    calls = {
        text: (
            [text],
            output,
            settings.text,
            without.get(text, frozenset()),
            False,
            figures_of(output),
        )
        for text, output in tasks.items()
    }
    finished = 0
    with tqdm(total=total, desc="examples", unit="B", unit_scale=True) as bar:

        def done(text: Path, _: TextStatistics) -> None:
            nonlocal finished
            finished += 1
            bar.set_postfix_str(f"{finished}/{len(calls)} files", refresh=False)
            bar.update(text.stat().st_size)

        run_in_processes(create_file, calls, settings.jobs, done)
