"""`doctor`: what this machine can run, what is missing, and how to fix it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from bert_pretraining import config, topology
from bert_pretraining.config import Config
from bert_pretraining.doctor import hardware, run, software
from bert_pretraining.doctor.report import NOTE, CheckResult, describe, has_problem
from bert_pretraining.launch import add_launch_flags, split_flags
from bert_pretraining.launch.plan import LaunchFlags

DATA_FLAGS = {"data_dir", "train_dir", "eval_dir", "bert_config_path", "init_checkpoint"}
TEXT = (
    "Checks whether a launch with the same flags can start on this machine. Without --name and "
    "--config it checks for one rank on each GPU, or one on the CPU. Data and checkpoint are "
    "checked if flags name them. Exit code 0 if training can start, else 1."
)


def main(arguments: list[str]) -> int:
    """Print every result; return 1 if training could not start, else 0."""
    parser = config.FlagParser(
        prog="python -m bert_pretraining doctor", allow_abbrev=False, description=TEXT
    )
    parser.add_argument(
        "--json", action="store_true", help="print the results as JSON (default: as text)"
    )
    add_launch_flags(parser)
    config.add_config_flags(parser)
    values = vars(parser.parse(arguments))
    as_json = values.pop("json")
    flags, settings = split_flags(values)
    results = list(software.results())
    results += _unless_packages_lack("launch", lambda: _launch_results(settings, flags))
    if as_json:
        ok = not has_problem(results)
        print(json.dumps({"ok": ok, "findings": [f.to_json() for f in results]}, indent=2))
    else:
        print(describe(results))
    return int(has_problem(results))


def _launch_results(settings: dict[str, object], flags: LaunchFlags) -> Iterator[CheckResult]:
    """The results of a launch with these flags on this machine."""
    machine = topology.read_machine(
        Path("/"), topology.query_nvidia_smi(), topology.visible_devices(os.environ)
    )
    whole_launch = "name" in settings or "config" in settings
    if not whole_launch:
        ranks = 1 if settings.get("device") == "cpu" else max(1, len(machine.gpus))
        general = {"name": "mini", "config": "CPUx1x1", "device": "auto", "nproc_per_node": ranks}
        settings = {**general, **settings}
    try:
        chosen = config.resolve(settings).config
    except ModuleNotFoundError:  # Python 3.10 without tomli: no file can be read
        if whole_launch:
            raise
        chosen = Config(**settings)
    looks_at_data = whole_launch or not DATA_FLAGS.isdisjoint(settings)
    yield from examine(chosen, flags, machine, looks_at_data)


def examine(
    settings: Config, flags: LaunchFlags, machine: topology.Machine, looks_at_data: bool
) -> Iterator[CheckResult]:
    """Check a launch of this configuration on this machine."""
    yield from _unless_packages_lack(
        "hardware", lambda: hardware.results(settings, flags, machine, looks_at_data)
    )
    yield from _unless_packages_lack("run", lambda: run.results(settings, flags, looks_at_data))


def _unless_packages_lack(
    what: str, check: Callable[[], Iterator[CheckResult]]
) -> Iterator[CheckResult]:
    """The results of `check`, up to the first that needs a package which is not installed.

    The results of `software` say which packages are missing, and how to install them.
    """
    try:
        yield from check()
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("bert_pretraining"):
            raise
        text = f"the other checks need {error.name}, which is not installed"
        yield CheckResult(what, NOTE, text, "install it, and call doctor again")
