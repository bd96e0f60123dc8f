"""Switches of DeepSparkHub's sample that are accepted and change nothing, each with the reason."""

from __future__ import annotations

from dataclasses import dataclass, fields

from bert_pretraining.config.fields import setting

_PACKED = "batches hold no padding"
_KERNELS = "--kernels chooses the operators"
_REDUCTION = "gradients are reduced in overlapping buckets"


def no_effect(default: object, why: str) -> object:
    """A setting that changes nothing. why: the reason."""
    return setting(default, "upstream", f"no effect: {why}", changes_numbers=False)


@dataclass(frozen=True)
class UpstreamSwitches:
    """A part of every `Config`, so that upstream's command lines and files keep working."""

    cache_eval_data: bool = no_effect(False, "evaluation batches always stay in memory")
    unpad: bool = no_effect(False, _PACKED)
    unpad_fmha: bool = no_effect(False, _PACKED)
    pad: bool = no_effect(False, _PACKED)
    dense_seq_output: bool = no_effect(False, "the MLM head sees masked rows only")
    fused_mha: bool = no_effect(False, _KERNELS)
    fused_gelu_bias: bool = no_effect(False, _KERNELS)
    fused_dropout_add: bool = no_effect(False, _KERNELS)
    enable_fuse_dropout: bool = no_effect(False, _KERNELS)
    disable_fuse_mask: bool = no_effect(False, _KERNELS)
    disable_fuse_scale: bool = no_effect(False, _KERNELS)
    disable_fuse_qkv: bool = no_effect(False, _KERNELS)
    disable_apex_softmax: bool = no_effect(False, _KERNELS)
    ddp_type: str = no_effect("native", "always torch's DistributedDataParallel")
    allreduce_post_accumulation: bool = no_effect(False, _REDUCTION)
    allreduce_post_accumulation_fp16: bool = no_effect(False, _REDUCTION)
    dwu_group_size: int = no_effect(0, "distributed_lamb shards over all ranks")
    dwu_num_blocks: int = no_effect(4, _REDUCTION)
    dwu_num_chunks: int = no_effect(1, _REDUCTION)
    dwu_num_rs_pg: int = no_effect(2, _REDUCTION)
    dwu_num_ar_pg: int = no_effect(4, _REDUCTION)
    dwu_num_ag_pg: int = no_effect(2, _REDUCTION)
    dwu_overlap_reductions: bool = no_effect(False, _REDUCTION)
    dwu_e5m2_allgather: bool = no_effect(False, "weights are gathered in their own precision")
    do_train: bool = no_effect(True, "a run always trains")
    bypass_amp: bool = no_effect(False, "there is no AMP")
    opt_level: str = no_effect("O2", "--precision decides")

    @property
    def without_effect(self) -> dict[str, list[str]]:
        """Reason -> the switches that are on and change nothing."""
        reasons: dict[str, list[str]] = {}
        for switch in fields(UpstreamSwitches):
            if getattr(self, switch.name) is True and not switch.default:
                reasons.setdefault(switch.metadata["help"], []).append(switch.name)
        return reasons
