"""Synthetic logs with a realistic learning curve, in the format of real runs."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

from bert_pretraining.logs.sinks import RankSeconds, Speed

SPEED = 4000.0  # sequences per second, without evaluations
STARTED_MS = 1_700_000_000_000


def mllog_line(key: str, value: object, time_ms: int, **metadata: object) -> str:
    """One `:::MLLOG` record."""
    kind = "INTERVAL_END" if key.endswith("_stop") else "POINT_IN_TIME"
    kind = "INTERVAL_START" if key.endswith("_start") else kind
    record = {"namespace": "", "time_ms": time_ms, "event_type": kind, "key": key}
    return ":::MLLOG " + json.dumps({**record, "value": value, "metadata": metadata})


def perflog_line(event: str, value: object, time_ms: int) -> str:
    """One `[PerfLog]` record."""
    metadata = {"file": "train.py", "lineno": 1, "time_ms": time_ms, "rank": 0}
    return "[PerfLog] " + json.dumps({"event": event, "value": value, "metadata": metadata})


def accuracy_at(samples: int, samples_to_target: float) -> float:
    """About how BERT-large learns from MLPerf's checkpoint: fast at first, then slowly to 0.72."""
    done = samples / samples_to_target
    rise = 1 / (1 + math.exp(-(done - 0.22) / 0.035))
    return 0.341 + 0.355 * rise + 0.024 * (1 - math.exp(-2.6 * max(0.0, done - 0.25))) / 0.858


def speed_figures(
    number: int, ranks: int = 8, slow: float = 1.06, step: float = 0.112
) -> dict[str, object]:
    """Figures of speed as a trainer logs them, for `write_run`.

    A step takes `step` seconds, the first one ten times as many. The slowest of the ranks, number
    5 or the last, takes `slow` times the median rank's work. Every fourth logged step waits longer
    for data. The loss scale halves now and then.
    """
    draw = random.Random(number)
    whole = step * (10 if number == 1 else 1) * draw.gauss(1, 0.01)
    data = whole * (0.10 if number % 4 == 3 else 0.01)
    seconds = {
        "data": data,
        "forward_backward": 0.72 * whole,
        "reduction": (0.12 if ranks > 1 else 0.0) * whole,
        "optimizer": 0.09 * whole,
        "other": 0.02 * whole,
    }
    own = sum(seconds[part] for part in ("data", "forward_backward", "optimizer"))
    speed = Speed(
        sequences_per_second=SPEED,
        tokens_per_second=SPEED * 250,
        flop_per_second=2.1e15,
        matrix_share=0.31,
        peak_memory=37 * 2**30,
        seconds=seconds,
        fastest=RankSeconds(0, own * (0.97 if ranks > 1 else 1)),
        slowest=RankSeconds(min(5, ranks - 1), own * (slow if ranks > 1 else 1)),
        median_seconds=own,
    )
    throughputs = {"p_whole": 3950.0, "p_train": 4010.0, "p_core": 4090.0}
    last = {"loss_scale": 65536.0 / 2 ** (number // 5)} if number else throughputs
    return {**speed.named(), **last}


def write_run(
    folder: Path,
    seed: int,
    batch_size: int = 448,
    converges: bool = True,
    eval_samples: int = 10_000,
    interval: int = 150_000,
    platform: str = "8xH200",
    speed: Callable[[int], dict[str, object]] | None = None,
) -> Path:
    """Write a run's folder with `mllog.txt` and `perflog.txt`, determined by the arguments.

    speed: what to add to the figures of logged step 1, 2, ..., and as 0 to those of FINISHED.
    """
    draw = random.Random(seed)
    to_target = draw.gauss(2_420_000, 110_000) * (1 if converges else 1.6)
    started = STARTED_MS + 1000 * seed
    mllog = [
        mllog_line("cache_clear", True, started - 60_000),
        mllog_line("init_start", None, started - 60_000),
        mllog_line("submission_benchmark", "bert", started - 59_000),
        mllog_line("submission_org", "Example", started - 59_000),
        mllog_line("submission_division", "closed", started - 59_000),
        mllog_line("submission_platform", platform, started - 59_000),
        mllog_line("seed", seed, started - 59_000),
        mllog_line("global_batch_size", batch_size, started - 59_000),
        mllog_line("opt_base_learning_rate", 0.0004, started - 59_000),
        mllog_line("init_stop", None, started - 1),
        mllog_line("run_start", None, started),
        mllog_line("block_start", None, started, first_epoch_num=1, epoch_count=1),
    ]
    perflog = [perflog_line("INIT_START", None, started - 60_000)]
    time_ms, samples, evaluation, accuracy = started, 0, 0, 0.0
    while accuracy < 0.72 and samples < 3_000_000:
        steps = math.ceil(evaluation * interval / batch_size)
        time_ms += int((steps * batch_size - samples) / (SPEED * draw.gauss(1, 0.01)) * 1000)
        samples = steps * batch_size
        accuracy = accuracy_at(samples, to_target) + draw.gauss(0, 0.0004)
        loss = 4.47 - 4.4 * accuracy + draw.gauss(0, 0.003)
        event, figures = "INIT_EVALUATION", {"eval_loss": loss, "eval_mlm_accuracy": accuracy}
        if evaluation:
            event, figures["global_steps"] = "EVALUATION", steps
            step = {
                "loss": loss + draw.gauss(0, 0.05),
                "mlm_acc": accuracy + draw.gauss(0, 0.01),
                "num_trained_samples": samples,
                "global_steps": steps,
                "learning_rate": 0.0004 * (1 - samples / 3_630_000),
                "seq/s": SPEED * draw.gauss(1, 0.01),
                **(speed(evaluation) if speed else {}),
            }
            perflog.append(perflog_line("STEP_END", step, time_ms))
        time_ms += 1500
        perflog.append(perflog_line(event, figures, time_ms))
        mllog.append(mllog_line("eval_accuracy", accuracy, time_ms, epoch_num=samples))
        evaluation += 1
    if speed:
        rate = {"flop_per_second": 6.8e15, "dtype": "bf16", "shape": [8192, 8192, 8192]}
        perflog.append(perflog_line("RUN_OUTLINE", {"matrix_rate": rate}, started))
        finished = {"converged": accuracy >= 0.72, "training_sequences_per_second": SPEED}
        perflog.append(perflog_line("FINISHED", {**finished, **speed(0)}, time_ms))
    status = "success" if accuracy >= 0.72 else "aborted"
    mllog += [
        mllog_line("train_samples", samples, time_ms),
        mllog_line("eval_samples", eval_samples, time_ms),
        mllog_line("run_stop", None, time_ms, status=status),
    ]
    folder.mkdir(parents=True)
    (folder / "mllog.txt").write_text("\n".join(mllog) + "\n")
    (folder / "perflog.txt").write_text("\n".join(perflog) + "\n")
    return folder
