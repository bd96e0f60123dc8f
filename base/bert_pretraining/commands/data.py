"""The command line of `data ...`: parse the flags, call preparation/, print lines.

The commands that make shards from text are in data_text.py.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from bert_pretraining import config
from bert_pretraining.commands import data_text
from bert_pretraining.commands.data_flags import add_number, add_shard_pattern, data_parser
from bert_pretraining.errors import EXIT_CONVERGED, UserError

MINI_DATA_DIR = "data/datasets/bert_mini"


def make_mini(arguments: list[str]) -> None:
    """`data make-mini`: the mini data set."""
    parser = data_parser(
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


def checksum(arguments: list[str]) -> None:
    """`data checksum FILE...`: md5s in the form of the published lists."""
    parser = data_parser("checksum", "Print the md5 of each shard as the published lists have it.")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="an HDF5 shard")
    values = parser.parse(arguments)

    from bert_pretraining.preparation import prepare as stages

    for path in values.files:
        print(f"{path.name}\t{stages.checksum(path)}")


def verify(arguments: list[str]) -> int:
    """`data verify DIR`: 0 for a sound data set, 1 for another."""
    parser = data_parser(
        "verify", "Check a whole data set. The exit code is 0 if it is sound, 1 if it is not."
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="the data set")
    parser.add_argument(
        "--json", action="store_true", help="print the report as JSON (default: as text)"
    )
    add_number(parser, "--jobs", 1, 1, "processes")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE",
        help="draw a histogram of sequence lengths as PNG (default: none)",
    )  # fmt: skip
    add_shard_pattern(parser)
    values = parser.parse(arguments)

    from bert_pretraining.preparation import verify as verifying
    from bert_pretraining.preparation.verify_plot import plot_lengths, require_plot

    if values.plot:
        require_plot(values.plot)
    report = verifying.verify(values.directory, values.jobs, values.shard_pattern)
    print(json.dumps(report.to_json(), indent=2) if values.json else report.describe())
    if values.plot:
        plot_lengths(report, values.plot)
    return 0 if report.ok else 1


def download(arguments: list[str]) -> None:
    """`data download`: the files of DeepSparkHub's mini data set."""
    from bert_pretraining.preparation import download as downloading

    parser = data_parser(
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
    "prepare": data_text.prepare,
    "create-examples": data_text.create_examples,
    "shard": data_text.shard,
    "pick-eval": data_text.pick_eval,
    "to-varlength": data_text.to_varlength,
    "checksum": checksum,
    "segment": data_text.segment,
    "verify": verify,
    "download": download,
}
