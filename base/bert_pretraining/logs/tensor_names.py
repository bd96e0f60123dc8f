"""Our parameters' names -> the tensor names of MLPerf's `weights_initialization`."""

from __future__ import annotations

from collections.abc import Iterable

_OF_THEIR_OWN = {
    "cls.predictions.bias": "cls/predictions/output_bias",
    "cls.seq_relationship.weight": "cls/seq_relationship/output_weights",
    "cls.seq_relationship.bias": "cls/seq_relationship/output_bias",
}
_TIED = "cls.predictions.decoder.weight"  # the word embedding under its second name


def mlperf_tensor_names(parameters: Iterable[str]) -> list[str]:
    """The names that MLPerf has for these parameters, TensorFlow's: 398 for BERT-large's.

    The decoder is the word embedding, and has no name of its own.

    Raises ValueError for a name that is no parameter's of `BertForPreTraining`.
    """
    return [_tensor_name(parameter) for parameter in parameters if parameter != _TIED]


def _tensor_name(parameter: str) -> str:
    if parameter in _OF_THEIR_OWN:
        return _OF_THEIR_OWN[parameter]
    layer, _, kind = parameter.rpartition(".")
    if not layer.startswith(("bert.", "cls.")) or kind not in ("weight", "bias"):
        raise ValueError(f"no parameter of BERT: {parameter!r}")
    endings = {"weight": "/kernel", "bias": "/bias"}
    if layer.endswith(".LayerNorm"):
        endings = {"weight": "/gamma", "bias": "/beta"}
    elif layer.endswith("_embeddings"):
        endings = {"weight": ""}
    path = layer.replace("encoder.layer.", "encoder.layer_").replace(".", "/")
    return path + endings[kind]
