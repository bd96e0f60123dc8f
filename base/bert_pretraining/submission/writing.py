"""Files that are whole or not there."""

from __future__ import annotations

import json
import os
from pathlib import Path

from bert_pretraining.runtime.files import UNFINISHED


def write_text(path: Path, text: str) -> None:
    """Write `path` anew, or leave what was there. Raises OSError."""
    partial = path.with_name(path.name + UNFINISHED)
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_json(path: Path, content: object) -> None:
    """`content` as indented JSON."""
    write_text(path, json.dumps(content, indent=4) + "\n")
