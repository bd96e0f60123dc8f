"""The command line of the `data ...` commands that make shards from text, stage by stage."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bert_pretraining import config
from bert_pretraining.commands.data_flags import (
    add_number,
    add_shard_pattern,
    at_least,
    data_parser,
    probability,
)
from bert_pretraining.errors import UserError
from bert_pretraining.runtime.words import counted

# Those of preparation/documents.py, which is imported only where it is needed.
FORMS = ("file", "blank_line", "json", "doc_tags")

if TYPE_CHECKING:
    from bert_pretraining.preparation.prepare import TextSettings

EXAMPLE_FILES = "part-*.hdf5"  # what `data shard` chops


def segment(arguments: list[str]) -> None:
    """`data segment`: raw text -> one sentence a line."""
    parser = data_parser(
        "segment",
        "Turn raw text, plain or from WikiExtractor, into one sentence a line with a blank line "
        "after each article, and set evaluation articles apart. Files may be compressed (gzip, "
        "bz2, xz, zstd). Figures of the text, and what looks wrong with it, go to stderr.",
    )
    add = parser.add_argument
    add("--input", type=Path, nargs="+", required=True, metavar="FILE",
        help="files of raw text, or folders of them (required)")  # fmt: skip
    add("--output_dir", type=Path, required=True, metavar="DIR",
        help="for part-* and eval.txt (required)")  # fmt: skip
    add_number(parser, "--num_eval_articles", 10000, 0, "articles for evaluation")
    add("--seed", type=int, default=12345, metavar="N",
        help="any integer; decides which articles (default: %(default)s)")  # fmt: skip
    add("--documents", choices=FORMS, metavar="{" + ",".join(FORMS) + "}",
        help="what a document is: a file of plain text; paragraphs of plain text, separated by two "
        "blank lines, or by one if no two are there; the text of a JSON object, one a line; what "
        "stands in <doc ...> tags (default: guessed and printed)")  # fmt: skip
    add("--num_parts", type=at_least(1), metavar="N",
        help="parts to gather the text in, at least 1 (default: one for each file; of files that "
        "are a document each, one for every 32 MB)")  # fmt: skip
    _add_missing_parts(parser)
    values = parser.parse(arguments)

    from bert_pretraining.preparation import segment as segmenting

    report = segmenting.segment(
        values.input,
        values.output_dir,
        values.num_eval_articles,
        values.seed,
        values.num_parts,
        values.documents,
        values.allow_missing_parts,
    )
    print(segmenting.describe(report))


def _add_missing_parts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow_missing_parts", action="store_true",
        help="go on without parts that names such as part-00000-of-00500 promise (default: no)",
    )  # fmt: skip


def _add_text_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the reference's create_pretraining_data.py, with its defaults."""
    add = parser.add_argument
    add("--vocab", type=Path, required=True, metavar="FILE",
        help="WordPiece tokens, one a line (required)")  # fmt: skip
    add_number(parser, "--max_seq_length", 512, 8, "tokens of a padded sequence")
    add_number(parser, "--max_predictions_per_seq", 76, 1, "most masked tokens of a sequence")
    add("--masked_lm_prob", type=probability, default=0.15, metavar="P",
        help="share of masked tokens, 0 to 1 (default: %(default)s)")  # fmt: skip
    add("--short_seq_prob", type=probability, default=0.1, metavar="P",
        help="share of sequences that are made shorter, 0 to 1 (default: %(default)s)")  # fmt: skip
    add_number(parser, "--dupe_factor", 10, 1, "passes over the text, each with other masks")
    add("--random_seed", type=int, default=12345, metavar="N",
        help="any integer (default: %(default)s)")  # fmt: skip
    add("--do_lower_case", nargs="?", const=True, default=True, type=config.parse_bool,
        metavar="BOOL", help="lower-case the text, true or false (default: true)")  # fmt: skip


def _text_settings(values: argparse.Namespace) -> TextSettings:
    from bert_pretraining.preparation.examples import ExampleSettings
    from bert_pretraining.preparation.prepare import TextSettings

    examples = ExampleSettings(
        values.max_seq_length,
        values.max_predictions_per_seq,
        values.masked_lm_prob,
        values.short_seq_prob,
        values.dupe_factor,
    )
    return TextSettings(values.vocab, examples, values.random_seed, values.do_lower_case)


def prepare(arguments: list[str]) -> None:
    """`data prepare`: all stages."""
    parser = data_parser(
        "prepare",
        "Make shards and an evaluation set from text of one sentence a line, with blank lines "
        "between documents. A rerun goes on where the last run stopped. It needs memory of about "
        "100 bytes for every byte of a text file, for each of --jobs, and disk space for the "
        "examples twice: 2.4 kB for each sequence of 512 tokens.",
    )
    add = parser.add_argument
    add("--text_dir", type=Path, required=True, metavar="DIR",
        help="every file in it is training text but hidden files and the evaluation text, which is "
        "known by its path and its content (required)")  # fmt: skip
    add("--eval_text", type=Path, required=True, metavar="FILE",
        help="evaluation text (required)")  # fmt: skip
    add("--output_dir", type=Path, required=True, metavar="DIR",
        help="the new data set (required)")  # fmt: skip
    add_number(parser, "--shards", 2048, 1, "training files")
    add_number(parser, "--num_eval_examples", 10000, 1, "evaluation sequences")
    add_number(parser, "--jobs", 1, 1, "text files at the same time")
    _add_missing_parts(parser)
    _add_text_flags(parser)
    values = parser.parse(arguments)

    from bert_pretraining.preparation import prepare as stages

    settings = stages.PrepareSettings(
        values.text_dir,
        values.eval_text,
        values.output_dir,
        _text_settings(values),
        values.shards,
        values.num_eval_examples,
        values.jobs,
        values.allow_missing_parts,
    )
    for line in stages.prepare(settings):
        print(line)


def create_examples(arguments: list[str]) -> None:
    """`data create-examples`: one file of examples."""
    parser = data_parser("create-examples", "Make one HDF5 file of examples from text files.")
    add = parser.add_argument
    add("--input_file", type=Path, nargs="+", required=True, metavar="TEXT",
        help="text of one sentence a line; all files form one corpus (required)")  # fmt: skip
    add("--output_file", type=Path, required=True, metavar="FILE",
        help="the new HDF5 file (required)")  # fmt: skip
    add("--documents", choices=FORMS[:2], default="blank_line",
        help="file: each file is a document; blank_line: a blank line separates documents "
        "(default: %(default)s)")  # fmt: skip
    _add_text_flags(parser)
    values = parser.parse(arguments)

    from bert_pretraining.preparation import prepare as stages
    from bert_pretraining.preparation import text_statistics
    from bert_pretraining.preparation.vocabulary import Vocabulary

    for path in values.input_file:
        _require_other_output(path, values.output_file)
    settings = _text_settings(values)
    statistics = stages.create_file(
        values.input_file,
        values.output_file,
        settings,
        files_are_documents=values.documents == "file",
    )
    text_statistics.tell(
        ", ".join(str(path) for path in values.input_file[:3]),
        statistics,
        vocabulary=str(Vocabulary.load(settings.vocab, settings.lower_case)),
    )
    print(f"{values.output_file}: {counted(statistics.examples, 'example')}")


def _require_other_output(source: Path, output: Path) -> None:
    if source.exists() and output.exists() and source.samefile(output):
        raise UserError(
            f"--output_file {output} is the input, which would be lost",
            "name another --output_file",
        )


def shard(arguments: list[str]) -> None:
    """`data shard`: examples -> equal shards."""
    parser = data_parser(
        "shard",
        "Chop part-*.hdf5 into equal shards. As in the reference, up to one example for each "
        "shard is dropped where the division leaves a rest: the published checksums depend on it.",
    )
    parser.add_argument(
        "--input_dir", type=Path, required=True, metavar="DIR", help="holds part-*.hdf5 (required)"
    )
    parser.add_argument(
        "--output_dir", type=Path, required=True, metavar="DIR", help="for the shards (required)"
    )
    add_number(parser, "--num_shards", 2048, 1, "training files")
    _add_missing_parts(parser)
    add_shard_pattern(parser, EXAMPLE_FILES)
    values = parser.parse(arguments)

    from bert_pretraining.data.shard_names import shard_folder
    from bert_pretraining.preparation import prepare as stages
    from bert_pretraining.preparation.text_files import listed, require_all_parts
    from bert_pretraining.preparation.text_statistics import warn

    pattern = values.shard_pattern or EXAMPLE_FILES
    make = "make them with python -m bert_pretraining data create-examples"
    folder = shard_folder(values.input_dir, make, pattern)
    if folder.other_shards:
        others = listed(folder.other_shards)
        print(f"Left out of --input_dir, not {pattern}: {others}", file=sys.stderr)
    where = f"--input_dir {values.input_dir}"
    warn(require_all_parts(folder.names, where, values.allow_missing_parts))
    made, there = stages.shard(folder.shards, values.output_dir, values.num_shards)
    print(f"{values.output_dir}: {counted(made, 'shard')} made, {there} there already")


def pick_eval(arguments: list[str]) -> None:
    """`data pick-eval`: the evaluation examples."""
    parser = data_parser("pick-eval", "Pick evaluation examples, spread evenly over a file.")
    _add_file_flags(parser, "examples, as create-examples makes them")
    add_number(parser, "--num_examples", 10000, 1, "examples to pick")
    values = parser.parse(arguments)

    from bert_pretraining.preparation import prepare as stages

    _require_other_output(values.input_file, values.output_file)
    stages.pick_file(values.input_file, values.output_file, values.num_examples)
    print(f"{values.output_file}: {counted(values.num_examples, 'example')}")


def to_varlength(arguments: list[str]) -> None:
    """`data to-varlength`: the form without padding."""
    parser = data_parser("to-varlength", "Write a shard in NVIDIA's form without padding.")
    _add_file_flags(parser, "a fixed-length shard")
    values = parser.parse(arguments)

    from bert_pretraining.preparation import prepare as stages

    _require_other_output(values.input_file, values.output_file)
    stages.to_varlength(values.input_file, values.output_file)
    print(f"{values.output_file}: variable-length form of {values.input_file}")


def _add_file_flags(parser: argparse.ArgumentParser, what: str) -> None:
    for flag, text in (("--input_file", what), ("--output_file", "the new HDF5 file")):
        parser.add_argument(
            flag, type=Path, required=True, metavar="FILE", help=f"{text} (required)"
        )
