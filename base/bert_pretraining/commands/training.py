"""The command line of `launch`, `train` and `config ...`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from bert_pretraining import config
from bert_pretraining import launch as launching
from bert_pretraining.commands.data import MINI_DATA_DIR, make_mini
from bert_pretraining.config import Config
from bert_pretraining.data import inputs
from bert_pretraining.errors import UserError
from bert_pretraining.runtime import rank_reports


def launch(arguments: list[str]) -> int:
    parser = config.FlagParser(prog="bash run_training.sh", allow_abbrev=False)
    launching.add_launch_flags(parser)
    config.add_config_flags(parser)
    flags, values = launching.split_flags(vars(parser.parse(arguments)))
    if "name" not in values and "config" not in values:
        values = {**values, "name": "mini", "config": _embedded_config(values.get("device"))}
    resolved = config.resolve(values)
    without_flags = {argument.replace("-", "_") for argument in arguments} <= {"__dry_run"}
    makes_data = without_flags and not Path(MINI_DATA_DIR).exists()
    if makes_data and not flags.dry_run:
        make_mini([])
    placed = launching.placed_rank(os.environ)
    if placed:
        flags = launching.join(flags, resolved, placed)
    plan = launching.make_plan(resolved, flags, _trainer_flags(values))
    if plan.notice and (placed is None or placed.local_rank == 0):
        print(f"Notice: {plan.notice}", file=sys.stderr)
    if flags.dry_run:
        print(launching.describe(plan), flush=True)
        _note_what_lacks(resolved.config, makes_data)
        return 0

    def check() -> None:
        inputs.data_paths(resolved.config)  # fail here, once, rather than on every rank

    if placed:
        check()
        return launching.run_placed(plan, placed)
    return launching.run(plan, check)


def _note_what_lacks(settings: Config, makes_data: bool) -> None:
    """What a launch of the plan just shown would refuse on this machine, on stderr.

    No error: a plan may be for another machine. Last, so that it stands below the plan.
    """
    if makes_data:
        notes = [f"{MINI_DATA_DIR} not found here; the launch would make it first"]
    else:
        found = inputs.faults(settings)
        notes = [f"a launch on this machine would be refused: {fault}" for fault in found]
    for note in notes:
        print(f"Note: {note}", file=sys.stderr)


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


def train(arguments: list[str]) -> int:
    parser = config.FlagParser(prog="python -m bert_pretraining train", allow_abbrev=False)
    config.add_config_flags(parser)
    resolved = config.resolve(vars(parser.parse(arguments)))

    from bert_pretraining.runtime import process_group
    from bert_pretraining.training import train

    rank_reports.show_stacks_on_request()
    earned = train.main(resolved)
    # Under the launcher, to have finished is no failure: it reads what was earned.
    if rank_reports.record_finish(int(os.environ.get("RANK", 0)), earned):
        rank_reports.leave(0)
    process_group.stop()
    return earned


def config_show(arguments: list[str]) -> None:
    parser = config.FlagParser(prog="python -m bert_pretraining config show", allow_abbrev=False)
    config.add_config_flags(parser)
    print(config.show(config.resolve(vars(parser.parse(arguments)))))


def config_list(arguments: list[str]) -> None:
    if arguments:
        raise UserError(f"config list takes no flags, not {arguments[0]}")
    for name, stem in config.config_names():
        print(f"--name {name} --config {stem}")


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "launch": launch,
    "train": train,
    "rank": launching.run_rank,
    "config show": config_show,
    "config list": config_list,
}
