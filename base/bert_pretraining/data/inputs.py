"""Where the files are that a run reads, and whether they exist and are of the right kind.

The launcher checks before it starts any rank, and each rank checks again; of the ranks, one on each
machine lists the shards. `--dry_run` reports all faults at once. No shard is opened, and no large
package is imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bert_pretraining.config import Config, nearest
from bert_pretraining.config.trackers import modules_of, split_names
from bert_pretraining.data.shard_names import (
    NoShardsError,
    ShardFolder,
    looks_like_shards,
    shard_folder,
    some,
)
from bert_pretraining.errors import UserError
from bert_pretraining.model.bert_config import BERT_CONFIG_NAME, BertConfig
from bert_pretraining.runtime import packages
from bert_pretraining.runtime.file_kind import cannot_read, shown
from bert_pretraining.runtime.files import checkpoint_kind, require_directory

DEFAULT_CHECKPOINT = "model.ckpt-28252.apex.pt"
TRAIN_NAME = "2048_shards_uncompressed"
EVAL_NAME = "eval_set_uncompressed"


@dataclass(frozen=True)
class DataPaths:
    """Where a run reads from. `init_checkpoint` is None for random weights."""

    train_dir: Path
    eval_dir: Path
    bert_config: Path
    init_checkpoint: Path | None


def data_paths(config: Config, *, list_folders: bool = True) -> DataPaths:
    """The directories and files that `data_dir` and its overrides name.

    list_folders: also look for shards in the folders. One process of a machine is enough for that.

    Raises UserError for the first one that is missing or of the wrong kind.
    """
    paths = _choose(config)
    for check in _checks(config, paths, list_folders):
        check()
    return paths


def faults(config: Config) -> list[UserError]:
    """All faults for which `data_paths` would raise."""
    return examined(config).faults


class Examined(NamedTuple):
    """What a run would read. folders: of training, then of evaluation shards; () with faults."""

    faults: list[UserError]
    folders: tuple[ShardFolder, ...] = ()
    init_checkpoint: Path | None = None


def examined(config: Config) -> Examined:
    """All faults for which `data_paths` would raise, and what there is. It lists a folder once."""
    try:
        paths = _choose(config)
    except UserError as error:
        return Examined([error])
    found, results = [], []
    for check in _checks(config, paths):
        try:
            results.append(check())
        except UserError as error:
            found.append(error)
    if found:
        return Examined(found)
    folders = tuple(one for one in results if isinstance(one, ShardFolder))
    return Examined([], folders, paths.init_checkpoint)


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
        _require_layout(root, config)

    def choose(override: str | None, name: str) -> Path:
        return Path(override) if override else root / name

    random = config.init_checkpoint == "random"
    return DataPaths(
        train_dir=choose(config.train_dir, TRAIN_NAME),
        eval_dir=choose(config.eval_dir, EVAL_NAME),
        bert_config=choose(config.bert_config_path, BERT_CONFIG_NAME),
        init_checkpoint=None if random else choose(config.init_checkpoint, DEFAULT_CHECKPOINT),
    )


def _checks(
    config: Config, paths: DataPaths, list_folders: bool = True
) -> Iterator[Callable[[], object]]:
    """The checks, each of which raises UserError if one file, directory or package is missing."""
    if config.report:
        yield partial(_require_modules, "report", ("matplotlib",), "report")
    for tracker in config.trackers:
        asked_by = f"track {tracker}"
        if tracker not in split_names(config.track):
            asked_by = "tensorboard_dir"
        yield partial(_require_modules, asked_by, modules_of(tracker), tracker)
    if paths.init_checkpoint is not None:
        yield partial(checkpoint_kind, paths.init_checkpoint)
    yield partial(BertConfig.load, paths.bert_config)
    for flag, directory, name, choose in (
        ("train_dir", paths.train_dir, TRAIN_NAME, shard_folder),
        ("eval_dir", paths.eval_dir, EVAL_NAME, evaluation_shards),
    ):
        fix = f"pass a --data_dir that holds {name}/, or --{flag} DIR"
        if getattr(config, flag):
            fix = f"pass the right --{flag}"
            if config.data_dir:
                fix += f", or leave it out to take {Path(config.data_dir) / name}"
        if list_folders:
            yield partial(choose, directory, fix, config.shard_pattern)
        else:
            yield partial(require_directory, directory, "data directory", fix)
    yield partial(_require_two_sets, paths)


def training_folder(config: Config, paths: DataPaths) -> ShardFolder:
    """The content of the folder of training shards."""
    return shard_folder(paths.train_dir, "pass another --train_dir", config.shard_pattern)


def evaluation_folder(config: Config, paths: DataPaths) -> ShardFolder:
    """The content of the folder of evaluation shards."""
    return evaluation_shards(paths.eval_dir, "pass another --eval_dir", config.shard_pattern)


def evaluation_shards(
    directory: Path, fix: str, pattern: str | None, *, allow_broken: bool = False
) -> ShardFolder:
    """`shard_folder` of an evaluation set.

    A pattern that fits none of its files is one for training shards: the usual names hold.
    """
    try:
        return shard_folder(directory, fix, pattern, allow_broken=allow_broken)
    except NoShardsError as error:
        if pattern is None:
            raise
        try:
            return shard_folder(directory, fix, allow_broken=allow_broken)
        except NoShardsError:
            raise error from None


def _require_layout(root: Path, config: Config) -> None:
    """Raise UserError where `data_dir` is no folder with a data set in it.

    The message says what is there instead, and which folder nearby would be right.
    """
    if not os.path.isdir(root):
        _require_existing(root)
    if config.train_dir and config.eval_dir:
        return
    if has_set(root):
        return
    raise layout_fault(root, _how_to_get(root))


def layout_fault(root: Path, fix: str, flag: str = "--data_dir ") -> UserError:
    """The error for a folder that is no data set: what is there, and which folder is right.

    fix: what to do where nothing nearby is a data set. flag: stands before a folder in the order.
    """
    try:
        names = sorted(os.listdir(root))
    except OSError as error:
        return cannot_read(root, error, "pass another folder")
    problem = (
        f"{flag.strip('- ') or 'folder'} {shown(root)} holds no {TRAIN_NAME}/ and no {EVAL_NAME}/, "
        f"found {some(names) if names else 'nothing'}"
    )
    above = root.absolute().parent
    if has_set(above):
        return UserError(
            f"{problem}: it is one folder of a data set",
            f"pass the one above: {flag}{shown(above)}",
        )
    inside = [name for name in names if has_set(root / name)]
    if inside:
        return UserError(problem, f"pass a data set in it: {flag}{shown(root / inside[0])}")
    if not flag:
        return UserError(problem, fix)
    if looks_like_shards(names):
        return UserError(
            f"{problem}: shards, without the folder that a data set keeps them in",
            f"pass --train_dir {shown(root)} and --eval_dir DIR with evaluation shards, "
            "--bert_config_path and --init_checkpoint, in place of --data_dir",
        )
    folders = [name for name in names if _holds_shards(root / name)]
    evaluation = [name for name in folders if "eval" in name or "test" in name]
    training = [name for name in folders if name not in evaluation]
    if training:
        other = shown(root / evaluation[0]) if evaluation else "DIR"
        return UserError(
            problem, f"pass --train_dir {shown(root / training[0])} and --eval_dir {other} with it"
        )
    return UserError(problem, fix)


def _holds_shards(folder: Path) -> bool:
    try:
        return looks_like_shards(os.listdir(folder))
    except OSError:
        return False  # no folder, or one that cannot be read


def has_set(directory: Path) -> bool:
    """Whether a folder holds a data set's folder of training or evaluation shards."""
    return any(os.path.isdir(directory / name) for name in (TRAIN_NAME, EVAL_NAME))


def _require_existing(root: Path) -> None:
    """Raise UserError: `data_dir` is a file, or nothing."""
    if os.path.isfile(root):
        owner = next((one for one in root.absolute().parents if has_set(one)), None)
        raise UserError(
            f"data_dir {shown(root)} is a file",
            f"pass the data set that it is in: --data_dir {shown(owner)}"
            if owner
            else f"pass the directory that holds {TRAIN_NAME}/ and {EVAL_NAME}/",
        )
    try:
        require_directory(root, "data_dir", f"check the path, or {_how_to_get(root)}")
    except UserError as error:
        raise UserError(f"{error.problem}{_similar(root)}", error.fix) from error


def _similar(root: Path) -> str:
    """ "; did you mean X?" with a data set whose path differs in one name; "" if there is none."""
    missing = root
    while missing != missing.parent and not os.path.isdir(missing.parent):
        missing = missing.parent
    folder, below = missing.parent, root.relative_to(missing)
    try:
        names = [name for name in sorted(os.listdir(folder)) if has_set(folder / name / below)]
    except OSError:
        return ""  # the folder cannot be read: nothing to suggest
    return nearest(missing.name, names, lambda name: shown(folder / name / below))


def _how_to_get(root: Path) -> str:
    """What to do where there is no data set: one whose name says so is the mini data set."""
    if "mini" in root.name:
        return (
            "make the mini data set with: "
            f"python -m bert_pretraining data make-mini --output_dir {shown(root)}"
        )
    return (
        f"pass the folder with {TRAIN_NAME}/, {EVAL_NAME}/, {BERT_CONFIG_NAME} and the start "
        "checkpoint (docs/data.md says how to get or make them)"
    )


def _require_modules(asked_by: str, modules: tuple[str, ...], extra: str) -> None:
    """Raise UserError if a module is missing. asked_by: the flag. extra: of pyproject.toml."""
    missing = [packages.package_of(name) for name in modules if packages.folder_of(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise UserError(
            f"--{asked_by}: {' and '.join(missing)} {verb} not installed",
            f"leave it out, or: {packages.how_to_install(missing)} (the extra [{extra}])",
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
