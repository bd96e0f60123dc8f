"""Parts of a rank and of its links from files that `bench` and `qualify` wrote."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bert_pretraining.bench.workload import BERT_LARGE
from bert_pretraining.errors import UserError
from bert_pretraining.model.bert_config import BertConfig
from bert_pretraining.runtime.file_kind import read_json
from bert_pretraining.runtime.words import counted
from bert_pretraining.scaling.collectives import Link
from bert_pretraining.scaling.rank_parts import Sourced

SAME_TOKENS = 0.01  # by which the files' average lengths may differ
FIX = (
    "pass a file of 'python -m bert_pretraining bench step --output FILE' or '... bench optimizer "
    "--output FILE', or a qualification.json"
)
OF_THIS_MODEL = "pass a file of this model, or --bert_config_path of that one"


@dataclass
class Measured:
    """What the files tell; empty or None where they do not.

    seconds: of forward and backward, by sequences of a micro-batch. files: by what was measured.
    optimizer, host, evaluation, activation: see `RankParts`. link: inside of a machine. devices:
    names of those that were measured, with their file. tokens: of a sequence of each file, on
    average. notes: what the user should know.
    """

    seconds: dict[int, list[float]] = field(default_factory=dict)
    files: dict[str, list[str]] = field(default_factory=dict)
    optimizer: Sourced | None = None
    host: Sourced | None = None
    evaluation: Sourced | None = None
    activation: Sourced | None = None
    link: Link | None = None
    link_source: str = ""
    devices: dict[str, str] = field(default_factory=dict)
    tokens: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def medians(self) -> dict[int, float]:
        """Seconds of forward and backward by sequences."""
        return {size: statistics.median(found) for size, found in self.seconds.items()}

    @property
    def source(self) -> str:
        """Of forward and backward."""
        told = (f"measured in {', '.join(paths)} ({what})" for what, paths in self.files.items())
        return "; ".join(told)

    def add(self, size: int, seconds: float, path: Path, what: str) -> None:
        """A time of forward and backward."""
        self.seconds.setdefault(size, []).append(seconds)
        paths = self.files.setdefault(what, [])
        if str(path) not in paths:
            paths.append(str(path))


def read(paths: Iterable[Path], model: BertConfig, precision: str) -> Measured:
    """What the files tell of this model in this precision.

    Raises UserError for a file that is missing, of another kind, or of another model.
    """
    found = Measured()
    for path in paths:
        content = _content(path)
        try:
            if "stages" in content:
                _qualification(found, content, path, model, precision)
            elif "results" in content and "lengths" in content:
                _step(found, content, path, model, precision)
            elif "seconds" in content and "parameters" in content:
                _optimizer(found, content, path, model)
            else:
                raise UserError(f"{path}: has no figures of a step or an optimizer", FIX)
        except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
            raise UserError(f"{path}: damaged ({type(error).__name__}: {error})", FIX) from error
    _compare(found)
    return found


def _compare(found: Measured) -> None:
    """UserError for files of several devices; a note for times that lie on no one line."""
    if len(found.devices) > 1:
        told = ", ".join(f"{path} on {device}" for device, path in found.devices.items())
        raise UserError(f"the files were measured on several devices: {told}", "pass those of one")
    if len(found.files) > 1:
        found.notes.append(
            f"the times are of different steps ({'; '.join(found.files)}): measure the same one at "
            "each batch size, for example with --kernels auto"
        )
    if found.tokens and max(found.tokens) > (1.0 + SAME_TOKENS) * min(found.tokens):
        found.notes.append(
            f"the sequences of the files have {min(found.tokens):.0f} to {max(found.tokens):.0f} "
            "tokens on average, which bends the line: measure batch sizes of 8 or more"
        )


def _content(path: Path) -> Mapping[str, Any]:
    content = read_json(path, "figures in JSON", FIX)
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds no JSON object", FIX)
    return content


def _step(found: Measured, content: Mapping, path: Path, model: BertConfig, precision: str) -> None:
    """`bench step`: the fastest candidate in this precision."""
    _require_model(path, content["layers"], content["hidden_size"], model)
    by_name = content["results"].get(precision)
    if not by_name:
        raise UserError(
            f"{path}: measured in {', '.join(content['results'])}, not in {precision}",
            "pass a file of 'python -m bert_pretraining bench step --output FILE --precision "
            f"{precision}', or another --precision",
        )
    times = {name: one for name, one in by_name.items() if "seconds" in one}
    if not times:
        raise UserError(f"{path}: no step in {precision} succeeded", "measure it again")
    name = min(times, key=lambda one: times[one]["seconds"]["median"])
    seconds, size = times[name]["seconds"], len(content["lengths"])
    what = f"{name}, {content['device']}"
    source = f"measured in {path} ({what})"
    is_largest = size > max(found.seconds, default=0)
    found.devices.setdefault(content["device"], str(path))
    found.tokens.append(sum(content["lengths"]) / size)
    found.add(size, _positive(seconds["median"]), path, what)
    if "host" in seconds and is_largest:
        found.host = Sourced(_positive(seconds["host"]["median"]), source)
    memory = times[name].get("peak_memory_mib")
    if memory and is_largest:
        found.activation = Sourced(
            memory * 2**20 / size, f"{source}, at {counted(size, 'sequence')}"
        )


def _optimizer(found: Measured, content: Mapping, path: Path, model: BertConfig) -> None:
    """`bench optimizer`: the fastest implementation."""
    # Imported here: it needs the model's shapes, which files of another kind do not.
    from bert_pretraining.bench.optimizer import shapes_of

    own = sum(shape.numel() for shape in shapes_of(model).values())
    if content["parameters"] != own:
        raise UserError(
            f"{path}: of {content['parameters']:,} parameters, but this model has {own:,}",
            OF_THIS_MODEL,
        )
    times = {name: one["median"] for name, one in content["seconds"].items()}
    name = min(times, key=times.get)
    found.optimizer = Sourced(_positive(times[name]), f"measured in {path} ({name})")


def _qualification(
    found: Measured, content: Mapping, path: Path, model: BertConfig, precision: str
) -> None:
    """`qualify`: the stages step and limits."""
    figures = {stage["name"]: stage["figures"] for stage in content["stages"]}
    step, limits = figures.get("step", {}), figures.get("limits", {})
    ranks = content["settings"]["ranks"]
    if not step.get("by_batch_size") and "all_reduce" not in limits:
        raise UserError(f"{path}: no stage measured a step or an all-reduce", FIX)
    if step.get("by_batch_size"):
        fix = f"{FIX}, of this model"
        if model.hidden_size == BERT_LARGE.hidden_size:
            fix = (
                "pass one of 'python -m bert_pretraining qualify --num_layers "
                f"{model.num_hidden_layers}' (by default it takes 24 on an accelerator, 2 on a CPU)"
            )
        _require_model(path, step["layers"], BERT_LARGE.hidden_size, model, fix)
        if step["precision"] != precision:
            raise UserError(
                f"{path}: measured in {step['precision']}, not in {precision}",
                f"pass --precision {step['precision']}",
            )
        what = f"qualify, {_of_ranks(ranks)}"
        is_shared = ranks > 1 and content["settings"].get("distributed_lamb", False)
        if ranks > 1:
            found.notes.append(
                f"{path}: measured on {ranks} ranks, so forward and backward have in them what the "
                "exchange beside them slows down"
            )
        if is_shared:
            found.notes.append(
                f"{path}: its optimizer's time is left out, as {ranks} ranks shared the state: "
                "measure it with 'python -m bert_pretraining bench optimizer --output FILE'"
            )
        source = f"measured in {path} ({what})"
        for size, one in step["by_batch_size"].items():
            if "seconds_forward_backward" in one:
                found.add(int(size), _positive(one["seconds_forward_backward"]), path, what)
                if not is_shared:
                    found.optimizer = Sourced(_positive(one["seconds_optimizer"]), source)
            if "evaluation_sequences/s" in one:
                rate = _positive(one["evaluation_sequences/s"])
                found.evaluation = Sourced(ranks / rate, source)
    if "all_reduce" in limits:
        largest = max(limits["all_reduce"], key=int)
        rate = 1e9 * _positive(limits["all_reduce"][largest]["bus_gb/s"])
        latency = _positive(limits["all_reduce_latency_seconds"]) / (2 * (ranks - 1))
        found.link = Link(rate, latency)
        found.link_source = f"measured in {path} (all-reduce of {largest} MiB on {ranks} ranks)"


def _of_ranks(ranks: int) -> str:
    return counted(ranks, "rank")


def _require_model(
    path: Path, layers: int, hidden: int, model: BertConfig, fix: str = OF_THIS_MODEL
) -> None:
    if (layers, hidden) != (model.num_hidden_layers, model.hidden_size):
        raise UserError(
            f"{path}: of {counted(layers, 'layer')} of {hidden}, but this model has "
            f"{model.num_hidden_layers} of {model.hidden_size}",
            fix,
        )


def _positive(value: object) -> float:
    """ValueError for what is no number above 0."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise ValueError(f"{value!r} is no number above 0")
    return float(value)
