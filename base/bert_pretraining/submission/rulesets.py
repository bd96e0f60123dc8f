"""The MLPerf Training rulesets with BERT, and MLPerf's tools on this machine."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

from bert_pretraining.config import nearest
from bert_pretraining.errors import UserError
from bert_pretraining.runtime import packages

RULESETS = ("1.0.0", "1.1.0", "2.0.0", "2.1.0", "3.0.0", "3.1.0", "4.0.0", "4.1.0", "5.0.0")
DEFAULT_RULESET = "4.1.0"
RUNS = 10  # of a submission; the fastest and the slowest do not count
DROPPED_RUNS = 2
TARGET_MLM_ACCURACY = 0.72
RETIRED = (
    "BERT left MLPerf Training after 5.0, so no BERT log can pass it (the checkers of later "
    "rounds skip BERT and call that a success)"
)


def require_ruleset(ruleset: str) -> str:
    """Return `ruleset`; raise UserError with the reason if it has no BERT."""
    if ruleset in RULESETS:
        return ruleset
    version = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)", ruleset)
    if version and tuple(map(int, version.groups())) > (5, 0, 0):
        raise UserError(f"--ruleset {ruleset}: {RETIRED}", "pass --ruleset 5.0.0 or an earlier one")
    if version and int(version[1]) < 1:
        raise UserError(
            f"--ruleset {ruleset}: has no reference convergence points",
            "pass --ruleset 1.0.0 or a later one",
        )
    raise UserError(
        f"--ruleset {ruleset}: no such ruleset{nearest(ruleset, list(RULESETS))}",
        f"pass one of {', '.join(RULESETS)}",
    )


def mlperf_directory() -> Path:
    """The folder of the package mlperf_logging. Raises UserError if it is not installed."""
    found = importlib.util.find_spec("mlperf_logging")
    if found is None or not found.submodule_search_locations:
        raise missing("mlperf_logging")
    return Path(next(iter(found.submodule_search_locations)))


def missing(package: str) -> UserError:
    """The error for a missing package of MLPerf's tools."""
    return UserError(
        f"{sys.executable} lacks the package {package}, which MLPerf's tools come in or need",
        f"install it: {packages.how_to_install(['mlperf-logging==4.1.68', 'scipy'])}",
    )
