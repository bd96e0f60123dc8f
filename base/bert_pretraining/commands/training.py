"""The commands `launch`, `train` and `config ...`: flags in, functions called, exit code out."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from bert_pretraining import config
from bert_pretraining import launch as launching
from bert_pretraining.commands.data import MINI_DATA_DIR, make_mini
from bert_pretraining.data import inputs
from bert_pretraining.errors import EXIT_NOT_CONVERGED, UserError
from bert_pretraining.launch import checks, cpu_instead
from bert_pretraining.runtime import output, packages, rank_reports, rank_variables
from bert_pretraining.runtime.lock import FolderLock


def launch(arguments: list[str]) -> int:
    """`launch`: start one trainer a rank; or, as a rank of another launcher, become its trainer."""
    parser = config.FlagParser(
        prog="bash run_training.sh",
        allow_abbrev=False,
        description="Start one bound trainer for each rank. The defaults below hold where neither "
        "the configuration's file nor a flag sets a value; config show prints a file's values.",
    )
    launching.add_launch_flags(parser)
    config.add_config_flags(parser)
    flags, values = launching.split_flags(vars(parser.parse(arguments)))
    is_embedded_default = not values  # launch flags choose no other configuration
    if "name" not in values and "config" not in values:
        values = {**values, "name": "mini", "config": _default_config(values.get("device"))}
    resolved = config.resolve(values)
    external = launching.external_rank(os.environ)
    if external:
        flags = launching.join(flags, resolved, external)
    if not flags.dry_run:
        _print_notice(cpu_instead.notice(resolved.config), external)
    lacks_mini_data = is_embedded_default and not Path(MINI_DATA_DIR).exists()
    if lacks_mini_data and not flags.dry_run:
        make_mini_once()
    plan = launching.make_plan(resolved, flags, _trainer_flags(values))
    for notice in (*plan.notices, checks.crowding_notice(plan)):
        _print_notice(notice, external)
    if flags.dry_run:
        print(launching.describe(plan), flush=True)
        _print_what_is_missing(plan, lacks_mini_data)
        return 0
    # The ranks find out themselves, and save. With --log_dir their output is in its files.
    output.when_lost(lambda _: None)
    if external:
        return launching.run_external_rank(plan, external)

    def check() -> None:
        inputs.data_paths(resolved.config)  # fail here, once, and not on every rank

    return _exit_code(launching.run(plan, check), flags.exit_zero_without_target)


def _print_notice(notice: str | None, external: launching.ExternalRank | None) -> None:
    """Print a notice once on each machine."""
    if notice and (external is None or external.local_rank == 0):
        print(f"Notice: {notice}", file=sys.stderr)


def make_mini_once() -> None:
    """Make the mini data set, unless it is there.

    A launcher such as torchrun or mpirun calls this in every rank of a machine at the same time:
    the process that gets the lock makes the data set, the others wait and find it. A machine
    with a disk of its own makes its own.
    """
    data_dir = Path(MINI_DATA_DIR)
    fix = f"run in a folder that you can write to, or pass --data_dir (not {MINI_DATA_DIR})"
    with FolderLock(data_dir.parent, name="the folder", fix=fix, wait=True):
        if data_dir.exists():
            return
        try:
            make_mini([])
        except UserError:
            # On a file system without locks, another process may have been faster. The data set
            # gets its name only when it is complete.
            if not data_dir.exists():
                raise


def _exit_code(earned: int, zero_without_target: bool) -> int:
    """What --exit_zero_without_target makes of the exit code."""
    return 0 if zero_without_target and earned == EXIT_NOT_CONVERGED else earned


def _print_what_is_missing(plan: launching.Plan, lacks_mini_data: bool) -> None:
    """For --dry_run: what a launch on this machine would refuse, on stderr, below the plan.

    It is no error, because the plan may be for another machine.
    """
    settings = plan.resolved.config
    if lacks_mini_data:
        notes = [f"{MINI_DATA_DIR} not found here; the launch would make it first"]
    else:
        found = inputs.faults(settings)
        notes = [f"a launch on this machine would be refused: {fault}" for fault in found]
    try:
        checks.check_network(plan)
    except UserError as refusal:
        notes.append(f"a launch on this machine would be refused: {refusal}")
    if packages.folder_of("torch") is not None:  # the plan needs no PyTorch
        try:
            notes += filter(None, [cpu_instead.notice(settings)])
        except UserError as refusal:
            notes.append(f"a launch on this machine would be refused: {refusal}")
    for note in notes:
        print(f"Note: {note}", file=sys.stderr)


def _default_config(device: object) -> str:
    """The configuration of a launch without --name and --config."""
    if device == "cpu":
        return "CPUx1x2"
    from bert_pretraining.runtime import device as devices

    return "GPUx1x1" if devices.seen() else "CPUx1x2"


def _trainer_flags(values: dict[str, object]) -> list[str]:
    """The parsed flags as the words of a command line."""
    words = []
    for name, value in values.items():
        words += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    return words


def train(arguments: list[str]) -> int:
    """`train`: one trainer, in this process."""
    parser = config.FlagParser(prog="python -m bert_pretraining train", allow_abbrev=False)
    parser.add_argument(
        launching.EXIT_ZERO_FLAG, action="store_true", help=launching.EXIT_ZERO_HELP
    )
    config.add_config_flags(parser)
    values = vars(parser.parse(arguments))
    zero_without_target = values.pop("exit_zero_without_target")
    resolved = config.resolve(values)

    if launching.STARTED_VARIABLE not in os.environ:  # else the launcher has said it
        _print_notice(cpu_instead.notice(resolved.config), launching.external_rank(os.environ))

    from bert_pretraining.runtime import process_group
    from bert_pretraining.training import train

    rank_reports.show_stacks_on_request()
    earned = train.main(resolved)
    # The launcher reads the exit code from the report: for torchrun, a rank's code 3 is a failure.
    if rank_reports.record_finish(rank_variables.own_rank(), earned):
        process_group.wait_for_all_to_finish()
        rank_reports.leave(0)
    process_group.stop()
    return _exit_code(earned, zero_without_target)


def config_show(arguments: list[str]) -> None:
    parser = config.FlagParser(prog="python -m bert_pretraining config show", allow_abbrev=False)
    config.add_config_flags(parser)
    print(config.show(config.resolve(vars(parser.parse(arguments)))))


def config_list(arguments: list[str]) -> None:
    if arguments:
        raise UserError(f"config list takes no flags, but {arguments[0]} was given", "leave it out")
    for name, stem in config.config_names():
        print(f"--name {name} --config {stem}")


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "launch": launch,
    "train": train,
    "rank": launching.run_rank,
    "config show": config_show,
    "config list": config_list,
}
