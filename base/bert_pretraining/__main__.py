"""The command line: `python -m bert_pretraining COMMAND ...`."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from bert_pretraining import (
    __version__,
    checkpoint_commands,
    config,
    data_commands,
    inputs,
    launch,
    outcome,
    submission_commands,
)
from bert_pretraining.config import Config
from bert_pretraining.errors import (
    EXIT_CRASH,
    EXIT_USAGE,
    TrainingError,
    UserError,
)

USAGE = """usage: python -m bert_pretraining COMMAND [flags]

  launch            start one bound trainer a rank (bash run_training.sh is the same)
  train             one trainer alone, in this process
  config show       the resolved configuration, and where each value came from
  config list       every configuration that ships
  data make-mini        make the mini data set
  data prepare          text -> shards and evaluation set, as the MLPerf reference makes them
  data segment          raw text to one sentence a line, training and evaluation articles
  data download         the files of DeepSparkHub's mini data set, resumable
  data verify           check a data set whole: exit code 0 if it is sound, else 1
  data create-examples, shard, pick-eval, to-varlength, checksum     its stages
  checkpoint inspect    what a checkpoint of any known kind holds
  checkpoint convert    its weights as a start checkpoint, for Hugging Face, or to resume from
  checkpoint diff       whether two hold the same weights: exit code 0 if so, else 1
  doctor                what this machine can run, what is missing, and how to mend it
  bench step, kernels   seconds of forward and backward: of the model, of each operator
  bench optimizer       seconds of a LAMB update, implementations in turn
  bench loader          sequences a second that reading and packing a data set gives
  submission run        run after run of one command, seeds drawn, resumable as a series
  submission assemble   logs, machine and code to the tree ORG/
  submission check      a submission before it is handed in: exit code 0 if it passes, else 1
  submission rcp        samples that a global batch size must take to pass
  submission summarize  scored time and a table of the runs
  report            pictures and a page of runs' logs, beside the reference convergence points
  version           the package's version

COMMAND --help lists the flags of a command.
Exit codes: 0 target reached, 3 finished without reaching it, 4 stopped by a signal after saving,
2 bad input, 1 crash.
"""
GROUPS = ("config", "data", "checkpoint", "bench", "submission")  # commands of two words


def main() -> int:
    """Run one command; errors become one line and an exit code."""
    try:
        return _dispatch(sys.argv[1:])
    except UserError as error:
        return _fail(EXIT_USAGE, str(error))
    except TrainingError as error:
        return _fail(EXIT_CRASH, str(error), error.detail)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "bert_pretraining":
            raise
        return _fail(
            EXIT_USAGE,
            f"{sys.executable} lacks the package {error.name}; use .venv/bin/python, which "
            "'bash run_training.sh' makes, or: python -m pip install -r requirements.txt",
        )
    except KeyboardInterrupt as interrupt:
        number = signal.Signals[str(interrupt)] if interrupt.args else signal.SIGINT
        return _fail(128 + number, f"ended by {number.name}")
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        return _fail(EXIT_CRASH, message, traceback.format_exc())


def _fail(exit_code: int, message: str, detail: str = "") -> int:
    """Show what ended this process, or, of a rank, leave it to the launcher to show."""
    if outcome.record_failure(int(os.environ.get("RANK", 0)), exit_code, message, detail):
        _leave(exit_code)
    print(f"{detail}Error: {message}", file=sys.stderr)
    return exit_code


def _leave(exit_code: int) -> NoReturn:
    """End a rank without clean-up: gloo's threads may wait for ranks that are gone, and abort."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _dispatch(arguments: list[str]) -> int:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if command in GROUPS and rest[:1] in (["-h"], ["--help"], ["help"]):
        print(_usage_of(command), end="")
        return 0
    if command in GROUPS and rest:
        command, rest = f"{command} {rest[0]}", rest[1:]
    commands = {
        "launch": _launch,
        "train": _train,
        "rank": launch.run_rank,
        "config show": _config_show,
        "config list": _config_list,
        **{f"data {name}": run for name, run in data_commands.COMMANDS.items()},
        **{f"submission {name}": run for name, run in submission_commands.COMMANDS.items()},
        **{f"checkpoint {name}": run for name, run in checkpoint_commands.COMMANDS.items()},
        "bench step": lambda rest: _bench("step", rest),
        "bench kernels": lambda rest: _bench("kernels", rest),
        "bench optimizer": lambda rest: _bench("optimizer", rest),
        "bench loader": lambda rest: _bench("loader", rest),
        "report": _report,
        "doctor": _doctor,
        "version": _version,
    }
    parts = [name.split()[1] for name in commands if name.startswith(f"{command} ")]
    if parts:
        raise UserError(f"'{command}' needs one of: {', '.join(parts)} (see {command} --help)")
    if command not in commands:
        known = [name for name in commands if name != "rank"]
        raise UserError(f"unknown command '{command}'{config.nearest(command, known)} (see --help)")
    return commands[command](rest) or 0


def _usage_of(command: str) -> str:
    """The lines of USAGE that concern one of GROUPS."""
    lines = [line for line in USAGE.splitlines() if line.startswith(f"  {command} ")]
    first = f"usage: python -m bert_pretraining {command} COMMAND [flags]"
    return "\n".join([first, "", *lines, "", "COMMAND --help lists its flags.", ""])


def _launch(arguments: list[str]) -> int:
    parser = config.FlagParser(prog="bash run_training.sh", allow_abbrev=False)
    launch.add_launch_flags(parser)
    config.add_config_flags(parser)
    flags, values = launch.split_flags(vars(parser.parse(arguments)))
    if "name" not in values and "config" not in values:
        values = {**values, "name": "mini", "config": _embedded_config(values.get("device"))}
    resolved = config.resolve(values)
    without_flags = {argument.replace("-", "_") for argument in arguments} <= {"__dry_run"}
    makes_data = without_flags and not Path(data_commands.MINI_DATA_DIR).exists()
    if makes_data and not flags.dry_run:
        data_commands.make_mini([])
    placed = launch.placed_rank(os.environ)
    if placed:
        flags = launch.join(flags, resolved, placed)
    plan = launch.make_plan(resolved, flags, _trainer_flags(values))
    if plan.notice and (placed is None or placed.local_rank == 0):
        print(f"Notice: {plan.notice}", file=sys.stderr)
    if flags.dry_run:
        print(launch.describe(plan), flush=True)
        _note_what_lacks(resolved.config, makes_data)
        return 0

    def check() -> None:
        inputs.data_paths(resolved.config)  # fail here, once, rather than on every rank

    if placed:
        check()
        return launch.run_placed(plan, placed)
    return launch.run(plan, check)


def _note_what_lacks(settings: Config, makes_data: bool) -> None:
    """What a launch of the plan just shown would refuse on this machine, on stderr.

    No error: a plan may be for another machine. Last, so that it stands below the plan.
    """
    if makes_data:
        notes = [f"{data_commands.MINI_DATA_DIR} not found here; the launch would make it first"]
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


def _train(arguments: list[str]) -> int:
    parser = config.FlagParser(prog="python -m bert_pretraining train", allow_abbrev=False)
    config.add_config_flags(parser)
    resolved = config.resolve(vars(parser.parse(arguments)))

    from bert_pretraining import distributed, train

    outcome.show_stacks_on_request()
    earned = train.main(resolved)
    # Under the launcher, to have finished is no failure: it reads what was earned.
    if outcome.record_finish(int(os.environ.get("RANK", 0)), earned):
        _leave(0)
    distributed.stop()
    return earned


def _config_show(arguments: list[str]) -> None:
    parser = config.FlagParser(prog="python -m bert_pretraining config show", allow_abbrev=False)
    config.add_config_flags(parser)
    print(config.show(config.resolve(vars(parser.parse(arguments)))))


def _config_list(arguments: list[str]) -> None:
    if arguments:
        raise UserError(f"config list takes no flags, not {arguments[0]}")
    for name, stem in config.config_names():
        print(f"--name {name} --config {stem}")


def _bench(what: str, arguments: list[str]) -> int:
    # Only now: a launch should not wait for what measuring needs.
    return importlib.import_module(f"bert_pretraining.bench.{what}").main(arguments)


def _report(arguments: list[str]) -> None:
    from bert_pretraining.report import command

    command.main(arguments)


def _doctor(arguments: list[str]) -> int:
    from bert_pretraining import doctor

    return doctor.main(arguments)


def _version(_: list[str]) -> None:
    print(__version__)


if __name__ == "__main__":
    sys.exit(main())
