"""Published speeds of BERT-large's pretraining, of one device.

`published.toml` holds the figures. `normal.py` sets a measured speed beside them, and `plan`
(`scaling/`) holds its model of the step against them.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from pathlib import Path

from bert_pretraining.config.toml import parse_toml

FILE = Path(__file__).with_name("published.toml")
# Of MLPerf's systems with the same 8 GPUs and 768 sequences an update: B200 2.4%, H200 and H100
# SXM 5.4%.
SPREAD = 0.054
PART = re.compile(r"\bMIG\b")  # in the name of a part of a device (NVIDIA's multi-instance GPU)
FACTOR = 8  # between the numbers of devices


@dataclass(frozen=True)
class Row:
    """A published speed; see the head of `published.toml`. None where it is not known."""

    device: str
    names: str
    sequences_per_second: float
    system: str
    source: str
    devices: int | None = None
    lowest: float | None = None
    batch_size: int | None = None
    precision: str | None = None
    packed: bool | None = None
    round: str | None = None
    minutes: float | None = None

    @property
    def lower_bound(self) -> float:
        """The lowest normal speed of a device, in sequences a second."""
        return self.lowest or self.sequences_per_second * (1.0 - SPREAD)

    @property
    def device_batch_size(self) -> float | None:
        """Sequences of an update on a device."""
        return self.batch_size / self.devices if self.batch_size and self.devices else None

    @property
    def origin(self) -> str:
        """Who published it, for people."""
        return f"{self.system}, MLPerf {self.round}" if self.round else self.system


@functools.cache
def rows() -> tuple[Row, ...]:
    """All published speeds."""
    return tuple(Row(**row) for row in parse_toml(FILE.read_text(encoding="utf-8"))["figure"])


def find(device: str, devices: int) -> list[Row]:
    """The speeds of a device of this name; those with the most similar number of devices first.

    Those of many times as many or as few devices are left out, as long as there are others.
    """

    def apart(row: Row) -> float:
        return abs(math.log((row.devices or devices) / devices))

    if PART.search(device):
        return []
    found = sorted((row for row in rows() if re.search(row.names, device)), key=apart)
    return [row for row in found if apart(row) <= math.log(FACTOR)] or found[:1]
