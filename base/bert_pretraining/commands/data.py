"""The command line of `data ...`: parse the flags, call preparation/, print lines."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from bert_pretraining import config
from bert_pretraining.errors import EXIT_CONVERGED, UserError

if TYPE_CHECKING:
    from bert_pretraining.preparation.prepare import TextSettings

MINI_DATA_DIR = "data/datasets/bert_mini"


def _parser(command: str, text: str) -> config.FlagParser:
    return config.FlagParser(
        prog=f"python -m bert_pretraining data {command}", allow_abbrev=False, description=text
    )


def _at_least(minimum: int) -> Callable[[str], int]:
    """A type for flags: an integer of at least `minimum`."""

    def parse(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{text} is less than {minimum}")
        return value

    return parse


def _add_number(
    parser: argparse.ArgumentParser, flag: str, default: int, minimum: int, text: str
) -> None:
    parser.add_argument(
        flag, type=_at_least(minimum), default=default, metavar="N",
        help=f"{text}, at least {minimum} (default: {default})",
    )  # fmt: skip


def _probability(text: str) -> float:
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is no probability; pass a number from 0 to 1")
    return value


def make_mini(arguments: list[str]) -> None:
    """`data make-mini`: the mini data set."""
    parser = _parser(
        "make-mini",
        "Make a small data set in the layout of the real one, without a network. Where the same "
        "data set exists already, nothing is changed.",
    )
    parser.add_argument(
        "--output_dir", default=MINI_DATA_DIR, help="the new data set (default: %(default)s)"
    )
    parser.add_argument(
        "--num_shards", type=int, default=16,
        help="training files, 1 to 4320; the real set has 2048 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--max_seq_length", type=int, default=64,
        help="tokens of a padded sequence, 16 to 512 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=int, default=12345, help="any integer; the text follows from it "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--source", choices=("grammar", "stdlib"), default="grammar",
        help="grammar: sentences of a small grammar; stdlib: the documentation of this Python's "
        "standard library (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--text", nargs="+", default=[], metavar="FILE",
        help="your own text files, in place of --source (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--pretrain", action="store_true",
        help="train the start checkpoint again (to about 0.34) and put it into the package "
        "(default: no)",
    )  # fmt: skip
    values = parser.parse(arguments)

    from bert_pretraining.preparation import mini, start_checkpoint

    settings = mini.MiniSettings(
        Path(values.output_dir),
        values.num_shards,
        values.max_seq_length,
        values.seed,
        values.source,
        [Path(name) for name in values.text],
    )
    defaults = mini.MiniSettings(settings.output_dir, settings.num_shards)
    if values.pretrain and settings != defaults:
        raise UserError(
            "--pretrain makes the checkpoint of the default data set",
            "leave out --max_seq_length, --seed, --source and --text",
        )
    if values.text and values.source != "grammar":
        raise UserError("--text takes the place of --source", "leave one of them out")
    report = mini.make_mini(settings, start_checkpoint.write_random_start)
    print(mini.describe(report))
    if values.pretrain and not report.made:
        raise UserError(
            f"--pretrain replaces the start checkpoint of a new data set, and {values.output_dir} "
            "exists",
            "delete it, or choose another --output_dir",
        )
    if values.pretrain:
        _pretrain_mini(settings.output_dir)


def _pretrain_mini(data_dir: Path) -> None:
    """Train from random weights to about 0.34 and package the result."""
    from bert_pretraining.preparation import mini, start_checkpoint
    from bert_pretraining.training import train

    with tempfile.TemporaryDirectory() as output_dir:
        flags = {
            "name": "mini",
            "config": "CPUx1x1",
            "data_dir": str(data_dir),
            "output_dir": output_dir,
            "init_checkpoint": "random",
            "seed": 12345,
            "target_mlm_accuracy": 0.338,
            "eval_steps": 1,
            "save_checkpoint": True,
        }
        if train.main(config.resolve(flags)) != EXIT_CONVERGED:
            raise UserError(
                "the run did not reach 0.338, so the packaged checkpoint is unchanged",
                "run it again, and look at the losses that it prints",
            )
        for destination in (mini.PACKAGED_CHECKPOINT, data_dir / mini.CHECKPOINT_NAME):
            start_checkpoint.package_start(Path(output_dir), destination)
            print(f"Wrote {destination}")


def _add_text_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the reference's create_pretraining_data.py, with its defaults."""
    add = parser.add_argument
    add("--vocab", type=Path, required=True, metavar="FILE",
        help="WordPiece tokens, one a line (required)")  # fmt: skip
    _add_number(parser, "--max_seq_length", 512, 8, "tokens of a padded sequence")
    _add_number(parser, "--max_predictions_per_seq", 76, 1, "most masked tokens of a sequence")
    add("--masked_lm_prob", type=_probability, default=0.15, metavar="P",
        help="share of masked tokens, 0 to 1 (default: %(default)s)")  # fmt: skip
    add("--short_seq_prob", type=_probability, default=0.1, metavar="P",
        help="share of sequences that are made shorter, 0 to 1 (default: %(default)s)")  # fmt: skip
    _add_number(parser, "--dupe_factor", 10, 1, "passes over the text, each with other masks")
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
    parser = _parser(
        "prepare",
        "Make shards and an evaluation set from text of one sentence a line, with blank lines "
        "between documents. A rerun goes on where the last run stopped. It needs memory of about "
        "100 bytes for every byte of a text file, for each of --jobs, and disk space for the "
        "examples twice: 2.4 kB for each sequence of 512 tokens.",
    )
    add = parser.add_argument
    add("--text_dir", type=Path, required=True, metavar="DIR",
        help="every file in it but eval.txt is training text (required)")  # fmt: skip
    add("--eval_text", type=Path, required=True, metavar="FILE",
        help="evaluation text (required)")  # fmt: skip
    add("--output_dir", type=Path, required=True, metavar="DIR",
        help="the new data set (required)")  # fmt: skip
    _add_number(parser, "--shards", 2048, 1, "training files")
    _add_number(parser, "--num_eval_examples", 10000, 1, "evaluation sequences")
    _add_number(parser, "--jobs", 1, 1, "text files at the same time")
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
    )
    for line in stages.prepare(settings):
        print(line)


def create_examples(arguments: list[str]) -> None:
    """`data create-examples`: one file of examples."""
    parser = _parser("create-examples", "Make one HDF5 file of examples from text files.")
    add = parser.add_argument
    add("--input_file", type=Path, nargs="+", required=True, metavar="TEXT",
        help="text of one sentence a line; all files form one corpus (required)")  # fmt: skip
    add("--output_file", type=Path, required=True, metavar="FILE",
        help="the new HDF5 file (required)")  # fmt: skip
    _add_text_flags(parser)
    values = parser.parse(arguments)

    from bert_pretraining.preparation import prepare as stages

    count = stages.create_file(values.input_file, values.output_file, _text_settings(values))
    print(f"{values.output_file}: {count} examples")


def shard(arguments: list[str]) -> None:
    """`data shard`: examples -> equal shards."""
    parser = _parser(
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
    _add_number(parser, "--num_shards", 2048, 1, "training files")
    values = parser.parse(arguments)

    from bert_pretraining.preparation import prepare as stages

    inputs = sorted(values.input_dir.glob("part-*.hdf5"))
    if not inputs:
        raise UserError(
            f"no part-*.hdf5 in {values.input_dir}", "make them with data create-examples"
        )
    made, there = stages.shard(inputs, values.output_dir, values.num_shards)
    print(f"{values.output_dir}: {made} shards made, {there} there already")


def pick_eval(arguments: list[str]) -> None:
    """`data pick-eval`: the evaluation examples."""
    parser = _parser("pick-eval", "Pick evaluation examples, spread evenly over a file.")
    _add_file_flags(parser, "examples, as create-examples makes them")
    _add_number(parser, "--num_examples", 10000, 1, "examples to pick")
    values = parser.parse(arguments)

    from bert_pretraining.preparation import prepare as stages

    stages.pick_file(values.input_file, values.output_file, values.num_examples)
    print(f"{values.output_file}: {values.num_examples} examples")


def to_varlength(arguments: list[str]) -> None:
    """`data to-varlength`: the form without padding."""
    parser = _parser("to-varlength", "Write a shard in NVIDIA's form without padding.")
    _add_file_flags(parser, "a fixed-length shard")
    values = parser.parse(arguments)

    from bert_pretraining.preparation import prepare as stages

    stages.to_varlength(values.input_file, values.output_file)
    print(f"{values.output_file}: variable-length form of {values.input_file}")


def _add_file_flags(parser: argparse.ArgumentParser, what: str) -> None:
    for flag, text in (("--input_file", what), ("--output_file", "the new HDF5 file")):
        parser.add_argument(
            flag, type=Path, required=True, metavar="FILE", help=f"{text} (required)"
        )


def checksum(arguments: list[str]) -> None:
    """`data checksum FILE...`: md5s in the form of the published lists."""
    parser = _parser("checksum", "Print the md5 of each shard as the published lists have it.")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="an HDF5 shard")
    values = parser.parse(arguments)

    from bert_pretraining.preparation import prepare as stages

    for path in values.files:
        print(f"{path.name}\t{stages.checksum(path)}")


def segment(arguments: list[str]) -> None:
    """`data segment`: raw text -> one sentence a line."""
    parser = _parser(
        "segment",
        "Turn raw text, plain or from WikiExtractor, into one sentence a line with a blank line "
        "after each article, and set evaluation articles apart.",
    )
    add = parser.add_argument
    add("--input", type=Path, nargs="+", required=True, metavar="FILE",
        help="raw text (required)")  # fmt: skip
    add("--output_dir", type=Path, required=True, metavar="DIR",
        help="for part-* and eval.txt (required)")  # fmt: skip
    _add_number(parser, "--num_eval_articles", 10000, 0, "articles for evaluation")
    add("--seed", type=int, default=12345, metavar="N",
        help="any integer; decides which articles (default: %(default)s)")  # fmt: skip
    values = parser.parse(arguments)

    from bert_pretraining.preparation import segment as segmenting

    report = segmenting.segment(
        values.input, values.output_dir, values.num_eval_articles, values.seed
    )
    print(segmenting.describe(report))


def verify(arguments: list[str]) -> int:
    """`data verify DIR`: 0 for a sound data set, 1 for another."""
    parser = _parser(
        "verify", "Check a whole data set. The exit code is 0 if it is sound, 1 if it is not."
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="the data set")
    parser.add_argument(
        "--json", action="store_true", help="print the report as JSON (default: as text)"
    )
    _add_number(parser, "--jobs", 1, 1, "processes")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE",
        help="draw a histogram of sequence lengths as PNG (default: none)",
    )  # fmt: skip
    values = parser.parse(arguments)

    from bert_pretraining.preparation import verify as verifying
    from bert_pretraining.preparation.verify_plot import plot_lengths

    report = verifying.verify(values.directory, values.jobs)
    print(json.dumps(report.to_json(), indent=2) if values.json else report.describe())
    if values.plot:
        plot_lengths(report, values.plot)
    return 0 if report.ok else 1


def download(arguments: list[str]) -> None:
    """`data download`: the files of DeepSparkHub's mini data set."""
    from bert_pretraining.preparation import download as downloading

    parser = _parser(
        "download",
        "Download the files of DeepSparkHub's mini data set. A rerun goes on where the last one "
        "stopped.",
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path(MINI_DATA_DIR), metavar="DIR",
        help="for the files (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--mirror", metavar="URL",
        help="a directory of these files on another host (default: DeepSparkHub's own)",
    )  # fmt: skip
    names = ", ".join(remote.name for remote in downloading.FILES)
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME",
        help=f"only these of the files {names} (default: all)",
    )  # fmt: skip
    values = parser.parse(arguments)

    for line in downloading.download(values.output_dir, values.mirror, values.only):
        print(line)


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "make-mini": make_mini,
    "prepare": prepare,
    "create-examples": create_examples,
    "shard": shard,
    "pick-eval": pick_eval,
    "to-varlength": to_varlength,
    "checksum": checksum,
    "segment": segment,
    "verify": verify,
    "download": download,
}
