"""The command line: `python -m bert_pretraining COMMAND ...`."""

from __future__ import annotations

if __name__ == "__main__":  # before a module is imported that a file of the user may hide
    from bert_pretraining.runtime import import_path

    import_path.leave_out_the_current_folder()

import importlib
import os
import signal
import sys
import traceback

from bert_pretraining import __version__, config
from bert_pretraining.commands import checkpoint, data, predict, submission, training
from bert_pretraining.errors import (
    EXIT_CRASH,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    TrainingError,
    UserError,
)
from bert_pretraining.runtime import (
    import_path,
    output,
    packages,
    rank_reports,
    rank_variables,
    torch_variables,
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
  predict               what a checkpoint has learned: words for [MASK], the next sentence
  doctor                what this machine can run, what is missing, and how to fix it
  bench step, kernels   seconds of forward and backward: of the model, of each operator
  bench optimizer       seconds of a LAMB update, implementations in turn
  bench loader          sequences a second that reading and packing a data set gives
  qualify           is this accelerator, and this machine, right? a page with verdicts
  qualify compare   qualifications side by side: exit code 1 where one has fallen back
  qualify page      the page of a qualification, drawn again from its JSON
  plan              what N ranks would give: step, efficiency, memory, time to the target
  submission run        run after run of one command, seeds drawn, resumable as a series
  submission assemble   logs, machine and code to the tree ORG/
  submission check      a submission before it is handed in: exit code 0 if it passes, else 1
  submission rcp        samples that a global batch size must take to pass
  submission summarize  scored time and a table of the runs
  report            pictures and a page of runs' logs, beside the reference convergence points
  version           the package's version

COMMAND --help lists the flags of a command.
Exit codes: 0 target reached, 3 finished without reaching it, 4 stopped by a signal after saving,
2 bad input, 1 crash, 141 the reader of the output is gone.
"""
INTERNAL = ("rank", "qualify-stage", "qualify-worker")  # what this package starts itself
GROUPS = ("config", "data", "checkpoint", "bench", "submission")  # commands of two words


def main() -> int:
    """Run one command; errors become one line and an exit code."""
    output.prepare()
    try:
        try:
            return _run()
        finally:
            sys.stdout.flush()  # what it raises at the interpreter's end could not be handled
    except output.OutputLost as lost:
        return _fail(EXIT_USAGE, str(lost.as_error())) if lost.is_full else output.EXIT_BROKEN_PIPE


def _run() -> int:
    try:
        return _dispatch(sys.argv[1:])
    except UserError as error:
        return _fail(EXIT_USAGE, str(error))
    except TrainingError as error:
        return _fail(EXIT_CRASH, str(error), error.detail)
    except (ImportError, AttributeError) as error:
        path = import_path.hiding_file()
        if path is not None:
            return _fail(EXIT_USAGE, import_path.hidden(path))
        if not isinstance(error, ModuleNotFoundError):
            return _crashed(error)
        module = (error.name or "").split(".")[0]
        if module == "bert_pretraining":
            raise
        return _fail(EXIT_USAGE, _what_is_missing(module))
    except KeyboardInterrupt as interrupt:
        number = signal.Signals[str(interrupt)] if interrupt.args else signal.SIGINT
        return _fail(128 + number, f"ended by {number.name}")
    except Exception as error:
        refused = torch_variables.refused(error, os.environ)
        if refused is not None:
            return _fail(EXIT_USAGE, str(refused))
        return _crashed(error)


def _crashed(error: Exception) -> int:
    return _fail(EXIT_CRASH, f"{type(error).__name__}: {error}", traceback.format_exc())


def _what_is_missing(module: str) -> str:
    """The message for a module that is not installed."""
    fix = "use .venv/bin/python, which 'bash run_training.sh' makes"
    if module != "torch":  # there is no command that brings the right one for every device
        fix += f", or: {packages.how_to_install([packages.package_of(module)])}"
    return f"{sys.executable} lacks the package {module}; {fix}"


def _fail(exit_code: int, message: str, detail: str = "") -> int:
    """Print the error; in a rank, report it to the launcher, which prints it."""
    if rank_reports.record_failure(rank_variables.own_rank(), exit_code, message, detail):
        rank_reports.leave(exit_code)
    print(f"{detail}Error: {message}", file=sys.stderr)
    return exit_code


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
        **training.COMMANDS,
        **{f"data {name}": run for name, run in data.COMMANDS.items()},
        **{f"submission {name}": run for name, run in submission.COMMANDS.items()},
        **{f"checkpoint {name}": run for name, run in checkpoint.COMMANDS.items()},
        "bench step": lambda rest: _bench("step", rest),
        "bench kernels": lambda rest: _bench("kernels", rest),
        "bench optimizer": lambda rest: _bench("optimizer", rest),
        "bench loader": lambda rest: _bench("loader", rest),
        "qualify": lambda rest: _qualify("command", rest),
        "qualify-stage": lambda rest: _qualify("runner", rest),
        "qualify-worker": lambda rest: _qualify("workers", rest),
        "plan": _plan,
        "predict": predict.main,
        "report": _report,
        "doctor": _doctor,
        "version": _version,
    }
    parts = [name.split()[1] for name in commands if name.startswith(f"{command} ")]
    if parts:
        raise UserError(
            f"'{command}' needs one of: {', '.join(parts)}",
            f"see python -m bert_pretraining {command} --help",
        )
    if command not in commands:
        known = [name for name in commands if name not in INTERNAL]
        raise UserError(
            f"unknown command '{command}'{config.nearest(command, known)}",
            "see python -m bert_pretraining --help",
        )
    return commands[command](rest) or 0


def _usage_of(command: str) -> str:
    """The lines of USAGE for one of GROUPS."""
    lines = [line for line in USAGE.splitlines() if line.startswith(f"  {command} ")]
    first = f"usage: python -m bert_pretraining {command} COMMAND [flags]"
    return "\n".join([first, "", *lines, "", "COMMAND --help lists its flags.", ""])


def _bench(what: str, arguments: list[str]) -> int:
    # Imported only here, so that a launch does not wait for these modules.
    return importlib.import_module(f"bert_pretraining.bench.{what}").main(arguments)


def _qualify(what: str, arguments: list[str]) -> int:
    return importlib.import_module(f"bert_pretraining.qualify.{what}").main(arguments)


def _plan(arguments: list[str]) -> int:
    from bert_pretraining.scaling import command

    return command.main(arguments)


def _report(arguments: list[str]) -> None:
    from bert_pretraining.report import command

    command.main(arguments)


def _doctor(arguments: list[str]) -> int:
    from bert_pretraining import doctor

    return doctor.main(arguments)


def _version(_: list[str]) -> None:
    print(__version__)


if __name__ == "__main__":
    exit_code = main()
    if exit_code == EXIT_INTERRUPTED:
        # The program ends already: a second Ctrl-C would only print a traceback.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(exit_code)
