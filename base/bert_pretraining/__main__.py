"""The command line: `python -m bert_pretraining COMMAND ...`."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from pathlib import Path

from bert_pretraining import __version__, config, launch, outcome
from bert_pretraining.errors import EXIT_CONVERGED, EXIT_CRASH, EXIT_USAGE, TrainingError, UserError

USAGE = """usage: python -m bert_pretraining COMMAND [flags]

  launch            start one bound trainer a rank (bash run_training.sh is the same)
  train             one trainer alone, in this process
  config show       the resolved configuration, and where each value came from
  config list       every configuration that ships
  data make-mini    make the mini data set
  version           the package's version

COMMAND --help lists the flags of a command.
Exit codes: 0 target reached, 3 finished without reaching it, 2 bad input, 1 crash.
"""

MINI_DATA_DIR = "data/datasets/bert_mini"


def main() -> int:
    """Run one command; errors become one line and an exit code."""
    rank = int(os.environ.get("RANK", 0))
    try:
        return _dispatch(sys.argv[1:])
    except UserError as error:
        if not outcome.record_failure(rank, EXIT_USAGE, str(error)):
            print(f"Error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except TrainingError as error:
        if not outcome.record_failure(rank, EXIT_CRASH, str(error)):
            print(f"Error: {error}", file=sys.stderr)
        return EXIT_CRASH
    except KeyboardInterrupt:
        print("Interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        detail = traceback.format_exc()
        message = f"{type(error).__name__}: {error}"
        if not outcome.record_failure(rank, EXIT_CRASH, message, detail):
            print(detail, file=sys.stderr, end="")
        return EXIT_CRASH


def _dispatch(arguments: list[str]) -> int:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if command in ("config", "data"):
        command = f"{command} {rest[0] if rest else ''}".strip()
        rest = rest[1:]
    commands = {
        "launch": _launch,
        "train": _train,
        "rank": launch.run_rank,
        "config show": _config_show,
        "config list": _config_list,
        "data make-mini": _make_mini,
        "version": _version,
    }
    if command not in commands:
        known = [name for name in commands if name != "rank"]
        raise UserError(f"unknown command '{command}'{config.nearest(command, known)} (see --help)")
    return commands[command](rest) or 0


def _launch(arguments: list[str]) -> int:
    parser = config.FlagParser(prog="bash run_training.sh", allow_abbrev=False)
    launch.add_launch_flags(parser)
    config.add_config_flags(parser)
    flags, values = launch.split_flags(vars(parser.parse(arguments)))
    if "name" not in values and "config" not in values:
        values = {**values, "name": "mini", "config": _embedded_config(values.get("device"))}
    resolved = config.resolve(values)
    if not arguments and not Path(MINI_DATA_DIR).exists():
        _make_mini([])
    plan = launch.make_plan(resolved, flags, _trainer_flags(values))
    if flags.dry_run:
        print(launch.describe(plan))
        return 0
    config.data_paths(resolved.config)  # fail here, once, rather than on every rank
    return launch.run(plan)


def _embedded_config(device: object) -> str:
    """The configuration of a launch without --name and --config."""
    if device == "cpu":
        return "CPUx1x2"
    import torch

    return "GPUx1x1" if torch.cuda.is_available() else "CPUx1x2"


def _trainer_flags(values: dict[str, object]) -> list[str]:
    """Parsed flags -> the words of a command line."""
    words = []
    for name, value in values.items():
        words += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    return words


def _train(arguments: list[str]) -> int:
    parser = config.FlagParser(prog="python -m bert_pretraining train", allow_abbrev=False)
    config.add_config_flags(parser)
    resolved = config.resolve(vars(parser.parse(arguments)))

    from bert_pretraining import train

    earned = train.main(resolved)
    # Under the launcher, to have finished is no failure: it reads what was earned.
    return 0 if outcome.record_finish(int(os.environ.get("RANK", 0)), earned) else earned


def _config_show(arguments: list[str]) -> None:
    parser = config.FlagParser(prog="python -m bert_pretraining config show", allow_abbrev=False)
    config.add_config_flags(parser)
    print(config.show(config.resolve(vars(parser.parse(arguments)))))


def _config_list(arguments: list[str]) -> None:
    if arguments:
        raise UserError(f"config list takes no flags, not {arguments[0]}")
    for name, stem in config.config_names():
        print(f"--name {name} --config {stem}")


def _make_mini(arguments: list[str]) -> None:
    parser = config.FlagParser(prog="python -m bert_pretraining data make-mini", allow_abbrev=False)
    parser.add_argument("--output_dir", default=MINI_DATA_DIR, help=f"({MINI_DATA_DIR})")
    parser.add_argument("--num_shards", type=int, default=16, help="(16; 2048 as the real one)")
    parser.add_argument("--max_seq_length", type=int, default=64, help="(64)")
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

    from bert_pretraining import start_checkpoint
    from bert_pretraining.data import mini

    settings = mini.MiniSettings(
        Path(values.output_dir),
        values.num_shards,
        values.max_seq_length,
        values.seed,
        values.source,
        [Path(name) for name in values.text],
    )
    report = mini.make_mini(settings)
    if not report.has_start_checkpoint:
        start_checkpoint.write_random_start(
            settings.output_dir, mini.CHECKPOINT_NAME, settings.seed
        )
    print(mini.describe(report))
    if values.pretrain:
        _pretrain_mini(settings.output_dir)


def _pretrain_mini(data_dir: Path) -> None:
    """Train from random weights to about 0.34 and package the result."""
    from bert_pretraining import start_checkpoint, train
    from bert_pretraining.data import mini

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


def _version(_: list[str]) -> None:
    print(__version__)


if __name__ == "__main__":
    sys.exit(main())
