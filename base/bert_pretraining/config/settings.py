"""Every setting of a run: name, type, default, meaning.

Names follow DeepSparkHub's BERT sample, so that its command lines and configurations
keep working. `resolution.py` fills a `Config` from files and flags.
"""

from __future__ import annotations

from dataclasses import Field, dataclass, fields

from bert_pretraining.config.fields import setting
from bert_pretraining.config.upstream import UpstreamSwitches

_PROVIDERS = ("auto", "reference", "torch", "triton", "apex")


def _operator(name: str) -> object:
    return setting(
        None, "run", f"provider of {name} alone; --kernels.{name} too", choices=_PROVIDERS
    )


@dataclass(frozen=True)
class Config(UpstreamSwitches):
    """One run, fully resolved."""

    name: str = setting(
        "mini", "run", "who tuned the configuration: a folder of configs/", changes_numbers=False
    )
    config: str = setting(
        "CPUx1x2",
        "run",
        "<device>x<nodes>x<processes per node>, or the path of a .toml file",
        changes_numbers=False,
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
        None,
        "run",
        "master seed; by default from the system's entropy",
        minimum=0,
        changes_numbers=False,
    )

    data_dir: str | None = setting(
        None,
        "data",
        "holds 2048_shards_uncompressed/, eval_set_uncompressed/, bert_config.json",
        changes_numbers=False,
    )
    train_dir: str | None = setting(
        None, "data", "training shards, if not in data_dir", changes_numbers=False
    )
    eval_dir: str | None = setting(
        None, "data", "evaluation shards, if not in data_dir", changes_numbers=False
    )
    bert_config_path: str | None = setting(
        None, "data", "bert_config.json, if not in data_dir", changes_numbers=False
    )
    init_checkpoint: str | None = setting(
        None,
        "data",
        "start weights, if not data_dir/model.ckpt-28252.apex.pt; 'random' for none",
        changes_numbers=False,
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
        changes_numbers=False,
    )
    output_dir: str | None = setting(
        None,
        "data",
        "logs and checkpoints; by default output/<name>_<config>",
        changes_numbers=False,
    )

    train_batch_size: int = setting(18, "training", "sequences a rank and micro-batch", minimum=1)
    gradient_accumulation_steps: int = setting(1, "training", "micro-batches an update", minimum=1)
    check_replicas_every: int = setting(
        0,
        "training",
        "updates between checks that all ranks hold the same weights; 0 for only at the start",
        minimum=0,
        changes_numbers=False,
    )
    objective: str = setting(
        "mlm_nsp",
        "training",
        "losses to train with: masked words (mlm) and next sentences (nsp), or masked words alone, "
        "for which a start checkpoint needs no next-sentence head",
        choices=("mlm_nsp", "mlm"),
    )
    max_steps: int = setting(1536, "training", "updates after which to stop", minimum=1)
    max_samples_termination: int = setting(
        14_000_000, "training", "sequences after which to stop", minimum=1, changes_numbers=False
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
        "adamw, or LAMB: auto for its fastest implementation here, or that implementation's name",
        choices=("auto", "reference", "foreach", "flat", "triton", "apex", "adamw"),
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
    weight_decay_rate: float = setting(0.01, "optimizer", "weight decay", minimum=0.0)
    opt_lamb_beta_1: float = setting(
        0.9, "optimizer", "beta 1 of LAMB and AdamW", minimum=0.0, maximum=0.999999
    )
    opt_lamb_beta_2: float = setting(
        0.999, "optimizer", "beta 2 of LAMB and AdamW", minimum=0.0, maximum=0.999999
    )
    opt_lamb_epsilon: float = setting(1e-6, "optimizer", "epsilon of LAMB and AdamW", minimum=1e-12)
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
        changes_numbers=False,
    )
    eval_steps: int = setting(
        0,
        "evaluation",
        "updates between evaluations; 0 for the MLPerf schedule",
        minimum=0,
        changes_numbers=False,
    )
    eval_interval_samples: int = setting(
        0,
        "evaluation",
        "sequences between evaluations; 0 for the MLPerf formula",
        minimum=0,
        changes_numbers=False,
    )
    eval_batch_size: int = setting(
        128, "evaluation", "sequences a batch", minimum=1, changes_numbers=False
    )
    num_eval_examples: int = setting(
        10_000, "evaluation", "sequences to evaluate", minimum=1, changes_numbers=False
    )

    log_freq: int = setting(
        1,
        "logging",
        "updates between STEP_END lines; 0 for evaluated steps only",
        minimum=0,
        changes_numbers=False,
    )
    save_checkpoint: bool = setting(
        False,
        "logging",
        "write model.ckpt-<step>.pt: on the way, and at the end",
        changes_numbers=False,
    )
    num_samples_per_checkpoint: int = setting(
        500_000,
        "logging",
        "sequences between checkpoints; 0 for one at the end only",
        minimum=0,
        changes_numbers=False,
    )
    min_samples_to_start_checkpoints: int = setting(
        3_000_000, "logging", "sequences before the first of them", minimum=0, changes_numbers=False
    )
    keep_n_most_recent_checkpoints: int = setting(
        20, "logging", "checkpoints of a run to keep; 0 for all", minimum=0, changes_numbers=False
    )
    resume: str | None = setting(
        None,
        "logging",
        "go on from the latest whole checkpoint in output_dir where there is one (auto), or else "
        "refuse (required); by default only from an --init_checkpoint that is a training "
        "checkpoint, and with never not even then",
        choices=("auto", "never", "required"),
        changes_numbers=False,
    )

    report: bool = setting(
        False,
        "logging",
        "draw the run into its folder at the end, as 'report' does",
        changes_numbers=False,
    )
    tensorboard_dir: str | None = setting(
        None,
        "logging",
        "also write the figures of steps and evaluations for TensorBoard, here",
        changes_numbers=False,
    )

    submission_org: str = setting(
        "unknown", "submission", "organisation in the MLPerf log", changes_numbers=False
    )
    submission_platform: str = setting(
        "", "submission", "platform; by default the host's name", changes_numbers=False
    )
    submission_division: str = setting(
        "closed",
        "submission",
        "division in the MLPerf log",
        choices=("closed", "open"),
        changes_numbers=False,
    )
    submission_status: str = setting(
        "onprem",
        "submission",
        "status in the MLPerf log",
        choices=("cloud", "onprem", "preview", "research"),
        changes_numbers=False,
    )

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
    def optimizer_algorithm(self) -> str:
        """What `optimizer` computes: "adamw", or "lamb" for each implementation of LAMB."""
        return "adamw" if self.optimizer == "adamw" else "lamb"

    @property
    def resolved_output_dir(self) -> str:
        stem = self.config.rsplit("/", 1)[-1].removesuffix(".toml")
        return self.output_dir or f"output/{self.name}_{stem}"

    @property
    def resolved_warmup_steps(self) -> int:
        return self.warmup_steps or int(self.max_steps * self.warmup_proportion)

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.nnodes * self.nproc_per_node

    @property
    def global_batch_size(self) -> int:
        """Sequences of one update, over all ranks."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size


FIELDS = {field.name: field for field in fields(Config)}
_TYPES = {"str": str, "int": int, "float": float, "bool": bool}


def base_type(field: Field) -> type:
    """The type of a field's values where they are set: int for `int | None`."""
    return _TYPES[str(field.type).split(" | ")[0]]
