"""`data verify`: check whether a directory is a data set for training, and which one.

One of `jobs` processes reads each file once and returns a summary. Each process needs
memory for one file and some blocks of rows. This process needs 16 bytes for each training
sequence, because it finds repeated sequences by 8-byte hashes: 2.5 GB for the real set of
157 million sequences. The chance that two different ones have equal hashes is below one in
a thousand.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bert_pretraining.data import inputs, shard_index
from bert_pretraining.data.shard_names import (
    INDEX_NAME,
    NoShardsError,
    broken_shards,
    shard_folder,
    some,
)
from bert_pretraining.errors import UserError
from bert_pretraining.model.bert_config import BERT_CONFIG_NAME, BertConfig
from bert_pretraining.preparation import verify_report as report
from bert_pretraining.preparation.verify_content import check_content
from bert_pretraining.preparation.verify_file import Task, check_file
from bert_pretraining.preparation.verify_report import FIX, CheckResults, FileSummary, VerifyReport
from bert_pretraining.runtime.file_kind import cannot_read, shown
from bert_pretraining.runtime.files import require_directory
from bert_pretraining.runtime.words import counted


def verify(directory: Path, jobs: int = 1, pattern: str | None = None) -> VerifyReport:
    """Check a data set: `*shards*/` and `eval*/` with files named `*part*`, bert_config.json.

    pattern: chooses the files of a directory by name, as --shard_pattern of a run does.

    A set is compared with the published md5s if its names say that it has 2048 or 4320
    shards and its vocabulary has 30522 entries. Raises UserError only for a directory
    that does not exist or holds no such files; other faults are problems in the report.
    """
    require_directory(directory, "data set", "name the directory that holds the data set")
    results = CheckResults(not_checked=list(report.NEVER_CHECKED))
    names = _find_files(directory, results, pattern)
    vocab_size, max_positions = _read_config(directory / BERT_CONFIG_NAME, results)
    known = np.empty(0, np.uint64)
    checked: dict[str, list[FileSummary]] = {}
    roles = {name: "evaluation" if _is_eval(name) else "training" for name in names}
    # The evaluation set comes first, because training files are searched for its sequences.
    for name in sorted(names, key=lambda name: (roles[name], name)):
        count = report.check_names(name, names[name], results)
        genuine = vocab_size == report.PUBLISHED_VOCAB_SIZE and count in report.PUBLISHED_COUNTS
        is_eval = roles[name] == "evaluation"
        tasks = [
            Task(
                path=directory / name / file,
                name=f"{name}/{file}",
                vocab_size=vocab_size,
                max_positions=max_positions,
                eval_hashes=None if is_eval else known,
                wants_md5=is_eval or genuine,
            )
            for file in names[name]
        ]
        files = _check_files(name, tasks, jobs, results)
        checked[name] = files
        _compare_index(directory / name, files, results)
        report.compare_files(name, files, results)
        check_content(name, files, results)
        report.check_duplicates(name, files, results)
        if is_eval:
            known = np.unique(np.concatenate([known, *(file.text_hashes for file in files)]))
        else:
            evaluation = [file for part in checked if _is_eval(part) for file in checked[part]]
            report.check_overlap(files, evaluation, results)
    files = [file for part in checked.values() for file in part]
    report.compare_special_tokens(files, results)
    report.list_unread(files, results)
    eval_md5, eval_sequences = report.fingerprint(files)
    checkpoint = next((path.name for path in sorted(directory.glob("model.ckpt-*"))), None)
    results.notes.append(f"start checkpoint: {checkpoint or 'none'}")
    return VerifyReport(
        directory=directory,
        published=report.check_published(files, vocab_size, results),
        problems_by_kind=results.problems,
        notes=results.notes,
        not_checked=results.not_checked,
        sets=[report.summarize(name, roles[name], part) for name, part in checked.items()],
        vocab_size=vocab_size,
        eval_md5=eval_md5,
        eval_sequences=eval_sequences,
        checkpoint=checkpoint,
    )


def _is_eval(name: str) -> bool:
    return name.startswith("eval")


def _find_files(
    directory: Path, results: CheckResults, pattern: str | None
) -> dict[str, list[str]]:
    """Each subdirectory with the names of its shards below it, sorted."""
    found: dict[str, list[str]] = {}
    empty: dict[str, NoShardsError] = {}
    try:
        inside = sorted(path for path in directory.iterdir() if path.is_dir())
    except OSError as error:
        raise cannot_read(directory, error) from error
    for path in inside:
        if not ("shards" in path.name or _is_eval(path.name)):
            continue
        choose = inputs.evaluation_shards if _is_eval(path.name) else shard_folder
        try:
            folder = choose(path, FIX, pattern, allow_broken=True)
        except NoShardsError as error:
            empty[path.name] = error
            continue
        found[path.name] = folder.names
        for name in folder.broken:
            line = str(broken_shards(path, [name])).replace(shown(path), path.name)
            results.problem("no file", line)
        unread = [*folder.other_shards, *folder.unfinished, *folder.unread]
        if folder.other_shards or folder.unfinished:
            line = f"{path.name}: training does not read {some(unread)}"
            fix = "rename them, or pass --shard_pattern GLOB; delete what is unfinished"
            results.problem("shards of other names", f"{line}; {fix}")
        elif unread:
            line = f"{path.name}: {counted(len(unread), 'file')} that training does not read"
            results.notes.append(line)
    if not found:
        fix = "name the directory that holds 2048_shards_uncompressed/"
        raise next(iter(empty.values()), None) or inputs.layout_fault(directory, fix, flag="")
    for name, error in empty.items():
        results.problem("no shards", f"{name}: {error}")
    for wanted, example in ((False, "2048_shards_uncompressed"), (True, "eval_set_uncompressed")):
        if not any(_is_eval(name) is wanted for name in (*found, *empty)):
            line = f"{example}: no such directory with files in it; make or copy it"
            results.problem("missing directory", line)
    return {name: files for name, files in found.items() if files}


def _read_config(path: Path, results: CheckResults) -> tuple[int | None, int | None]:
    """vocab_size and max_position_embeddings; None where a launch would refuse the file."""
    try:
        config = BertConfig.load(path)  # as a launch does
        return config.vocab_size, config.max_position_embeddings
    except UserError as error:
        results.problem(path.name, str(error).replace(shown(path), path.name))
    results.not_checked.append("vocabulary: whether token ids are in it; bert_config.json fails")
    return None, None


def _compare_index(folder: Path, files: Sequence[FileSummary], results: CheckResults) -> None:
    """Report an index by which a run would expect other numbers of sequences than there are."""
    counts = {file.name.partition("/")[2]: file.num_sequences for file in files if file.readable}
    wrong = shard_index.contradictions(folder, counts)
    if wrong:
        line = f"{folder.name}/{INDEX_NAME} says other numbers of sequences than {some(wrong)} have"
        results.problem("index", f"{line}; delete it, and a run makes it again")


def _check_files(
    name: str, tasks: Sequence[Task], jobs: int, results: CheckResults
) -> list[FileSummary]:
    """Check all files of one directory, in order. Their problems go into `results`."""
    summaries: list[FileSummary] = []
    jobs = max(1, min(jobs, len(tasks)))
    # spawn, because a forked child would share the parent's HDF5 state
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        checked = pool.map(check_file, tasks) if jobs > 1 else map(check_file, tasks)
        try:
            for summary in tqdm(checked, name, len(tasks), unit="file", disable=None):
                summaries.append(summary)
                for kind, line in summary.problems:
                    results.problem(kind, line)
        except BrokenProcessPool:
            unchecked = counted(len(tasks) - len(summaries), "file")
            line = f"{name}: a process died, {unchecked} not checked"
            results.problem("process died", f"{line}; run again with fewer --jobs")
    return summaries
