"""From a configuration to what trains: model, optimizer, loss scale, the update over them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from bert_pretraining.checkpoint import load_weights
from bert_pretraining.checkpoint.training_state import Saved
from bert_pretraining.config import Config
from bert_pretraining.kernels import DTYPES, select
from bert_pretraining.logs.run_log import RunLog
from bert_pretraining.model.bert_config import BertConfig
from bert_pretraining.model.heads import BertForPreTraining
from bert_pretraining.optim import (
    Lamb,
    LambSettings,
    LossScale,
    Schedule,
    Sharing,
    create_optimizer,
)
from bert_pretraining.runtime import process_group, seeds
from bert_pretraining.runtime.process_group import Ranks
from bert_pretraining.training.gradient_reduction import make_reduction
from bert_pretraining.training.micro_step import choose_step
from bert_pretraining.training.update import Update


@dataclass(frozen=True)
class Training:
    """What `build` makes. module: the bare model, which holds the weights."""

    module: BertForPreTraining
    optimizer: Lamb
    loss_scale: LossScale
    update: Update


def build(
    config: Config,
    bert_config: BertConfig,
    start: Path | Saved | None,
    seed: int,
    schedule: Schedule,
    ranks: Ranks,
    log: RunLog,
) -> Training:
    """Build everything that needs no data, and say and log what was chosen.

    start: weights to start from, a run to go on with, or None for random weights.
    """
    precision = _precision(config, ranks, log)
    if ranks.world_size == 1:
        on = {"distributed_lamb": config.distributed_lamb, "clip_gradients": _clips_first(config)}
        for name in (name for name, is_on in on.items() if is_on):
            log.say(f"Notice: {name} has no effect: there is one rank")
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
    if isinstance(start, Path):
        summary = load_weights(module, start).summary()
        log.say(f"Start weights: {start} ({summary})")
        log.weights_loaded(name for name, _ in module.named_parameters())
    elif start is None:
        log.say(f"Start weights: random (seed {seed})")
    module.to(ranks.device)
    masters = None
    if DTYPES[precision].itemsize < 4:
        # The optimizer works on the weights as they were loaded, not on their rounding.
        masters = {name: value.detach().clone() for name, value in module.named_parameters()}
        module.to(DTYPES[precision])
    process_group.check_replicas(masters or dict(module.named_parameters()), updates=0)
    optimizer = _optimizer(config, module, masters, ranks)
    del masters
    log.say(f"Optimizer: {optimizer.choice}")
    log.built("CREATE_OPTIMIZER", optimizer, provider=optimizer.choice)
    loss_scale = LossScale.for_precision(precision, config.loss_scale, ranks.device)
    if isinstance(start, Saved):
        start.restore(optimizer, loss_scale)
        process_group.check_replicas(dict(module.named_parameters()), optimizer.updates)
    log.perf.log("MODEL_TO_FP16", {"fp16": precision == "fp16", "precision": precision})
    limit = config.max_gradient_norm if _clips_first(config) else None
    reduction = make_reduction(module, optimizer, ranks, limit)
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
    return Training(module, optimizer, loss_scale, update)


def _clips_first(config: Config) -> bool:
    return config.clip_gradients == "before_reduction"


def _precision(config: Config, ranks: Ranks, log: RunLog) -> str:
    precision = config.resolved_precision
    if config.loss_scale and precision != "fp16":
        log.say(f"Notice: loss_scale has no effect: precision is {precision}")
    if precision == "fp16" and ranks.device.type == "cpu":
        log.say("Notice: fp16 needs a GPU; training in fp32 on this CPU")
        return "fp32"
    return precision


def _optimizer(
    config: Config, module: BertForPreTraining, masters: dict[str, Tensor] | None, ranks: Ranks
) -> Lamb:
    settings = LambSettings(
        config.opt_lamb_beta_1,
        config.opt_lamb_beta_2,
        config.opt_lamb_epsilon,
        config.weight_decay_rate,
        config.max_gradient_norm,
    )
    sharing: Sharing = "sharded" if config.distributed_lamb else "replicated"
    if ranks.world_size == 1 or (sharing == "replicated" and _clips_first(config)):
        sharing = "alone"  # nobody but the optimizer holds gradients
    return create_optimizer(config.optimizer, module.named_parameters(), settings, masters, sharing)
