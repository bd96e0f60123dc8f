"""The flags that several measurements have, and what they stand for."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from bert_pretraining.bench import record
from bert_pretraining.bench.timing import announce
from bert_pretraining.bench.workload import BERT_LARGE
from bert_pretraining.config import FlagParser
from bert_pretraining.errors import UserError
from bert_pretraining.model.bert_config import BertConfig
from bert_pretraining.runtime import device as devices

BENCH = "python -m bert_pretraining bench"


def bench_parser(prog: str, description: str) -> FlagParser:
    """A parser with the flag that every measurement has. prog: what the user types."""
    parser = FlagParser(prog=prog, allow_abbrev=False, description=description)
    parser.add_argument(
        "--output", type=Path, metavar="FILE",
        help="a JSON file for the figures (default: none)",
    )  # fmt: skip
    return parser


def add_model_flags(parser: FlagParser, repeated: str) -> None:
    """Flags for the device, the model's sizes, and how often `repeated` is timed."""
    parser.add_argument(
        "--device", default="auto", metavar="TYPE",
        help="cpu, or a type of accelerator such as cuda (default: an accelerator, if there is "
        "one, else cpu)",
    )  # fmt: skip
    parser.add_argument(
        "--bert_config_path", type=Path, metavar="FILE",
        help="the model's sizes (default: BERT-large)",
    )  # fmt: skip
    parser.add_argument(
        "--num_layers", type=int, metavar="N", help="encoder layers, at least 1 (default: all)"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, metavar="N",
        help=f"{repeated}, at least 1 (default: %(default)s)",
    )  # fmt: skip


def require_at_least_one(flags: argparse.Namespace, *names: str) -> None:
    """UserError where one of these numbers is given and below 1."""
    for name in names:
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: it must be at least 1", f"pass --{name} 1 or more")


def device_and_model(flags: argparse.Namespace) -> tuple[torch.device, BertConfig]:
    """What the flags of `add_model_flags` stand for."""
    require_at_least_one(flags, "repeats", "num_layers")
    device = devices.choose(flags.device, local_rank=0).device
    if record.is_pretended() and device.type != "cpu":
        announce("the GPU is pretended (PRETENDED_GPU is set): its times mean nothing")
    config = BertConfig.load(flags.bert_config_path) if flags.bert_config_path else BERT_LARGE
    if flags.num_layers:
        config = replace(config, num_hidden_layers=flags.num_layers)
    return device, config
