"""Can a run start here? What `doctor` checks for a launch with these settings.

A problem of `doctor` is a fail, and a note of it a note. A note about a precision that the run does
not use is left to the stage `kernels`. The stage `software` has the results about packages.

Figures: `checks`, name -> status, "OK", "note" or "problem"; `problems`, `notes`: how many.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from bert_pretraining import topology
from bert_pretraining.config import Config
from bert_pretraining.doctor import examine
from bert_pretraining.doctor.report import NOTE as DOCTOR_NOTE
from bert_pretraining.doctor.report import PROBLEM, CheckResult
from bert_pretraining.launch.plan import LaunchFlags
from bert_pretraining.qualify.context import Context
from bert_pretraining.qualify.learning import real_data
from bert_pretraining.qualify.record import FAIL, NOTE, PASS, Finding
from bert_pretraining.qualify.stages import Tell

KERNELS = "kernels "  # begins the name of a result about a precision


def run(context: Context, tell: Tell) -> Finding:
    """Check a launch of this configuration, with all ranks, on this machine."""
    tell("machine: devices, CPUs, memory, disk, network")
    # `device` stays as it was asked for: with "auto", doctor tells of a device that PyTorch does
    # not see.
    settings = dataclasses.replace(
        context.config, nnodes=1, nproc_per_node=context.ranks, output_dir=str(context.folder)
    )
    machine = topology.read_machine(
        Path("/"), topology.query_nvidia_smi(), topology.visible_devices(os.environ)
    )
    results = list(examine(settings, LaunchFlags(), machine, real_data(context.config)))
    return judged(results, settings, context.device)


def judged(results: Sequence[CheckResult], settings: Config, device: str) -> Finding:
    """The verdict on these results of `doctor`. device: the type that is used."""
    used = "fp32" if device == "cpu" else settings.resolved_precision
    notes = [one for one in results if one.status == DOCTOR_NOTE]
    ignored = [one for one in notes if one.what.startswith(KERNELS) and one.what != KERNELS + used]
    counted = [one for one in notes if one not in ignored]
    problems = [one for one in results if one.status == PROBLEM]
    figures: dict[str, object] = {
        "checks": {one.what: one.status for one in results},
        "problems": len(problems),
        "notes": len(counted),
    }
    lines = told([*problems, *counted])[1:]  # the first is in the reason
    if problems:
        reason = f"no run can start: {_number(problems, 'problem')}; {first(problems)}"
        return Finding(FAIL, reason, figures, lines)
    if counted:
        reason = f"a run can start; {_number(counted, 'note')}; {first(counted)}"
        return Finding(NOTE, reason, figures, lines)
    return Finding(PASS, f"a run can start: {len(results)} checks", figures, lines)


def told(results: Iterable[CheckResult]) -> list[str]:
    """A line for each result: what was found, and what to do."""
    lines = []
    for one in results:
        text = " ".join(one.text.split())
        named = text if text.startswith(one.what) else f"{one.what}: {text}"
        lines.append(named + (f"; {one.fix}" if one.fix else ""))
    return lines


def first(results: Sequence[CheckResult]) -> str:
    """The first of them, for a reason."""
    text = told(results)[0]
    return text if len(results) == 1 else f"the first: {text}"


def _number(results: Sequence[CheckResult], word: str) -> str:
    return f"{len(results)} {word}{'s' if len(results) != 1 else ''}"
