"""The files of a data set that `data prepare` makes, and `prepare.json`, its settings.

A rerun compares its settings with those in `prepare.json`. What does not depend on a
changed setting is kept, and what does is removed, so that the rerun makes it again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from bert_pretraining.errors import UserError
from bert_pretraining.runtime.files import real, write_whole

FLAGS = {
    "texts": "--text_dir",
    "eval_text": "--eval_text",
    "vocab": "--vocab",
    "seed": "--random_seed",
    "lower_case": "--do_lower_case",
    "num_shards": "--shards",
    "num_eval_examples": "--num_eval_examples",
}
HASHED = ("texts", "eval_text", "vocab")  # digests stand for what these flags name
CHANGES_ALL = ("vocab", "examples", "seed", "lower_case")  # every example depends on these
NOTES = "files"  # of `prepare.json`
ANOTHER = "choose another --output_dir, or delete it"


@dataclass(frozen=True)
class OutputFiles:
    """Where `data prepare` writes. `work` holds the examples, until the data set is finished."""

    root: Path

    @property
    def work(self) -> Path:
        return self.root / "work"

    @property
    def shards(self) -> Path:
        return self.root / "2048_shards_uncompressed"

    @property
    def evaluation(self) -> Path:
        return self.root / "eval_set_uncompressed"

    @property
    def manifest(self) -> Path:
        return self.root / "prepare.json"

    @property
    def finished(self) -> Path:
        return self.root / "prepare_finished.json"

    @property
    def eval_examples(self) -> Path:
        """All examples of the evaluation text, from which some are picked."""
        return self.work / "eval" / "eval_all.hdf5"

    def examples(self, text_name: str) -> Path:
        """The examples of one training text."""
        return self.work / f"{text_name}.hdf5"

    def require_apart(self, text_dir: Path, *files: Path) -> None:
        """Raise UserError where an input lies where files are written or removed."""
        text_dir, root = real(text_dir), real(self.root)
        if text_dir == root:
            raise UserError(
                f"--output_dir {self.root} is the --text_dir too, so that the files made in it "
                "would be taken for text",
                "choose another --output_dir",
            )
        made = [real(path) for path in (self.work, self.shards, self.evaluation)]
        for path in (text_dir, *map(real, files)):
            if any(folder == path or folder in path.parents for folder in made):
                raise UserError(
                    f"{path} is in a folder that --output_dir {self.root} makes and removes",
                    "choose another --output_dir",
                )

    def picked(self, count: int) -> Path:
        """The evaluation set of `count` examples."""
        name = f"{count // 1000}k" if count % 1000 == 0 else f"{count}"
        return self.evaluation / f"part_eval_{name}.hdf5"


def figures_of(examples: Path) -> Path:
    """Where the figures of the text stand that a file of examples was made of."""
    return examples.with_name(examples.name + ".json")


def read_notes(files: OutputFiles) -> dict[str, dict]:
    """What the run before noted of each text, by its name; nothing where there was none."""
    notes = (_read(files.manifest) or {}).get(NOTES)
    return notes["texts"] if isinstance(notes, dict) else {}


def write_manifest(files: OutputFiles, settings: dict, notes: dict) -> list[str]:
    """Write the settings down; first remove what a run with other settings has left.

    settings: as in `prepare.json`. notes: of each of the "texts", for `read_notes`, and
    "eval_bytes"; they are not compared.

    Returns a line for each setting that has changed.
    Raises UserError, and removes nothing, where the data set is finished, or where all
    examples that were made depend on a changed setting.
    """
    before = _read(files.manifest)
    if before:
        before = _with_digests(before, settings, notes)
    changed = [key for key in settings if before and before.get(key) != settings[key]]
    differences = [line for key in changed for line in _difference(key, before, settings)]
    told = ", ".join(differences)
    if changed and files.finished.is_file():
        raise UserError(f"{files.root} is finished, and was made with {told}", ANOTHER)
    has_examples = any(files.work.rglob("*.hdf5"))
    if has_examples and any(key in CHANGES_ALL for key in changed):
        raise UserError(
            f"{files.root} was begun with {told}, and all examples in it depend on that",
            f"pass the same setting as before, {ANOTHER}",
        )
    try:
        # Outdated files go first: if this is interrupted, the next run finds the old settings.
        for path in _outdated(files, before, settings, changed) if before else []:
            path.unlink(missing_ok=True)
        files.root.mkdir(parents=True, exist_ok=True)
        if before != (now := {**settings, NOTES: notes}):
            write_whole(files.manifest, json.dumps(now, indent=2) + "\n")
    except OSError as error:
        raise UserError(
            f"cannot write to {files.root} ({error.strerror})", "choose another --output_dir"
        ) from error
    return [f"begun with {line}: what depends on it is made again" for line in differences]


def _read(manifest: Path) -> dict | None:
    """The settings of the run before; None where there was none."""
    try:
        found = json.loads(manifest.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {manifest} ({error})", ANOTHER) from error
    if not isinstance(found, dict):
        raise UserError(f"{manifest} holds no settings of data prepare", ANOTHER)
    return found


def _with_digests(before: dict, settings: dict, notes: dict) -> dict:
    """The settings of an earlier version of this program, which told texts apart by size."""
    before = dict(before)
    texts, now = before.get("texts"), settings["texts"]
    if isinstance(texts, dict):
        sizes = {name: text["size"] for name, text in notes["texts"].items()}
        before["texts"] = {
            name: now[name] if isinstance(told, int) and sizes.get(name) == told else told
            for name, told in texts.items()
        }
    if before.get("eval_text") == notes["eval_bytes"]:
        before["eval_text"] = settings["eval_text"]
    return before


def _difference(key: str, before: dict, settings: dict) -> list[str]:
    """What was given before and what is given now, by the names of the flags."""
    old, new = before.get(key), settings[key]
    if key == "examples":
        old = old if isinstance(old, dict) else {}
        return [
            f"--{name} {old.get(name)}, not {value}"
            for name, value in new.items()
            if old.get(name) != value
        ]
    if key in HASHED:
        return [f"{'other files in' if key == 'texts' else 'another'} {FLAGS[key]}"]
    return [f"{FLAGS[key]} {_shown(old)}, not {_shown(new)}"]


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _outdated(files: OutputFiles, before: dict, settings: dict, changed: list[str]) -> list[Path]:
    """The files that depend on a changed setting."""
    paths = []
    if "texts" in changed:
        now = settings["texts"]
        paths += [
            files.examples(name)
            for name, digest in before["texts"].items()
            if now.get(name) != digest
        ]
    if "eval_text" in changed:
        paths.append(files.eval_examples)
    if {"eval_text", "num_eval_examples"} & set(changed):
        paths.append(files.picked(before["num_eval_examples"]))
    if {"texts", "num_shards"} & set(changed):
        paths += files.shards.glob(f"part_*_of_{before['num_shards']:05d}.hdf5")
    return paths
