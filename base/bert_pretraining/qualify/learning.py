"""Does it learn? The mini data set, launched as a user does, until it reaches the target.

With --data_dir only the start checkpoint of that data is evaluated, and compared with what it is
known to have (`logs/watch_start.py`).

Figures of the mini data set: `target_accuracy`, `reached`, `steps`, `accuracy`, `start_accuracy`,
`curve` ([steps, accuracy] of each evaluation), `e2e_seconds`, `p_whole`, `p_train`, `p_core`
(sequences/s over all ranks), `precision`, `kernels`, `seed`, `batch_size` (of all ranks).
Figures with --data_dir: `start_accuracy`, `start_loss`, `evaluation_seconds`, `lowest`, `highest`
(the known band; missing for an unknown checkpoint), `precision`, `kernels`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bert_pretraining import config as configuration
from bert_pretraining.config import Config
from bert_pretraining.errors import TrainingError, UserError
from bert_pretraining.logs.reading.events import PERFLOG_TOKEN, Event, mllog_events, perflog_events
from bert_pretraining.logs.sinks import EvaluationSetFacts, RunOutline
from bert_pretraining.logs.watch_start import known_start
from bert_pretraining.preparation.mini import MiniSettings, make_mini
from bert_pretraining.qualify.context import Context
from bert_pretraining.qualify.record import FAIL, NOTE, PASS, Finding
from bert_pretraining.qualify.stages import Tell, ranks_limit
from bert_pretraining.runtime import rank_variables

MINI = {"name": "mini", "config": "CPUx1x1"}
SEED, BATCH_SIZE, MINI_SHARDS = 1, 64, 16
# Of the run's settings, those that may change how well a model learns on a device.
TAKEN = (
    "precision", "kernels", "compile", "deterministic", "allow_tf32", "prove_kernels",
    "dist_backend", "gradient_dtype", "loss_scale",
    "use_cuda_graph", "batching",
)  # fmt: skip
WRONG_START = ("start_weights_useless", "start_accuracy_unusual")  # kinds of notices
USUAL_EXITS = (0, 3)  # converged, and not converged
SECONDS_TO_END = 10.0


@dataclass(frozen=True)
class Goal:
    """accuracy: of masked tokens. usual: after how many steps all measured seeds had reached it,
    the fewest and the most. most: steps until it must be reached."""

    accuracy: float
    usual: tuple[int, int]
    most: int


# Of the seeds in results/2026-11-23_mini, at evaluations after every 50 steps. The schedule ends
# after 1000 steps.
GOAL = Goal(0.72, (550, 700), 1000)
QUICK_GOAL = Goal(0.45, (150, 150), 300)


def run(context: Context, tell: Tell) -> Finding:
    """Train on the mini data set; with data of the user, evaluate its start checkpoint."""
    try:
        if real_data(context.config):
            return _start(context, tell)
        return _mini(context, tell, QUICK_GOAL if context.quick else GOAL)
    except TrainingError as error:
        return Finding(FAIL, str(error), is_late=isinstance(error, Late))


def real_data(config: Config) -> bool:
    """Whether the settings name a data set other than the mini one, which a run would make."""
    mini = configuration.resolve(dict(MINI)).config
    return config.data_dir not in (None, mini.data_dir)


# ---- the mini data set


def _mini(context: Context, tell: Tell, goal: Goal) -> Finding:
    tell("learning: the mini data set is made")
    data = context.folder / "bert_mini"
    make_mini(MiniSettings(data, num_shards=max(MINI_SHARDS, context.ranks)))
    base = configuration.resolve(dict(MINI)).config
    operators = [name for name in Config.__dataclass_fields__ if name.startswith("kernels_")]
    batch_size = max(1, BATCH_SIZE // context.ranks)
    settings = dataclasses.replace(
        base,
        **{name: getattr(context.config, name) for name in (*TAKEN, *operators)},
        device=context.device,
        nproc_per_node=context.ranks,
        train_batch_size=batch_size,
        data_dir=str(data),
        seed=SEED,
        target_mlm_accuracy=goal.accuracy,
        max_samples_termination=goal.most * batch_size * context.ranks,
    )
    try:
        run = launched(context, settings, tell)
    except Late as error:
        return late_mini(error, goal, context.ranks * batch_size)
    return judged_mini(run, goal, context.ranks * batch_size)


def late_mini(error: Late, goal: Goal, batch_size: int) -> Finding:
    """The finding on a run that did not end in time, with the figures until then."""
    figures = mini_figures(error.events, goal, batch_size)
    curve, told = figures["curve"], ""
    if curve:
        told = f"; until then accuracy {_share(curve[-1][1])} after {curve[-1][0]} steps"
    is_wrong = any(accuracy is None for _, accuracy in curve)
    return Finding(FAIL, f"{error}{told}", figures, is_late=not is_wrong)


def mini_figures(events: list[Event], goal: Goal, batch_size: int) -> dict[str, object]:
    """The figures of a run; those of its end are missing where it did not reach it."""
    last = _last(events)
    finished, outline = last.get("FINISHED", {}), last.get("RUN_OUTLINE", {})
    curve = [
        [event.value["global_steps"], event.value["eval_mlm_accuracy"]]
        for event in events
        if event.key == "EVALUATION"
    ]
    figures: dict[str, object] = {
        "target_accuracy": goal.accuracy,
        "reached": bool(finished.get("converged")),
        "curve": curve,
        "seed": SEED,
        "batch_size": batch_size,
    }
    sources = {
        "steps": (last.get("STEP_END", {}), "global_steps"),
        "start_accuracy": (last.get("INIT_EVALUATION", {}), "eval_mlm_accuracy"),
        "accuracy": (finished, "final_mlm_accuracy"),
        "e2e_seconds": (finished, "e2e_time"),
        **{name: (finished, name) for name in ("p_whole", "p_train", "p_core")},
        **{name: (outline, name) for name in ("precision", "kernels")},
    }
    figures |= {name: event[key] for name, (event, key) in sources.items() if key in event}
    if curve:
        figures.setdefault("accuracy", curve[-1][1])
    return figures


def judged_mini(events: list[Event], goal: Goal, batch_size: int) -> Finding:
    """The verdict on a run of these events. batch_size: of all ranks."""
    figures = mini_figures(events, goal, batch_size)
    steps, start, accuracy = (figures[name] for name in ("steps", "start_accuracy", "accuracy"))
    notices = [event.value["text"] for event in events if event.key == "NOTICE"]
    usual = "usual: " + " to ".join(dict.fromkeys(map(str, goal.usual)))
    if not figures["reached"]:
        words = "it learns nothing" if (accuracy or 0.0) <= start + 0.02 else "it learns too little"
        if accuracy is None or accuracy < start - 0.02:
            words = "its accuracy falls"
        reason = (
            f"{words}: {_share(accuracy)} instead of {goal.accuracy:g} after {steps} steps "
            f"({usual}), from {start:.3f} at the start: look at the stages kernels and determinism"
        )
        return Finding(FAIL, reason, figures, notices)
    speeds = ", ".join(
        f"{name} {figures[name]:.0f}"
        for name in ("p_whole", "p_train", "p_core")
        if name in figures
    )
    reason = (
        f"accuracy {accuracy:.3f} after {steps} steps ({usual}), from {start:.3f} at the start; "
        f"{speeds} sequences/s"
    )
    if notices:
        return Finding(NOTE, f"{reason}; {notices[0]}", figures, notices[1:])
    return Finding(PASS, reason, figures)


def _share(accuracy: float | None) -> str:
    return "no number" if accuracy is None else f"{accuracy:.3f}"


# ---- the start checkpoint of the user's data


def _start(context: Context, tell: Tell) -> Finding:
    settings = dataclasses.replace(
        context.config,
        device=context.device,
        nnodes=1,
        nproc_per_node=context.ranks,
        train_batch_size=1,
        gradient_accumulation_steps=1,
        max_steps=1,
        save_checkpoint=False,
        seed=SEED,
    )
    tell("learning: the start checkpoint is evaluated")
    try:
        return judged_start(launched(context, settings, tell), settings)
    except Late as error:
        if context.device != "cpu":
            raise
        # BERT-large on MLPerf's 10,000 sequences takes hours there.
        return Finding(NOTE, f"the start checkpoint is not evaluated on this CPU: {error}")


def judged_start(events: list[Event], settings: Config) -> Finding:
    """The verdict on a run that began so. events: of its two logs."""
    last = _last(events)
    evaluation, outline = last["INIT_EVALUATION"], last["RUN_OUTLINE"]
    accuracy, loss = evaluation["eval_mlm_accuracy"], evaluation["eval_loss"]
    figures: dict[str, object] = {
        "start_accuracy": accuracy,
        "start_loss": loss,
        "evaluation_seconds": evaluation["time"],
        "precision": outline["precision"],
        "kernels": outline["kernels"],
    }
    notices = {
        event.value["kind"]: event.value["text"] for event in events if event.key == "NOTICE"
    }
    known = known_start(
        settings,
        RunOutline(**{**outline, "matrix_rate": None}),
        EvaluationSetFacts(**last["EVALUATION_SET"]),
        int(last["eval_samples"]),
    )
    if known is not None:
        figures |= {"lowest": known.lowest, "highest": known.highest}
    wrong = [notices[kind] for kind in WRONG_START if kind in notices]
    if accuracy is None:
        wrong = ["the start checkpoint's accuracy is no number: its weights are likely damaged"]
    if wrong:
        return Finding(FAIL, wrong[0], figures, wrong[1:])
    reason = f"the start checkpoint's MLM accuracy is {accuracy:.4f} (loss {loss:.4g})"
    if known is None:
        reason += "; neither MLPerf's checkpoint nor the mini one on its evaluation set: compared "
        return Finding(NOTE, reason + "with nothing", figures)
    reason += f"; {known.whose} has {known.lowest:g} to {known.highest:g}"
    return Finding(PASS, reason, figures)


# ---- a launch


class Late(TrainingError):
    """A run did not end in time. events: what it logged until then."""

    def __init__(self, message: str, events: list[Event]) -> None:
        super().__init__(message)
        self.events = events


def launched(context: Context, settings: Config, tell: Tell) -> list[Event]:
    """Launch a run with these settings in the context's folder, and return what it logged.

    Raises Late where it takes too long, TrainingError where it fails, UserError where its log
    cannot be read.
    """
    folder = context.folder / "stages" / "learning"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    base = configuration.resolve(dict(MINI)).config
    settings = dataclasses.replace(settings, output_dir=str(folder))
    words = [f"--{name}={value}" for name, value in MINI.items()]
    command = [sys.executable, "-m", "bert_pretraining", "launch", *words, "--nnodes=1"]
    command += flags_between(base, settings)
    limit = ranks_limit("learning", context)
    log = folder / "output.txt"
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=rank_variables.environment_without_rank(),
        )
        timer, is_late = threading.Timer(limit, process.terminate), False
        timer.start()
        try:
            for line in process.stdout:
                output.write(line)
                if line.startswith(PERFLOG_TOKEN):
                    _tell_evaluation(line, tell)
            code = process.wait()
        finally:
            is_late = timer.finished.is_set()
            timer.cancel()
            _end(process)
    if is_late:
        # Its last line may be half a line.
        raise Late(f"the run was ended at its limit of {limit:g} s; see {log}", _logged(folder))
    if code not in USUAL_EXITS:
        raise TrainingError(f"the run ended with exit code {code}: {_error_of(log)}; see {log}")
    return _events(folder)


def flags_between(base: Config, wanted: Config) -> Iterator[str]:
    """The flags that make `wanted` of `base`."""
    for name in Config.__dataclass_fields__:
        value = getattr(wanted, name)
        if value != getattr(base, name) and name not in MINI and value is not None:
            yield f"--{name}={value}"


def _end(process: subprocess.Popen) -> None:
    """End the launcher, which ends its ranks."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS_TO_END / 2)
        process.kill()
    process.wait()


def _events(folder: Path) -> list[Event]:
    found = _logged(folder, strict=True)
    if not found:
        raise UserError(f"the run left no log in {folder}", "look at its output.txt")
    return found


def _logged(folder: Path, strict: bool = False) -> list[Event]:
    """The events of the run's two logs, of those that there are."""
    found: list[Event] = []
    for log in sorted(folder.glob("run-*/perflog.txt"))[-1:]:
        found += perflog_events(log, strict)
        if log.with_name("mllog.txt").is_file():
            found += mllog_events(log.with_name("mllog.txt"), strict)
    return found


def _last(events: list[Event]) -> dict[str, Any]:
    """Event -> the value of the last of its kind."""
    return {event.key: event.value for event in events}


def _tell_evaluation(line: str, tell: Tell) -> None:
    """Tell of a line of the log that is an evaluation; the file of the log is read strictly."""
    try:
        event = json.loads(line.removeprefix(PERFLOG_TOKEN))
    except ValueError:
        return
    if event["event"] == "EVALUATION":
        value = event["value"]
        tell(
            f"learning: step {value['global_steps']}, accuracy {_share(value['eval_mlm_accuracy'])}"
        )


def _error_of(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
    return next((line for line in reversed(lines) if line.startswith("Error: ")), lines[-1])
