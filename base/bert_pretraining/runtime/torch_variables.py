"""Environment variables that PyTorch reads: values that it does not take, or that break it."""

from __future__ import annotations

from collections.abc import Mapping

from bert_pretraining.errors import UserError
from bert_pretraining.runtime.rank_variables import text

DEBUG_VARIABLE = "TORCH_DISTRIBUTED_DEBUG"
_PREFIXES = ("TORCH", "PYTORCH")


def refused(error: Exception, environment: Mapping[str, str]) -> UserError | None:
    """What PyTorch does not take, if that is what it says in an error while it is imported."""
    if not isinstance(error, ValueError):
        return None
    names = [name for name in environment if name.startswith(_PREFIXES) and name in str(error)]
    if not names:
        return None
    name = max(names, key=len)
    reason = " ".join(str(error).split())[:200]
    return UserError(
        f"PyTorch does not take the environment variable {name}={environment[name]!r} ({reason})",
        f"run 'unset {name}', or set it to a value that PyTorch takes",
    )


def is_detailed(environment: Mapping[str, str]) -> bool:
    """Whether PyTorch checks every collective: it wraps the process group in another one."""
    return (text(environment, DEBUG_VARIABLE) or "").upper() == "DETAIL"


def notice(environment: Mapping[str, str]) -> str | None:
    """What the user should know of these variables before a launch."""
    if not is_detailed(environment):
        return None
    return (
        f"{DEBUG_VARIABLE}=DETAIL makes each collective slower, and ends "
        "DistributedDataParallel (--optimizer adamw) by a segmentation fault in PyTorch 2.13 and "
        f"later; {DEBUG_VARIABLE}=INFO does neither"
    )
