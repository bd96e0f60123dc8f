"""What every stage is told."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path

from bert_pretraining.config import Config
from bert_pretraining.runtime.files import write_whole


@dataclass(frozen=True)
class Context:
    """What is qualified, and how thoroughly.

    config: all settings of a run, as the flags and the configuration's file have them: device,
        precision, kernels, data_dir, train_batch_size, ...
    device: the type, resolved: "cpu", or an accelerator's.
    ranks: on this machine, one a device.
    layers: encoder layers of the measured model, whose other sizes are BERT-large's.
    batch_sizes: sequences a rank, which the stage `step` tries in turn.
    minutes: of steady steps in the stage `endurance`.
    quick: whether the whole may take two minutes on two cores.
    folder: where stages may leave files.
    words: of the command line that chose all this, without --only and --output_dir.
    """

    config: Config
    device: str
    ranks: int
    layers: int
    batch_sizes: tuple[int, ...]
    minutes: float
    quick: bool
    folder: Path
    words: tuple[str, ...] = ()

    def alone(self, stage: str) -> str:
        """The command that runs this stage alone, into another folder."""
        command = "python -m bert_pretraining qualify"
        own = ["--only", stage, "--output_dir", f"{self.folder}_{stage}"]
        return f"{command} {shlex.join([*self.words, *own])}"

    def write(self, path: Path) -> None:
        """As JSON, atomically. OSError where the system refuses."""
        write_whole(path, json.dumps({**asdict(self), "folder": str(self.folder)}))

    @classmethod
    def read(cls, path: Path) -> Context:
        values = json.loads(path.read_text(encoding="utf-8"))
        values["config"] = Config(**values["config"])
        values |= {name: tuple(values[name]) for name in ("batch_sizes", "words")}
        values["folder"] = Path(values["folder"])
        return cls(**values)
