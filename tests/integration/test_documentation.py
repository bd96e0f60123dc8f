"""README and the pages of docs/: every command runs as printed, every link leads somewhere.

Each page has a working directory of its own with the files that its commands name. A command of
this package runs in this process, any other in a shell. Where a command is run with changes, or
cannot be run here, CHANGED or NOT_HERE says so; both are checked for entries without a command.
"""

from __future__ import annotations

import glob
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from bert_pretraining.__main__ import main
from helpers import REFERENCE, ROOT

PAGES = [ROOT / "README.md", *sorted(set((ROOT / "docs").glob("*.md")) - {ROOT / "docs/LOG.md"})]
PAGE_NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
PACKAGE_COMMAND = re.compile(r"python3? -m bert_pretraining ")
START_CHECKPOINT = "model.ckpt-28252.apex.pt"
TENSORFLOW_CHECKPOINT = "model.ckpt-28252"

GPUS = "needs 8 GPUs"
MACHINES = "needs other machines; tests/distributed and test_examples.py try the scripts"
LAUNCHER = "needs a launcher that is not installed here"
# Commands that cannot run here, by their beginnings, and why.
NOT_HERE = {
    "bash run_tests.sh": "runs this test",
    "python -m pytest": "run_tests.sh runs these tests too",
    "export PYTHONPATH": "sets variables of the reader's shell",
    "python3 -m pip install": "needs a network",
    'python3 -c "import torch': "asks the torch of the reader's python3",
    "bash benchmarks/gpu_check.sh": "needs a GPU",
    "bash run_training.sh --name mini --config CPUx1x2 --nnodes 2": MACHINES,
    "bash examples/train_ssh.sh": MACHINES,
    "bash examples/smoke_test.sh": "test_examples.py runs it",
    "nsys profile": "needs Nsight Systems and a GPU",
    "sbatch": LAUNCHER,
    "srun": LAUNCHER,
    "mpirun": LAUNCHER,
    "torchrun --nnodes 2": MACHINES,
    "torchrun --nproc_per_node 8": "starts 8 processes; tests/distributed runs torchrun",
}
# These draw; without matplotlib they end with an error, which other tests check.
DRAWS = re.compile(r"python -m bert_pretraining (report|data verify .*--plot) ")


@dataclass(frozen=True)
class Change:
    """How the test changes commands that begin with `start`.

    add: flags at the end. replace: text in the command -> other text. code: the exit code.
    """

    start: str
    add: str = ""
    replace: tuple[tuple[str, str], ...] = ()
    code: int = 0


DRY = "--dry_run"
SHORT = "--max_steps 1 --num_eval_examples 64"
SMALL_MODEL = "--bert_config_path bert_config.json --repeats 1"
NOT_REACHED = 3
MINI_DATA = "data/datasets/bert_mini"
PYTHON = "python -m bert_pretraining"
TO_MINI_DATA = (
    ("/data/bert", MINI_DATA),
    ("--data_dir DIR", f"--data_dir {MINI_DATA}"),
    ("--device cuda", "--device cpu"),
)
FEW_SHARDS = (
    ("--shards 2048 --jobs 8", "--shards 4 --max_seq_length 64 --num_eval_examples 20"),
    ("--num_shards 2048", "--num_shards 4"),
    ("--max_seq_length 128", "--max_seq_length 64"),  # what the mini model takes
)
TO_MINI_MODEL = (
    ("--name nvidia --config H200x1x8", "--name mini --config CPUx1x1 --max_steps 1"),
    ("--data_dir data/datasets/wikipedia", f"--data_dir {MINI_DATA}"),
    ("--runs 10", "--runs 1"),
    ("--runs 2", "--runs 1"),
    ("--config CPUx1x2 --max_steps 20", "--config CPUx1x1 --max_steps 1"),
)
CHANGED = [
    # test_mini_runs.py runs these whole.
    Change("bash run_training.sh --name default --config V100x1x8", DRY),
    Change("bash run_training.sh --name iluvatar --config 03V100x1x8", DRY),
    Change("bash run_training.sh --name nvidia", DRY, TO_MINI_DATA),
    Change("bash run_training.sh --name acme --config H100x1x8 --data_dir data/datasets/bert_mini "
           "--max_steps 20", SHORT, code=NOT_REACHED),
    Change("bash run_training.sh --name mini --config CPUx1x2 --log_dir", SHORT, code=NOT_REACHED),
    Change("bash run_training.sh --name mini --config CPUx1x2 --save_checkpoint", SHORT,
           code=NOT_REACHED),
    Change("bash run_training.sh --name mini --config CPUx1x2 --optimizer flat", DRY),
    Change("bash run_training.sh --name mini --config CPUx1x1 --kernels", DRY),
    Change("bash run_training.sh --name mini --config CPUx1x1 --data_dir data/datasets/articles",
           "--num_eval_examples 64", code=NOT_REACHED),
    Change("bash run_training.sh", DRY),
    Change("cat > data/datasets/articles/bert_config.json", replace=(
        ('"vocab_size": 30522', '"vocab_size": 238'), ('"hidden_size": 256', '"hidden_size": 64'))),
    Change(f"{PYTHON} data make-mini --text", "--max_seq_length 16",
           (("--text ARTICLES", "--text ARTICLES more.txt"),)),
    Change(f"{PYTHON} doctor --name default", replace=TO_MINI_DATA),
    Change("python3 -m bert_pretraining", replace=TO_MINI_DATA),
    Change(f"{PYTHON} data segment", replace=(("_articles 500", "_articles 20"),)),
    Change(f"{PYTHON} data prepare", replace=FEW_SHARDS),
    Change(f"{PYTHON} data create-examples", "--max_seq_length 64"),
    Change(f"{PYTHON} data shard", replace=FEW_SHARDS),
    Change(f"{PYTHON} data pick-eval", replace=(("--num_examples 10000", "--num_examples 20"),)),
    Change(f"{PYTHON} bench optimizer", SMALL_MODEL),
    Change(f"{PYTHON} bench", f"{SMALL_MODEL} --batch_size 1"),
    Change(f"{PYTHON} plan --name nvidia --config H200x1x8 --ranks 64",
           "--bert_config_path bert_config.json"),
    Change(f"{PYTHON} qualify compare"),
    Change(f"{PYTHON} qualify page"),
    Change(f"{PYTHON} qualify", "--only software"),  # test_qualify_*.py run the others
    Change(f"{PYTHON} submission run", replace=TO_MINI_MODEL, code=NOT_REACHED),
    Change(f"{PYTHON} submission check", code=1),
    Change(f"{PYTHON} submission summarize", code=1),
]  # fmt: skip


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language in a page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    """Every command of a page's bash blocks on one line, without comments.

    A command that reads the lines behind it, up to "END", has these lines too.
    """
    text = "".join(blocks(page, "bash")).replace("\\\n", " ")
    found = []
    for line in re.findall(r"^.*<< 'END'\n(?s:.*?)^END$|^.*$", text, re.MULTILINE):
        words = [line] if "\n" in line else shlex.split(line, comments=True, posix=False)
        found.append(" ".join(words))
    return [command for command in found if command]


def why_not_here(command: str) -> str | None:
    """Why the command cannot run here, or None."""
    return next((why for start, why in NOT_HERE.items() if command.startswith(start)), None)


def change_of(command: str) -> Change:
    """The first change whose start the command has; as printed where there is none."""
    return next((change for change in CHANGED if command.startswith(change.start)), Change(""))


@pytest.fixture
def workplace(mini_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with the mini data set, and the other files that pages name."""
    for name in ("base", "configs", "scripts", "run_training.sh", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, tmp_path / name)
    shutil.copytree(mini_data, tmp_path / MINI_DATA)
    for name in ("vocab.txt", "bert_config.json", START_CHECKPOINT):
        shutil.copy2(mini_data / name, tmp_path / name)
    (tmp_path / "RAW").mkdir()
    (tmp_path / "RAW/wiki_00").write_text("\n".join(article(number) for number in range(80)))
    monkeypatch.chdir(tmp_path)
    # This process is the package of ROOT; it takes configurations from the copy all the same.
    monkeypatch.setattr(
        "bert_pretraining.config.resolution.configs_directory", lambda: tmp_path / "configs"
    )
    for name, value in (("PYTHON", sys.executable), ("PYTHONPATH", str(tmp_path / "base"))):
        monkeypatch.setenv(name, value)
    return tmp_path


def article(number: int) -> str:
    """An article as WikiExtractor writes it: a title, then paragraphs of several sentences."""
    words = "the big dog sees one small cat near that old house and runs over a green hill".split()
    draw = random.Random(number)
    sentences = [" ".join(draw.choices(words, k=9)).capitalize() for _ in range(24)]
    paragraphs = (". ".join(sentences[at : at + 6]) + "." for at in range(0, 24, 6))
    return "\n".join([f'<doc id="{number}">', f"Title {number}", *paragraphs, "</doc>"])


def add_checkpoints(workplace: Path) -> None:
    """The checkpoints that docs/checkpoints.md names, one of each kind."""
    if REFERENCE.is_dir():
        folder = REFERENCE / "checkpoint"
        for path in (*folder.glob("*.*"), *folder.glob("tf1/*")):
            shutil.copy(path, workplace / path.name)
    else:  # a checkpoint of any kind may have this name; test_tensor_bundle.py reads TensorFlow's
        shutil.copy(workplace / START_CHECKPOINT, workplace / TENSORFLOW_CHECKPOINT)
    convert = f"{PYTHON} checkpoint convert {START_CHECKPOINT} bert-large-uncased --to hf"
    assert run(convert, workplace) == 0


def add_files_of(page: Path, workplace: Path) -> None:
    """Write the TOML files that a page shows; their first line is a comment with their path."""
    for text in blocks(page, "toml"):
        path = workplace / re.match(r"# ([\w./]+\.toml)", text)[1]
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    if page.name == "checkpoints.md":
        add_checkpoints(workplace)
    if page.name == "data.md":
        (workplace / "articles").mkdir()
        for number in range(120):
            paragraphs = article(number).split("\n")[2:-1]
            (workplace / f"articles/{number:03d}.txt").write_text("\n\n".join(paragraphs))
        more = (article(number).split("\n")[2:-1] for number in range(120, 520))
        (workplace / "more.txt").write_text("\n\n".join(map("\n".join, more)))
        shutil.rmtree(workplace / MINI_DATA)  # the page's first command makes it
    if page.name == "reports.md":
        run_folder = workplace / "output/mini_CPUx1x2/run-20261123-080526"
        flags = f"--name mini --config CPUx1x1 {SHORT} --output_dir output/one"
        assert run(f"bash run_training.sh {flags}", workplace) == NOT_REACHED
        (made,) = (workplace / "output/one").glob("run-*")
        run_folder.parent.mkdir()
        made.rename(run_folder)


def run(command: str, workplace: Path) -> int:
    """The exit code of a command: of this package in this process, of another in a shell.

    A launch is another process unless it starts nothing: it has signal handlers and children.
    """
    if command.endswith(DRY):
        command = command.replace("bash run_training.sh", f"{PYTHON} launch", 1)
    if not PACKAGE_COMMAND.match(command):
        shell = ["bash", "-c", command]
        return subprocess.run(shell, cwd=workplace, timeout=300, check=False).returncode
    words = []
    for word in shlex.split(PACKAGE_COMMAND.sub("", command)):
        words += sorted(glob.glob(word)) or [word]  # as a shell keeps a pattern that fits nothing
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bert_pretraining", *words])
        return main()


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGE_NAMES)
def test_every_command_runs_as_printed(
    name: str, workplace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    add_files_of(ROOT / name, workplace)
    for command in commands(ROOT / name):
        if why_not_here(command) or (DRAWS.match(command) and not find_spec("matplotlib")):
            continue
        change = change_of(command)
        changed = command
        for old, new in change.replace:
            changed = changed.replace(old, new)
        code = run(f"{changed} {change.add}".strip(), workplace)
        said = capfd.readouterr()
        assert code == change.code, f"{command}\n{said.out[-2000:]}{said.err[-2000:]}"


def test_predict_prints_what_the_page_shows(
    workplace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The same words, and the same probabilities but for the last digits."""
    page = ROOT / "docs/checkpoints.md"
    (command,) = (line for line in commands(page) if line.startswith(f"{PYTHON} predict "))
    (shown,) = re.findall(r"^```\n(\[CLS\] .*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    assert run(command, workplace) == 0
    number = re.compile(r"\d\.\d{4}")
    printed = capfd.readouterr().out
    assert number.sub("N", printed) == number.sub("N", shown)
    assert [float(found) for found in number.findall(printed)] == pytest.approx(
        [float(found) for found in number.findall(shown)], abs=2e-4
    )


def test_no_entry_is_left_of_a_command_that_is_gone() -> None:
    printed = [command for page in PAGES for command in commands(page)]
    assert printed
    drawing = {match[1].split()[0] for match in map(DRAWS.match, printed) if match}
    assert drawing == {"report", "data"}
    for start in NOT_HERE:
        assert any(command.startswith(start) for command in printed), start
    for change in CHANGED:
        mine = [command for command in printed if change_of(command) is change]
        assert [command for command in mine if not why_not_here(command)], change.start
    for old, _ in {pair for change in CHANGED for pair in change.replace}:
        assert any(old in command for command in printed), old


def test_the_walks_name_files_and_functions_that_exist() -> None:
    """Rows of docs/architecture.md: | number | `file.py`, ... | `name`, ... | what happens |."""
    rows = re.findall(
        r"^\| \d+ \| ([^|]+) \| ([^|]+) \|",
        (ROOT / "docs/architecture.md").read_text(),
        re.MULTILINE,
    )
    assert len(rows) > 30
    for files, names in rows:
        paths = [ROOT / "base/bert_pretraining" / name for name in re.findall(r"`(.+?)`", files)]
        code = "".join(path.read_text() for path in paths)
        for name in re.findall(r"`(.+?)`", names):
            defined = rf"^(class|def) {name}\b|^    (def {name}\b|{name}: )"
            assert re.search(defined, code, re.MULTILINE), f"{files} defines no {name}"


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_links_lead_to_files_and_headings(name: str) -> None:
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = Path(os.path.normpath(page.parent / path)) if path else page
        assert linked.exists(), f"{name} links to {target}"
        if anchor:
            assert anchor in anchors(linked), f"{name} links to {target}"


def test_readme_links_to_every_page() -> None:
    text = (ROOT / "README.md").read_text()
    for page in PAGES[1:]:
        assert f"](docs/{page.name})" in text, page.name
    assert len(text.splitlines()) <= 220
