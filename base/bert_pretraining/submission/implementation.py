"""The code of a submission: a copy of the checkout, and the four files that the rules require."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from bert_pretraining.config import parse_toml
from bert_pretraining.errors import UserError

COPIED = (
    "base configs scripts docs run_training.sh requirements.txt requirements-beside-torch.txt "
    "pyproject.toml setup.py LICENSE CHANGELOG.md"
).split()
SETUP = """\
#!/usr/bin/env bash
# Installs the pinned requirements into .venv, unless this Python has them.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$root"
source scripts/environment.sh
prepare_python requirements.txt
"""
INIT_DATASETS = """\
#!/usr/bin/env bash
# Makes the data set of MLPerf's text, and checks it whole:
#   bash init_datasets.sh TEXT_DIR EVAL_TEXT VOCAB OUTPUT_DIR [JOBS]
# TEXT_DIR holds part-00000-of-00500 and so on, EVAL_TEXT is eval.txt, VOCAB is vocab.txt.
# OUTPUT_DIR then wants bert_config.json and the start checkpoint beside the shards.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ $# -lt 4 ]; then sed -n 2,5p "${BASH_SOURCE[0]}" >&2; exit 2; fi
source "$root/scripts/environment.sh"
find_python
export PYTHONPATH="$root/base${PYTHONPATH:+:$PYTHONPATH}"
"$PYTHON" -m bert_pretraining data prepare --text_dir "$1" --eval_text "$2" --vocab "$3" \\
    --output_dir "$4" --shards 2048 --jobs "${5:-1}"
"$PYTHON" -m bert_pretraining data verify "$4" --jobs "${5:-1}"
"""
RUN_AND_TIME = """\
#!/usr/bin/env bash
# Timed runs, one after the other, with the flags of this submission. RUNS (1) and OUTPUT_DIR
# (output/submission) may be exported; further flags take the place of those below.
set -euo pipefail
root=$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)
source "$root/scripts/environment.sh"
find_python
export PYTHONPATH="$root/base${{PYTHONPATH:+:$PYTHONPATH}}"
exec "$PYTHON" -m bert_pretraining submission run --runs "${{RUNS:-1}}" \\
    --output_dir "${{OUTPUT_DIR:-output/submission}}" -- \\
    {flags} "$@"
"""
OWN_CONFIGS = "submission"  # of configs/, for a configuration from outside
README = """\
# BERT pretraining: how these results were made

```bash
bash setup.sh
bash init_datasets.sh TEXT_DIR EVAL_TEXT VOCAB DATA_DIR 8
RUNS={runs} bash run_and_time.sh
```

They install the Python packages into .venv, make and check the data set of MLPerf's text, and
make the timed runs.

The runs of this submission were made with:

```bash
bash run_training.sh {flags}
```

What follows is the README of the code.

"""


def checkout() -> Path:
    """The checkout that this package runs from. Raises UserError if the package is installed."""
    root = Path(__file__).resolve().parents[3]
    if not (root / "run_training.sh").is_file():
        raise UserError(
            f"the code lies in {root}, which is no checkout",
            "assemble from a checkout, since a submission holds the code with its scripts",
        )
    return root


def write_implementation(folder: Path, flags: Sequence[str], runs: int) -> None:
    """Copy the code to `folder` (a new directory) and write the files that the rules require.

    No dotfiles, no caches, no data.
    """
    root = checkout()
    folder.mkdir(parents=True)
    for name in COPIED:
        source = root / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=_ignored)
        elif source.is_file():
            shutil.copyfile(source, folder / name)
    words = shlex.join(_with_own_configuration(flags, folder / "configs" / OWN_CONFIGS))
    scripts = {
        "setup.sh": SETUP,
        "init_datasets.sh": INIT_DATASETS,
        "run_and_time.sh": RUN_AND_TIME.format(flags=words),
    }
    for name, text in scripts.items():
        (folder / name).write_text(text, encoding="utf-8")
    for name in (*scripts, "run_training.sh"):
        os.chmod(folder / name, 0o755)
    project = (root / "README.md").read_text(encoding="utf-8")
    (folder / "README.md").write_text(
        README.format(flags=words, runs=runs) + project, encoding="utf-8"
    )


def _with_own_configuration(flags: Sequence[str], folder: Path) -> list[str]:
    """The flags, with a TOML file of --config copied to `folder` and named there.

    Raises UserError if there is no such file.
    """
    words = [part for flag in flags for part in _parts(flag)]
    names = dict(zip(words, [*words[1:], ""], strict=True))
    path = Path(names.get("--config", ""))
    if path.suffix != ".toml":
        return list(flags)
    stem = path.stem
    while path is not None:
        try:
            parent = parse_toml(path.read_text(encoding="utf-8")).get("extends")
        except (OSError, ValueError) as error:
            raise UserError(
                f"--config {path} of the runs cannot be read ({error})",
                "assemble in the directory that they were started in",
            ) from error
        folder.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / path.name)
        path = path.parent / f"{parent}.toml" if parent else None
    without = [index for index, word in enumerate(words) if word in ("--name", "--config")]
    kept = [word for index, word in enumerate(words) if not {index, index - 1} & set(without)]
    return ["--name", OWN_CONFIGS, "--config", stem, *kept]


def _parts(flag: str) -> list[str]:
    """--config=FILE and --name=NAME as two words; other flags as they are."""
    name, sign, value = flag.partition("=")
    return [name, value] if sign and name in ("--name", "--config") else [flag]


def _ignored(_: str, names: list[str]) -> list[str]:
    """The names that are not copied: MLPerf's repo checker refuses dotfiles and spaces."""
    return [
        name
        for name in names
        if name.startswith(".")
        or " " in name
        or name == "__pycache__"
        or name.endswith((".pyc", ".egg-info"))
    ]
