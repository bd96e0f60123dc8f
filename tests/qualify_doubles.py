"""For tests of `qualify`: a small model in the place of BERT-large, in this and other processes."""

from __future__ import annotations

from pathlib import Path

from bert_pretraining.config import Config
from bert_pretraining.model.bert_config import BertConfig
from bert_pretraining.qualify.context import Context

SMALL = BertConfig(512, 64, 1, 4, 128, 512)  # with the usual dropout

# Python reads it first in each process. In ranks it makes the model small; before the weights of
# rank RANK_NUMBER are looked at for the UPDATE-th time, a bit of one is flipped.
RANKS = """
import os

if os.environ.get("RANK"):
    import torch
    from bert_pretraining.model.bert_config import BertConfig
    from bert_pretraining.qualify import fingerprint, workload

    workload.BERT_LARGE = BertConfig(512, 64, 1, 4, 128, 512)
    add_weights, calls = fingerprint.add_weights, []

    def flipped(marks, module):
        calls.append(marks)
        if os.environ["RANK"] == "RANK_NUMBER" and len(calls) == UPDATE:
            weight = module.bert.encoder.layer[0].intermediate.dense.weight
            weight.data.view(torch.int32)[5, 7] ^= 1 << 12
        add_weights(marks, module)

    fingerprint.add_weights = flipped
"""


def context_of(folder: Path, **values: object) -> Context:
    """A quick qualification of two ranks on the CPU."""
    given = {
        "config": Config(device="cpu"),
        "device": "cpu",
        "ranks": 2,
        "layers": 1,
        "batch_sizes": (2,),
        "minutes": 0.05,
        "quick": True,
        "folder": folder,
    }
    return Context(**{**given, **values})


def flipping_ranks(folder: Path, rank: int, update: int) -> Path:
    """A folder for PYTHONPATH; see RANKS."""
    folder.mkdir()
    program = RANKS.replace("RANK_NUMBER", str(rank)).replace("UPDATE", str(update))
    (folder / "sitecustomize.py").write_text(program)
    return folder


def ignored(*_: object) -> None:
    """Where progress goes."""
