"""The command `qualify`: its flags, the stages in turn, the files and the exit code."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import math
import os
import platform
import time
from collections.abc import Collection
from pathlib import Path

from bert_pretraining import config as configuration
from bert_pretraining.config import Config
from bert_pretraining.errors import UserError
from bert_pretraining.qualify import runner
from bert_pretraining.qualify.context import Context
from bert_pretraining.qualify.record import FAIL, Qualification
from bert_pretraining.qualify.stages import STAGES
from bert_pretraining.runtime.file_kind import cannot_write
from bert_pretraining.runtime.signals import StopRequest
from bert_pretraining.runtime.words import counted

RECORD, PAGE = "qualification.json", "qualification.html"
CPU_LAYERS, CPU_BATCHES = 2, (1, 2, 4)
CPU_QUICK_LAYERS, CPU_QUICK_BATCHES = 1, (1,)
LAYERS, BATCHES, QUICK_BATCHES = 24, (16, 32, 48, 64, 96, 128, 192, 256), (16, 48)
QUICK_MINUTES = 0.1
EXIT_FAILED = 1
TEXT = (
    "Qualify this machine's accelerators, or its CPU: is everything right, and as fast as it "
    "should be? Runs nine stages, and writes DIR/qualification.html and .json. Exit code 0 if no "
    "stage fails, 1 if one does, 2 for wrong flags or a folder that cannot be written. 'qualify "
    "compare A.json B.json' compares; 'qualify page FILE.json' draws a page again."
)
SUBCOMMANDS = ("compare", "page")  # each a module with this function `main`


def main(arguments: list[str]) -> int:
    """Qualify, or run one of SUBCOMMANDS."""
    if arguments[:1] and arguments[0] in SUBCOMMANDS:
        # Imported only here, so that a qualification begins soon.
        module = importlib.import_module(f"bert_pretraining.qualify.{arguments[0]}")
        return module.main(arguments[1:])
    flags, config = _parse(arguments)
    context = _context(flags, config)
    wanted = [stage for stage in STAGES if not flags.only or stage.name in flags.only]
    done = Qualification(
        started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        machine=_machine(context),
        settings=_settings(context),
        stages=[],
        asked=[stage.name for stage in wanted],
    )
    context_file = _context_file(context)
    from bert_pretraining.qualify import terminal
    from bert_pretraining.qualify.page import Page, no_pictures

    shown, page = terminal.Shown(done, wanted, no_pictures()), Page(context.folder / PAGE)
    try:
        with StopRequest().listening():  # a stage's processes end with this one's
            for stage in wanted:
                page.write(done, stage)
                shown.begins(stage, stage.limit(context))
                result = runner.run_stage(stage, context, context_file, shown.progress)
                done.stages.append(result)
                shown.ended(result)
                done.write(context.folder / RECORD)
                if result.verdict == FAIL:
                    runner.require_space(context.folder)
    except BaseException:  # an interruption, too, leaves a page of what was found
        shown.close()
        with contextlib.suppress(UserError):  # why it ended is told, and matters more
            page.finish(done)
        raise
    shown.close()
    page.finish(done)
    shown.finished(context.folder / PAGE, context.folder / RECORD)
    return EXIT_FAILED if done.verdict == FAIL else 0


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, Config]:
    parser = configuration.FlagParser(
        prog="python -m bert_pretraining qualify", allow_abbrev=False, description=TEXT
    )
    add = parser.add_argument
    add("--quick", action="store_true",
        help="less than two minutes on two idle cores (default: thorough)")  # fmt: skip
    add("--minutes", type=float, metavar="M",
        help="of steady steps in the stage endurance, above 0 (default: 10; with --quick "
        f"{QUICK_MINUTES})")  # fmt: skip
    add("--ranks", type=int, metavar="N",
        help="ranks, one a device (default: one for each accelerator; two on a CPU)")  # fmt: skip
    add("--num_layers", type=int, metavar="N",
        help=f"encoder layers of the measured model (default: {LAYERS}; on a CPU "
        f"{CPU_LAYERS}, and {CPU_QUICK_LAYERS} with --quick)")  # fmt: skip
    add("--only", nargs="+", choices=[stage.name for stage in STAGES], metavar="STAGE",
        help="these stages alone: " + ", ".join(stage.name for stage in STAGES))  # fmt: skip
    configuration.add_config_flags(parser)
    values = vars(parser.parse(arguments))
    own = {name: values.pop(name) for name in ("quick", "minutes", "ranks", "num_layers", "only")}
    for name in ("minutes", "ranks", "num_layers"):
        value = own[name]
        if value is not None and not 0 < value < math.inf:
            raise UserError(
                f"--{name} {value}: it must be a number above 0", f"pass --{name} 1 or more"
            )
    if "name" not in values and "config" not in values:
        values = {"name": "mini", "config": "CPUx1x1", "device": "auto", **values}
    values.setdefault("output_dir", "output/qualify")
    own["words"] = _without(("--only", "--output_dir"), arguments)
    return argparse.Namespace(**own), configuration.resolve(values).config


def _without(flags: Collection[str], arguments: list[str]) -> list[str]:
    """The words of a command line without these flags and their values."""
    found, is_left_out = [], False
    for word in arguments:
        if word.startswith("--"):
            is_left_out = word.partition("=")[0] in flags
        if not is_left_out:
            found.append(word)
    return found


def _context(flags: argparse.Namespace, config: Config) -> Context:
    from bert_pretraining.runtime import device as devices

    device = devices.resolve(config.device)
    on_cpu = device == "cpu"
    cores = len(os.sched_getaffinity(0))
    ranks = flags.ranks or (min(2, cores) if on_cpu else devices.count(device))
    if not on_cpu and ranks > (there := devices.count(device)):
        raise UserError(
            f"--ranks {ranks}: this machine has {counted(there, 'device')} of type {device}",
            f"pass --ranks {there}",
        )
    usual = (CPU_LAYERS, CPU_BATCHES) if on_cpu else (LAYERS, BATCHES)
    quick = (CPU_QUICK_LAYERS, CPU_QUICK_BATCHES) if on_cpu else (LAYERS, QUICK_BATCHES)
    layers, batch_sizes = quick if flags.quick else usual
    return Context(
        config=config,
        device=device,
        ranks=ranks,
        layers=flags.num_layers or layers,
        batch_sizes=batch_sizes,
        minutes=flags.minutes or (QUICK_MINUTES if flags.quick else 10.0),
        quick=flags.quick,
        folder=Path(config.resolved_output_dir).absolute(),
        words=tuple(flags.words),
    )


def _context_file(context: Context) -> Path:
    """Make the folder, and write the context there. UserError where nothing can be written.

    Figures of an earlier qualification are removed: nothing may take them for this one's.
    """
    file, stages = context.folder / "context.json", context.folder / "stages"
    try:
        context.folder.mkdir(parents=True, exist_ok=True)
        for old in (context.folder / RECORD, *(stages / f"{one.name}.json" for one in STAGES)):
            old.unlink(missing_ok=True)
        context.write(file)
    except OSError as error:
        raise cannot_write(error.filename or file, error, "pass another --output_dir") from error
    return file


def _machine(context: Context) -> dict[str, object]:
    """What is qualified: device, host, versions."""
    import torch

    from bert_pretraining.bench.record import circumstances
    from bert_pretraining.runtime import device as devices

    device = torch.device(context.device, 0) if context.device != "cpu" else torch.device("cpu")
    return {
        "device": devices.name(device),
        "device_type": context.device,
        "devices": max(devices.count(context.device), 1),
        "host": platform.node(),
        **circumstances(),
        **devices.versions(context.device),
    }


def _settings(context: Context) -> dict[str, object]:
    """What must be equal for two qualifications to be comparable."""
    config = context.config
    names = [
        "precision", "kernels", "compile", "use_cuda_graph", "deterministic", "allow_tf32",
        "optimizer", "distributed_lamb", "gradient_dtype", "checkpoint_activations",
    ]  # fmt: skip
    names += [  # of an operator, where it has one of its own
        name
        for name in Config.__dataclass_fields__
        if name.startswith("kernels_") and getattr(config, name) is not None
    ]
    return {
        "quick": context.quick,
        "ranks": context.ranks,
        "layers": context.layers,
        "batch_sizes": list(context.batch_sizes),
        "minutes": context.minutes,
        **{name: getattr(config, name) for name in names},
    }
