"""The command line of `data ...`: flags in, functions of data/ called, lines out."""

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


def _parser(command: str, text: str | None = None) -> config.FlagParser:
    return config.FlagParser(
        prog=f"python -m bert_pretraining data {command}", allow_abbrev=False, description=text
    )


def _at_least(minimum: int) -> Callable[[str], int]:
    """A type for flags: an integer that is not below `minimum`."""

    def parse(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{text} is less than {minimum}")
        return value

    return parse


def _probability(text: str) -> float:
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is no probability")
    return value


def make_mini(arguments: list[str]) -> None:
    """`data make-mini`: the mini data set."""
    parser = _parser("make-mini")
    parser.add_argument("--output_dir", default=MINI_DATA_DIR, help=f"({MINI_DATA_DIR})")
    parser.add_argument("--num_shards", type=int, default=16, help="(16; 2048 as the real one)")
    parser.add_argument("--max_seq_length", type=int, default=64, help="16 to 512 (64)")
    parser.add_argument("--seed", type=int, default=12345, help="of the text (12345)")
    parser.add_argument(
        "--source", choices=("grammar", "stdlib"), default="grammar",
        help="a grammar's sentences, or the running Python's own documentation",
    )  # fmt: skip
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE", help="your own text")
    parser.add_argument(
        "--pretrain", action="store_true",
        help="train the start checkpoint anew (to about 0.34) and put it into the package",
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
            "--pretrain makes the checkpoint of the default data set: leave out "
            "--max_seq_length, --seed, --source and --text"
        )
    if values.text and values.source != "grammar":
        raise UserError("--text takes the place of --source; leave one of them out")
    report = mini.make_mini(settings, start_checkpoint.write_random_start)
    print(mini.describe(report))
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
            raise UserError("the run did not reach 0.338; the packaged checkpoint is unchanged")
        for destination in (mini.PACKAGED_CHECKPOINT, data_dir / mini.CHECKPOINT_NAME):
            start_checkpoint.package_start(Path(output_dir), destination)
            print(f"Wrote {destination}")


def _add_text_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the reference's create_pretraining_data.py, with its defaults."""
    add = parser.add_argument
    add("--vocab", type=Path, required=True, metavar="FILE", help="WordPiece tokens, one a line")
    add("--max_seq_length", type=_at_least(8), default=512, help="tokens a sequence (512)")
    add("--max_predictions_per_seq", type=_at_least(1), default=76, help="masks a sequence (76)")
    add("--masked_lm_prob", type=_probability, default=0.15, help="share of masked tokens (0.15)")
    add("--short_seq_prob", type=_probability, default=0.1, help="share of shorter targets (0.1)")
    add("--dupe_factor", type=_at_least(1), default=10, help="passes over the text (10)")
    add("--random_seed", type=int, default=12345, help="(12345)")
    add("--do_lower_case", nargs="?", const=True, default=True, type=config.parse_bool,
        metavar="BOOL", help="lower-case the text (true)")  # fmt: skip


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
        "Text of one sentence a line, blank lines between documents, to shards and evaluation set. "
        "A rerun goes on where it stopped. Memory: for each of --jobs about 100 bytes for every "
        "byte of a text file. Disk: the examples twice, 2.4 kB a sequence of 512 tokens.",
    )
    add = parser.add_argument
    add("--text_dir", type=Path, required=True, help="every file in it is training text")
    add("--eval_text", type=Path, required=True, metavar="FILE", help="evaluation text")
    add("--output_dir", type=Path, required=True, help="the new data set")
    add("--shards", type=_at_least(1), default=2048, help="(2048)")
    add("--num_eval_examples", type=_at_least(1), default=10000, help="(10000)")
    add("--jobs", type=_at_least(1), default=1, help="text files at a time (1)")
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
    parser = _parser("create-examples")
    add = parser.add_argument
    add("--input_file", type=Path, nargs="+", required=True, metavar="TEXT", help="one corpus")
    add("--output_file", type=Path, required=True, metavar="FILE", help="OUT.hdf5")
    _add_text_flags(parser)
    values = parser.parse(arguments)

    from bert_pretraining.preparation import prepare as stages

    count = stages.create_file(values.input_file, values.output_file, _text_settings(values))
    print(f"{values.output_file}: {count} examples")


def shard(arguments: list[str]) -> None:
    """`data shard`: examples -> equal shards."""
    parser = _parser(
        "shard",
        "Chop part-*.hdf5 into equal shards. As in the reference, all but an exact division drops "
        "up to one example a shard: the published checksums depend on it.",
    )
    parser.add_argument("--input_dir", type=Path, required=True, help="holds part-*.hdf5")
    parser.add_argument("--output_dir", type=Path, required=True, help="gets the shards")
    parser.add_argument("--num_shards", type=_at_least(1), default=2048, help="(2048)")
    values = parser.parse(arguments)

    from bert_pretraining.preparation import prepare as stages

    inputs = sorted(values.input_dir.glob("part-*.hdf5"))
    if not inputs:
        raise UserError(f"no part-*.hdf5 in {values.input_dir}; make them with create-examples")
    made, there = stages.shard(inputs, values.output_dir, values.num_shards)
    print(f"{values.output_dir}: {made} shards made, {there} there already")


def pick_eval(arguments: list[str]) -> None:
    """`data pick-eval`: the evaluation examples."""
    parser = _parser("pick-eval")
    parser.add_argument("--input_file", type=Path, required=True, metavar="FILE")
    parser.add_argument("--output_file", type=Path, required=True, metavar="FILE")
    parser.add_argument("--num_examples", type=_at_least(1), default=10000, help="(10000)")
    values = parser.parse(arguments)

    from bert_pretraining.preparation import prepare as stages

    stages.pick_file(values.input_file, values.output_file, values.num_examples)
    print(f"{values.output_file}: {values.num_examples} examples")


def to_varlength(arguments: list[str]) -> None:
    """`data to-varlength`: the form without padding."""
    parser = _parser("to-varlength")
    parser.add_argument("--input_file", type=Path, required=True, metavar="FILE")
    parser.add_argument("--output_file", type=Path, required=True, metavar="FILE")
    values = parser.parse(arguments)

    from bert_pretraining.preparation import prepare as stages

    stages.to_varlength(values.input_file, values.output_file)
    print(f"{values.output_file}: variable-length form of {values.input_file}")


def checksum(arguments: list[str]) -> None:
    """`data checksum FILE...`: md5s in the published lists' form."""
    if not arguments or arguments[0].startswith("-"):
        raise UserError("data checksum takes the files to sum: data checksum FILE...")

    from bert_pretraining.preparation import prepare as stages

    for name in arguments:
        print(f"{Path(name).name}\t{stages.checksum(Path(name))}")


def segment(arguments: list[str]) -> None:
    """`data segment`: raw text -> one sentence a line."""
    parser = _parser("segment")
    add = parser.add_argument
    add("--input", type=Path, nargs="+", required=True, metavar="FILE", help="raw text")
    add("--output_dir", type=Path, required=True, help="gets part-* and eval.txt")
    add("--num_eval_articles", type=_at_least(0), default=10000, help="held out (10000)")
    add("--seed", type=int, default=12345, help="of the choice of articles (12345)")
    values = parser.parse(arguments)

    from bert_pretraining.preparation import segment as segmenting

    report = segmenting.segment(
        values.input, values.output_dir, values.num_eval_articles, values.seed
    )
    print(segmenting.describe(report))


def verify(arguments: list[str]) -> int:
    """`data verify DIR`: 0 for a sound data set, 1 for another."""
    parser = _parser("verify")
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    parser.add_argument("--jobs", type=_at_least(1), default=1, help="processes (1)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="histogram of lengths as PNG")
    if not arguments or arguments[0].startswith("-"):
        raise UserError("data verify takes the data set's directory: data verify DIR [flags]")
    values = parser.parse(arguments[1:])

    from bert_pretraining.preparation import verify as verifying
    from bert_pretraining.preparation.verify_report import plot_lengths

    report = verifying.verify(Path(arguments[0]), values.jobs)
    print(json.dumps(report.to_json(), indent=2) if values.json else report.describe())
    if values.plot:
        plot_lengths(report, values.plot)
    return 0 if report.ok else 1


def download(arguments: list[str]) -> None:
    """`data download`: the files of DeepSparkHub's mini data set."""
    parser = _parser("download")
    parser.add_argument("--output_dir", type=Path, default=Path(MINI_DATA_DIR))
    parser.add_argument("--mirror", metavar="URL", help="another host's directory of these files")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these files only")
    values = parser.parse(arguments)

    from bert_pretraining.preparation import download as downloading

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
