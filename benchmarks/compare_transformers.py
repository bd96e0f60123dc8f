"""Compare the step of this package with Hugging Face's BertForPreTraining, in one run.

    PYTHONPATH=base python benchmarks/compare_transformers.py --output results/DATE_step/x.json

Both run forward and backward with the same sizes, start weights, sequences and threads, and with
dropout 0.1. The two take turns. Hugging Face's model takes padded batches and uses its sdpa
attention. `--hugging_face_compile` also runs it compiled.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from bert_pretraining.bench import step as bench
from bert_pretraining.bench.workload import batch_of, padded_arrays
from bert_pretraining.kernels import select
from bert_pretraining.model.bert_config import BertConfig
from bert_pretraining.model.heads import BertForPreTraining

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def hugging_face_step(
    config: BertConfig,
    lengths: np.ndarray,
    device: torch.device,
    dtype: torch.dtype,
    compiled: bool,
) -> Callable[[], None]:
    """Forward and backward of the padded batch, with the start weights of our model."""
    import transformers

    model = transformers.BertForPreTraining(
        transformers.BertConfig(
            vocab_size=config.padded_vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            max_position_embeddings=config.max_position_embeddings,
            hidden_act="gelu_pytorch_tanh",
            layer_norm_eps=config.layer_norm_epsilon,
            hidden_dropout_prob=config.hidden_dropout_prob,
            attention_probs_dropout_prob=config.attention_probs_dropout_prob,
            attn_implementation="sdpa",
        )
    )
    kernels = select("reference", torch.device("cpu"), torch.float32)
    weights = BertForPreTraining(config, kernels, seed=1).state_dict()
    model.load_state_dict(weights, strict=False)
    model.to(device, dtype).train()
    arrays = padded_arrays(lengths, config)
    labels = np.full(arrays["input_ids"].shape, -100)
    rows, places = np.nonzero(arrays["masked_lm_ids"])
    labels[rows, arrays["masked_lm_positions"][rows, places]] = arrays["masked_lm_ids"][
        rows, places
    ]
    inputs = {
        "input_ids": arrays["input_ids"],
        "attention_mask": arrays["input_mask"],
        "token_type_ids": arrays["segment_ids"],
        "labels": labels,
        "next_sentence_label": arrays["next_sentence_labels"],
    }
    tensors = {key: torch.as_tensor(value).long().to(device) for key, value in inputs.items()}
    forward = torch.compile(model) if compiled else model

    def run() -> None:
        model.zero_grad()
        forward(**tensors).loss.backward()

    return run


def main() -> int:
    parser = bench.step_parser("benchmarks/compare_transformers.py", __doc__)
    parser.add_argument(
        "--hugging_face_compile", action="store_true", help="also Hugging Face's, compiled"
    )
    parser.add_argument("--compile", action="store_true", help="also ours, compiled")
    parser.add_argument("--graph", action="store_true", help="also ours, as a CUDA graph")
    flags = parser.parse(sys.argv[1:])
    device, config, lengths = bench.setting_of(flags)
    batch = batch_of(lengths, config)

    def makers_of(precision: str) -> bench.Makers:
        dtype = bench.DTYPES[precision]
        theirs = partial(hugging_face_step, config, lengths, device, dtype)
        ours = partial(bench.OurStep, config, batch, device, dtype)
        makers = {
            f"Hugging Face, sdpa, {precision}": partial(theirs, compiled=False),
            f"ours, {precision}": ours,
        }
        if flags.graph:
            makers[f"ours, graph, {precision}"] = partial(ours, graph=True)
        if flags.hugging_face_compile:
            makers[f"Hugging Face, compiled, {precision}"] = partial(theirs, compiled=True)
        if flags.compile:
            makers[f"ours, compiled, {precision}"] = partial(ours, compiled=True)
        return makers

    return bench.compare_each_precision(
        flags,
        (device, config, lengths),
        batch.num_masked,
        makers_of,
        transformers=importlib.metadata.version("transformers"),
    )


if __name__ == "__main__":
    sys.exit(main())
