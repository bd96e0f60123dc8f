"""One training run on one rank, top to bottom: set up, evaluate, loop, report."""

from __future__ import annotations

import dataclasses

import torch

from bert_pretraining import progress
from bert_pretraining.checkpoint import CheckpointWriter, read_checkpoint, training_state
from bert_pretraining.checkpoint.training_state import DataOrder, Saved
from bert_pretraining.config import Config, Resolved
from bert_pretraining.data.flat_shard import ShardInfo
from bert_pretraining.data.inputs import DataPaths, data_paths
from bert_pretraining.data.loader import LoaderConfig, TrainingLoader, load_evaluation_batches
from bert_pretraining.data.order import SampleOrder
from bert_pretraining.data.packing import on_device
from bert_pretraining.data.shards import list_shards
from bert_pretraining.errors import EXIT_CONVERGED, EXIT_NOT_CONVERGED, EXIT_STOPPED
from bert_pretraining.logs.run_folder import versions
from bert_pretraining.logs.run_log import RunLog
from bert_pretraining.model.bert_config import BertConfig
from bert_pretraining.optim import Schedule
from bert_pretraining.report.after_run import report_on
from bert_pretraining.runtime import process_group, rank_reports, seeds
from bert_pretraining.runtime.process_group import Ranks
from bert_pretraining.runtime.signals import StopRequest
from bert_pretraining.training.build import build
from bert_pretraining.training.evaluate import Evaluation, evaluate


def main(resolved: Resolved) -> int:
    """Train as configured; the process group is left for the caller to stop.

    Returns EXIT_CONVERGED, EXIT_NOT_CONVERGED or EXIT_STOPPED, on every rank.
    """
    config = resolved.config
    stop = StopRequest()
    with stop.listening():
        paths = data_paths(config)
        ranks = process_group.start(config.device, config.dist_backend, dataclasses.asdict(config))
        log = RunLog(resolved, ranks.rank, ranks.device_name, ranks.world_size)
        run = progress.RunState()
        try:
            reason = _train(config, paths, ranks, log, run, stop)
        except BaseException:
            # The process group stays as it is: to leave it now would make the other ranks
            # fail, and report it, before this one has reported the cause.
            log.aborted(run)
            raise
        finally:
            log.close()
    if config.report and ranks.is_main:
        print(report_on(log.folder), flush=True)
    if reason == "signal":
        return EXIT_STOPPED
    return EXIT_CONVERGED if run.converged else EXIT_NOT_CONVERGED


def _train(
    config: Config,
    paths: DataPaths,
    ranks: Ranks,
    log: RunLog,
    run: progress.RunState,
    stop: StopRequest,
) -> str:
    """Train, and return why it ended: "target", "max_steps", ... or "signal"."""
    # ---- everything that needs no data: untimed by the MLPerf rules
    resumed = process_group.from_main(
        lambda: training_state.find(config, paths.init_checkpoint, log.say)
    )
    saved = None if resumed is None else Saved(read_checkpoint(resumed))
    seed = process_group.from_main(lambda: _seed(config, saved))
    torch.manual_seed(seeds.worker_seed(seed, ranks.rank))
    accumulation = config.gradient_accumulation_steps
    samples_per_step = config.train_batch_size * accumulation * ranks.world_size
    triggers = _triggers(config, samples_per_step)
    warmup = config.resolved_warmup_steps
    schedule = Schedule(config.learning_rate, config.max_steps, warmup, config.start_warmup_step)
    log.hyperparameters(seed, triggers)

    bert_config = BertConfig.load(paths.bert_config)
    shards: list[ShardInfo] = process_group.from_main(lambda: list_shards(paths.train_dir))
    lanes = config.data_lanes or (saved.lanes if saved else ranks.world_size)
    data_order = DataOrder(seed, lanes, [shard.num_sequences for shard in shards])
    order = SampleOrder(data_order.shard_sizes, seed, lanes)
    progress.check_update(samples_per_step, order.num_sequences)
    start = saved or paths.init_checkpoint
    training = build(config, bert_config, start, seed, schedule, ranks, log)
    module, optimizer, update = training.module, training.optimizer, training.update

    # ---- the clock starts; from here on data is read
    process_group.barrier(ranks.device)
    log.mlperf.run_start()
    process_group.barrier(ranks.device)
    num_eval_batches, eval_batches = load_evaluation_batches(
        paths.eval_dir,
        config.num_eval_examples,
        config.eval_batch_size,
        bert_config.vocab_size,
        bert_config.max_position_embeddings,
        ranks.rank,
        ranks.world_size,
    )

    def run_evaluation() -> Evaluation:
        log.mlperf.evaluation_start(run.num_trained_samples)
        result = evaluate(module, num_eval_batches, eval_batches, ranks)
        log.mlperf.evaluation_stop(result.mlm_accuracy, run.num_trained_samples)
        run.eval_loss, run.eval_mlm_accuracy = result.loss, result.mlm_accuracy
        run.eval_sequences = result.num_sequences
        return result

    def stop_reason() -> str | None:
        return progress.stop_reason(
            run, config.target_mlm_accuracy, config.max_steps, config.max_samples_termination
        )

    reason = None
    if saved is None:
        evaluated = run_evaluation()
        log.start_evaluated(
            evaluated.loss, evaluated.mlm_accuracy, evaluated.num_sequences, evaluated.seconds
        )
    else:
        settings = training_state.influential(config, ranks.world_size)
        run.take_over(saved.run)
        log.resumed(resumed, run, saved.differences(settings, data_order))
        reason = stop_reason()
        saved.restore_generators(ranks)
    loader_config = LoaderConfig(
        config.train_batch_size,
        ranks.rank,
        ranks.world_size,
        bert_config.vocab_size,
        bert_config.max_position_embeddings,
        config.resolved_batching,
        samples_seen=run.samples_seen,
        pin_memory=ranks.device.type == "cuda",
    )
    batches = on_device(iter(TrainingLoader(shards, order, loader_config)), ranks.device)
    writer = CheckpointWriter(log.folder, config.keep_n_most_recent_checkpoints)

    def save() -> None:
        counters = {
            **dataclasses.asdict(run),
            "epoch": order.epoch(run.samples_seen),
            "iter_dataloader_idx": order.shard_ordinal(run.samples_seen),
            "learning_rate": schedule(run.global_steps),
        }
        content = training_state.capture(
            module, optimizer, training.loss_scale, counters, config, data_order, versions(), ranks
        )
        if content is not None:
            writer.write(run.global_steps, content)

    module.train()
    epoch = -1
    with stop.deferred():
        while reason is None:
            first_sample = run.samples_seen
            if order.epoch(first_sample) != epoch:
                if epoch >= 0:
                    log.perf.log("EPOCH_END", {"epoch": epoch})
                epoch = order.epoch(first_sample)
                log.perf.log("EPOCH_BEGIN", {"epoch": epoch})

            micro_batches = [next(batches) for _ in range(accumulation)]
            sums = update(micro_batches)
            rank_reports.heartbeat()
            run.samples_seen += samples_per_step
            # The host does not wait for the device until something may be due.
            expected = run.after(update.num_unread, samples_per_step)
            if not update.must_read and not triggers.anything_due(*expected):
                continue
            latest = update.read(run.global_steps)
            step = run.account(latest.updates, latest.skipped, latest.last_finite, samples_per_step)
            if latest.skipped:
                log.skipped(run, latest.skipped, latest.loss_scale)
            stopping = process_group.any_rank(stop.received is not None, ranks.device)
            if step and triggers.replica_check_due(step):
                process_group.check_replicas(dict(module.named_parameters()), run.global_steps)

            # ---- evaluate where due, and always at the last step; stop where due
            evaluation = None
            if step:
                reason = stop_reason()
                if reason is not None or triggers.evaluation_due(step, run.num_trained_samples):
                    evaluation = run_evaluation()
                if reason != "target":
                    # The last evaluation may have met the target. One that already had is not
                    # taken back: the start checkpoint counts, as upstream has it.
                    reason = stop_reason()
                run.converged = reason == "target"
            if reason is None and stopping:
                reason = "signal"

            figures = None
            if step and (triggers.logging_due(step) or evaluation):
                masked = sum(batch.num_masked for batch in micro_batches)
                totals = process_group.sum_over_ranks(torch.cat([sums, sums.new_tensor([masked])]))
                mlm_loss, correct, next_sentence_loss, masked = totals.tolist()
                figures = {
                    "loss": mlm_loss / max(masked, 1) + next_sentence_loss / samples_per_step,
                    "mlm_acc": correct / max(masked, 1),
                    "grad_norm": optimizer.gradient_norm.item(),
                    "epoch": epoch,
                    "end_training": reason is not None,
                    "iter_dataloader_idx": order.shard_ordinal(first_sample),
                    "learning_rate": schedule(step),
                }
            log.steps(
                run, latest.updates, samples_per_step, figures, evaluation and evaluation.seconds
            )
            saving = step and config.save_checkpoint and reason is None
            if saving and triggers.checkpoint_due(run.num_trained_samples):
                save()
            writer.report(log.say)

        batches.close()
        if epoch >= 0:
            log.perf.log("EPOCH_END", {"epoch": epoch})
        process_group.barrier(ranks.device)
        log.trained(run, run.eval_sequences)
        # A run that had finished before has nothing new to save.
        if epoch >= 0 and (config.save_checkpoint or reason == "signal"):
            save()
            writer.report(log.say, wait=True)
    log.finished(run, reason if reason != "signal" else f"signal {stop.received or 'to a rank'}")
    return reason


def _seed(config: Config, saved: Saved | None) -> int:
    if config.seed is not None:
        return config.seed
    return seeds.draw_master_seed() if saved is None else saved.seed


def _triggers(config: Config, samples_per_step: int) -> progress.StepTriggers:
    return progress.StepTriggers(
        samples_per_step,
        config.max_steps,
        config.max_samples_termination,
        config.log_freq,
        config.eval_steps,
        config.eval_interval_samples or progress.evaluation_interval(samples_per_step),
        config.check_replicas_every,
        config.num_samples_per_checkpoint if config.save_checkpoint else 0,
        config.min_samples_to_start_checkpoints,
    )
