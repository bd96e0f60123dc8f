"""This project's own Triton kernels as a provider. Importable without Triton."""

from __future__ import annotations

import os

from bert_pretraining.errors import NotInstalled, Unavailable
from bert_pretraining.kernels.provider import OPERATORS, Implementation, Provider, Target
from bert_pretraining.runtime import compat
from bert_pretraining.runtime import device as devices

NAME = "triton"
OLDEST = (2, 1)  # the oldest whose compiler takes all kernels


def unavailable(target: Target) -> Unavailable | None:
    """Why Triton's kernels cannot run on the target, or None if they can."""
    if not devices.is_installed("triton"):
        return NotInstalled("triton is not installed (pip install triton)")
    if devices.is_cuda(target.device):
        return None
    # TRITON_INTERPRET=1 runs the kernels in Python, for tests.
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return Unavailable(f"triton has no kernels for {target.device}")


def find(operator: str, target: Target) -> Implementation | Unavailable:
    """The operator's kernels. Triton is imported only here, after they were chosen."""
    import triton

    if compat.release(triton.__version__) < OLDEST:
        return Unavailable(f"triton {triton.__version__} is older than 2.1")
    from bert_pretraining.kernels import triton_operators
    from bert_pretraining.kernels.triton_pairs import PAIRS

    pair = getattr(PAIRS, operator, None)
    if pair is not None:
        pair = pair._replace(sums=PAIRS.sums)
    return Implementation(getattr(triton_operators, operator), NAME, pair)


PROVIDER = Provider(NAME, OPERATORS, find, unavailable)
