"""A run with all trackers, through the command line, offline; and what they hold of it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from bert_pretraining.logs.reading.events import perflog_events
from helpers import OF_A_BUSY_MACHINE, ROOT, MakeOnce, command, error_lines
from tracked_runs import NO_NETWORK, PATIENT, READERS, Tracked, require, without_trackers_variables

MINI = ("--name", "mini", "--config", "CPUx1x1", "--device", "cpu", "--data_dir")
SHORT = ("--max_steps", "12", "--eval_steps", "6", "--log_freq", "2", "--num_eval_examples", "64")
STEPS, EVALUATIONS = [1, 2, 4, 6, 8, 10, 12], [0, 6, 12]


@pytest.fixture
def folder(mini_data: Path, make_once: MakeOnce) -> Path:
    """The folder of one run with all trackers."""
    require(*READERS)

    def run(place: Path) -> None:
        place.mkdir()
        (place / "site").mkdir()
        (place / "site/sitecustomize.py").write_text(NO_NETWORK + PATIENT)
        with pytest.MonkeyPatch.context() as patch:
            without_trackers_variables(patch)
            done = command(
                "launch", *MINI, mini_data, *SHORT,
                "--track", "wandb,trackio", "mlflow", "tensorboard",
                cwd=place, HOME=str(place / "home"), XDG_CACHE_HOME=str(place / "home/cache"),
                NETWORK_ASKED=str(place / "asked"),
                PYTHONPATH=f"{place / 'site'}:{ROOT / 'base'}",
            )  # fmt: skip
        assert done.returncode == 3, done.stderr
        (place / "stdout").write_text(done.stdout)
        (place / "stderr").write_text(done.stderr)

    (found,) = (make_once("tracked_run", run) / "output/mini_CPUx1x1").glob("run-*")
    return found


def events(folder: Path, name: str) -> list[dict]:
    """The values of a run's PerfLog events of one name."""
    return [event.value for event in perflog_events(folder / "perflog.txt") if event.key == name]


def test_nothing_but_files_in_their_places(folder: Path) -> None:
    place = folder.parents[2]
    assert not (place / "asked").exists(), "the network was asked"
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "console.txt", "mllog.txt", "perflog.txt", "tensorboard", "versions.json",
        "wandb",
    }  # fmt: skip
    beside = {path.name for path in folder.parent.iterdir()} - {folder.name, ".lock"}
    assert beside == {"mlflow.db", "trackio"}
    assert {path.name for path in place.iterdir()} - {"home"} == {
        "output", "site", "stderr", "stdout",
    }  # fmt: skip
    written = [path for path in (place / "home").rglob("*") if path.is_file()]
    assert [path for path in written if "bert_pretraining" not in path.parts] == []
    # The packages print nothing where the run prints. The run may say that it waits for them.
    shown = [
        line
        for line in (place / "stdout").read_text().splitlines()
        if not line.startswith(("[PerfLog]", ":::MLLOG", "Notice: waiting for the tracker "))
    ]
    words = "\n".join([*shown, (place / "stderr").read_text()]).lower()
    assert not [name for name in ("wandb", "mlflow", "trackio", "tensorboard") if name in words]


@pytest.mark.parametrize("tracker", READERS)
def test_a_tracker_holds_what_the_run_told(folder: Path, tracker: str) -> None:
    run: Tracked = READERS[tracker](folder)
    (config,) = (value["config"] for value in events(folder, "SUBMITTED_INFO"))
    for name in ("learning_rate", "train_batch_size", "config", "max_steps"):
        assert str(run.facts[name]) in (str(config[name]), f"{config[name]}.0"), name
    for name in ("versions/torch", "run/device", "model/parameters", "data/sequences", "seed"):
        assert run.facts[name] not in ("", None), name
    logged = events(folder, "STEP_END")
    assert [value["step"] for value in logged] == STEPS
    names = {
        "training/loss": "loss",
        "training/mlm_accuracy": "mlm_acc",
        "training/learning_rate": "learning_rate",
        "training/grad_norm": "grad_norm",
        "training/samples": "num_trained_samples",
        "training/sequences_per_second": "seq/s",
        "speed/tokens_per_second": "tokens/s",
        "speed/seconds_data": "seconds_data",
    }
    for name, key in names.items():
        wanted = {value["step"]: value[key] for value in logged}
        assert run.figures[name] == pytest.approx(wanted, rel=1e-6), name
    first, *others = events(folder, "INIT_EVALUATION") + events(folder, "EVALUATION")
    assert len(others) + 1 == len(EVALUATIONS)
    wanted = [value["eval_mlm_accuracy"] for value in (first, *others)]
    accuracy = dict(zip(EVALUATIONS, wanted, strict=True))
    assert run.figures["evaluation/mlm_accuracy"] == pytest.approx(accuracy, rel=1e-6)
    samples = dict(zip(EVALUATIONS, (0, 384, 768), strict=True))
    assert run.figures["evaluation/samples"] == samples
    (finished,) = events(folder, "FINISHED")
    assert run.status == "finished"
    assert run.table["result/stopped_by"] == "max_steps"
    for name, key in (("mlm_accuracy", "final_mlm_accuracy"), ("p_train", "p_train")):
        assert float(run.table[f"result/{name}"]) == pytest.approx(finished[key], rel=1e-6)
    notices = [one for one in events(folder, "NOTICE") if one["kind"] not in OF_A_BUSY_MACHINE]
    (notice,) = notices
    assert notice["text"] in run.texts[notice["kind"]]


def test_a_tracker_that_is_not_installed_is_refused_before_ranks_start(
    mini_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['wandb'] = None\n")

    def launch(*flags: str) -> subprocess.CompletedProcess[str]:
        return command(
            "launch", *MINI, mini_data, "--track", "wandb", *flags, cwd=tmp_path,
            PYTHONPATH=f"{tmp_path}:{ROOT / 'base'}",
        )  # fmt: skip

    wanted = "--track wandb: wandb is not installed; leave it out, or: "
    dry = launch("--dry_run")
    assert dry.returncode == 0
    assert f"Note: a launch on this machine would be refused: {wanted}" in dry.stderr
    done = launch()
    assert done.returncode == 2
    (error,) = error_lines(done.stderr)
    assert error.startswith(f"Error: {wanted}")
    assert error.endswith("-m pip install wandb (the extra [wandb])")
    assert not (tmp_path / "output").exists()
