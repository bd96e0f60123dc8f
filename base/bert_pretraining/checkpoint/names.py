"""The names that other programs give to weights, and the names of the apex layout.

The apex layout has the names of this package's model: `bert.encoder.layer.N.attention.self.query
.weight`, `cls.predictions.bias`, ...
"""

from __future__ import annotations

import re

WORD_EMBEDDING = "bert.embeddings.word_embeddings.weight"
DECODER = "cls.predictions.decoder.weight"
DECODER_BIAS = "cls.predictions.decoder.bias"
OUTPUT_BIAS = "cls.predictions.bias"
VOCABULARY_ROWS = (WORD_EMBEDDING, DECODER, OUTPUT_BIAS)  # one row for each word piece

# Prefixes that wrappers of a model put in front of its names, and what to call them.
PREFIXES = {
    "module.": "'module.' in front",
    "bert_model_segment.": "segments",
    "heads_only_segment.": "segments",
}
# (pattern, apex layout, what such names are called)
REPLACEMENTS = tuple(
    (re.compile(pattern), replacement, called)
    for pattern, replacement, called in (
        (r"\.attention\.multi_head_attention\.q_", ".attention.self.query.", "fused attention"),
        (r"\.attention\.multi_head_attention\.k_", ".attention.self.key.", "fused attention"),
        (r"\.attention\.multi_head_attention\.v_", ".attention.self.value.", "fused attention"),
        (
            r"\.attention\.(multi_head_attention\.)?out_proj_",
            ".attention.output.dense.",
            "fused attention",
        ),
        (r"\.attention\.layer_norm\.", ".attention.output.LayerNorm.", "fused attention"),
        (r"\.LayerNorm\.gamma$", ".LayerNorm.weight", "gamma and beta"),
        (r"\.LayerNorm\.beta$", ".LayerNorm.bias", "gamma and beta"),
    )
)
TENSORFLOW_ENDINGS = {
    "kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
    "output_weights": "weight",
    "output_bias": "bias",
    "word_embeddings": "word_embeddings.weight",
    "position_embeddings": "position_embeddings.weight",
    "token_type_embeddings": "token_type_embeddings.weight",
}
TENSORFLOW_2_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
# Variables of the training loop, not of the model.
TENSORFLOW_COUNTERS = {
    "global_step": "step counter",
    "beta1_power": "optimizer state",
    "beta2_power": "optimizer state",
    "good_steps": "loss scale",
    "loss_scale": "loss scale",
    "current_loss_scale": "loss scale",
}


def from_pytorch(name: str) -> tuple[str, set[str]]:
    """The name in the apex layout, and what was unusual about `name`."""
    unusual = set()
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
        unusual.add(PREFIXES[prefix])
    for pattern, replacement, called in REPLACEMENTS:
        name, count = pattern.subn(replacement, name)
        if count:
            unusual.add(called)
    return name, unusual


def from_tensorflow(name: str) -> tuple[str, bool]:
    """The name in the apex layout, and whether the matrix is stored transposed."""
    *folders, ending = name.split("/")
    folders = [re.sub(r"^layer_(\d+)$", r"layer.\1", folder) for folder in folders]
    return ".".join([*folders, TENSORFLOW_ENDINGS.get(ending, ending)]), ending == "kernel"


def tensorflow_slot_of(name: str, variables: set[str]) -> bool:
    """Whether `name` is optimizer state (a slot, to TensorFlow) of another variable.

    Its name begins with that variable's: `bert/pooler/dense/kernel/LAMB`, `.../adam_m`.
    """
    parts = name.split("/")
    return any("/".join(parts[:length]) in variables for length in range(1, len(parts)))
