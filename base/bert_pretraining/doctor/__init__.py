"""`doctor`: what this machine can run, what is missing, and how to fix it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from bert_pretraining import config, topology
from bert_pretraining.config import Config
from bert_pretraining.doctor import hardware, run, software
from bert_pretraining.doctor.report import Finding, describe, has_problem
from bert_pretraining.launch import add_launch_flags, split_flags
from bert_pretraining.launch.plan import LaunchFlags

DATA_FLAGS = {"data_dir", "train_dir", "eval_dir", "bert_config_path", "init_checkpoint"}
TEXT = (
    "Checks this machine for a launch with the same flags; without --name and --config, for a "
    "rank on each GPU, or one on the CPU. Data and checkpoint are looked at where flags name "
    "them. Exit code 1 if training could not start, else 0."
)


def main(arguments: list[str]) -> int:
    """Print every finding; 1 if one of them keeps training from starting, else 0."""
    parser = config.FlagParser(
        prog="python -m bert_pretraining doctor", allow_abbrev=False, description=TEXT
    )
    parser.add_argument("--json", action="store_true", help="the findings as JSON")
    add_launch_flags(parser)
    config.add_config_flags(parser)
    values = vars(parser.parse(arguments))
    as_json = values.pop("json")
    flags, settings = split_flags(values)
    machine = topology.read_machine(
        Path("/"), topology.query_nvidia_smi(), os.environ.get("CUDA_VISIBLE_DEVICES")
    )
    whole_launch = "name" in settings or "config" in settings
    if not whole_launch:
        ranks = 1 if settings.get("device") == "cpu" else max(1, len(machine.gpus))
        general = {"name": "mini", "config": "CPUx1x1", "device": "auto", "nproc_per_node": ranks}
        settings = {**general, **settings}
    resolved = config.resolve(settings)
    looks_at_data = whole_launch or not DATA_FLAGS.isdisjoint(settings)
    findings = list(examine(resolved.config, flags, machine, looks_at_data))
    if as_json:
        ok = not has_problem(findings)
        print(json.dumps({"ok": ok, "findings": [f.to_json() for f in findings]}, indent=2))
    else:
        print(describe(findings))
    return int(has_problem(findings))


def examine(
    settings: Config, flags: LaunchFlags, machine: topology.Machine, looks_at_data: bool
) -> Iterator[Finding]:
    """Every finding about this machine and a launch of this configuration on it."""
    yield from software.findings()
    yield from hardware.findings(settings, flags, machine, looks_at_data)
    yield from run.findings(settings, flags, looks_at_data)
