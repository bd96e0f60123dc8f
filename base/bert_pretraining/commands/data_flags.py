"""What the flags of the `data ...` commands have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from bert_pretraining import config


def data_parser(command: str, text: str) -> config.FlagParser:
    """The parser of `data COMMAND`; `text` says what the command does."""
    return config.FlagParser(
        prog=f"python -m bert_pretraining data {command}", allow_abbrev=False, description=text
    )


def at_least(minimum: int) -> Callable[[str], int]:
    """A type for flags: an integer of at least `minimum`."""

    def parse(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{text} is less than {minimum}")
        return value

    return parse


def add_number(
    parser: argparse.ArgumentParser, flag: str, default: int, minimum: int, text: str
) -> None:
    """Add a flag for an integer of at least `minimum`; `text` says what it counts."""
    parser.add_argument(
        flag, type=at_least(minimum), default=default, metavar="N",
        help=f"{text}, at least {minimum} (default: {default})",
    )  # fmt: skip


def add_shard_pattern(
    parser: argparse.ArgumentParser, default: str = "all with 'part' in the name"
) -> None:
    """Add the flag that chooses shards by name."""
    parser.add_argument(
        "--shard_pattern", metavar="GLOB",
        help="shell pattern of the names of shards, such as '*training*.hdf5', or '*/*.h5' for "
        f"files in sub-folders (default: {default})",
    )  # fmt: skip


def probability(text: str) -> float:
    """A type for flags: a number from 0 to 1."""
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is no probability; pass a number from 0 to 1")
    return value
