"""Every setting of a run: name, type, default, meaning.

Names are those of DeepSparkHub's BERT sample, so that its command lines and configurations keep
working. `resolution.py` fills a `Config` from files and flags.
"""

from __future__ import annotations

from dataclasses import Field, dataclass, fields

from bert_pretraining.config.fields import setting
from bert_pretraining.config.log_settings import LogSettings
from bert_pretraining.config.upstream import UpstreamSwitches

LAMB_IMPLEMENTATIONS = ("auto", "reference", "foreach", "flat", "triton", "apex")
_PROVIDERS = ("auto", "reference", "torch", "triton", "apex")


def _operator(name: str) -> object:
    return setting(
        None, "run", f"provider of {name} alone; also --kernels.{name}", choices=_PROVIDERS
    )


@dataclass(frozen=True)
class Config(LogSettings, UpstreamSwitches):
    """All settings of a run, fully resolved."""

    name: str = setting(
        "mini",
        "run",
        "the configuration's folder in configs/, named after who tuned it",
        changes_numbers=False,
    )
    config: str = setting(
        "CPUx1x2",
        "run",
        "<device>x<nodes>x<processes per node>, or the path of a .toml file",
        changes_numbers=False,
    )
    nnodes: int = setting(1, "run", "number of machines", minimum=1)
    nproc_per_node: int = setting(1, "run", "processes (ranks) on each machine", minimum=1)
    device: str = setting(
        "auto",
        "run",
        "device to train on: auto (cuda, else another accelerator, else cpu), cpu, or a type that "
        "PyTorch knows: cuda, npu, musa, mlu, hpu, xpu, mps, ...",
    )
    dist_backend: str = setting(
        "nccl",
        "run",
        "backend of the collectives, such as gloo; nccl stands for the one that belongs to the "
        "device: nccl for cuda, hccl for npu, ...; on a CPU always gloo",
    )
    kernels: str = setting("auto", "run", "provider of the fused operators", choices=_PROVIDERS)
    kernels_attention: str | None = _operator("attention")
    kernels_bias_gelu: str | None = _operator("bias_gelu")
    kernels_bias_dropout_residual_layer_norm: str | None = _operator(
        "bias_dropout_residual_layer_norm"
    )
    kernels_embedding_layer_norm_dropout: str | None = _operator("embedding_layer_norm_dropout")
    kernels_masked_cross_entropy: str | None = _operator("masked_cross_entropy")
    prove_kernels: str = setting(
        "auto",
        "run",
        "run every operator once at the start, compare it with the reference in float64, and "
        "choose the fastest of the right ones; auto: on a device that is no CPU; on: on a CPU "
        "too, and try again what was wrong before",
        choices=("auto", "on", "off"),
    )
    compile: str = setting(
        "auto", "run", "torch.compile the model; auto: on a GPU only", choices=("auto", "on", "off")
    )
    use_cuda_graph: bool = setting(
        False,
        "run",
        "replay forward and backward as a CUDA graph (one rank, batching balanced)",
    )
    static_tokens: int = setting(
        0,
        "run",
        "tokens of the constant-shape batch that compiled code and CUDA graphs use with batching "
        "balanced; 0 for the mean of the MLPerf data set plus a margin",
        minimum=0,
    )
    deterministic: bool = setting(
        False,
        "run",
        "use only operators that give the same bits each time on a GPU too, so that a resumed run "
        "is bit-identical there; slower; on a CPU they always do",
    )
    seed: int | None = setting(
        None,
        "run",
        "master seed; by default drawn from the system's entropy",
        minimum=0,
        changes_numbers=False,
    )

    data_dir: str | None = setting(
        None,
        "data",
        "folder with 2048_shards_uncompressed/, eval_set_uncompressed/ and bert_config.json",
        changes_numbers=False,
    )
    train_dir: str | None = setting(
        None, "data", "folder of training shards, if not in data_dir", changes_numbers=False
    )
    eval_dir: str | None = setting(
        None, "data", "folder of evaluation shards, if not in data_dir", changes_numbers=False
    )
    shard_pattern: str | None = setting(
        None,
        "data",
        "shell pattern of the names of shards, such as '*training*.hdf5', or '*/*.h5' for files in "
        "sub-folders; by default every file with 'part' in its name",
        changes_numbers=False,
    )
    bert_config_path: str | None = setting(
        None, "data", "path of bert_config.json, if not in data_dir", changes_numbers=False
    )
    init_checkpoint: str | None = setting(
        None,
        "data",
        "checkpoint to start from; by default data_dir/model.ckpt-28252.apex.pt; 'random' for "
        "random weights",
        changes_numbers=False,
    )
    missing_weights: str = setting(
        "refuse",
        "data",
        "what to do where init_checkpoint lacks the heads of pretraining, as Hugging Face's "
        "BertModel does: refuse it, or start them from random weights and ignore other heads",
        choices=("refuse", "random"),
        changes_numbers=False,
    )
    batching: str | None = setting(
        None,
        "data",
        "'random': random sequences in each batch; 'balanced': about equal token counts in all "
        "batches and on all ranks; by default random, or balanced with exchange_padding",
        choices=("random", "balanced"),
    )
    exchange_padding: bool = setting(
        False,
        "data",
        "upstream's name for batching balanced (upstream exchanges sequences)",
    )
    data_lanes: int = setting(
        0,
        "data",
        "shards to read in parallel; 0 for one per rank; with the same number and seed, the order "
        "of the sequences is the same for every number of ranks",
        minimum=0,
        changes_numbers=False,
    )
    output_dir: str | None = setting(
        None,
        "data",
        "folder of logs and checkpoints; by default output/<name>_<config>",
        changes_numbers=False,
    )

    train_batch_size: int = setting(18, "training", "sequences per rank and micro-batch", minimum=1)
    gradient_accumulation_steps: int = setting(1, "training", "micro-batches per update", minimum=1)
    check_replicas_every: int = setting(
        0,
        "training",
        "updates between checks that all ranks hold the same weights; 0 to check only at the start",
        minimum=0,
        changes_numbers=False,
    )
    objective: str = setting(
        "mlm_nsp",
        "training",
        "losses to train with; mlm_nsp: masked tokens and next sentences; mlm: masked tokens "
        "only, so that the start checkpoint needs no next-sentence head",
        choices=("mlm_nsp", "mlm"),
    )
    max_steps: int = setting(1536, "training", "updates after which the run stops", minimum=1)
    max_samples_termination: int = setting(
        14_000_000,
        "training",
        "sequences after which the run stops",
        minimum=1,
        changes_numbers=False,
    )
    precision: str | None = setting(
        None,
        "training",
        "dtype of weights and activations; by default fp32, or fp16 with --fp16. fp8: the "
        "matrix products of the encoder in 8 bits, all else in bf16, or fp16 where that is missing",
        choices=("fp32", "bf16", "fp16", "fp8"),
    )
    allow_tf32: bool = setting(
        True,
        "training",
        "with precision fp32, let a GPU that has TF32 multiply matrices in it: faster, with inputs "
        "rounded to 10 bits after the point",
    )
    gradient_dtype: str = setting(
        "auto",
        "training",
        "dtype in which the gradients of micro-batches and ranks are added: param for that of the "
        "weights, fp32, or auto for the package's choice",
        choices=("auto", "param", "fp32"),
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
        False,
        "training",
        "save only each layer's input for the backward pass and recompute the rest",
    )
    mlm_loss_normalization: str = setting(
        "rank",
        "training",
        "'rank': the mean of each micro-batch, then the mean over ranks, as upstream does; "
        "'global': the mean over all masked tokens of the update",
        choices=("rank", "global"),
    )

    optimizer: str = setting(
        "auto",
        "optimizer",
        "adamw, or LAMB: auto for its fastest implementation on this device, or the name of an "
        "implementation",
        choices=(*LAMB_IMPLEMENTATIONS, "adamw"),
    )
    distributed_lamb: bool = setting(
        False,
        "optimizer",
        "shard gradients, moments and master weights over ranks: the same updates with less "
        "memory per rank",
    )
    clip_gradients: str = setting(
        "after_reduction",
        "optimizer",
        "after_reduction: clip the mean of the ranks' gradients; before_reduction: each rank "
        "clips its own gradient first",
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
        1.0, "optimizer", "gradients with a larger norm are scaled down to this norm", minimum=1e-12
    )
    warmup_steps: int = setting(0, "optimizer", "updates of linear warm-up", minimum=0)
    warmup_proportion: float = setting(
        0.0,
        "optimizer",
        "warm-up as a fraction of max_steps, if warmup_steps is 0",
        minimum=0.0,
        maximum=1.0,
    )
    start_warmup_step: int = setting(
        0, "optimizer", "update at which the warm-up starts; it may be negative"
    )

    target_mlm_accuracy: float = setting(
        0.72,
        "evaluation",
        "accuracy on the masked tokens of the evaluation set at which the run ends",
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
        128, "evaluation", "sequences per evaluation batch", minimum=1, changes_numbers=False
    )
    num_eval_examples: int = setting(
        10_000, "evaluation", "number of sequences to evaluate", minimum=1, changes_numbers=False
    )

    @property
    def resolved_precision(self) -> str:
        """`precision`, or what `fp16` means if that is not set."""
        return self.precision or ("fp16" if self.fp16 else "fp32")

    @property
    def resolved_batching(self) -> str:
        """`batching`, or what `exchange_padding` means if that is not set."""
        return self.batching or ("balanced" if self.exchange_padding else "random")

    def proves_kernels_on(self, device_type: str) -> bool:
        """Whether kernels are proven on a type of device, such as "cpu"."""
        return self.prove_kernels == "on" or (self.prove_kernels == "auto" and device_type != "cpu")

    @property
    def kernels_by_operator(self) -> dict[str, str]:
        """Operator -> provider, for the operators whose own setting is set."""
        start = "kernels_"
        named = {
            name.removeprefix(start): getattr(self, name)
            for name in self.__dataclass_fields__
            if name.startswith(start)
        }
        return {operator: provider for operator, provider in named.items() if provider}

    @property
    def optimizer_algorithm(self) -> str:
        """The algorithm of `optimizer`: "lamb" for each implementation of LAMB, else its name."""
        return "lamb" if self.optimizer in LAMB_IMPLEMENTATIONS else self.optimizer

    @property
    def resolved_output_dir(self) -> str:
        stem = self.config.rsplit("/", 1)[-1].removesuffix(".toml")
        return self.output_dir or f"output/{self.name}_{stem}"

    @property
    def resolved_warmup_steps(self) -> int:
        return self.warmup_steps or int(self.max_steps * self.warmup_proportion)

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self.nnodes * self.nproc_per_node

    @property
    def global_batch_size(self) -> int:
        """Sequences of one update, over all ranks."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size


FIELDS = {field.name: field for field in fields(Config)}
_TYPES = {"str": str, "int": int, "float": float, "bool": bool}


def base_type(field: Field) -> type:
    """The type of a field's values other than None: int for `int | None`."""
    return _TYPES[str(field.type).split(" | ")[0]]
