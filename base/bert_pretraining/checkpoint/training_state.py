"""What a run needs to go on as if it had never stopped: captured, found and restored.

A training checkpoint is {"model", "optimizer", "state"}, plain tensors, numbers and texts:

    model       the weights under the model's names, as every start checkpoint has them
    optimizer   updates, and by parameter name: master (float32) and the optimizer's slots, as
                first_moment and second_moment
    state       the counters of `RunState`; upstream's global_steps, epoch, iter_dataloader_idx,
                learning_rate; loss_scale; fp8 (each rank's scales, or None); random (each
                rank's generators, by type of device); order (what decides which sequence comes
                when); config, config_hash, versions, job; run_number (see `run_order.py`)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from bert_pretraining.checkpoint import Checkpoint, read_checkpoint
from bert_pretraining.checkpoint.fitting import require_finite
from bert_pretraining.checkpoint.run_order import RUN_NUMBER, SavedRun, latest_by_name, runs_in
from bert_pretraining.config import FIELDS, Config, without_switches
from bert_pretraining.errors import UserError
from bert_pretraining.optim import LossScale, Optimizer
from bert_pretraining.progress import RunState, stop_reason
from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime import process_group, rank_reports
from bert_pretraining.runtime.files import checkpoint_kind
from bert_pretraining.runtime.process_group import Ranks


class Scales(Protocol):
    """The scales of layers that compute in fp8."""

    def state_dict(self) -> dict:
        """This rank's scales, in main memory."""

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned. UserError if it is another model's."""


@dataclass(frozen=True)
class DataOrder:
    """What decides which sequence comes when: see `data/order.py`."""

    seed: int
    lanes: int
    shard_sizes: list[int]

    def digest(self) -> str:
        """Equal for data sets whose shards have the same sizes."""
        return hashlib.sha256(json.dumps(self.shard_sizes).encode()).hexdigest()


def settings_of(config: Config) -> dict[str, object]:
    """The settings that affect losses and weights."""
    named = {
        setting.name: getattr(config, setting.name)
        for setting in FIELDS.values()
        if setting.metadata["changes_numbers"]
    }
    # The number of ranks affects the numbers; their distribution over machines does not.
    return {**named, "nnodes": 1, "nproc_per_node": config.world_size}


def _with_defaults(saved: Mapping[str, object]) -> dict[str, object]:
    """The settings of a file; one that is newer than the file had its default's effect."""
    names = (field.name for field in FIELDS.values() if field.metadata["changes_numbers"])
    defaults = {name: FIELDS[name].default for name in (*names, "nnodes", "nproc_per_node")}
    return without_switches({**defaults, **saved})


def _counters(state: Mapping) -> RunState:
    return RunState(**{field.name: state[field.name] for field in dataclasses.fields(RunState)})


def _global_batch_size(settings: Mapping[str, object]) -> int:
    """Of settings as `settings_of` gives them."""
    names = ("train_batch_size", "gradient_accumulation_steps", "nproc_per_node")
    return math.prod(int(settings[name]) for name in names)


def config_hash(settings: dict[str, object]) -> str:
    """Equal for equal settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class TrainingState:
    """The live parts of a run that a checkpoint holds.

    settings: as `settings_of` gives them.
    """

    module: nn.Module
    optimizer: Optimizer
    loss_scale: LossScale
    order: DataOrder
    settings: dict[str, object]
    fp8: Scales | None = None

    def capture(
        self, counters: dict[str, object], versions: dict[str, str], ranks: Ranks
    ) -> dict[str, dict] | None:
        """Copies, in main memory, of what is to be saved; None on all ranks but the main one.

        Every rank must call it. counters: numbers of the run.
        """
        optimizer_state = self.optimizer.state_dict()
        generators = {"cpu": torch.get_rng_state()}
        own = None if ranks.device.type == "cpu" else devices.generator_state(ranks.device)
        if own is not None:
            generators[ranks.device.type] = own
        random = process_group.gather_to_main(generators)
        scaling = self.loss_scale.state_dict()
        scales = process_group.gather_to_main(self.fp8.state_dict()) if self.fp8 else None
        if not ranks.is_main:
            return None
        copy = _Copier()
        return {
            "model": copy(self.module.state_dict()),
            "optimizer": copy(optimizer_state),
            "state": {
                **counters,
                "loss_scale": scaling,
                "fp8": scales,
                "random": random,
                "order": {
                    "seed": self.order.seed,
                    "lanes": self.order.lanes,
                    "shards": self.order.digest(),
                },
                "config": self.settings,
                "config_hash": config_hash(self.settings),
                "versions": versions,
                "job": job(),
            },
        }


class _Copier:
    """Copies nested dictionaries of tensors to main memory.

    Tensors that share their memory, as a float32 weight and its master, stay one in the copy,
    and so in the file.
    """

    def __init__(self) -> None:
        self._copies: dict[tuple, Tensor] = {}

    def __call__(self, value: object) -> object:
        if isinstance(value, dict):
            return {key: self(item) for key, item in value.items()}
        if not isinstance(value, Tensor):
            return value
        key = (value.data_ptr(), value.dtype, value.shape)
        if key not in self._copies or value.numel() == 0:
            self._copies[key] = value.detach().to("cpu", copy=True)
        return self._copies[key]


@dataclass(frozen=True)
class Saved:
    """A training checkpoint that was read."""

    checkpoint: Checkpoint

    @property
    def state(self) -> dict:
        return self.checkpoint.state

    @property
    def run(self) -> RunState:
        """The counters, as they were."""
        return _counters(self.state)

    @property
    def seed(self) -> int:
        return self.state["order"]["seed"]

    @property
    def lanes(self) -> int:
        return self.state["order"]["lanes"]

    def restore(
        self,
        optimizer: Optimizer,
        loss_scale: LossScale,
        fp8: Scales | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """Weights, the optimizer's slots and loss scale.

        UserError if they are another model's, or not finite.

        fp8: gets this rank's scales, or the first rank's where there were not as many ranks.
        Where the saved run had none, they are measured anew.
        """
        _require_finite(self.checkpoint)
        optimizer.load_state_dict(self.checkpoint.optimizer)
        loss_scale.load_state_dict(self.state["loss_scale"])
        scales = self.state.get("fp8")
        if fp8 is not None and scales:
            same = ranks is not None and len(scales) == ranks.world_size
            fp8.load_state_dict(scales[ranks.rank if same else 0])

    def restore_generators(self, ranks: Ranks) -> None:
        """This rank's random generators, where there were as many ranks.

        Of a device's generator, only one of the same type of device can be restored.
        """
        random = self.state["random"]
        if len(random) != ranks.world_size:
            return
        torch.set_rng_state(random[ranks.rank]["cpu"])
        own = random[ranks.rank].get(ranks.device.type)
        if own is not None and ranks.device.type != "cpu":
            devices.set_generator_state(ranks.device, own)

    @property
    def device_type(self) -> str:
        """The type of device that the run was on: that of its generators beside the CPU's."""
        return next((kind for kind in self.state["random"][0] if kind != "cpu"), "cpu")

    def differences(
        self, settings: dict[str, object], order: DataOrder, device_type: str
    ) -> list[str]:
        """What differs from the saved run; empty if this run continues it bit for bit."""
        saved = _with_defaults(self.state["config"])
        now = without_switches(settings)
        found = [
            # There stands the number of all ranks, on any number of machines: see settings_of.
            f"{'ranks' if name == 'nproc_per_node' else name} {saved[name]} -> {value}"
            for name, value in now.items()
            if saved[name] != value
        ]
        before, after = _global_batch_size(saved), _global_batch_size(now)
        if before != after:
            found.append(f"global batch size {before} -> {after}")
        if self.seed != order.seed:
            found.append(f"seed {self.seed} -> {order.seed}")
        if self.state["order"]["shards"] != order.digest():
            found.append("the training shards")
        if self.device_type != device_type:
            found.append(
                f"devices {self.device_type} -> {device_type}, so dropout starts from the seed"
            )
        return found


def is_training_checkpoint(checkpoint: Checkpoint) -> bool:
    """Whether a run of this package can go on from it."""
    optimizer, state = checkpoint.optimizer, checkpoint.state
    return bool(optimizer and state) and "master" in optimizer and "order" in state


def find(config: Config, init_checkpoint: Path | None, say: Callable[[str], None]) -> Path | None:
    """The training checkpoint to go on from, or None to start from the start weights.

    `--resume auto` and `required` look in output_dir, then at init_checkpoint. Without --resume,
    init_checkpoint alone counts. `never` uses the start weights in any case. Ranks that a launcher
    has restarted go on from what their own job has saved, whatever --resume says.
    say: is told of files that are passed over. UserError where `required` finds none.
    """
    in_output_dir = config.resume in ("auto", "required")
    output_dir = Path(config.resolved_output_dir)
    if in_output_dir or restarted():
        runs = runs_in(output_dir)
        candidates = [(path, run) for run in runs for path in run.files]
        for path, run in candidates:
            try:
                found = read_checkpoint(path)
                if not is_training_checkpoint(found):
                    say(f"Notice: passed over {path}: it holds weights alone")
                    continue
                _require_finite(found)
            except UserError as error:
                say(f"Notice: passed over {error}")
                continue
            if in_output_dir or found.state["job"] == job():
                say(_choice(found, run, runs, output_dir))
                return path
    given = None if config.resume == "never" else init_checkpoint
    # Other kinds hold weights alone, and some take seconds to read.
    may_be = given is not None and checkpoint_kind(given) == "torch"
    if may_be and is_training_checkpoint(read_checkpoint(given)):
        return given
    if config.resume == "required":
        raise UserError(
            f"--resume required: no whole training checkpoint in {config.resolved_output_dir}",
            "pass its --output_dir, or --resume auto to start from the start weights",
        )
    if config.resume is None and not restarted():
        _tell_of_an_unfinished_run(config, output_dir, say)
    return None


def _has_plain_counters(state: Mapping) -> bool:
    """Whether settings, seed and counters are there, and of the types that this version writes.

    Whatever lies in an output_dir, a start that does not want it must not fail.
    """
    config, order = state.get("config"), state["order"]
    if not (isinstance(config, Mapping) and isinstance(order, Mapping)):
        return False
    counters = [state.get(field.name) for field in dataclasses.fields(RunState)]
    settings = all(isinstance(value, int | float | str | None) for value in config.values())
    return settings and all(
        isinstance(value, int | float) for value in (*counters, order.get("seed"))
    )


def _tell_of_an_unfinished_run(
    config: Config, output_dir: Path, say: Callable[[str], None]
) -> None:
    """Say that the latest run in output_dir has the same settings, and was stopped before its end.

    A user who gives a command again after Ctrl-C may have wanted to go on.
    """
    newest = latest_by_name(output_dir)
    state = newest.state if newest is not None else {}
    if not state or not _has_plain_counters(state):
        return  # no run, one of another version, or a converted checkpoint
    same_settings = _with_defaults(state["config"]) == without_switches(settings_of(config))
    if not same_settings or config.seed not in (None, state["order"]["seed"]):
        return
    run = _counters(state)
    target, limits = config.target_mlm_accuracy, (config.max_steps, config.max_samples_termination)
    if stop_reason(run, target, *limits) is None:
        say(
            f"Notice: {newest.folder} holds a checkpoint of this command at step "
            f"{run.global_steps:,} of {config.max_steps:,}; --resume auto goes on from it"
        )


def _require_finite(checkpoint: Checkpoint) -> None:
    """UserError if a weight or a number of the optimizer is NaN or infinite."""
    slots = {
        f"{slot} of {name}": value
        for slot, values in checkpoint.optimizer.items()
        if isinstance(values, dict)
        for name, value in values.items()
        if isinstance(value, Tensor)
    }
    require_finite(checkpoint.path, {**checkpoint.weights, **slots})


def _choice(found: Checkpoint, chosen: SavedRun, runs: list[SavedRun], output_dir: Path) -> str:
    """Which training checkpoint was chosen, and why."""
    number = found.state.get(RUN_NUMBER)
    told = f"Resume: {found.path}, the newest training state in {output_dir} ("
    told += f"run {number}, " if number else ""
    told += f"step {found.step}{f'; {len(runs)} runs have checkpoints' if runs[1:] else ''})"
    later = max(run.folder.name for run in runs)
    if chosen.folder != output_dir and later > chosen.folder.name:
        told += f"; {later} has a later name, but an older state"
    return told


def job() -> str | None:
    """An identifier of the launch, the same after its restarts."""
    return os.environ.get("BERT_PRETRAINING_STARTED")


def restarted() -> bool:
    """Whether a launcher has started these ranks again after a failure."""
    return int(os.environ.get(rank_reports.ATTEMPT_VARIABLE, 0)) > 0
