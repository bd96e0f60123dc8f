"""Every setting of a run: name, type, default, meaning.

Names follow DeepSparkHub's BERT sample, so that its command lines and configurations
keep working. `resolution.py` fills a `Config` from files and flags.
"""

from __future__ import annotations

from dataclasses import Field, dataclass, field, fields

GROUPS = {
    "run": "configuration and device",
    "data": "data and files",
    "training": "training",
    "optimizer": "optimizer",
    "evaluation": "evaluation and target",
    "logging": "logs and checkpoints",
    "submission": "MLPerf submission",
    "upstream": "upstream's switches that this design has no need of; they change nothing",
}


def setting(
    default: object,
    group: str,
    help_text: str,
    choices: tuple[str, ...] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
) -> object:
    """A dataclass field with its help text and bounds (both inclusive)."""
    metadata = {
        "group": group,
        "help": help_text,
        "choices": choices,
        "minimum": minimum,
        "maximum": maximum,
    }
    return field(default=default, metadata=metadata)


def ignored(default: object, why: str) -> object:
    """A field of upstream's that is accepted and has no effect, and why."""
    return setting(default, "upstream", why)


_PACKED = "no effect: batches hold no padding"
_PROVIDERS = ("auto", "reference", "torch", "triton", "apex")
_KERNELS = "no effect: --kernels chooses the operators"
_REDUCTION = "no effect: gradients are reduced in overlapping buckets"


def _operator(name: str) -> object:
    return setting(
        None, "run", f"provider of {name} alone; --kernels.{name} too", choices=_PROVIDERS
    )


@dataclass(frozen=True)
class Config:
    """One run, fully resolved."""

    name: str = setting("mini", "run", "who tuned the configuration: a folder of configs/")
    config: str = setting(
        "CPUx1x2", "run", "<device>x<nodes>x<processes per node>, or the path of a .toml file"
    )
    nnodes: int = setting(1, "run", "machines", minimum=1)
    nproc_per_node: int = setting(1, "run", "processes (ranks) on each machine", minimum=1)
    device: str = setting("auto", "run", "where to train", choices=("auto", "cpu", "cuda"))
    dist_backend: str = setting(
        "nccl", "run", "collectives; gloo on a CPU", choices=("nccl", "gloo")
    )
    kernels: str = setting("auto", "run", "provider of the operators", choices=_PROVIDERS)
    kernels_attention: str | None = _operator("attention")
    kernels_bias_gelu: str | None = _operator("bias_gelu")
    kernels_bias_dropout_residual_layer_norm: str | None = _operator(
        "bias_dropout_residual_layer_norm"
    )
    kernels_embedding_layer_norm_dropout: str | None = _operator("embedding_layer_norm_dropout")
    kernels_masked_cross_entropy: str | None = _operator("masked_cross_entropy")
    compile: str = setting(
        "auto", "run", "torch.compile the model; auto: on a GPU", choices=("auto", "on", "off")
    )
    use_cuda_graph: bool = setting(
        False, "run", "replay forward and backward as a CUDA graph (one rank; batching balanced)"
    )
    static_tokens: int = setting(
        0,
        "run",
        "tokens of the constant-shape batch that compiled code and graphs take, with batching "
        "balanced; 0 for the mean of the MLPerf data set with a margin",
        minimum=0,
    )
    seed: int | None = setting(
        None, "run", "master seed; by default from the system's entropy", minimum=0
    )

    data_dir: str | None = setting(
        None, "data", "holds 2048_shards_uncompressed/, eval_set_uncompressed/, bert_config.json"
    )
    train_dir: str | None = setting(None, "data", "training shards, if not in data_dir")
    eval_dir: str | None = setting(None, "data", "evaluation shards, if not in data_dir")
    bert_config_path: str | None = setting(None, "data", "bert_config.json, if not in data_dir")
    init_checkpoint: str | None = setting(
        None, "data", "start weights, if not data_dir/model.ckpt-28252.apex.pt; 'random' for none"
    )
    batching: str | None = setting(
        None,
        "data",
        "'random' sequences a batch, or 'balanced' to level token counts between batches and "
        "ranks; by default what exchange_padding stands for",
        choices=("random", "balanced"),
    )
    exchange_padding: bool = setting(
        False, "data", "upstream's name for batching balanced (its own way exchanges sequences)"
    )
    data_lanes: int = setting(
        0,
        "data",
        "shards read side by side, 0 for one a rank; the order of the sequences follows from "
        "this and the seed, whatever the number of ranks",
        minimum=0,
    )
    output_dir: str | None = setting(
        None, "data", "logs and checkpoints; by default output/<name>_<config>"
    )

    train_batch_size: int = setting(18, "training", "sequences a rank and micro-batch", minimum=1)
    gradient_accumulation_steps: int = setting(1, "training", "micro-batches an update", minimum=1)
    check_replicas_every: int = setting(
        0,
        "training",
        "updates between checks that all ranks hold the same weights; 0 for only at the start",
        minimum=0,
    )
    max_steps: int = setting(1536, "training", "updates after which to stop", minimum=1)
    max_samples_termination: int = setting(
        14_000_000, "training", "sequences after which to stop", minimum=1
    )
    precision: str | None = setting(
        None, "training", "weights and activations", choices=("fp32", "bf16", "fp16")
    )
    fp16: bool = setting(False, "training", "the same as --precision fp16; fp32 on a CPU")
    loss_scale: float = setting(
        0.0,
        "training",
        "fixed loss scale for fp16; 0 for a dynamic one",
        minimum=0.0,
        maximum=2.0**24,
    )
    checkpoint_activations: bool = setting(
        False, "training", "keep only each layer's input for the backward pass; less memory"
    )
    mlm_loss_normalization: str = setting(
        "rank",
        "training",
        "'rank': each micro-batch's own mean, then the mean over ranks (upstream's way); "
        "'global': the mean over all masked tokens of the update",
        choices=("rank", "global"),
    )

    optimizer: str = setting(
        "auto",
        "optimizer",
        "LAMB's implementation",
        choices=("auto", "reference", "foreach", "flat", "triton", "apex"),
    )
    distributed_lamb: bool = setting(
        False,
        "optimizer",
        "share gradients, moments and master weights between ranks; the same updates with less "
        "memory a rank",
    )
    clip_gradients: str = setting(
        "after_reduction",
        "optimizer",
        "clip the mean of the ranks' gradients, or, before the reduction, each rank's own",
        choices=("after_reduction", "before_reduction"),
    )
    learning_rate: float = setting(4e-5, "optimizer", "peak learning rate", minimum=0.0)
    weight_decay_rate: float = setting(0.01, "optimizer", "LAMB's weight decay", minimum=0.0)
    opt_lamb_beta_1: float = setting(
        0.9, "optimizer", "LAMB's beta 1", minimum=0.0, maximum=0.999999
    )
    opt_lamb_beta_2: float = setting(
        0.999, "optimizer", "LAMB's beta 2", minimum=0.0, maximum=0.999999
    )
    opt_lamb_epsilon: float = setting(1e-6, "optimizer", "LAMB's epsilon", minimum=1e-12)
    max_gradient_norm: float = setting(
        1.0, "optimizer", "gradients of a greater norm are scaled down to it", minimum=1e-12
    )
    warmup_steps: int = setting(0, "optimizer", "updates of linear warm-up", minimum=0)
    warmup_proportion: float = setting(
        0.0,
        "optimizer",
        "warm-up as a share of max_steps, where warmup_steps is 0",
        minimum=0.0,
        maximum=1.0,
    )
    start_warmup_step: int = setting(
        0, "optimizer", "update at which the warm-up starts; may be negative"
    )

    target_mlm_accuracy: float = setting(
        0.72,
        "evaluation",
        "masked-token accuracy on the evaluation set that ends the run",
        minimum=0.0,
        maximum=1.0,
    )
    eval_steps: int = setting(
        0, "evaluation", "updates between evaluations; 0 for the MLPerf schedule", minimum=0
    )
    eval_interval_samples: int = setting(
        0, "evaluation", "sequences between evaluations; 0 for the MLPerf formula", minimum=0
    )
    eval_batch_size: int = setting(128, "evaluation", "sequences a batch", minimum=1)
    num_eval_examples: int = setting(10_000, "evaluation", "sequences to evaluate", minimum=1)

    log_freq: int = setting(
        1, "logging", "updates between STEP_END lines; 0 for evaluated steps only", minimum=0
    )
    save_checkpoint: bool = setting(
        False, "logging", "write model.ckpt-<step>.pt: on the way, and at the end"
    )
    num_samples_per_checkpoint: int = setting(
        500_000, "logging", "sequences between checkpoints; 0 for one at the end only", minimum=0
    )
    min_samples_to_start_checkpoints: int = setting(
        3_000_000, "logging", "sequences before the first of them", minimum=0
    )
    keep_n_most_recent_checkpoints: int = setting(
        20, "logging", "checkpoints of a run to keep; 0 for all", minimum=0
    )
    resume: str | None = setting(
        None,
        "logging",
        "go on from the latest whole checkpoint in output_dir where there is one (auto), or else "
        "refuse (required); by default only from an --init_checkpoint that is a training "
        "checkpoint, and with never not even then",
        choices=("auto", "never", "required"),
    )

    report: bool = setting(
        False, "logging", "draw the run into its folder at the end, as 'report' does"
    )
    tensorboard_dir: str | None = setting(
        None, "logging", "also write the figures of steps and evaluations for TensorBoard, here"
    )

    submission_org: str = setting("unknown", "submission", "organisation in the MLPerf log")
    submission_platform: str = setting("", "submission", "platform; by default the host's name")
    submission_division: str = setting(
        "closed", "submission", "division in the MLPerf log", choices=("closed", "open")
    )
    submission_status: str = setting(
        "onprem",
        "submission",
        "status in the MLPerf log",
        choices=("cloud", "onprem", "preview", "research"),
    )

    cache_eval_data: bool = ignored(False, "no effect: evaluation batches always stay in memory")
    unpad: bool = ignored(False, _PACKED)
    unpad_fmha: bool = ignored(False, _PACKED)
    pad: bool = ignored(False, _PACKED)
    dense_seq_output: bool = ignored(False, "no effect: the MLM head sees masked rows only")
    fused_mha: bool = ignored(False, _KERNELS)
    fused_gelu_bias: bool = ignored(False, _KERNELS)
    fused_dropout_add: bool = ignored(False, _KERNELS)
    enable_fuse_dropout: bool = ignored(False, _KERNELS)
    disable_fuse_mask: bool = ignored(False, _KERNELS)
    disable_fuse_scale: bool = ignored(False, _KERNELS)
    disable_fuse_qkv: bool = ignored(False, _KERNELS)
    disable_apex_softmax: bool = ignored(False, _KERNELS)
    ddp_type: str = ignored("native", "no effect: always torch's DistributedDataParallel")
    allreduce_post_accumulation: bool = ignored(False, _REDUCTION)
    allreduce_post_accumulation_fp16: bool = ignored(False, _REDUCTION)
    dwu_group_size: int = ignored(0, "no effect: distributed_lamb shares between all ranks")
    dwu_num_blocks: int = ignored(4, _REDUCTION)
    dwu_num_chunks: int = ignored(1, _REDUCTION)
    dwu_num_rs_pg: int = ignored(2, _REDUCTION)
    dwu_num_ar_pg: int = ignored(4, _REDUCTION)
    dwu_num_ag_pg: int = ignored(2, _REDUCTION)
    dwu_overlap_reductions: bool = ignored(False, _REDUCTION)
    dwu_e5m2_allgather: bool = ignored(False, "no effect: weights travel in their own precision")
    do_train: bool = ignored(True, "no effect: a run always trains")
    bypass_amp: bool = ignored(False, "no effect: there is no AMP")
    opt_level: str = ignored("O2", "no effect: --precision decides")

    @property
    def resolved_precision(self) -> str:
        """`precision`, or what `fp16` stands for."""
        return self.precision or ("fp16" if self.fp16 else "fp32")

    @property
    def resolved_batching(self) -> str:
        """`batching`, or what `exchange_padding` stands for."""
        return self.batching or ("balanced" if self.exchange_padding else "random")

    @property
    def kernels_by_operator(self) -> dict[str, str]:
        """Operator -> provider, where one is named for it alone."""
        start = "kernels_"
        named = {
            name.removeprefix(start): getattr(self, name)
            for name in self.__dataclass_fields__
            if name.startswith(start)
        }
        return {operator: provider for operator, provider in named.items() if provider}

    @property
    def without_effect(self) -> dict[str, list[str]]:
        """Why -> the switches of upstream's that are on and change nothing."""
        reasons: dict[str, list[str]] = {}
        for switch in fields(self):
            value = getattr(self, switch.name)
            if switch.metadata["group"] == "upstream" and value is True and not switch.default:
                reasons.setdefault(switch.metadata["help"], []).append(switch.name)
        return reasons

    @property
    def resolved_output_dir(self) -> str:
        stem = self.config.rsplit("/", 1)[-1].removesuffix(".toml")
        return self.output_dir or f"output/{self.name}_{stem}"

    @property
    def resolved_warmup_steps(self) -> int:
        return self.warmup_steps or int(self.max_steps * self.warmup_proportion)

    @property
    def world_size(self) -> int:
        return self.nnodes * self.nproc_per_node


FIELDS = {field.name: field for field in fields(Config)}
_TYPES = {"str": str, "int": int, "float": float, "bool": bool}


def base_type(field: Field) -> type:
    """The type of a field's values where they are set: int for `int | None`."""
    return _TYPES[str(field.type).split(" | ")[0]]
