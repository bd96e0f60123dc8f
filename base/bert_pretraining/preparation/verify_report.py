"""The report of `data verify`, and the checks that compare the files of a data set."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from bert_pretraining.data.shard_names import NAME_PATTERN, missing_shards, some
from bert_pretraining.runtime.words import counted, plural

PUBLISHED_VOCAB_SIZE = 30522
PUBLISHED_COUNTS = (2048, 4320)
CHECKSUMS = Path(__file__).with_name(
    "checksums"
)  # the published lists; each line holds a name, a tab and an md5
TOLERATED_SHARE = 0.01  # of the sequences may repeat others, or be in both sets
MAX_BINS = 16
SHOWN_PROBLEMS, SHOWN_NOTES, SHOWN_NOT_CHECKED, SHOWN_SETS = 16, 5, 7, 4
FIX = "make or copy it again"
NEVER_CHECKED = (
    "text: whether the tokens spell what they should",
    "masking: whether masked tokens were drawn as BERT's procedure draws them",
    "next_sentence_labels: whether they are true of their sequences",
    "checkpoint: weights and optimizer state; only whether there is one",
)


@dataclass
class FileSummary:
    """What one file holds, small enough to be passed from process to process.

    name: `directory/file`. problems: (kind, line). readable: the content was checked.
    max_seq_length: None for a variable-length file. special_tokens: the tokens that
    sequences begin and end with. length_counts: (L,) int64, the number of sequences of each
    length. hashes: (N,) uint64, of the tokens and masks of each sequence. digest: equal for
    equal sequences in equal order. text_hashes: uint64, of the tokens before masking; of an
    evaluation file all, of a training file those that the evaluation set has too.
    row_md5s: of an evaluation file. md5: in the published form, where it is wanted.
    next_sentence_ones: sequences with label 1. num_unmasked: masked tokens whose answer stands
    in input_ids. forms: what is stored in another form than usual.
    """

    name: str
    is_eval: bool
    problems: list[tuple[str, str]] = field(default_factory=list)
    readable: bool = False
    num_sequences: int = 0
    max_seq_length: int | None = None
    special_tokens: tuple[int, int] | None = None
    num_masked: int = 0
    num_unmasked: int = 0
    next_sentence_ones: int = 0
    forms: list[str] = field(default_factory=list)
    length_counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    hashes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    digest: bytes = b""
    text_hashes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    row_md5s: list[str] = field(default_factory=list)
    md5: str | None = None


@dataclass
class CheckResults:
    """What the checks have found so far: problems by kind, notes, and what was not checked."""

    problems: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)

    def problem(self, kind: str, line: str) -> None:
        self.problems.setdefault(kind, []).append(line)


@dataclass(frozen=True)
class SetSummary:
    """The counts of one directory. max_seq_length is None for variable-length files.

    histogram: (shortest, longest, number of sequences) of each bin. The bins have equal
    width, a power of two.
    """

    name: str
    role: str
    files: int
    sequences: int
    tokens: int
    masked_tokens: int
    mean_length: float
    max_seq_length: int | None
    histogram: list[tuple[int, int, int]]

    def describe(self) -> str:
        length = self.max_seq_length
        return (
            f"  {self.name} ({self.role}): {counted(self.files, 'file')}, "
            f"{counted(self.sequences, 'sequence')}, mean length {self.mean_length:.1f}, "
            + ("variable length" if length is None else f"padded to {length}")
        )


@dataclass(frozen=True)
class VerifyReport:
    """All that `verify` found, in lines: problems by kind, notes, what was not checked.

    eval_md5: of the evaluation sequences in their order, None where some could not be read.
    published: how many files were compared with a published md5, and how many of them
    matched. checkpoint: the file name of the start checkpoint.
    """

    directory: Path
    problems_by_kind: dict[str, list[str]]
    notes: list[str]
    not_checked: list[str]
    sets: list[SetSummary]
    vocab_size: int | None
    eval_md5: str | None
    eval_sequences: int
    published: tuple[int, int]
    checkpoint: str | None

    @property
    def ok(self) -> bool:
        return not self.problems_by_kind

    @property
    def problems(self) -> list[str]:
        """One line for each problem: the file, what is wrong, how to fix it."""
        return [line for lines in self.problems_by_kind.values() for line in lines]

    def to_json(self) -> dict:
        """The report as plain data for json.dumps."""
        return {
            "ok": self.ok,
            "directory": str(self.directory),
            "problems": self.problems,
            "notes": self.notes,
            "not_checked": self.not_checked,
            "sets": [asdict(part) for part in self.sets],
            "vocab_size": self.vocab_size,
            "eval_fingerprint": {"md5": self.eval_md5, "sequences": self.eval_sequences},
            "published_checksums": {"compared": self.published[0], "matched": self.published[1]},
            "checkpoint": self.checkpoint,
        }

    def describe(self) -> str:
        """At most 40 lines: the result, counts, the first problems of each kind, notes."""
        count = len(self.problems)
        verdict = "good" if self.ok else f"NOT good: {counted(count, 'problem')}"
        lines = [f"{self.directory}: {verdict}"]
        lines += _first([part.describe() for part in self.sets], SHOWN_SETS)
        if self.eval_md5:
            lines.append(
                f"  evaluation fingerprint: {self.eval_md5}, {counted(self.eval_sequences, 'row')}"
            )
        if self.published[0]:
            lines.append(f"  published md5s: {self.published[1]} of {self.published[0]} match")
        for title, items, limit in (
            ("Problems", _shown(self.problems_by_kind), SHOWN_PROBLEMS),
            ("Notes", self.notes, SHOWN_NOTES),
            ("Not checked", self.not_checked, SHOWN_NOT_CHECKED),
        ):
            if items:
                lines += [f"{title}:", *(f"  {item}" for item in _first(items, limit))]
        return "\n".join(lines)


def _first(lines: list[str], limit: int) -> list[str]:
    if len(lines) <= limit:
        return lines
    return [*lines[: limit - 1], f"and {len(lines) - limit + 1} more"]


def _shown(problems: dict[str, list[str]]) -> list[str]:
    """The first problems of each kind: three, or fewer where there are many kinds."""
    limit = max(1, min(3, SHOWN_PROBLEMS // max(1, len(problems))))
    shown = []
    for kind, lines in problems.items():
        shown += lines[:limit]
        if len(lines) > limit:
            shown[-1] += f" (and {len(lines) - limit} more: {kind})"
    return shown


def summarize(name: str, role: str, files: Sequence[FileSummary]) -> SetSummary:
    """Add up the files of one directory."""
    counts = np.zeros(max([2, *(len(file.length_counts) for file in files)]), np.int64)
    for file in files:
        counts[: len(file.length_counts)] += file.length_counts
    width = 1
    while width * MAX_BINS < len(counts) - 1:
        width *= 2
    sequences, tokens = int(counts.sum()), int(counts @ np.arange(len(counts)))
    widths = Counter(file.max_seq_length for file in files if file.readable)
    return SetSummary(
        name=name,
        role=role,
        files=len(files),
        sequences=sequences,
        tokens=tokens,
        masked_tokens=sum(file.num_masked for file in files),
        mean_length=tokens / max(1, sequences),
        max_seq_length=widths.most_common(1)[0][0] if widths else None,
        histogram=[
            (low, low + width - 1, int(counts[low : low + width].sum()))
            for low in range(1, len(counts), width)
        ],
    )


def check_names(set_name: str, names: Sequence[str], results: CheckResults) -> int | None:
    """Compare the names of files with the count in them, `_of_NNNNN`.

    Returns that count, None where no name has one.
    """
    matches = {name: NAME_PATTERN.fullmatch(name) for name in names}
    numbered = {name: (int(match[1]), int(match[2])) for name, match in matches.items() if match}
    if not numbered:
        if not set_name.startswith("eval"):
            line = f"{set_name}: whether all shards are there; no name has _of_<count>"
            results.not_checked.append(line)
        return None
    count = Counter(of for _, of in numbered.values()).most_common(1)[0][0]
    by_number: dict[int, str] = {}
    for name in names:
        number, of = numbered.get(name, (0, 0))
        if name not in numbered:
            kind = "not a shard's name"
            line = "not named part_<number>_of_<count>, yet training reads it"
        elif of != count:
            kind, line = "other shard count", f"one of {of} shards, where the others are of {count}"
        elif number >= count:
            kind, line = "shard number too high", f"the last of {count} shards is {count - 1}"
        elif number in by_number:
            kind, line = "shard number twice", f"the same number as {by_number[number]}"
        else:
            by_number[number] = name
            continue
        results.problem(kind, f"{set_name}/{name}: {line}; move it away")
    missing = missing_shards(list(by_number.values()))
    if missing:
        line = f"{len(missing.names)} of {count} shards missing: {some(missing.names)}"
        results.problem("missing shards", f"{set_name}: {line}; make or copy them")
    return count


def compare_files(set_name: str, files: Sequence[FileSummary], results: CheckResults) -> None:
    """Check that the files of a directory have one form, one length and about equal sizes."""
    readable = [file for file in files if file.readable]
    if not readable:
        return
    usual = Counter(file.max_seq_length for file in readable).most_common(1)[0][0]
    for file in readable:
        if file.max_seq_length != usual:
            own, others = (size or "varying numbers of" for size in (file.max_seq_length, usual))
            line = f"rows of {own} tokens, in the other files of {others}; make all of one form"
            results.problem("other length of rows", f"{file.name}: {line}")
    sizes = [file.num_sequences for file in readable]
    if max(sizes) > 1.05 * min(sizes) + 1:
        line = f"{set_name}: files are uneven: {min(sizes)} to {max(sizes)} sequences"
        results.notes.append(line)


def compare_special_tokens(files: Sequence[FileSummary], results: CheckResults) -> None:
    """Check that the sequences of all files begin with one [CLS] and end with one [SEP]."""
    found = [file for file in files if file.special_tokens]
    usual = Counter(file.special_tokens for file in found).most_common(1)
    for file in found:
        if file.special_tokens != usual[0][0]:
            own, others = ("{} ... {}".format(*pair) for pair in (file.special_tokens, usual[0][0]))
            line = f"sequences are [{own}], in the other files [{others}]; use one vocabulary"
            results.problem("other [CLS] or [SEP]", f"{file.name}: {line}")


def check_duplicates(set_name: str, files: Sequence[FileSummary], results: CheckResults) -> None:
    """Find files and sequences that repeat others. Removes `hashes` of the files after use."""
    seen: dict[bytes, str] = {}
    for file in files:
        if file.digest and seen.setdefault(file.digest, file.name) != file.name:
            line = f"the same sequences as {seen[file.digest]}; make or copy the right file"
            results.problem("duplicate shard", f"{file.name}: {line}")
    flat = np.concatenate([np.empty(0, np.uint64), *(file.hashes for file in files)])
    ends = np.cumsum([len(file.hashes) for file in files])
    for file in files:
        file.hashes = flat[:0]
    ordered = np.sort(flat)
    repeats = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(repeats):
        indices = np.searchsorted(ends, np.flatnonzero(flat == repeats[0])[:2], "right")
        one, other = (files[index].name for index in indices)
        line = f"{set_name}: {_share(len(repeats), len(flat))} sequences repeat others"
        line += f", one of them in {one} and {other}"
        if len(repeats) > TOLERATED_SHARE * len(flat):
            results.problem("duplicate sequences", f"{line}; make the set again")
        else:
            results.notes.append(line)


def check_overlap(
    train: Sequence[FileSummary], evaluation: Sequence[FileSummary], results: CheckResults
) -> None:
    """Find evaluation sequences that training has too, with equal tokens before masking."""
    shared = [file for file in train if len(file.text_hashes)]
    if not shared or not evaluation:
        return
    wanted = np.concatenate([file.text_hashes for file in evaluation])
    found = np.isin(wanted, np.concatenate([file.text_hashes for file in shared]))
    count = int(found.sum())
    line = (
        f"{evaluation[0].name}: {_share(count, len(found))} sequences {plural(count, 'is')} in "
        f"training too, the first in {shared[0].name}"
    )
    if count > TOLERATED_SHARE * len(found):
        results.problem("evaluation in training", f"{line}; take them out of training")
    else:
        results.notes.append(line)


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({part / whole:.2%})"


def row_md5s(ids: np.ndarray, ends: np.ndarray) -> list[str]:
    """The md5 of each sequence, that is, of its list of token ids as Python prints it.

    ids: (T,) the tokens of all sequences; ends: (N,) the index behind each sequence.
    """
    tokens, start, sums = ids.tolist(), 0, []
    for end in ends.tolist():
        sums.append(md5_of(tokens[start:end]))
        start = end
    return sums


def md5_of(values: list[int] | list[str]) -> str:
    """The md5 of a list as Python prints it. For the md5s of rows, it is the published md5."""
    return hashlib.md5(str(values).encode(), usedforsecurity=False).hexdigest()


def fingerprint(files: Sequence[FileSummary]) -> tuple[str | None, int]:
    """The md5 of all evaluation sequences in order, None where some are unread; their number."""
    evaluation = [file for file in files if file.is_eval]
    sums = [md5 for file in evaluation for md5 in file.row_md5s]
    whole = bool(evaluation) and all(file.readable for file in evaluation)
    return md5_of(sums) if whole else None, len(sums)


def list_unread(files: Sequence[FileSummary], results: CheckResults) -> None:
    """Count the files whose content could not be checked."""
    unread = sum(not file.readable for file in files)
    if unread:
        results.not_checked.append(
            f"content of {counted(unread, 'file')} that could not be read (above)"
        )


def check_published(
    files: Sequence[FileSummary], vocab_size: int | None, results: CheckResults
) -> tuple[int, int]:
    """Compare md5s with the published lists; returns how many, and how many match.

    If no shard matches, the set is not the published one, which is no fault.
    """
    lines = [line.split() for path in CHECKSUMS.glob("*.chk") for line in path.open()]
    published = dict(lines)
    compared = [
        (file, file.md5 == published[Path(file.name).name])
        for file in files
        if vocab_size == PUBLISHED_VOCAB_SIZE and file.md5 and Path(file.name).name in published
    ]
    matched = sum(same for _, same in compared)
    if not compared:
        line = "published md5s: they are for 2048 or 4320 shards and 30522 tokens"
        results.not_checked.append(line)
    elif not matched:
        line = "none of the published checksums match: this is not the published data set"
        results.notes.append(line)
    elif not any(same for file, same in compared if not file.is_eval):
        results.notes.append("only the evaluation set matches its published checksum")
    else:
        for file, same in compared:
            if not same:
                line = f"its md5 {file.md5} is not the published one; {FIX}"
                results.problem("not the published content", f"{file.name}: {line}")
    return len(compared), matched
