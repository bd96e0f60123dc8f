"""One training run on one rank, top to bottom: set up, evaluate, loop, report."""

from __future__ import annotations

import dataclasses
import functools

import torch

from bert_pretraining import distributed, seeds, state
from bert_pretraining.checkpoint import checkpoint_path, load_weights, save_checkpoint
from bert_pretraining.config import Config, Resolved
from bert_pretraining.data.loader import Feed, TrainingLoader, load_evaluation_batches
from bert_pretraining.data.order import SampleOrder
from bert_pretraining.data.packing import on_device
from bert_pretraining.data.shards import ShardInfo, list_shards
from bert_pretraining.distributed import Ranks
from bert_pretraining.errors import EXIT_CONVERGED, EXIT_NOT_CONVERGED, TrainingError
from bert_pretraining.evaluate import Evaluation, evaluate
from bert_pretraining.inputs import DataPaths, data_paths
from bert_pretraining.kernels import DTYPES, select
from bert_pretraining.logs.run_log import RunLog
from bert_pretraining.model.bert_config import BertConfig
from bert_pretraining.model.heads import BertForPreTraining
from bert_pretraining.optim import LambSettings, LossScale, Schedule, Sharing, create_optimizer
from bert_pretraining.reduction import make_reduction
from bert_pretraining.step import choose_step
from bert_pretraining.update import MAX_UNREAD, Update


def main(resolved: Resolved) -> int:
    """Train as configured. Returns EXIT_CONVERGED or EXIT_NOT_CONVERGED, on every rank."""
    config = resolved.config
    paths = data_paths(config)
    ranks = distributed.start(config.device, config.dist_backend)
    log = RunLog(resolved, ranks.rank, ranks.device_name, ranks.world_size)
    run = state.RunState()
    try:
        _train(config, paths, ranks, log, run)
    except BaseException:
        # The process group stays as it is: to leave it now would make the other ranks
        # fail, and report it, before this one has reported the cause.
        log.aborted(run)
        raise
    finally:
        log.close()
    distributed.stop()
    return EXIT_CONVERGED if run.converged else EXIT_NOT_CONVERGED


def _train(
    config: Config, paths: DataPaths, ranks: Ranks, log: RunLog, run: state.RunState
) -> None:
    # ---- everything that needs no data: untimed by the MLPerf rules
    seed = distributed.from_main(
        lambda: seeds.draw_master_seed() if config.seed is None else config.seed
    )
    torch.manual_seed(seeds.worker_seed(seed, ranks.rank))
    accumulation = config.gradient_accumulation_steps
    samples_per_step = config.train_batch_size * accumulation * ranks.world_size
    calendar = state.Calendar(
        samples_per_step,
        config.max_steps,
        config.max_samples_termination,
        config.log_freq,
        config.eval_steps,
        config.eval_interval_samples or state.evaluation_interval(samples_per_step),
        config.check_replicas_every,
    )
    warmup = config.resolved_warmup_steps
    schedule = Schedule(config.learning_rate, config.max_steps, warmup, config.start_warmup_step)
    log.hyperparameters(seed, samples_per_step)

    bert_config = BertConfig.load(paths.bert_config)
    shards: list[ShardInfo] = distributed.from_main(lambda: list_shards(paths.train_dir))
    lanes = config.data_lanes or ranks.world_size
    order = SampleOrder([shard.num_sequences for shard in shards], seed, lanes)
    state.check_update(samples_per_step, order.num_sequences)

    precision = _precision(config, ranks, log)
    for why, names in config.without_effect.items():
        log.say(f"Notice: {', '.join(names)}: {why}")
    kernels = select(
        config.kernels,
        ranks.device,
        DTYPES[precision],
        bert_config.head_size,
        config.kernels_by_operator,
    )
    log.say(f"Kernels: {kernels.describe()}")
    module = BertForPreTraining(
        bert_config, kernels, seeds.model_seed(seed), config.checkpoint_activations
    )
    log.built("CONVERT_MODEL", module, kernels=kernels.choice)
    if paths.init_checkpoint is not None:
        load_weights(module, paths.init_checkpoint)
    log.say(f"Start weights: {paths.init_checkpoint or f'random (seed {seed})'}")
    module.to(ranks.device)
    # The optimizer works on the weights as they were loaded, not on their rounding.
    masters = {name: value.detach().clone() for name, value in module.named_parameters()}
    module.to(DTYPES[precision])
    settings = LambSettings(
        config.opt_lamb_beta_1,
        config.opt_lamb_beta_2,
        config.opt_lamb_epsilon,
        config.weight_decay_rate,
        config.max_gradient_norm,
    )
    _check_replicas(masters, run)
    sharing: Sharing = "sharded" if config.distributed_lamb else "replicated"
    if ranks.world_size == 1:
        sharing = "alone"
    optimizer = create_optimizer(
        config.optimizer, module.named_parameters(), settings, masters, sharing
    )
    del masters
    log.say(f"Optimizer: {optimizer.choice}")
    log.built("CREATE_OPTIMIZER", optimizer, provider=optimizer.choice)
    loss_scale = LossScale.for_precision(precision, config.loss_scale, ranks.device)
    log.perf.log("MODEL_TO_FP16", {"fp16": precision == "fp16", "precision": precision})
    clip_first = config.max_gradient_norm if config.clip_gradients == "before_reduction" else None
    reduction = make_reduction(module, optimizer, ranks, clip_first)
    log.built("MODEL_TO_DDP", reduction.model, reduction=type(reduction).__name__)
    micro_step = choose_step(
        config, reduction.model, bert_config.max_position_embeddings, ranks, log.say
    )
    micro_step.prepare(functools.partial(optimizer.zero_grad, set_to_none=False))
    update = Update(
        module,
        micro_step,
        reduction,
        optimizer,
        schedule,
        loss_scale,
        config.mlm_loss_normalization,
        ranks,
    )

    # ---- the clock starts; from here on data is read
    distributed.barrier(ranks.device)
    log.mlperf.run_start()
    distributed.barrier(ranks.device)
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
        return result

    def stop_reason() -> str | None:
        return state.stop_reason(
            run, config.target_mlm_accuracy, config.max_steps, config.max_samples_termination
        )

    start = run_evaluation()
    log.start_evaluated(start.loss, start.mlm_accuracy, start.num_sequences, start.seconds)
    feed = Feed(
        config.train_batch_size,
        ranks.rank,
        ranks.world_size,
        bert_config.vocab_size,
        bert_config.max_position_embeddings,
        config.resolved_batching,
        pin_memory=ranks.device.type == "cuda",
    )
    batches = on_device(iter(TrainingLoader(shards, order, feed)), ranks.device)
    module.train()
    epoch = -1
    reason = None
    while reason is None:
        first_sample = run.samples_seen
        if order.epoch(first_sample) != epoch:
            if epoch >= 0:
                log.perf.log("EPOCH_END", {"epoch": epoch})
            epoch = order.epoch(first_sample)
            log.perf.log("EPOCH_BEGIN", {"epoch": epoch})

        micro_batches = [next(batches) for _ in range(accumulation)]
        sums = update(micro_batches)
        run.samples_seen += samples_per_step
        # The host does not wait for the device until something may be due.
        expected = run.global_steps + update.num_unread
        if not calendar.anything_due(expected) and update.num_unread < MAX_UNREAD:
            continue
        outcome = update.read(run.global_steps)
        run.global_steps += outcome.updates
        run.num_trained_samples += outcome.updates * samples_per_step
        run.skipped_steps += outcome.skipped
        if outcome.skipped:
            log.skipped(run, outcome.skipped, outcome.loss_scale)
        # What is due after an update was done right after it, and not again after a skipped one.
        step = run.global_steps if outcome.last_finite else None
        if step and calendar.replica_check_due(step):
            _check_replicas(dict(module.named_parameters()), run)

        # ---- evaluate where due, and always at the last step; stop where due
        evaluation = None
        if step:
            reason = stop_reason()
            if reason is not None or calendar.evaluation_due(step):
                evaluation = run_evaluation()
            if reason != "target":
                # The last evaluation may have met the target. One that already had is not
                # taken back: the start checkpoint counts, as upstream has it.
                reason = stop_reason()
            run.converged = reason == "target"

        figures = None
        if step and (calendar.logging_due(step) or evaluation):
            masked = sum(batch.num_masked for batch in micro_batches)
            totals = distributed.sum_over_ranks(torch.cat([sums, sums.new_tensor([masked])]))
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
            run, outcome.updates, samples_per_step, figures, evaluation and evaluation.seconds
        )

    batches.close()
    log.perf.log("EPOCH_END", {"epoch": epoch})
    distributed.barrier(ranks.device)
    log.trained(run, start.num_sequences)
    optimizer_state = optimizer.state_dict() if config.save_checkpoint else {}
    if config.save_checkpoint and ranks.is_main:
        path = checkpoint_path(log.folder, run.global_steps)
        try:
            content = dataclasses.asdict(run)
            save_checkpoint(path, module.state_dict(), optimizer_state, content)
            log.say(f"Checkpoint: {path}")
        except OSError as error:
            # What was trained is still worth its figures.
            log.say(f"Warning: no checkpoint was written: {path}: {error.strerror}")
    log.finished(run, reason)


def _precision(config: Config, ranks: Ranks, log: RunLog) -> str:
    precision = config.resolved_precision
    if precision == "fp16" and ranks.device.type == "cpu":
        log.say("Notice: fp16 needs a GPU; training in fp32 on this CPU")
        return "fp32"
    return precision


def _check_replicas(weights: dict[str, torch.Tensor], run: state.RunState) -> None:
    """TrainingError, on every rank, if the ranks' weights are not the same to the last bit."""
    differing = distributed.differing_replica(weights)
    if differing is not None:
        raise TrainingError(
            f"the ranks hold different weights after {run.global_steps} updates: first "
            f"{differing}; look for another start checkpoint, failing memory, or a device or "
            "library that differs"
        )
