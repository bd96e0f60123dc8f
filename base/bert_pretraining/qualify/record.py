"""What a qualification found: the verdict of each stage and of the whole, as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bert_pretraining.errors import UserError
from bert_pretraining.runtime import strict_json
from bert_pretraining.runtime.file_kind import cannot_write, read_json
from bert_pretraining.runtime.files import write_whole

SCHEMA = 1
PASS, NOTE, FAIL = "pass", "note", "fail"
VERDICTS = (PASS, NOTE, FAIL)  # from good to bad
# What code raises that reads figures of another kind than a qualification's.
DAMAGES = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
FIX = "pass a qualification.json that 'python -m bert_pretraining qualify' wrote"


@dataclass(frozen=True)
class Finding:
    """What a stage found.

    reason: one line, why this verdict. figures: name -> number, text, list or mapping of these, as
    JSON has them; a name ends in its unit. notes: further lines for people. is_late: a fail alone
    because the time was over; `runner` tells whether the stage was only slow.
    """

    verdict: str
    reason: str
    figures: dict[str, object] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    is_late: bool = False


@dataclass(frozen=True)
class StageResult:
    """A stage and its finding. seconds: it took. is_judged: not so where other programs made it
    late; it has the figures until then. Others as in `Finding`."""

    name: str
    verdict: str
    reason: str
    seconds: float
    figures: dict[str, object] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    is_judged: bool = True


@dataclass(frozen=True)
class Qualification:
    """A whole qualification.

    started: UTC, ISO 8601. machine: what was qualified: device, host, versions. settings: what was
    asked of it; runs with other settings cannot be compared. asked: the names of the stages that
    were asked for; empty for all.
    """

    started: str
    machine: dict[str, object]
    settings: dict[str, object]
    stages: list[StageResult]
    schema: int = SCHEMA
    asked: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        return worst(stage.verdict for stage in self.stages)

    def stage(self, name: str) -> StageResult | None:
        """The stage of this name; None where it did not run."""
        return next((stage for stage in self.stages if stage.name == name), None)

    def write(self, path: Path) -> None:
        """As JSON, atomically. UserError where the system refuses."""
        content = {"verdict": self.verdict, **asdict(self)}
        write_or_tell(path, strict_json.dumps(content, indent=2) + "\n")


def write_or_tell(path: Path, content: str | bytes) -> None:
    """`write_whole` for a file of the user's folder: UserError where the system refuses."""
    try:
        write_whole(path, content)
    except OSError as error:
        raise cannot_write(path, error) from error


def worst(verdicts: Sequence[str]) -> str:
    """fail, if one is; else note, if one is; else pass."""
    return max(verdicts, key=VERDICTS.index, default=PASS)


def read(path: Path) -> Qualification:
    """What `write` wrote. UserError for another file, and for another schema."""
    content = read_json(path, "a qualification", FIX)
    if not isinstance(content, Mapping) or "schema" not in content:
        raise UserError(f"{path}: not a qualification: it has no 'schema'", FIX)
    if content["schema"] != SCHEMA:
        raise UserError(
            f"{path}: schema {content['schema']!r}, but this version reads schema {SCHEMA}",
            "qualify that machine again with this version",
        )
    try:
        stages = [StageResult(**stage) for stage in content["stages"]]
        for stage in stages:
            if isinstance(stage.figures, dict):
                stage.figures.update(strict_json.numbers_again(stage.figures))
        done = Qualification(
            content["started"], content["machine"], content["settings"], stages,
            asked=content.get("asked", []),
        )  # fmt: skip
        _require_kinds(done)
        return done
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a qualification ({error})", FIX) from error


def damaged(name: str, error: Exception) -> UserError:
    """The error for one of DAMAGES. name: of the file, or of the files that may be it."""
    why = f"{type(error).__name__}: {error}"
    return UserError(f"{name}: its figures are not those of a qualification ({why})", FIX)


def _require_kinds(done: Qualification) -> None:
    """ValueError for a value that is of another kind than `write` writes."""
    wanted: list[tuple[object, type | tuple[type, ...], str]] = [
        (done.started, str, "text"),
        (done.asked, list, "list"),
    ]
    wanted += [(one, Mapping, "mapping") for one in (done.machine, done.settings)]
    for stage in done.stages:
        wanted += [(stage.name, str, "text"), (stage.reason, str, "text")]
        wanted += [(stage.seconds, (int, float), "number"), (stage.figures, Mapping, "mapping")]
        wanted += [(stage.is_judged, bool, "yes or no")]
        wanted += [(stage.notes, list, "list"), *((note, str, "text") for note in stage.notes)]
        if stage.verdict not in VERDICTS:
            raise ValueError(f"the stage {stage.name} has the verdict {stage.verdict!r}")
    for value, kind, name in wanted:
        if not isinstance(value, kind):
            raise ValueError(f"{str(value)[:40]!r} is not a {name}")
