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

# Parts of a name that come from a wrapper around the model or around one of its layers, and what
# to call such names. They stand in any order, in front and between.
WRAPPERS = {
    "module": "'module.' in front",  # DistributedDataParallel, DeepSpeed
    "model": "'model.' in front",  # Lightning
    "_orig_mod": "'_orig_mod.' in front",  # torch.compile
    "_fsdp_wrapped_module": "'_fsdp_wrapped_module.' in front",
    "_checkpoint_wrapped_module": "'_checkpoint_wrapped_module.' in front",
    "_forward_module": "'_forward_module.' in front",  # Lightning Fabric
    "bert_model_segment": "segments",
    "heads_only_segment": "segments",
}
# BERT's own part of a name, without the 'bert.' that BertModel alone does not write.
_OF_BERT = re.compile(
    r"(?P<front>(?:.+\.)?)(?P<own>embeddings\.(?:(?:word|position|token_type)_embeddings|LayerNorm"
    r"|position_ids|token_type_ids)\b.*|encoder\.layer\.\d+\..*|pooler\.dense(?:_act)?\..*)"
)
_OF_HEADS = re.compile(r"(?P<front>(?:.+\.)?)(?P<own>cls\.(?:predictions|seq_relationship)\..*)")
# Models with the names of BERT's layers that compute something else with them.
OTHER_MODELS = (
    "roberta", "electra", "deberta", "albert", "distilbert", "ernie", "nezha", "layoutlm", "mpnet",
    "xmod", "bert_generation",
)  # fmt: skip
# Ends of names that hold no weights: buffers, and the counters of wrappers.
NO_WEIGHTS = {
    "position_ids": "position numbers",  # 0, 1, 2, ...; Hugging Face used to store them
    "token_type_ids": "buffers",
    "n_averaged": "buffers",
    "num_batches_tracked": "buffers",
    "_extra_state": "buffers",
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
        (r"\.dense_act\.", ".dense.", "dense_act"),  # DeepLearningExamples
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
    parts = name.split(".")
    unusual = {WRAPPERS[part] for part in parts if part in WRAPPERS}
    name = ".".join(part for part in parts if part not in WRAPPERS)
    name, words = _without_front(name)
    unusual |= words
    for pattern, replacement, called in REPLACEMENTS:
        name, count = pattern.subn(replacement, name)
        if count:
            unusual.add(called)
    return name, unusual


def _without_front(name: str) -> tuple[str, set[str]]:
    """A name that begins with `bert.` or `cls.`, where that is what the rest of it is.

    What stands before it is the attribute of the model that holds BERT, as in
    `backbone.bert.encoder...`.
    """
    match = _OF_HEADS.fullmatch(name) or _OF_BERT.fullmatch(name)
    if match is None or any(part in OTHER_MODELS for part in match["front"].split(".")):
        return name, set()
    front, own, unusual = match["front"], match["own"], set()
    if not own.startswith("cls."):
        own = f"bert.{own}"
        if front == "bert." or front.endswith(".bert."):
            front = front.removesuffix("bert.")
        else:
            unusual.add("no 'bert.' in front")
    if front:
        unusual.add(f"'{front}' in front")
    return own, unusual


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
