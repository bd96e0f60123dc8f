"""`data make-mini`: a small data set in the layout of the real one, made without a network."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bert_pretraining.data.shards import SCHEMA, read_arrays, write_shard
from bert_pretraining.errors import UserError
from bert_pretraining.preparation import text_sources, text_statistics
from bert_pretraining.preparation.baselines import baselines
from bert_pretraining.preparation.examples import (
    ExampleSettings,
    create_examples,
    to_arrays,
)
from bert_pretraining.preparation.grammar import Grammar, vocabulary
from bert_pretraining.preparation.text_statistics import TextStatistics
from bert_pretraining.preparation.vocabulary import Vocabulary
from bert_pretraining.runtime.file_kind import shown
from bert_pretraining.runtime.files import whole_folder
from bert_pretraining.runtime.seeds import derive
from bert_pretraining.runtime.words import counted

TRAIN_DOCUMENTS = 4000
EVAL_DOCUMENTS = 300
EVAL_SHARE = 5  # one document in five of a text is for evaluation
MIN_EVAL_SEQUENCES = 1000
PACKAGED_CHECKPOINT = Path(__file__).with_name("mini_start.pt")
CHECKPOINT_NAME = "model.ckpt-28252.apex.pt"
TRAIN_NAME, EVAL_NAME = "2048_shards_uncompressed", "eval_set_uncompressed"
EVAL_FILE, VOCABULARY_NAME, CONFIG_NAME = "part_eval.hdf5", "vocab.txt", "bert_config.json"
CHECKPOINT_LENGTH = 64  # position embeddings of the packaged checkpoint
LENGTHS = (16, 512)  # 512 is the longest BERT takes
MAX_SHARDS = 4320  # the most that a published BERT data set has


@dataclass(frozen=True)
class MiniSettings:
    """The flags of `data make-mini`."""

    output_dir: Path
    num_shards: int = 16
    max_seq_length: int = 64
    seed: int = 12345
    source: str = "grammar"
    text: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class MiniReport:
    """The data set. `has_start_checkpoint` is False where the weights start at random.

    made: False where the same data set existed already, and nothing was changed.
    """

    output_dir: Path
    train_sequences: int
    eval_sequences: int
    mean_length: float
    vocab_size: int
    baselines: dict[str, float]
    has_start_checkpoint: bool
    made: bool = True


@dataclass(frozen=True)
class _Content:
    """All that the settings determine."""

    train: dict[str, np.ndarray]
    evaluation: dict[str, np.ndarray]
    tokens: list[str]
    figures: dict[str, TextStatistics]


def make_mini(
    settings: MiniSettings, write_random_start: Callable[[Path, str, int], None] | None = None
) -> MiniReport:
    """Make the data set. When anything fails, no `output_dir` is left behind.

    Where `output_dir` holds the same data set already, complete, nothing is changed.

    write_random_start: writes a start checkpoint for a directory's bert_config.json under
    a name, from a seed; called where the packaged one does not fit.

    Raises UserError for numbers out of bounds, a text too small, or an output directory
    that holds anything else.
    """
    for flag, value, (lowest, highest) in (
        ("--num_shards", settings.num_shards, (1, MAX_SHARDS)),
        ("--max_seq_length", settings.max_seq_length, LENGTHS),
    ):
        if not lowest <= value <= highest:
            raise UserError(
                f"{flag} {value} is out of bounds", f"pass a number from {lowest} to {highest}"
            )
    output_dir = Path(os.path.abspath(settings.output_dir))
    exists = output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir()))
    if exists:
        _require_no_difference(settings.output_dir, _difference_of_settings(settings))
    content = _content(settings)
    if exists:
        _require_no_difference(settings.output_dir, _difference_of_content(settings, content))
    else:
        _write(output_dir, settings, content, write_random_start)
        for what, figures in content.figures.items():
            text_statistics.tell(what, figures)
    return MiniReport(
        output_dir=settings.output_dir,
        train_sequences=len(content.train["input_mask"]),
        eval_sequences=len(content.evaluation["input_mask"]),
        mean_length=float(content.train["input_mask"].sum(axis=1, dtype=np.int64).mean()),
        vocab_size=len(content.tokens),
        baselines=baselines(content.train, content.evaluation),
        has_start_checkpoint=_start_checkpoint_fits(settings),
        made=not exists,
    )


def _content(settings: MiniSettings) -> _Content:
    """Make the examples in memory; UserError for a text that gives too few."""
    train_text, eval_text, tokens = _corpus(settings)
    vocab = Vocabulary(tokens, "the mini data set")
    length = settings.max_seq_length
    shape = ExampleSettings(
        max_seq_length=length, max_predictions_per_seq=max(1, round(length * 0.15)), dupe_factor=1
    )
    train, train_figures = _examples(train_text, vocab, shape, derive(settings.seed, "train"))
    evaluation, eval_figures = _examples(eval_text, vocab, shape, derive(settings.seed, "eval"))
    figures = {"the training text": train_figures, "the evaluation text": eval_figures}
    num_train, num_eval = (len(part["input_mask"]) for part in (train, evaluation))
    if num_eval < MIN_EVAL_SEQUENCES:
        raise UserError(
            f"{_name(settings)} gives {counted(num_eval, 'evaluation sequence')}, fewer than "
            f"{MIN_EVAL_SEQUENCES}",
            "give more --text",
        )
    if settings.num_shards > num_train:
        raise UserError(
            f"--num_shards {settings.num_shards}: there are {num_train} sequences only",
            "ask for fewer shards",
        )
    return _Content(train, evaluation, tokens, figures)


def _require_no_difference(output_dir: Path, difference: str | None) -> None:
    """UserError where the content of output_dir differs from what is asked for."""
    if difference is not None:
        raise UserError(
            f"{output_dir} exists and {difference}", "choose another --output_dir, or delete it"
        )


def _difference_of_settings(settings: MiniSettings) -> str | None:
    """Compare output_dir with what is asked for by the names of its files and its model's size.

    Returns what differs, None for nothing.
    """
    shards = [path.name for path in sorted((settings.output_dir / TRAIN_NAME).glob("*.hdf5"))]
    try:
        text = (settings.output_dir / CONFIG_NAME).read_text(encoding="utf-8")
        length = json.loads(text)["max_position_embeddings"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"is no complete mini data set (no {CONFIG_NAME} of one)"
    if length != settings.max_seq_length:
        return f"has --max_seq_length {length}, not {settings.max_seq_length}"
    if shards != _shard_names(settings.num_shards):
        of = shards[0].removesuffix(".hdf5").rpartition("_")[2] if shards else "0"
        if of.isdigit() and shards == _shard_names(int(of)):
            return f"has --num_shards {len(shards)}, not {settings.num_shards}"
        return f"is not complete: {len(shards)} of its shards are in {TRAIN_NAME}/"
    return None


def _difference_of_content(settings: MiniSettings, content: _Content) -> str | None:
    """Compare what is in the files of output_dir; returns what differs, None for nothing."""
    directory = settings.output_dir
    if not (directory / CHECKPOINT_NAME).is_file():
        return f"is not complete: it has no {CHECKPOINT_NAME}"
    try:
        vocabulary = (directory / VOCABULARY_NAME).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return f"is not complete: it has no {VOCABULARY_NAME}"
    if vocabulary != _vocabulary_text(content.tokens):
        return "was made of another text (--source, --text), or by another version"
    parts = [
        read_arrays(directory / TRAIN_NAME / name) for name in _shard_names(settings.num_shards)
    ]
    train = {key: np.concatenate([part[key] for part in parts]) for key in SCHEMA}
    evaluation = read_arrays(directory / EVAL_NAME / EVAL_FILE)
    for found, wanted in ((train, content.train), (evaluation, content.evaluation)):
        if not all(np.array_equal(found[key], wanted[key]) for key in SCHEMA):
            return "holds other sequences (another --seed or text, or another version)"
    return None


def describe(report: MiniReport, target: float = 0.72) -> str:
    """The lines that `data make-mini` prints."""
    if not report.made:
        return f"{report.output_dir} holds this data set already, complete: nothing to do"
    lines = [
        f"Made {report.output_dir}: {report.train_sequences:,} training and "
        f"{report.eval_sequences:,} evaluation sequences of {report.mean_length:.1f} tokens on "
        f"average, {counted(report.vocab_size, 'word piece')}",
        "Masked-token accuracy without a network, on the evaluation set: "
        + ", ".join(f"{name} {value:.3f}" for name, value in report.baselines.items())
        + f"; MLPerf's target {target:g}",
    ]
    if report.has_start_checkpoint:
        lines.append(f"Start checkpoint {CHECKPOINT_NAME}: about 0.34 before training")
    else:
        lines.append(
            f"No start checkpoint fits this text and length: {CHECKPOINT_NAME} holds random weights"
        )
    return "\n".join(lines)


def bert_config(vocab_size: int, max_seq_length: int) -> dict:
    """The mini model. A larger model, or a smaller initializer, learns far more slowly."""
    return {
        "attention_probs_dropout_prob": 0.0,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": 64,
        "initializer_range": 0.1,
        "intermediate_size": 256,
        "max_position_embeddings": max_seq_length,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "type_vocab_size": 2,
        "vocab_size": vocab_size,
    }


def _name(settings: MiniSettings) -> str:
    """Of the text, for messages."""
    if not settings.text:
        return f"--source {settings.source}"
    return f"--text {' '.join(shown(path) for path in settings.text)}"


def _corpus(settings: MiniSettings) -> tuple[str, str, list[str]]:
    """Training text, evaluation text and vocabulary."""
    if settings.source == "grammar" and not settings.text:
        train_text = Grammar(derive(settings.seed, "train text")).text(TRAIN_DOCUMENTS)
        eval_documents = EVAL_DOCUMENTS * -(-settings.max_seq_length // CHECKPOINT_LENGTH)
        eval_text = Grammar(derive(settings.seed, "eval text")).text(eval_documents)
        return train_text, eval_text, vocabulary()
    if settings.text:
        documents = text_sources.file_documents(settings.text)
    else:
        documents = text_sources.standard_library_documents()
    if len(documents) < 2 * EVAL_SHARE:
        raise UserError(
            f"{_name(settings)} has {counted(len(documents), 'document')} (separated by blank "
            "lines)",
            f"give at least {2 * EVAL_SHARE}",
        )
    held_out = [_held_out(document) for document in documents]
    texts = []
    for wanted in (False, True):
        chosen = (doc for doc, out in zip(documents, held_out, strict=True) if out is wanted)
        texts.append("\n\n".join("\n".join(document) for document in chosen))
    return texts[0], texts[1], text_sources.count_vocabulary(documents)


def _held_out(document: list[str]) -> bool:
    digest = hashlib.sha256("\n".join(document).encode()).digest()
    return digest[0] * EVAL_SHARE < 256


def _examples(
    text: str, vocab: Vocabulary, shape: ExampleSettings, seed: int
) -> tuple[dict[str, np.ndarray], TextStatistics]:
    documents = vocab.documents(text)
    figures = text_statistics.count_documents(documents, vocab.ids["[UNK]"])
    arrays = to_arrays(create_examples(documents, vocab, shape, random.Random(seed)), shape)
    return arrays, figures + text_statistics.count_examples(arrays)


def _start_checkpoint_fits(settings: MiniSettings) -> bool:
    grammar = settings.source == "grammar" and not settings.text
    fits = grammar and settings.max_seq_length == CHECKPOINT_LENGTH
    return fits and PACKAGED_CHECKPOINT.is_file()


def _shard_names(count: int) -> list[str]:
    return [f"part_{index:05d}_of_{count:05d}.hdf5" for index in range(count)]


def _vocabulary_text(tokens: list[str]) -> str:
    return "\n".join(tokens) + "\n"


def _write(
    output_dir: Path,
    settings: MiniSettings,
    content: _Content,
    write_random_start: Callable[[Path, str, int], None] | None,
) -> None:
    """Write all files, or none."""
    with whole_folder(output_dir) as staging:
        _write_files(staging, settings, content)
        if write_random_start is not None and not _start_checkpoint_fits(settings):
            write_random_start(staging, CHECKPOINT_NAME, settings.seed)


def _write_files(directory: Path, settings: MiniSettings, content: _Content) -> None:
    for name in (TRAIN_NAME, EVAL_NAME):
        (directory / name).mkdir(parents=True)
    names = _shard_names(settings.num_shards)
    bounds = np.linspace(0, len(content.train["input_mask"]), len(names) + 1).astype(int)
    for index, name in enumerate(names):
        rows = slice(bounds[index], bounds[index + 1])
        arrays = {key: array[rows] for key, array in content.train.items()}
        write_shard(directory / TRAIN_NAME / name, arrays)
    write_shard(directory / EVAL_NAME / EVAL_FILE, content.evaluation)
    vocabulary_text = _vocabulary_text(content.tokens)
    (directory / VOCABULARY_NAME).write_text(vocabulary_text, encoding="utf-8")
    config = bert_config(len(content.tokens), settings.max_seq_length)
    (directory / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
    if _start_checkpoint_fits(settings):
        shutil.copyfile(PACKAGED_CHECKPOINT, directory / CHECKPOINT_NAME)
