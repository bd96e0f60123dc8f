"""Differences between the versions of PyTorch and Triton that the package runs on.

Each entry says from which version on it is not needed. When that version is the oldest supported
one, delete the entry. No other module asks for a version.
"""

from __future__ import annotations

import re

import torch

TORCH = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
