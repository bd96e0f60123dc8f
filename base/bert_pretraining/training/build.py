"""From a configuration to what trains: model, optimizer, loss scale, the update over them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bert_pretraining.checkpoint import load_weights
from bert_pretraining.checkpoint.plausibility import suspicions
from bert_pretraining.checkpoint.training_state import Saved
from bert_pretraining.config import Config
from bert_pretraining.kernels import DTYPES, fp8_linear
from bert_pretraining.kernels.fp8 import Fp8State
from bert_pretraining.logs.run_log import RunLog
from bert_pretraining.logs.sinks import MatrixRate
from bert_pretraining.model.bert_config import BertConfig
from bert_pretraining.model.heads import BertForPreTraining
from bert_pretraining.model.losses import OBJECTIVES
from bert_pretraining.optim import (
    LossScale,
    Optimizer,
    OptimizerSettings,
    Schedule,
    Sharing,
    create_optimizer,
)
from bert_pretraining.runtime import arithmetic, process_group, seeds
from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime.matrix_rate import matrix_rate
from bert_pretraining.runtime.process_group import Ranks
from bert_pretraining.runtime.replicas import check_replicas
from bert_pretraining.training.evaluate import Evaluator
from bert_pretraining.training.gradient_reduction import make_reduction
from bert_pretraining.training.kernel_choice import choose_kernels
from bert_pretraining.training.step_choice import Trained, prepared_step
from bert_pretraining.training.step_clock import StepClock
from bert_pretraining.training.update import Update


@dataclass(frozen=True)
class Setup:
    """The input of `build`.

    start: weights to start from, a run to go on with, or None for random weights.
    """

    config: Config
    bert_config: BertConfig
    start: Path | Saved | None
    seed: int
    schedule: Schedule
    ranks: Ranks
    log: RunLog

    @property
    def clips_before_reduction(self) -> bool:
        return self.config.clip_gradients == "before_reduction"


@dataclass(frozen=True)
class Training:
    """What `build` makes.

    module: the bare model, which holds the weights. evaluate: of its whole evaluation set. fp8: the
    scales of its encoder, if it computes in fp8. clock: measures the updates. precision: of the
    weights and products, as the log has it. matrix_rate: of all ranks' devices.
    """

    module: BertForPreTraining
    optimizer: Optimizer
    loss_scale: LossScale
    update: Update
    evaluate: Evaluator
    fp8: Fp8State | None
    clock: StepClock
    precision: str
    matrix_rate: MatrixRate | None


def build(setup: Setup) -> Training:
    """Build everything that needs no data, and say and log what was chosen."""
    config, ranks, log = setup.config, setup.ranks, setup.log
    precision = _precision(setup)
    _say_what_has_no_effect(setup)
    rate = _matrix_rate(setup, precision)
    module = _model(setup, precision)
    masters = None
    if DTYPES[precision].itemsize < 4:
        # The optimizer works on the weights as they were loaded, not on their rounding.
        masters = {name: value.detach().clone() for name, value in module.named_parameters()}
        module.to(DTYPES[precision])
    check_replicas(masters or dict(module.named_parameters()), updates=0)
    optimizer = _optimizer(setup, module, masters)
    del masters
    loss_scale = LossScale.for_precision(precision, config.loss_scale, ranks.device)
    fp8 = _fp8_state(setup, module, DTYPES[precision])
    if isinstance(setup.start, Saved):
        setup.start.restore(optimizer, loss_scale, fp8, ranks)
        check_replicas(dict(module.named_parameters()), optimizer.updates)
    tf32 = precision == "fp32" and arithmetic.multiplies_in_tf32(ranks.device)
    named_precision = "fp8" if fp8 else precision
    log.precision(named_precision, tf32)
    limit = config.max_gradient_norm if setup.clips_before_reduction else None
    clock = StepClock(ranks.device)
    reduction = make_reduction(module, optimizer, ranks, limit, clock.waits_from_here)
    log.built("MODEL_TO_DDP", reduction.model, reduction=reduction.name)
    longest = setup.bert_config.max_position_embeddings
    trained = Trained(
        module=module,
        model=reduction.model,
        zero_grad=functools.partial(optimizer.zero_grad, set_to_none=False),
        sink=optimizer.sink,
        reduces_later=reduction.can_follow,
        fp8=fp8,
    )
    micro_step = prepared_step(config, trained, longest, ranks, log.say)
    update = Update(
        module=module,
        micro_step=micro_step,
        reduction=reduction,
        optimizer=optimizer,
        schedule=setup.schedule,
        loss_scale=loss_scale,
        normalization=config.mlm_loss_normalization,
        ranks=ranks,
        clock=clock,
        fp8=fp8,
    )
    proves = config.proves_kernels_on(ranks.device.type)
    evaluate = Evaluator(module, ranks, micro_step.pool, proves, fp8, log.say)
    return Training(
        module, optimizer, loss_scale, update, evaluate, fp8, clock, named_precision, rate
    )


def _say_what_has_no_effect(setup: Setup) -> None:
    config, say = setup.config, setup.log.say
    if setup.ranks.world_size == 1:
        on = {
            "distributed_lamb": config.distributed_lamb,
            "clip_gradients": setup.clips_before_reduction,
        }
        for name in (name for name, is_on in on.items() if is_on):
            say(f"Notice: {name} has no effect: there is one rank")
    for why, names in config.without_effect.items():
        say(f"Notice: {', '.join(names)}: {why}")


def _precision(setup: Setup) -> str:
    """Of weights and activations, in DTYPES; of those around the fp8 layers with fp8."""
    precision, say = setup.config.resolved_precision, setup.log.say
    if precision == "fp8":
        device = setup.ranks.device
        has_bf16 = devices.supports(device, DTYPES["bf16"]) and not devices.emulates_bf16(device)
        precision = "bf16" if has_bf16 else "fp16"
    if setup.config.loss_scale and precision != "fp16":
        say(f"Notice: loss_scale has no effect: precision is {precision}")
    device = setup.ranks.device
    if precision == "fp16" and device.type == "cpu":
        say("Notice: fp16 needs a GPU; training in fp32 on this CPU")
        return "fp32"
    if not devices.supports(device, DTYPES[precision]):
        say(f"Notice: {device.type} devices do not compute in {precision}; training in fp32")
        return "fp32"
    return precision


def _matrix_rate(setup: Setup, precision: str) -> MatrixRate | None:
    """Measured on all ranks at the same time, as training uses them; None with fp8.

    A product in fp8 is not like the others of a step, which stay in 16 bits.
    """
    if setup.config.resolved_precision == "fp8":
        return None
    device = setup.ranks.device
    process_group.barrier(device)
    rate, shape = matrix_rate(device, DTYPES[precision])
    (of_all,) = process_group.total([rate], device)
    return MatrixRate(of_all, precision, shape)


def _model(setup: Setup, precision: str) -> BertForPreTraining:
    """The model on this rank's device, in float32, with its start weights if there are any."""
    config, bert_config, log = setup.config, setup.bert_config, setup.log
    kernels = choose_kernels(config, bert_config, DTYPES[precision], setup.ranks.device, log.say)
    module = BertForPreTraining(
        bert_config,
        kernels,
        seeds.model_seed(setup.seed),
        config.checkpoint_activations,
        OBJECTIVES[config.objective],
    )
    log.built("CONVERT_MODEL", module, kernels=kernels.choice)
    if isinstance(setup.start, Path):
        loaded = load_weights(module, setup.start, config.missing_weights)
        log.say(f"Start weights: {setup.start} ({loaded.summary()})")
        for notice in suspicions(loaded.weights):
            log.notice("start_weights_odd", f"{setup.start}: {notice}")
        log.weights_loaded(name for name, _ in module.named_parameters())
    elif setup.start is None:
        log.say(f"Start weights: random (seed {setup.seed})")
    return module.to(setup.ranks.device)


def _fp8_state(setup: Setup, module: BertForPreTraining, dtype: torch.dtype) -> Fp8State | None:
    """The scales of the encoder's layers with --precision fp8, else None."""
    if setup.config.resolved_precision != "fp8":
        return None
    device, sizes = setup.ranks.device, setup.bert_config
    state = Fp8State.of(module.bert.encoder, device)
    hidden, inner = sizes.hidden_size, sizes.intermediate_size
    layers = ((hidden, 3 * hidden), (hidden, hidden), (hidden, inner), (inner, hidden))
    if device.type == "cpu":
        setup.log.say(
            "Notice: this CPU has no fp8: its rounding is emulated, which is slower than bf16"
        )
    else:
        fp8_linear.check(device, dtype, layers)
    setup.log.say(f"fp8: {len(state.names)} linear layers ({state.engine.name})")
    return state


def _optimizer(
    setup: Setup, module: BertForPreTraining, masters: dict[str, Tensor] | None
) -> Optimizer:
    config = setup.config
    settings = OptimizerSettings(
        config.opt_lamb_beta_1,
        config.opt_lamb_beta_2,
        config.opt_lamb_epsilon,
        config.weight_decay_rate,
        config.max_gradient_norm,
    )
    sharing: Sharing = "sharded" if config.distributed_lamb else "replicated"
    if setup.ranks.world_size == 1:
        sharing = "alone"
    optimizer = create_optimizer(
        config.optimizer,
        module.parameters_in_memory_order(),
        settings,
        masters,
        sharing,
        torch.float32 if config.gradient_dtype == "fp32" else None,
    )
    setup.log.say(f"Optimizer: {optimizer.choice}")
    setup.log.built("CREATE_OPTIMIZER", optimizer, provider=optimizer.choice)
    return optimizer
