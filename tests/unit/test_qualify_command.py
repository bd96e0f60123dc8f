"""`qualify` with wrong flags and folders, and stages that leave no finding or are interrupted."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bert_pretraining.errors import UserError
from bert_pretraining.qualify import command, kept, other_programs, record, runner
from bert_pretraining.qualify.context import Context
from bert_pretraining.qualify.record import FAIL, NOTE, PASS, StageResult, read
from bert_pretraining.qualify.stages import Stage
from bert_pretraining.report import figures
from bert_pretraining.runtime import process_stat
from helpers import ROOT
from qualify_doubles import context_of, ignored

STAGE = Stage("machine", "Can a run start here?", 60, 60)
# In the place of a stage: it tells its number and that of a rank, and waits.
WAITS = """
import os, subprocess, sys
if "qualify-stage" in sys.argv or "qualify-stage" in sys.orig_argv:
    rank = subprocess.Popen(["sleep", "600"])
    with open(os.environ["TOLD"] + ".new", "w") as file:
        file.write(f"{os.getpid()} {rank.pid}")
    os.rename(os.environ["TOLD"] + ".new", os.environ["TOLD"])
    rank.wait()
"""


# In the place of a stage: it keeps a figure, as `kept.keep_figures` does, and ends in some way.
KEEPS = """
import json, os, pathlib, sys, time
if "qualify-stage" in sys.argv or "qualify-stage" in sys.orig_argv:
    folder = pathlib.Path("FOLDER/stages/so_far")
    folder.mkdir()
    kept = {"figures": {"rate": 1.5}, "notes": ["a note"], "fault": "FAULT"}
    (folder / "machine.json").write_text(json.dumps(kept))
    print("qualify: machine: the ninth case", flush=True)
    if "sleep" in "ENDS":
        pathlib.Path("FOLDER/waits").write_text("")
    ENDS
"""
# In the place of a stage: it prints more than the disk takes.
FILLS = """
import sys
if "qualify-stage" in sys.argv or "qualify-stage" in sys.orig_argv:
    sys.stdout.write("x" * 2**17)
    sys.stdout.flush()
"""


@pytest.fixture(autouse=True)
def _programs_find_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "base"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--only", "speed"], "invalid choice: 'speed'"),
        (["--ranks", "0"], "--ranks 0: it must be a number above 0"),
        (["--num_layers", "-1"], "--num_layers -1: "),
        (["--minutes", "nan"], "--minutes nan: "),
        (["--minutes", "inf"], "--minutes inf: "),
        (["--minute", "1"], "unknown flag --minute"),
    ],
)
def test_wrong_flags(tmp_path: Path, flags: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        command.main(["--quick", "--device", "cpu", "--output_dir", str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "out" / "context.json").mkdir(parents=True)
    for folder in ("file", "out"):
        with pytest.raises(UserError, match=r"cannot write .*pass another --output_dir"):
            command.main(["--quick", "--device", "cpu", "--output_dir", str(tmp_path / folder)])


@pytest.mark.parametrize(("verdict", "code"), [(PASS, 0), (NOTE, 0), (FAIL, 1)])
def test_exit_code_and_settings(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    verdict: str,
    code: int,
) -> None:
    """Of them one without matplotlib, which is told before all else."""
    if verdict == NOTE:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    else:
        monkeypatch.setattr(figures, "require_matplotlib", lambda: None)
    asked = []

    def result(stage: Stage, context: Context, *_: object) -> StageResult:
        asked.append(context)
        return StageResult(stage.name, verdict if stage.name == "limits" else PASS, "why", 1.0)

    monkeypatch.setattr(runner, "run_stage", result)
    flags = ["--device", "cpu", "--kernels.attention", "torch", "--ranks", "3", "--precision=bf16"]
    assert command.main([*flags, "--only", "limits", "step", "--output_dir", str(tmp_path)]) == code
    done = read(tmp_path / "qualification.json")
    assert (done.verdict, [stage.name for stage in done.stages]) == (verdict, ["limits", "step"])
    notice = "Notice: no pictures, matplotlib is missing; install it: "
    assert (notice in capsys.readouterr().out) == (verdict == NOTE)
    expected = {"quick": False, "minutes": 10.0, "ranks": 3, "layers": 2, "precision": "bf16"}
    assert expected.items() <= done.settings.items()
    assert done.settings["kernels_attention"] == "torch"
    config = Context.read(tmp_path / "context.json").config
    assert config == asked[0].config
    assert asked[0].words == tuple(flags)
    assert (config.kernels_attention, config.precision) == ("torch", "bf16")


def test_figures_of_an_earlier_qualification_are_not_taken_for_this_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Interrupted in its first stage, it leaves a page and no figures."""
    (tmp_path / "stages").mkdir()
    old = [tmp_path / "qualification.json", tmp_path / "stages" / "step.json"]
    for file in old:
        file.write_text("{}")

    def interrupted(*_: object) -> StageResult:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run_stage", interrupted)
    words = ["--quick", "--device", "cpu", "--only", "endurance", "--output_dir", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        command.main(words)
    assert not any(file.exists() for file in old)
    assert "no stage ran" in (tmp_path / "qualification.html").read_text()


def full(path: Path, *_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


@pytest.mark.parametrize("lost", ["full", "gone"])
@pytest.mark.parametrize("verdict", [PASS, FAIL])
def test_a_disk_that_gets_full_and_a_folder_that_goes(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    lost: str,
    verdict: str,
) -> None:
    """During the second of three stages. What was found is told; what was written stays whole."""
    folder, ran = tmp_path / "out", []

    def result(stage: Stage, *_: object) -> StageResult:
        ran.append(stage.name)
        if len(ran) == 2 and lost == "full":
            monkeypatch.setattr(record, "write_whole", full)
        elif len(ran) == 2:
            shutil.rmtree(folder)
        return StageResult(stage.name, verdict, f"{stage.name} is told", 1.0)

    monkeypatch.setattr(runner, "run_stage", result)
    words = ["--quick", "--device", "cpu", "--only", "machine", "software", "limits"]
    what = {"full": "no space left on the disk", "gone": "its folder does not exist"}[lost]
    with pytest.raises(UserError, match=rf"cannot write {folder}/\S+: {what} .*; ") as caught:
        command.main([*words, "--output_dir", str(folder)])
    assert "\n" not in str(caught.value)
    assert ran == ["machine", "software"]
    out, err = capsys.readouterr()
    assert "machine is told" in out
    assert "software is told" in out
    if lost == "full":
        assert [one.name for one in read(folder / "qualification.json").stages] == ["machine"]
        names = sorted(one.name for one in folder.iterdir())
        assert names == ["context.json", "qualification.json"]  # no page that says "runs"
        (line,) = err.splitlines()
        assert line.startswith(f"Notice: {folder}/qualification.html was removed: ")
        assert line.endswith(f"qualify page {folder}/qualification.json")
    else:
        assert err == ""


def test_a_stage_that_fails_because_the_disk_is_full_is_no_fail_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No file may be larger than 64 KiB, which stands for a full disk; the log becomes larger."""
    of_a_stage(monkeypatch, tmp_path, FILLS)
    words = ["--quick", "--device", "cpu", "--only", "machine", "software"]
    command_line = shlex.join(
        [sys.executable, "-m", "bert_pretraining", "qualify", *words, "--output_dir", "out"]
    )
    done = subprocess.run(
        ["bash", "-c", f"ulimit -f 64; {command_line}"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 2, done
    (line,) = done.stderr.splitlines()
    assert re.match(r"Error: cannot write \S+/out/stages/space: the file would be too large", line)
    assert "Traceback" not in done.stdout


def of_a_stage(monkeypatch: pytest.MonkeyPatch, folder: Path, program: str) -> Path:
    """Each process that this one starts reads the program first."""
    (folder / "early").mkdir()
    (folder / "early" / "sitecustomize.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", f"{folder / 'early'}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("TOLD", str(folder / "told"))
    return folder / "told"


def test_a_stage_that_crashes_and_one_that_wrote_half(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    context = context_of(tmp_path)
    of_a_stage(monkeypatch, tmp_path, "import os; os.write(1, b'broken\\n'); os._exit(9)")
    found = runner.run_stage(STAGE, context, tmp_path / "context.json", ignored)
    assert found.verdict == FAIL
    assert found.reason.startswith("ended with exit code 9: broken; see ")
    kept.keep_figures(context, "machine", {"rate": 1.5}, ["a note"])  # as the stage does
    assert kept.kept_figures(context, "machine")["figures"] == {"rate": 1.5}
    half = "import os, sys; open(sys.orig_argv[-2], 'w').write('{\"verdict\": '); os._exit(9)"
    (tmp_path / "early" / "sitecustomize.py").write_text(half)
    found = runner.run_stage(STAGE, context, tmp_path / "context.json", ignored)
    assert found.verdict == FAIL
    assert "its result cannot be read" in found.reason
    assert found.figures == {}  # those of another stage are forgotten


LIMIT = "ended at its limit of 60 s, at 'the ninth case'"
KEPT = "the figures until then are kept; see "
OLD = "os.utime(folder / 'machine.json', (9, 9))"
REPEAT = "end them, and repeat this stage: python -m bert_pretraining qualify --quick --only"


@pytest.mark.parametrize(
    ("ends", "used", "fault", "verdict", "words"),
    [
        ("time.sleep(600)", 0.2, "", FAIL, f"{LIMIT}; {KEPT}"),  # on an idle machine
        (f"{OLD}; time.sleep(600)", 1.7, "", FAIL, f"{LIMIT}; {KEPT}"),  # it hangs
        ("time.sleep(600)", 1.7, "a kernel is wrong", FAIL, f"a kernel is wrong; {LIMIT}; {KEPT}"),
        ("os._exit(9)", 1.7, "", FAIL, f"ended with exit code 9: {KEPT}"),
        ("time.sleep(600)", None, "", FAIL, f"{LIMIT}; {KEPT}"),  # nobody can tell
        ("time.sleep(600)", 1.7, "", NOTE, f"not judged: {LIMIT}; {KEPT}"),
    ],
)
def test_a_stage_that_is_ended_keeps_its_figures(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    ends: str,
    used: float | None,
    fault: str,
    verdict: str,
    words: str,
) -> None:
    """At its limit, slow or hanging, and by a crash. used: CPUs, of two, by other programs."""
    context = context_of(tmp_path, words=("--quick",))
    keeps = KEEPS.replace("ENDS", ends).replace("FOLDER", str(tmp_path)).replace("FAULT", fault)
    of_a_stage(monkeypatch, tmp_path, keeps)
    monkeypatch.setattr(other_programs.StageTime, "others_used", lambda *_: used)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monotonic = time.monotonic

    def jumps() -> float:
        return monotonic() + (1e6 if (tmp_path / "waits").exists() else 0.0)

    monkeypatch.setattr(time, "monotonic", jumps)
    found = runner.run_stage(STAGE, context, tmp_path / "context.json", ignored)
    assert found.verdict == verdict
    assert found.reason.startswith(words.replace("9: ", "9: qualify: machine: the ninth case; "))
    told = (
        f"other programs used 1.7 of the 2 CPUs: {REPEAT} machine --output_dir {tmp_path}_machine"
    )
    assert found.reason.endswith(told) == (verdict == NOTE)
    assert (found.figures, found.notes) == ({"rate": 1.5}, ["a note"])
    assert json.loads((tmp_path / "stages/machine.json").read_text())["figures"] == {"rate": 1.5}
    assert not (tmp_path / "stages/so_far").exists()


def test_a_stage_whose_ranks_were_only_slow(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The stage itself has ended, with the fail of its ranks; a rank has made updates."""
    context = context_of(tmp_path)
    late = {"verdict": FAIL, "reason": "rank 0 did not end within 40 s", "is_late": True}
    of_a_stage(
        monkeypatch,
        tmp_path,
        "import os, pathlib, sys\n"
        f"folder = pathlib.Path({str(tmp_path / 'stages/so_far/progress')!r})\n"
        "folder.mkdir(parents=True)\n"
        "(folder / '0').write_text('')\n"
        f"pathlib.Path(sys.orig_argv[-2]).write_text({json.dumps(late)!r})\n"
        "os._exit(0)",
    )
    monkeypatch.setattr(other_programs, "RECENT", 100.0)  # however slow this machine is
    for used, verdict in ((128.0, NOTE), (0.0, FAIL)):
        monkeypatch.setattr(other_programs.StageTime, "others_used", lambda *_, now=used: now)
        found = runner.run_stage(STAGE, context, tmp_path / "context.json", ignored)
        told = "not judged: " if verdict == NOTE else ""
        assert found.reason.startswith(f"{told}rank 0 did not end within 40 s")
        written = json.loads((tmp_path / "stages/machine.json").read_text())
        assert found.verdict == written["verdict"] == verdict
        assert found.is_judged == (verdict == FAIL)


def test_sigterm_leaves_a_page_and_no_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told = of_a_stage(monkeypatch, tmp_path, WAITS)
    words = ["qualify", "--quick", "--device", "cpu", "--only", "machine"]
    process = subprocess.Popen(
        [sys.executable, "-m", "bert_pretraining", *words, "--output_dir", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while not told.exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.terminate()
        _, errors = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert errors.strip().splitlines()[-1] == "Error: ended by SIGTERM"
    assert (tmp_path / "out" / "qualification.html").is_file()
    for number in map(int, told.read_text().split()):
        assert is_gone(number)


def test_a_stage_and_its_ranks_end_with_what_started_them(tmp_path: Path) -> None:
    """Even where that was killed."""
    child = (
        "import os, sys, time\nfrom bert_pretraining.runtime.parent import end_with_parent\n"
        "end_with_parent(int(sys.argv[1])); print(os.getpid(), flush=True); time.sleep(600)"
    )
    parent = (
        "import os, subprocess, sys\n"
        "subprocess.run([sys.executable, '-c', sys.argv[1], str(os.getpid())])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent, child], stdout=subprocess.PIPE, text=True
    )
    number = int(process.stdout.readline())
    process.kill()
    process.wait()
    assert is_gone(number)
    late = [sys.executable, "-c", child, str(process.pid)]  # its parent is another one
    assert subprocess.run(late, capture_output=True, check=False).returncode == 1


def is_gone(process: int) -> bool:
    """Whether it ends; a zombie has ended."""
    for _ in range(600):
        found = process_stat.fields(process)
        if not found or found[process_stat.STATE] in "ZX":
            return True
        time.sleep(0.05)
    return False
