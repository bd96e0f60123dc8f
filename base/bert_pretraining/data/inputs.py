"""Where the files are that a run reads, and whether they exist and are of the right kind.

The launcher checks before it starts any rank, and each rank checks again. `--dry_run`
reports all faults at once. No shard is opened, and no large package is imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from bert_pretraining.config import Config
from bert_pretraining.errors import UserError
from bert_pretraining.model.bert_config import BertConfig
from bert_pretraining.runtime.files import checkpoint_kind, require_directory, shard_files

DEFAULT_CHECKPOINT = "model.ckpt-28252.apex.pt"
TRAIN_NAME = "2048_shards_uncompressed"
EVAL_NAME = "eval_set_uncompressed"
BERT_CONFIG_NAME = "bert_config.json"
# A setting, the package that it needs, and the extra of pyproject.toml with that package.
PACKAGES_OF_SETTINGS = (
    ("tensorboard_dir", "tensorboard", "tensorboard"),
    ("report", "matplotlib", "report"),
)


@dataclass(frozen=True)
class DataPaths:
    """Where a run reads from. `init_checkpoint` is None for random weights."""

    train_dir: Path
    eval_dir: Path
    bert_config: Path
    init_checkpoint: Path | None


def data_paths(config: Config) -> DataPaths:
    """The directories and files that `data_dir` and its overrides name.

    Raises UserError for the first one that is missing or of the wrong kind.
    """
    paths = _choose(config)
    for check in _checks(config, paths):
        check()
    return paths


def faults(config: Config) -> list[UserError]:
    """All faults for which `data_paths` would raise."""
    try:
        paths = _choose(config)
    except UserError as error:
        return [error]
    found = []
    for check in _checks(config, paths):
        try:
            check()
        except UserError as error:
            found.append(error)
    return found


def _choose(config: Config) -> DataPaths:
    root = Path(config.data_dir) if config.data_dir else None
    flags = ("train_dir", "eval_dir", "bert_config_path", "init_checkpoint")
    lacking = [f"--{flag}" for flag in flags if not getattr(config, flag)]
    if root is None and lacking:
        given = len(lacking) < len(flags)
        parts = f", or the parts of it that you did not name: {', '.join(lacking)}"
        raise UserError(
            "no data", f"pass --data_dir DIR{parts if given else ''} (see docs/data.md)"
        )
    if root is not None:
        fix = (
            "make the mini data set with: "
            f"python -m bert_pretraining data make-mini --output_dir {root}"
        )
        require_directory(root, "data_dir", fix)

    def choose(override: str | None, name: str) -> Path:
        return Path(override) if override else root / name

    random = config.init_checkpoint == "random"
    return DataPaths(
        train_dir=choose(config.train_dir, TRAIN_NAME),
        eval_dir=choose(config.eval_dir, EVAL_NAME),
        bert_config=choose(config.bert_config_path, BERT_CONFIG_NAME),
        init_checkpoint=None if random else choose(config.init_checkpoint, DEFAULT_CHECKPOINT),
    )


def _checks(config: Config, paths: DataPaths) -> Iterator[Callable[[], object]]:
    """The checks, each of which raises UserError if one file, directory or package is missing."""
    for name, package, extra in PACKAGES_OF_SETTINGS:
        if getattr(config, name):
            yield partial(_require_package, name, package, extra)
    if paths.init_checkpoint is not None:
        yield partial(checkpoint_kind, paths.init_checkpoint)
    yield partial(BertConfig.load, paths.bert_config)
    for directory, flag, given, name in (
        (paths.train_dir, "--train_dir", config.train_dir, TRAIN_NAME),
        (paths.eval_dir, "--eval_dir", config.eval_dir, EVAL_NAME),
    ):
        fix = f"pass a --data_dir that holds {name}/, or {flag} DIR"
        if given:
            fix = f"pass the right {flag}"
            if config.data_dir:
                fix += f", or leave it out to take {Path(config.data_dir) / name}"
        yield partial(shard_files, directory, fix)
    yield partial(_require_two_sets, paths)


def _require_package(name: str, package: str, extra: str) -> None:
    if find_spec(package) is None:
        raise UserError(
            f"--{name}: {package} is not installed",
            f"leave it out, or: {sys.executable} -m pip install {package} (the extra [{extra}])",
        )


def _require_two_sets(paths: DataPaths) -> None:
    try:
        same = os.path.samefile(paths.train_dir, paths.eval_dir)
    except OSError:
        return  # another check reports a missing directory
    if same:
        raise UserError(
            f"train_dir and eval_dir are the same directory, {paths.train_dir}: a model that is "
            "evaluated on what it trains on proves nothing",
            "pass an --eval_dir of other sequences",
        )
