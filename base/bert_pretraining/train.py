"""One training run on one rank, top to bottom: set up, evaluate, loop, report."""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bert_pretraining import distributed, seeds, state
from bert_pretraining.checkpoint import checkpoint_path, load_weights, save_checkpoint
from bert_pretraining.config import Config, Resolved
from bert_pretraining.data.loader import Feed, TrainingLoader, load_evaluation_batches
from bert_pretraining.data.order import SampleOrder
from bert_pretraining.data.packing import PackedBatch, on_device
from bert_pretraining.data.shards import ShardInfo, list_shards
from bert_pretraining.distributed import Ranks
from bert_pretraining.errors import EXIT_CONVERGED, EXIT_NOT_CONVERGED, TrainingError
from bert_pretraining.evaluate import Evaluation, evaluate
from bert_pretraining.inputs import DataPaths, data_paths
from bert_pretraining.kernels import select
from bert_pretraining.logs.run_log import RunLog
from bert_pretraining.model.bert_config import BertConfig
from bert_pretraining.model.diagnosis import first_non_finite
from bert_pretraining.model.heads import BertForPreTraining
from bert_pretraining.model.loss_weights import loss_weights
from bert_pretraining.optim import LambSettings, LossScale, Schedule, create_optimizer
from bert_pretraining.step import choose_step

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
    eval_interval = config.eval_interval_samples or state.evaluation_interval(samples_per_step)
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
    optimizer = create_optimizer(config.optimizer, module.named_parameters(), settings, masters)
    del masters
    log.built("CREATE_OPTIMIZER", optimizer)
    loss_scale = LossScale.for_precision(precision, config.loss_scale)
    log.perf.log("MODEL_TO_FP16", {"fp16": precision == "fp16", "precision": precision})
    model = _replicate(module, ranks)
    log.built("MODEL_TO_DDP", model)
    micro_step = choose_step(config, model, bert_config.max_position_embeddings, ranks, log.say)
    micro_step.prepare(functools.partial(optimizer.zero_grad, keep_memory=True))

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
    model.train()
    epoch = -1
    reason = None
    while reason is None:
        first_sample = run.samples_seen
        if order.epoch(first_sample) != epoch:
            if epoch >= 0:
                log.perf.log("EPOCH_END", {"epoch": epoch})
            epoch = order.epoch(first_sample)
            log.perf.log("EPOCH_BEGIN", {"epoch": epoch})

        # ---- one update: forward and backward for each micro-batch, then LAMB
        micro_batches = [next(batches) for _ in range(accumulation)]
        run.samples_seen += samples_per_step
        weights = loss_weights(micro_batches, config.mlm_loss_normalization, ranks)
        sums = torch.zeros(3, device=ranks.device)
        optimizer.zero_grad(micro_step.keeps_gradients)
        for batch, weight in zip(micro_batches, weights, strict=True):
            with _reduction(model, batch is micro_batches[-1]):
                sums += micro_step(batch, weight * loss_scale.scale)
        finite = optimizer.step(schedule(optimizer.updates), 1.0 / loss_scale.scale)
        loss_scale.update(finite)
        if not finite:
            run.skipped_steps += 1
            diagnose = functools.partial(_diagnose, module, micro_batches)
            loss_scale.check(run.global_steps, diagnose)
            log.say(f"Skipped an update: overflow in fp16; loss scale now {loss_scale.scale:g}")
            continue
        run.global_steps += 1
        run.num_trained_samples += samples_per_step
        if state.replica_check_due(run.global_steps, config.check_replicas_every):
            _check_replicas(dict(module.named_parameters()), run)

        # ---- evaluate where due, and always at the last step; stop where due
        reason = stop_reason()
        due = reason is not None or state.evaluation_due(
            run.global_steps, samples_per_step, config.eval_steps, eval_interval
        )
        evaluation = run_evaluation() if due else None
        if reason != "target":
            # The last evaluation may have met the target. One that already had is not
            # taken back: the start checkpoint counts, as upstream has it.
            reason = stop_reason()
        run.converged = reason == "target"

        figures = None
        if state.logging_due(run.global_steps, config.log_freq) or due:
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
                "learning_rate": schedule(optimizer.updates),
            }
        log.step(run, samples_per_step, figures, evaluation and evaluation.seconds)

    batches.close()
    log.perf.log("EPOCH_END", {"epoch": epoch})
    distributed.barrier(ranks.device)
    log.trained(run, start.num_sequences)
    if config.save_checkpoint and ranks.is_main:
        path = checkpoint_path(log.folder, run.global_steps)
        try:
            content = dataclasses.asdict(run)
            save_checkpoint(path, module.state_dict(), optimizer.state_dict(), content)
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


def _replicate(module: nn.Module, ranks: Ranks) -> nn.Module:
    if ranks.world_size == 1:
        return module
    device_ids = [ranks.device.index] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=device_ids, gradient_as_bucket_view=True)


def _check_replicas(weights: dict[str, torch.Tensor], run: state.RunState) -> None:
    """TrainingError, on every rank, if the ranks' weights are not the same to the last bit."""
    differing = distributed.differing_replica(weights)
    if differing is not None:
        raise TrainingError(
            f"the ranks hold different weights after {run.global_steps} updates: first "
            f"{differing}; look for another start checkpoint, failing memory, or a device or "
            "library that differs"
        )


def _diagnose(module: nn.Module, batches: list[PackedBatch]) -> str:
    """What was not finite first, on the rank that can tell best; the same on every rank."""
    found = distributed.gather(first_non_finite(module, batches))
    telling = [rank for rank, what in enumerate(found) if "gradient" not in what] or [0]
    rank = telling[0]
    return found[rank] if len(found) == 1 else f"rank {rank}: {found[rank]}"


def _reduction(model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """Ranks exchange gradients once an update: in the last micro-batch's backward."""
    if last or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()
