"""What the summaries of a data set's files say together, and the report of `data verify`."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from bert_pretraining.errors import UserError

NAME_PATTERN = re.compile(r"part[-_](\d+)[-_]of[-_](\d+)\.(hdf5|h5)")
PUBLISHED_VOCAB_SIZE = 30522
PUBLISHED_COUNTS = (2048, 4320)
CHECKSUMS = Path(__file__).with_name("checksums")  # the published lists: name, tab, md5
TOLERATED_SHARE = 0.01  # of sequences that repeat, or stand in both sets
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
    """What one file holds, small enough to hand from process to process.

    name: `directory/file`. problems: (kind, line). readable: its content was checked.
    max_seq_length: None in a variable-length file. special_tokens: what sequences begin
    and end with. length_counts: (L,) int64, how many sequences have each length.
    hashes: (N,) uint64 of each sequence's tokens and masks. digest: equal for equal
    sequences in equal order. text_hashes: uint64 of the tokens before masking, all of an
    evaluation file's, or a training file's that the evaluation set has too.
    row_md5s: an evaluation file's. md5: as published, where asked for.
    """

    name: str
    is_eval: bool
    problems: list[tuple[str, str]] = field(default_factory=list)
    readable: bool = False
    num_sequences: int = 0
    max_seq_length: int | None = None
    special_tokens: tuple[int, int] | None = None
    num_masked: int = 0
    length_counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    hashes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    digest: bytes = b""
    text_hashes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    row_md5s: list[str] = field(default_factory=list)
    md5: str | None = None


@dataclass
class Findings:
    """Problems by kind, notes, and what was not checked."""

    problems: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)

    def problem(self, kind: str, line: str) -> None:
        self.problems.setdefault(kind, []).append(line)


@dataclass(frozen=True)
class SetSummary:
    """Counts of one directory. max_seq_length is None for variable-length files.

    histogram: (shortest, longest, sequences) of bins of equal width, a power of two.
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
            f"  {self.name} ({self.role}): {self.files} files, {self.sequences} sequences, mean "
            f"length {self.mean_length:.1f}, "
            + ("variable length" if length is None else f"padded to {length}")
        )


@dataclass(frozen=True)
class VerifyReport:
    """All that `verify` found, a line each: problems by kind, notes, what was not checked.

    eval_md5: of the evaluation sequences in their order, None where they could not all
    be read. published: how many files were held against a published md5, and how many
    of them matched. checkpoint: the start checkpoint's file name.
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
        """One line each: file, what is wrong, how to fix it."""
        return [line for lines in self.problems_by_kind.values() for line in lines]

    def to_json(self) -> dict:
        """The report as values that `json` can write."""
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
        """At most 40 lines: verdict, counts, the first problems of each kind, the rest."""
        count = len(self.problems)
        verdict = "good" if self.ok else f"NOT good: {count} problem{'s' * (count > 1)}"
        lines = [f"{self.directory}: {verdict}"]
        lines += _first([part.describe() for part in self.sets], SHOWN_SETS)
        if self.eval_md5:
            lines.append(f"  evaluation fingerprint: {self.eval_md5}, {self.eval_sequences} rows")
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
    """The first few of each kind: three, or fewer where there are many kinds."""
    limit = max(1, min(3, SHOWN_PROBLEMS // max(1, len(problems))))
    shown = []
    for kind, lines in problems.items():
        shown += lines[:limit]
        if len(lines) > limit:
            shown[-1] += f" (and {len(lines) - limit} more: {kind})"
    return shown


def plot_lengths(report: VerifyReport, path: Path) -> None:
    """Draw each set's length histogram into an image file.

    Raises UserError without matplotlib, or where `path` cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            "the plot needs matplotlib", "install it: pip install matplotlib"
        ) from error
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="tokens in a sequence", ylabel="share of the set's sequences")
    for part in report.sets:
        edges = [low for low, _, _ in part.histogram] + [part.histogram[-1][1] + 1]
        shares = [count / max(1, part.sequences) for _, _, count in part.histogram]
        axes.stairs(shares, edges, label=f"{part.name}, mean {part.mean_length:.1f}")
    axes.legend()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {path} ({error})", "name another file") from error


def summarize(name: str, role: str, files: Sequence[FileSummary]) -> SetSummary:
    """Add up one directory's files."""
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


def check_names(set_name: str, names: Sequence[str], findings: Findings) -> int | None:
    """Hold file names against their `_of_NNNNN`; returns that count, None without one."""
    matches = {name: NAME_PATTERN.fullmatch(name) for name in names}
    numbered = {name: (int(match[1]), int(match[2])) for name, match in matches.items() if match}
    if not numbered:
        if not set_name.startswith("eval"):
            line = f"{set_name}: whether all shards are there; no name has _of_<count>"
            findings.not_checked.append(line)
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
        findings.problem(kind, f"{set_name}/{name}: {line}; move it away")
    absent = count - len(by_number)
    if absent:
        missing = (number for number in range(count) if number not in by_number)
        first = [f"part_{next(missing):05d}_of_{count:05d}.hdf5" for _ in range(min(3, absent))]
        named = ", ".join(first) + (f" and {absent - 3} more" if absent > 3 else "")
        line = f"{set_name}: {absent} of {count} shards missing: {named}; make or copy them"
        findings.problem("missing shards", line)
    return count


def compare_files(set_name: str, files: Sequence[FileSummary], findings: Findings) -> None:
    """One form and one length over a directory's files; sizes that are about equal."""
    readable = [file for file in files if file.readable]
    if not readable:
        return
    usual = Counter(file.max_seq_length for file in readable).most_common(1)[0][0]
    for file in readable:
        if file.max_seq_length != usual:
            own, others = (size or "varying numbers of" for size in (file.max_seq_length, usual))
            line = f"rows of {own} tokens, in the other files of {others}; make all of one form"
            findings.problem("other length of rows", f"{file.name}: {line}")
    sizes = [file.num_sequences for file in readable]
    if max(sizes) > 1.05 * min(sizes) + 1:
        line = f"{set_name}: files are uneven: {min(sizes)} to {max(sizes)} sequences"
        findings.notes.append(line)


def compare_special_tokens(files: Sequence[FileSummary], findings: Findings) -> None:
    """All files' sequences begin with one [CLS] and end with one [SEP]."""
    found = [file for file in files if file.special_tokens]
    usual = Counter(file.special_tokens for file in found).most_common(1)
    for file in found:
        if file.special_tokens != usual[0][0]:
            own, others = ("{} ... {}".format(*pair) for pair in (file.special_tokens, usual[0][0]))
            line = f"sequences are [{own}], in the other files [{others}]; use one vocabulary"
            findings.problem("other [CLS] or [SEP]", f"{file.name}: {line}")


def check_duplicates(set_name: str, files: Sequence[FileSummary], findings: Findings) -> None:
    """Files that repeat, and sequences that do; empties the files' hashes to free memory."""
    seen: dict[bytes, str] = {}
    for file in files:
        if file.digest and seen.setdefault(file.digest, file.name) != file.name:
            line = f"the same sequences as {seen[file.digest]}; make or copy the right file"
            findings.problem("duplicate shard", f"{file.name}: {line}")
    flat = np.concatenate([np.empty(0, np.uint64), *(file.hashes for file in files)])
    ends = np.cumsum([len(file.hashes) for file in files])
    for file in files:
        file.hashes = flat[:0]
    ordered = np.sort(flat)
    repeats = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(repeats):
        places = np.searchsorted(ends, np.flatnonzero(flat == repeats[0])[:2], "right")
        one, other = (files[place].name for place in places)
        line = f"{set_name}: {_share(len(repeats), len(flat))} sequences repeat others"
        line += f", one of them in {one} and {other}"
        if len(repeats) > TOLERATED_SHARE * len(flat):
            findings.problem("duplicate sequences", f"{line}; make the set again")
        else:
            findings.notes.append(line)


def check_overlap(
    train: Sequence[FileSummary], evaluation: Sequence[FileSummary], findings: Findings
) -> None:
    """Evaluation sequences that training has too, token for token before masking."""
    shared = [file for file in train if len(file.text_hashes)]
    if not shared or not evaluation:
        return
    wanted = np.concatenate([file.text_hashes for file in evaluation])
    found = np.isin(wanted, np.concatenate([file.text_hashes for file in shared]))
    line = (
        f"{evaluation[0].name}: {_share(int(found.sum()), len(found))} sequences are in training "
        f"too, the first in {shared[0].name}"
    )
    if found.sum() > TOLERATED_SHARE * len(found):
        findings.problem("evaluation in training", f"{line}; take them out of training")
    else:
        findings.notes.append(line)


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({part / whole:.2%})"


def row_md5s(ids: np.ndarray, ends: np.ndarray) -> list[str]:
    """Each sequence's md5, of Python's text of its list of token ids.

    ids: (T,) sequences end to end; ends: (N,) where each ends.
    """
    tokens, start, sums = ids.tolist(), 0, []
    for end in ends.tolist():
        sums.append(md5_of(tokens[start:end]))
        start = end
    return sums


def md5_of(values: list[int] | list[str]) -> str:
    """The md5 of Python's text of a list; of its rows' md5s, a file's published md5."""
    return hashlib.md5(str(values).encode(), usedforsecurity=False).hexdigest()


def fingerprint(files: Sequence[FileSummary]) -> tuple[str | None, int]:
    """md5 of all evaluation sequences in order, None where some are unread; their number."""
    evaluation = [file for file in files if file.is_eval]
    sums = [md5 for file in evaluation for md5 in file.row_md5s]
    whole = bool(evaluation) and all(file.readable for file in evaluation)
    return md5_of(sums) if whole else None, len(sums)


def list_unread(files: Sequence[FileSummary], findings: Findings) -> None:
    """Files with a fault that kept their content from being checked."""
    unread = sum(not file.readable for file in files)
    if unread:
        findings.not_checked.append(f"content of {unread} files that could not be read (above)")


def check_published(
    files: Sequence[FileSummary], vocab_size: int | None, findings: Findings
) -> tuple[int, int]:
    """Hold md5s against the published lists; returns how many, and how many match.

    A set none of whose shards match is somebody's own, which is no fault.
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
        findings.not_checked.append(line)
    elif not matched:
        line = "none of the published checksums match: this is not the published data set"
        findings.notes.append(line)
    elif not any(same for file, same in compared if not file.is_eval):
        findings.notes.append("only the evaluation set matches its published checksum")
    else:
        for file, same in compared:
            if not same:
                line = f"its md5 {file.md5} is not the published one; {FIX}"
                findings.problem("not the published content", f"{file.name}: {line}")
    return len(compared), matched
