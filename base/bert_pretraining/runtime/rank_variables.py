"""The variables by which launchers tell a process its rank: RANK, WORLD_SIZE, LOCAL_RANK, ...

They may be left over from another program, empty, or no numbers. An empty one counts as not set.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from bert_pretraining.errors import UserError

HIGHEST_PORT = 65535
# What tells a process its place among the ranks.
_OF_RANKS = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*"
)


class RankVariables(NamedTuple):
    """This process's rank, the number of ranks, and its rank among those of its machine."""

    rank: int
    world_size: int
    local_rank: int


def read(environment: Mapping[str, str]) -> RankVariables:
    """RANK, WORLD_SIZE and LOCAL_RANK; one rank alone where they are not set.

    Raises UserError if one is no number, if they contradict each other, or if there are several
    ranks and MASTER_ADDR or MASTER_PORT does not say where they meet.
    """
    rank, world_size, local_rank = (
        whole_number(environment, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    )
    found = RankVariables(rank or 0, 1 if world_size is None else world_size, local_rank or 0)
    check_below(environment, "RANK", found.rank, "WORLD_SIZE", found.world_size)
    check_below(environment, "LOCAL_RANK", found.local_rank, "WORLD_SIZE", found.world_size)
    if found.world_size > 1:
        if text(environment, "MASTER_ADDR") is None:
            raise UserError(
                f"WORLD_SIZE={found.world_size} is set, but MASTER_ADDR is not",
                "start the ranks with bash run_training.sh or torchrun, which set both, or: unset "
                "RANK WORLD_SIZE LOCAL_RANK",
            )
        if port(environment) is None:
            raise UserError(
                f"WORLD_SIZE={found.world_size} is set, but MASTER_PORT is not",
                "export MASTER_PORT, the same to all ranks, or: unset RANK WORLD_SIZE LOCAL_RANK",
            )
    return found


def own_rank() -> int:
    """RANK of this process for its reports; 0 where it is not set, or wrong (`read` refuses it)."""
    value = os.environ.get("RANK", "")
    return int(value) if value.isdecimal() else 0


def text(environment: Mapping[str, str], name: str) -> str | None:
    """The variable's value without blanks around it; None if it is not set, or empty."""
    return environment.get(name, "").strip() or None


def whole_number(environment: Mapping[str, str], name: str) -> int | None:
    """The variable as a number, 0 or more; None if it is not set, or empty.

    Raises UserError for anything else.
    """
    value = text(environment, name)
    if value is None:
        return None
    if not (value.isascii() and value.isdecimal()):
        raise UserError(
            f"the environment variable {name}={value!r} is not a whole number, 0 or more",
            f"run 'unset {name}', or set it as the launcher of the ranks does",
        )
    return int(value)


def port(environment: Mapping[str, str], name: str = "MASTER_PORT") -> int | None:
    """The variable as a TCP port; None if it is not set, or empty. UserError if it is no port."""
    value = whole_number(environment, name)
    if value is not None and not 1 <= value <= HIGHEST_PORT:
        raise UserError(
            f"the environment variable {name}={value} is no port, 1 to {HIGHEST_PORT}",
            f"set it to the port of the first machine, or run 'unset {name}'",
        )
    return value


def check_below(
    environment: Mapping[str, str], name: str, value: int, size_name: str, size: int
) -> None:
    """Raise UserError unless the number of a rank or machine is below the number of them."""
    if value >= size:
        given = text(environment, size_name)
        said = f"{size_name}={given}" if given else f"{size_name} is not set, which means {size}"
        raise UserError(
            f"the environment variable {name}={value} is not below the number of them ({said})",
            f"set both as the launcher of the ranks does, or run 'unset {name} {size_name}'",
        )


def environment_without_rank() -> dict[str, str]:
    """This process's environment for a child that is no rank, and that finds this package."""
    kept = {name: value for name, value in os.environ.items() if not _OF_RANKS.fullmatch(name)}
    base = str(Path(__file__).resolve().parents[2])
    paths = [path for path in kept.get("PYTHONPATH", "").split(os.pathsep) if path]
    kept["PYTHONPATH"] = os.pathsep.join([*paths, *([] if base in paths else [base])])
    return kept
