"""The page of a qualification, its pictures, and what the terminal shows."""

from __future__ import annotations

import io
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import pytest

import qualifications
from bert_pretraining.qualify import pictures, roofline, terminal
from bert_pretraining.qualify.page import Page
from bert_pretraining.qualify.record import FAIL, NOTE, PASS, Qualification, StageResult
from bert_pretraining.qualify.stages import STAGES
from bert_pretraining.report import figures
from qualifications import complete, kernel_figures, page_of, stage

ALL_PICTURES = ["roofline", "speed", "parts", "scaling", "all_reduce", "endurance", "learning"]
WRONG = "attention triton bf16"


class Read(HTMLParser):
    """The tags of a page, what it refers to, its words, and the cells of its tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = ("src", "srcset", "href", "data", "action")
        self.links += [value or "" for name, value in attrs if name in names]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture
def quick_png(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return qualifications.quick_png(monkeypatch)


@pytest.mark.skipif(not find_spec("matplotlib"), reason="the pictures need matplotlib")
def test_a_complete_page_loads_nothing_and_is_drawn_light_and_dark(tmp_path: Path) -> None:
    text = page_of(complete(), tmp_path)
    read = Read(text)
    assert len(read.links) == 2 * len(ALL_PICTURES)
    assert all(link.startswith("data:image/png;base64,iVBOR") for link in read.links)
    assert len(set(read.links)) == len(read.links)
    assert not {"script", "link", "iframe", "object"} & set(read.tags)
    assert "url(" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text
    assert text.count("(prefers-color-scheme: dark)") >= 2 + len(ALL_PICTURES)
    assert len(text) < 900_000
    assert "refresh" not in text  # it is over


def test_the_verdict_comes_first_then_a_row_a_stage(tmp_path: Path, quick_png: list[str]) -> None:
    text = page_of(complete(), tmp_path)
    read = Read(text)
    places = [text.index(part) for part in ("<h1>note</h1>", "<h2>Stages", "<img", "<h2>What is n")]
    assert places == sorted(places)
    head = "8 pass, 1 note, 0 fail; it can be used; read the notes first 8 x NVIDIA H100 80GB HBM3"
    assert f"{head} on node-17, 2026-11-26 13:45:00 UTC, torch 2.13.0" in read.text
    rows = re.findall(r"<li><b class=(\w+)>(\w+)</b><span>(\w+)</span>", text)
    assert [name for _, _, name in rows] == [stage.name for stage in STAGES]
    assert rows[0][:2] == ("note", NOTE)
    assert rows[1][:2] == ("good", PASS)
    for one in STAGES:
        assert one.asks in read.text
    assert "a full qualification: BERT-large, 8 ranks, batch sizes 16, 32, 48, 64, 96" in read.text
    assert "<details><summary>1 further line</summary><ul><li>numactl: numactl is" in text  # folded
    assert "qualify compare BEFORE/qualification.json qualification.json" in read.text


def test_figures_stand_in_tables(tmp_path: Path, quick_png: list[str]) -> None:
    text = Read(page_of(complete(), tmp_path)).text
    assert "96 bf16 6,400 1,638,400 3,200 58.0% 55,080 0.120 2.1% 6,208 6,368 6,400" in text
    assert "128 a rank did not fit into the memory" in text
    assert "Product 12288 x 1024 x 4096 in fp8 (TFLOP/s) - 1,118 to 1,150" in text
    assert "8 x H100 SXM 924 to 974 800 82.1% below" in text  # published, and measured
    assert "masked_cross_entropy torch fp32 right 0.2 1.2" in text


def test_a_fail_is_told_first_and_its_kernel_leads_the_table(
    tmp_path: Path, quick_png: list[str]
) -> None:
    wrong = stage("kernels", FAIL, reason=f"1 of 18 are wrong: {WRONG}", notes=["take torch"],
                  figures=kernel_figures(WRONG))  # fmt: skip
    text = page_of(complete(kernels=wrong), tmp_path)
    read = Read(text)
    assert '<div class="verdict bad"><h1>fail</h1>' in text
    assert f"What is wrong kernels : 1 of 18 are wrong: {WRONG}" in read.text
    assert "<details open><summary>1 further line</summary><ul><li>take torch" in text
    assert f"How, or what is wrong {WRONG} wrong 41" in read.text
    assert "the output at [3, 7] is off by 1.0" in read.text


def test_all_texts_are_escaped(tmp_path: Path, quick_png: list[str]) -> None:
    evil = "<script>alert(1)</script> & \"quoted\" 'too'"
    done = complete(
        machine=stage("machine", FAIL, reason=evil, notes=[evil]),
        software=stage("software", figures={"versions": {evil: evil}}),
        kernels=stage("kernels", figures={"kernels": {evil: {"fault": evil, "verdict": FAIL}},
                                          "unavailable": {evil: evil}}),
        limits=stage("limits", figures={"matrix_tflop/s": {evil: {evil: [1.0]}}}),
    )  # fmt: skip
    machine = {**done.machine, "device": evil, "host": evil, "cpu": evil, "versions": {evil: evil}}
    done = replace(done, machine=machine, settings={**done.settings, "kernels": evil})
    text = page_of(done, tmp_path)
    assert "script" not in Read(text).tags
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_while_it_runs_the_page_says_what_is_missing(tmp_path: Path, quick_png: list[str]) -> None:
    asked = [one.name for one in STAGES if one.name != "learning"]
    done, path = replace(complete(), stages=[], asked=asked), tmp_path / "page.html"
    page = Page(path)
    page.write(done, running=STAGES[0])
    text = path.read_text()
    assert "<h1>runs</h1>" in text  # no verdict yet
    assert 'http-equiv="refresh"' in text
    assert text.count("runs now") == 2
    assert text.count("not run yet") == 7
    assert text.count("not asked for") == 1
    done = replace(done, stages=complete().stages[:3])
    page.write(done, running=STAGES[3])
    text = path.read_text()
    assert "2 pass, 1 note, 0 fail; 3 of 9 stages ran; so far: the stage determinism runs" in text
    assert text.count("not run yet") == 4
    page.write(done)  # interrupted
    text = path.read_text()
    assert "refresh" not in text
    assert text.count("<p>did not run</p>") == 5
    assert "3 of 9 stages ran; it was interrupted: stages that were asked for did not run" in text
    page.write(replace(done, stages=[]))
    assert "<h1>no stage ran</h1>" in path.read_text()


def test_a_picture_is_drawn_once(tmp_path: Path, quick_png: list[str]) -> None:
    page, done = Page(tmp_path / "page.html"), complete()
    page.write(replace(done, stages=done.stages[:6]))
    assert [name for name in quick_png if "light" in name] == [
        f"{name} light" for name in ("roofline", "speed", "parts", "all_reduce")
    ]
    page.write(done)
    # The scaling's parts stand beside those of the step: that picture is another one now.
    later = [name for name in quick_png[8:] if "dark" in name]
    assert later == [f"{name} dark" for name in ("parts", "scaling", "endurance", "learning")]
    page.write(done)
    assert len(quick_png) == 16


@pytest.mark.parametrize("name", [one.name for one in STAGES])
def test_stages_without_figures_leave_their_pictures_out(
    tmp_path: Path, quick_png: list[str], name: str
) -> None:
    """As those do that crashed, or did not end in time."""
    crashed = stage(name, FAIL, reason="ended by SIGKILL")
    assert "ended by SIGKILL" in page_of(complete(**{name: crashed}), tmp_path)
    without = {
        "limits": {"roofline", "all_reduce"}, "step": {"speed"}, "scaling": {"scaling"},
        "endurance": {"endurance"}, "learning": {"learning"},
    }.get(name, set())  # fmt: skip
    left = [sketch.picture.name for sketch in pictures.sketches(complete(**{name: crashed}))]
    assert left == [one for one in ALL_PICTURES if one not in without]


def test_no_figures_at_all(tmp_path: Path) -> None:
    empty = {one.name: stage(one.name) for one in STAGES}
    text = page_of(complete(**empty), tmp_path)
    assert "<h1>pass</h1>" in text
    assert "<img" not in text
    assert pictures.sketches(complete(**empty)) == []


def test_a_quick_qualification_draws_no_curve_of_one_point() -> None:
    speed = qualifications.speed(0.6, 4)
    unmeasured = {key: value for key, value in speed.items() if not key.startswith("seconds_")}
    done = complete(
        step=stage("step", figures={"by_batch_size": {"2": unmeasured}, "precision": "fp32",
                                    "best_batch_size": 2, "ranks": 2, "sequences/s": 0.6}),
        scaling=stage("scaling", reason="one device: nothing to scale"),
        endurance=stage("endurance", figures={"points": [[8.0, 8.0]], "sensors": []}),
    )  # fmt: skip
    names = [sketch.picture.name for sketch in pictures.sketches(done)]
    assert names == ["roofline", "all_reduce", "learning"]


def test_roofline_has_the_rates_of_one_rank() -> None:
    done = complete()
    data = roofline.data_of(done.stage("limits").figures, done.stage("step").figures)
    assert data["kind"] == "bf16"
    assert data["lines"] == pytest.approx(
        {"forward and backward, 96 a rank": 400 / 0.82, "the whole step, 96 a rank": 400}
    )
    assert data["memory"] == pytest.approx(0.99 * 2900 * (1 - 0.004 * 3.5))
    assert roofline.rows(data)[0][1] == pytest.approx(690 * (1 - 0.004 * 3.5))
    assert len(roofline.rows(data)) == 3 + 2 * len(qualifications.SIZES)
    # 2 * 2 * 3 * 4 operations; 6 + 12 elements of two bytes, 8 of two
    assert roofline.intensity("2x3x4", "bf16") == pytest.approx(48 / (2 * 18 + 2 * 8))
    assert roofline.intensity("2x3x4", "fp8") == pytest.approx(48 / (18 + 2 * 8))


def test_tf32_is_told_from_fp32_by_the_rate_that_training_measured() -> None:
    limits = complete().stage("limits").figures
    one = {**qualifications.speed(100.0, 96), "tflop/s": 80.0}
    for rate, kind in ((8 * 50.0, "fp32"), (8 * 350.0, "tf32")):
        sizes = {"96": {**one, "matrix_share": 80.0 / rate}}
        step = {"precision": "fp32", "ranks": 8, "best_batch_size": 96, "by_batch_size": sizes}
        assert roofline.data_of(limits, step)["kind"] == kind


def test_without_matplotlib_the_page_has_its_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = Read(page_of(complete(), tmp_path)).text
    assert f"install it: {sys.executable} -m pip install matplotlib" in text
    assert "'qualify page' draws them later" in text
    assert "96 bf16 6,400" in text


def test_a_roofline_of_one_panel_has_no_left_and_right() -> None:
    captions = [
        roofline_of.picture.caption
        for roofline_of in (
            pictures.roofline_picture(complete()),
            pictures.roofline_picture(complete(step=stage("step", FAIL))),
        )
    ]
    assert captions[0].startswith("Left: the roofs are ")
    assert "Right: " in captions[0]
    assert captions[1].startswith("The roofs are ")
    assert not {"Left", "Right"} & set(re.findall(r"\w+", captions[1]))


def test_times_and_throughputs_are_told_in_one_way(tmp_path: Path, quick_png: list[str]) -> None:
    done = complete()
    done.stage("scaling").figures["by_ranks"]["1"]["seconds_reduction"] = 8.002e-06
    text = page_of(done, tmp_path)
    assert "e-06" not in text
    assert "0.000</td></tr>" in text
    for name in ("p_train", "p_core", "p_whole"):
        assert f"{name}: " in text


def test_a_picture_that_cannot_be_drawn_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def png(picture: object, data: object, theme: object) -> bytes:
        raise ValueError("no <font>")

    monkeypatch.setattr(figures, "png", png)
    monkeypatch.setattr(figures, "require_matplotlib", lambda: None)
    text = page_of(complete(), tmp_path)
    assert text.count("This picture could not be drawn (ValueError: no &lt;font&gt;).") == 7


# ---- the terminal


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


def shown_on(
    stream: io.StringIO,
    done: Qualification,
    monkeypatch: pytest.MonkeyPatch,
    columns: int = 60,
    notice: str = "",
) -> str:
    """What is printed of this qualification; escape codes that move are left out."""
    monkeypatch.setattr(sys, "stdout", stream)
    for name, value in (("CI", ""), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(terminal.screen, "columns", lambda stream: columns)
    shown = terminal.Shown(done, STAGES, notice)
    for one, result in zip(STAGES, done.stages, strict=False):
        shown.begins(one, 120.0)
        shown.progress(f"{one.name}: a long text of what it does now, for a narrow terminal")
        shown.ended(result)
    shown.finished(Path("out/page.html"), Path("out/qualification.json"))
    return stream.getvalue()


def failed() -> Qualification:
    notes = [f"note {number} of what was found" for number in range(6)]
    reason = "1 of 18 are wrong: attention triton bf16: the output at [3, 7]\nis off; pass torch"
    return complete(kernels=stage("kernels", FAIL, reason=reason, notes=notes))


def test_a_narrow_terminal_gets_wrapped_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    text = shown_on(Screen(), failed(), monkeypatch)
    drawn = re.split(r"\n|\r\033\[K", text)
    paths = ("Page:", "Figures:", "Compare:")  # to be copied
    assert all(len(line) <= 60 for line in drawn if not line.startswith(paths))
    assert "kernels 0 s of at most 120: a long text of what it" in text
    assert "\033[1" not in text
    lines = [line for line in drawn if line]
    start = next(n for n, line in enumerate(lines) if re.match(r"fail +kernels +12.5 s$", line))
    assert lines[start + 1].startswith("      1 of 18 are wrong: attention")
    assert lines[start + 2].startswith("      ")
    assert "- 2 more: see the page" in text


def test_a_notice_stands_above_the_stages_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    told = "no pictures, matplotlib is missing; install it: /usr/bin/python3 -m pip install it"
    lines = shown_on(io.StringIO(), failed(), monkeypatch, notice=told).splitlines()
    assert lines[1] == f"Notice: {told}"
    assert f"\nNotice: {told}\n" in shown_on(Screen(), failed(), monkeypatch, notice=told).replace(
        "\r\033[K", ""
    )


def test_verdicts_are_coloured_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = shown_on(Screen(), failed(), monkeypatch, columns=90)
    assert "\033[1;31mfail\033[0m  kernels " in text
    assert "\033[1;32mpass\033[0m  software " in text
    # A reason's further lines stand below its first one.
    assert re.search(rf"attention triton bf16: [^\n]+\n {{{terminal.INDENT}}}\S", text)


def test_programs_get_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown_on(io.StringIO(), failed(), monkeypatch).splitlines()
    assert "\033" not in "".join(lines)
    assert "\r" not in "".join(lines)
    kernels = next(line for line in lines if line.startswith("fail  kernels"))
    assert kernels.endswith("  1 of 18 are wrong: attention triton bf16: the output at [3, 7] is "
                            "off; pass torch")  # fmt: skip
    assert sum(line.startswith(("pass ", "note ", "fail ")) for line in lines) == 9
    end = next(n for n, line in enumerate(lines) if line.startswith("Verdict: "))
    assert lines[end].startswith("Verdict: fail (7 pass, 1 note, 1 fail), ")
    assert lines[end + 1].startswith("  - kernels: 1 of 18 are wrong")  # the worst, again
    assert lines[-1].startswith("Compare: python -m bert_pretraining qualify compare BEFORE.json ")


def test_a_passed_qualification_ends_with_where_its_files_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done = complete(machine=stage("machine", notes=["told on the page alone"]))
    text = shown_on(io.StringIO(), done, monkeypatch)
    assert "told on the page alone" not in text
    assert text.splitlines()[-4].startswith("Verdict: pass (9 pass, 0 note, 0 fail), ")
    assert text.splitlines()[-3] == "Page:    out/page.html"


def test_a_page_shows_what_stages_that_were_ended_have_kept(
    tmp_path: Path, quick_png: list[str]
) -> None:
    """Those figures that a stage has at first, and those that it has later."""
    whole = complete()

    def ended(name: str, *names: str) -> StageResult:
        figures = {one: whole.stage(name).figures[one] for one in names}
        return stage(name, FAIL, reason="ended at its limit of 9 s", figures=figures)

    text = page_of(
        complete(
            kernels=ended("kernels", "kernels", "unavailable"),
            determinism=ended("determinism"),
            limits=ended("limits", "memory_copy_gb/s"),
            step=ended("step", "by_batch_size", "precision", "best_batch_size", "sequences/s"),
            scaling=ended("scaling", "batch_size", "by_ranks"),
            endurance=ended("endurance", "batch_size"),
            learning=ended("learning", "target_accuracy", "curve", "batch_size", "start_accuracy"),
        ),
        tmp_path,
    )
    assert [name for name in quick_png if "light" in name] == [
        f"{name} light" for name in ("speed", "parts", "scaling", "learning")
    ]
    assert text.count("ended at its limit of 9 s") == 2 * 7
    assert "Copy within the memory (GB/s)" in text
    assert "masked_cross_entropy torch fp32" in text
