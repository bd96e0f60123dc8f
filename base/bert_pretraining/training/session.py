"""A run on one rank, new or resumed: everything that its loop works on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch

from bert_pretraining import progress
from bert_pretraining.checkpoint import (
    CheckpointWriter,
    checkpoint_path,
    read_checkpoint,
    training_state,
)
from bert_pretraining.checkpoint.training_state import DataOrder, Saved, TrainingState
from bert_pretraining.config import Config
from bert_pretraining.data import inputs
from bert_pretraining.data.flat_shard import ShardInfo
from bert_pretraining.data.inputs import DataPaths
from bert_pretraining.data.loader import (
    EvaluationSet,
    LoaderConfig,
    TrainingLoader,
    load_evaluation_set,
)
from bert_pretraining.data.order import SampleOrder
from bert_pretraining.data.packing import on_device
from bert_pretraining.data.shards import inspect_shards
from bert_pretraining.logs.run_folder import versions
from bert_pretraining.logs.run_log import RunLog
from bert_pretraining.logs.sinks import RunOutline, Work
from bert_pretraining.model.batch import PackedBatch
from bert_pretraining.model.bert_config import BertConfig
from bert_pretraining.optim import Schedule
from bert_pretraining.progress import RunState, StepTriggers
from bert_pretraining.runtime import process_group, seeds
from bert_pretraining.runtime.process_group import Ranks
from bert_pretraining.runtime.signals import StopRequest
from bert_pretraining.training.baseline import commonest_token
from bert_pretraining.training.build import Setup, Training, build
from bert_pretraining.training.evaluate import Evaluation
from bert_pretraining.training.feed import Feed
from bert_pretraining.training.held_up import HeldUp
from bert_pretraining.training.step_clock import over_ranks


class Session:
    """All parts of a run on one rank. Every rank builds it in three steps:

    the constructor       finds out what to start from, and builds all that needs no sequence
    `start_the_clock`     starts MLPerf's clock, then reads the evaluation set
    `begin`               evaluates the start weights, or goes on where the run was

    Attributes:
        config, ranks, log: what it was made with.
        run: the counters, equal on all ranks.
        triggers: what is due after which step.
        schedule: the learning rate by the number of updates made.
        training: model, optimizer, loss scale and update.
        order: which sample comes when.
    """

    def __init__(
        self, config: Config, paths: DataPaths, ranks: Ranks, log: RunLog, run: RunState
    ) -> None:
        self.config, self.ranks, self.log, self.run = config, ranks, log, run
        self._paths = paths
        self._resumed_from: Path | None = process_group.from_main(
            lambda: training_state.find(config, paths.init_checkpoint, log.say)
        )
        self._saved = Saved(read_checkpoint(self._resumed_from)) if self._resumed_from else None
        self._seed: int = process_group.from_main(self._choose_seed)
        torch.manual_seed(seeds.worker_seed(self._seed, ranks.rank))
        self.triggers = _triggers(config)
        self.schedule = Schedule(
            config.learning_rate,
            config.max_steps,
            config.resolved_warmup_steps,
            config.start_warmup_step,
        )
        log.hyperparameters(self._seed, self.triggers)
        self._bert_config = BertConfig.load(paths.bert_config)
        # Of the shards, only the headers are read here: how many sequences each one holds. MLPerf's
        # training rules allow that before the clock starts: metadata is not data.
        self._shards: list[ShardInfo] = process_group.from_main(
            lambda: inspect_shards(inputs.training_folder(config, paths), log.say)
        )
        sizes = [shard.num_sequences for shard in self._shards]
        lanes = config.data_lanes or (self._saved.lanes if self._saved else ranks.world_size)
        self.order = SampleOrder(sizes, self._seed, lanes)
        progress.check_update(config.global_batch_size, self.order.num_sequences)
        self.training: Training = build(
            Setup(
                config=config,
                bert_config=self._bert_config,
                start=self._saved or paths.init_checkpoint,
                seed=self._seed,
                schedule=self.schedule,
                ranks=ranks,
                log=log,
            )
        )
        log.outlined(self._outline())
        self._held_up = HeldUp(
            self.training.clock, ranks, log.notice, self.training.optimizer.waits_in_step
        )
        self._state = TrainingState(
            self.training.module,
            self.training.optimizer,
            self.training.loss_scale,
            DataOrder(self._seed, lanes, sizes),
            training_state.settings_of(config),
            self.training.fp8,
        )
        self._evaluation_set = EvaluationSet(0, [])  # until the clock has started
        self._writer = CheckpointWriter(log.folder, config.keep_n_most_recent_checkpoints)

    def _outline(self) -> RunOutline:
        module, sizes, training = self.training.module, self._bert_config, self.training
        return RunOutline(
            parameters=sum(parameter.numel() for parameter in module.parameters()),
            layers=sizes.num_hidden_layers,
            hidden_size=sizes.hidden_size,
            sequences=self.order.num_sequences,
            shards=len(self._shards),
            kernels=module.kernels.summary(),
            precision=training.precision,
            matrix_rate=training.matrix_rate,
        )

    def _choose_seed(self) -> int:
        if self.config.seed is not None:
            return self.config.seed
        return self._saved.seed if self._saved else seeds.draw_master_seed()

    def start_the_clock(self) -> None:
        """Start MLPerf's clock on all ranks, then read the evaluation set.

        No sequence is read before. UserError where an evaluation shard is damaged.
        """
        process_group.barrier(self.ranks.device)
        self.log.clock_started()
        process_group.barrier(self.ranks.device)
        shards = process_group.from_main(
            lambda: inspect_shards(inputs.evaluation_folder(self.config, self._paths), self.log.say)
        )
        evaluation_set = load_evaluation_set(
            shards,
            self.config.num_eval_examples,
            dataclasses.replace(
                self._loader_config(self.config.eval_batch_size), pin_for=self.ranks.device
            ),
        )
        vocab_size = self._bert_config.vocab_size
        self.log.evaluation_set_read(commonest_token(evaluation_set, vocab_size, self.ranks))
        self._evaluation_set = evaluation_set.near(self.ranks.device)

    def begin(self) -> str | None:
        """Evaluate the start weights, or take over the saved run; then training begins.

        Returns why there is nothing to train, as `stop_reason`, or None.
        """
        self.training.module.train()
        self._held_up.begin()
        if self._saved is None:
            self.log.start_evaluated(self.run, self.evaluate().seconds)
            return None
        self.run.take_over(self._saved.run)
        differences = self._saved.differences(
            self._state.settings, self._state.order, self.ranks.device.type
        )
        self.log.resumed(self._resumed_from, self.run, differences)
        self._saved.restore_generators(self.ranks)
        return self.stop_reason()

    def micro_batches(self, stop: StopRequest) -> Iterator[PackedBatch]:
        """This rank's batches on its device, without end, from the first sample not yet seen.

        stop: is told where a shard cannot be read any more, see `Feed`.
        """
        config, ranks, samples_seen = self.config, self.ranks, self.run.samples_seen

        def read_from(batch: int) -> Iterator[PackedBatch]:
            loader_config = dataclasses.replace(
                self._loader_config(config.train_batch_size),
                batching=config.resolved_batching,
                samples_seen=samples_seen + batch * config.train_batch_size * ranks.world_size,
                pin_for=ranks.device,
            )
            return iter(TrainingLoader(self._shards, self.order, loader_config))

        updates = 1 + self.training.update.outcomes.updates_to_agree
        reserve = updates * config.gradient_accumulation_steps
        feed = Feed(read_from, reserve, stop, ranks.rank if ranks.world_size > 1 else None)
        return on_device(iter(feed), ranks.device)

    def _loader_config(self, batch_size: int) -> LoaderConfig:
        return LoaderConfig(
            batch_size=batch_size,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            vocab_size=self._bert_config.vocab_size,
            max_seq_length=self._bert_config.max_position_embeddings,
        )

    def evaluate(self) -> Evaluation:
        """Evaluate the model on the whole set, and keep the figures in `run`."""
        run, log = self.run, self.log
        log.evaluation_started(run)
        result = self.training.evaluate(self._evaluation_set)
        log.evaluation_stopped(run, result.mlm_accuracy)
        run.eval_loss, run.eval_mlm_accuracy = result.loss, result.mlm_accuracy
        run.eval_sequences = result.num_sequences
        return result

    def work(self, whole: bool = False) -> Work:
        """What all ranks did since the last call, or with `whole` since training began.

        Every rank must call it; the devices must have done all work given to them.
        """
        clock = self.training.clock
        tally = clock.take()
        taken = clock.whole if whole else tally
        work = over_ranks(taken, clock.measures, self._bert_config, self.ranks)
        if not whole:
            self._held_up.logged(self.run.global_steps, tally, work)
        return work

    def stop_reason(self) -> str | None:
        """Why training ends now, or None; keeps in `run` whether the target is reached."""
        config = self.config
        reason = progress.stop_reason(
            self.run, config.target_mlm_accuracy, config.max_steps, config.max_samples_termination
        )
        self.run.converged = reason == "target"
        return reason

    def save(self) -> None:
        """Begin to write a checkpoint of this moment; `report_saved` tells what became of it."""
        counters = {
            **dataclasses.asdict(self.run),
            "epoch": self.order.epoch(self.run.samples_seen),
            "iter_dataloader_idx": self.order.shard_ordinal(self.run.samples_seen),
            "learning_rate": self.schedule(self.run.global_steps),
        }
        content = self._state.capture(counters, versions(), self.ranks)
        if content is not None:
            self._writer.write(self.run.global_steps, content)

    def report_saved(self, wait: bool = False) -> None:
        """Say what became of the checkpoints that were begun; wait for the last if asked to."""
        self._writer.report(self.log.say, wait=wait)

    def is_saved(self) -> bool:
        """Whether the checkpoint of this moment is complete; the same on every rank."""
        return process_group.from_main(
            lambda: checkpoint_path(self.log.folder, self.run.global_steps).is_file()
        )

    def close(self) -> None:
        """End what runs beside the training; also after an error."""
        self._held_up.end()


def _triggers(config: Config) -> StepTriggers:
    samples_per_step = config.global_batch_size
    return StepTriggers(
        samples_per_step=samples_per_step,
        max_steps=config.max_steps,
        max_samples=config.max_samples_termination,
        log_freq=config.log_freq,
        eval_steps=config.eval_steps,
        eval_interval_samples=config.eval_interval_samples
        or progress.evaluation_interval(samples_per_step),
        check_replicas_every=config.check_replicas_every,
        num_samples_per_checkpoint=config.num_samples_per_checkpoint
        if config.save_checkpoint
        else 0,
        min_samples_to_start_checkpoints=config.min_samples_to_start_checkpoints,
    )
