"""The tables of a qualification's page, and what was qualified; as HTML."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bert_pretraining.bench.workload import BERT_LARGE
from bert_pretraining.qualify import normal
from bert_pretraining.qualify.pictures import by_number, figures_of
from bert_pretraining.qualify.record import FAIL, Qualification
from bert_pretraining.report.document import table
from bert_pretraining.runtime.words import counted, plural

LONG_TABLE = 12  # rows; a longer one is folded
ABSENT = "-"
SPEED_COLUMNS = (
    ("Sequences/s", "sequences/s"), ("Tokens/s", "tokens/s"), ("TFLOP/s", "tflop/s"),
    ("Of matrix rate", "matrix_share"), ("Peak memory (MiB)", "peak_memory_mib"),
    ("Step (s)", "step_seconds_median"), ("Spread", "step_spread_share"),
)  # fmt: skip
THROUGHPUT_COLUMNS = (("p_whole", "p_whole"), ("p_train", "p_train"), ("p_core", "p_core"))
SHARES = ("matrix_share", "step_spread_share", "efficiency")
SECONDS = ("step_seconds_median", "seconds_reduction")
RATES = {
    "memory_copy_gb/s": "Copy within the memory (GB/s)",
    "host_to_device_gb/s": "Main memory to device (GB/s)",
    "device_to_host_gb/s": "Device to main memory (GB/s)",
}


def facts(done: Qualification) -> str:
    """The machine, the date, the versions, and what was asked."""
    machine, settings = done.machine, done.settings
    versions = machine.get("versions") or {}
    rows = {
        "Machine": f"{machine.get('host')}: {machine.get('devices')} x {machine.get('device')}",
        "CPU": " ".join(
            str(machine[name]) for name in ("cpu", "machine") if machine.get(name)
        ) + (f", {machine['cpus_allowed']} CPUs allowed" if "cpus_allowed" in machine else ""),
        "Date": _date(done),
        "Versions": ", ".join(f"{name} {value}" for name, value in versions.items()),
        "Commit": machine.get("commit"),
        "Asked": _asked(settings),
        "Settings": ", ".join(
            f"{name} {_setting(value)}" for name, value in settings.items() if name not in _TOLD
        ),
    }  # fmt: skip
    items = "".join(
        f"<dt>{name}</dt><dd>{html.escape(str(text))}</dd>" for name, text in rows.items() if text
    )
    return f"<h2>What was qualified</h2><dl class=facts>{items}</dl>"


def in_one_line(done: Qualification) -> str:
    """The machine, the date and PyTorch's version."""
    machine, versions = done.machine, done.machine.get("versions") or {}
    return (
        f"{machine.get('devices')} x {machine.get('device')} on {machine.get('host')}, "
        f"{_date(done)}, torch {versions.get('torch')}"
    )


def _date(done: Qualification) -> str:
    return done.started.replace("T", " ").replace("Z", " UTC")


_TOLD = ("quick", "ranks", "layers", "batch_sizes", "minutes")


def _asked(settings: Mapping[str, Any]) -> str:
    layers, ranks = settings.get("layers"), settings.get("ranks")
    sizes = ", ".join(map(str, settings.get("batch_sizes") or ()))
    model = f"BERT-large's sizes with {layers} of its {BERT_LARGE.num_hidden_layers} layers"
    if layers == BERT_LARGE.num_hidden_layers:
        model = "BERT-large"
    minutes = settings.get("minutes")
    steady = (
        f"{60 * minutes:g} s"
        if minutes and minutes < 1
        else f"{minutes:g} {plural(minutes, 'minute')}"
    )
    return (
        f"{'a quick look (--quick)' if settings.get('quick') else 'a full qualification'}: "
        f"{model}, {counted(ranks, 'rank')}, batch sizes {sizes} a rank, "
        f"{steady} of steady steps"
    )


def _setting(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "by default" if value is None else str(value)


def of_figures(done: Qualification) -> list[str]:
    """All tables for which there are figures."""
    makers: tuple[Callable[[Qualification], str], ...] = (
        _normal, _speed, _scaling, _limits, _kernels, _versions,
    )  # fmt: skip
    return [made for made in (make(done) for make in makers) if made]


def _normal(done: Qualification) -> str:
    """The published speeds of the same device, beside the measured one."""
    if "sequences/s" not in figures_of(done, "step"):
        return ""
    compared = normal.compare(done)
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in compared.lines)
    rows = [
        [
            ("", f"{one['devices'] or '?'} x {one['device']}"),
            ("number", _band(one)),
            ("number", _number(one["measured_sequences/s"])),
            ("number", _share(one.get("share"))),
            (_color(one), _judged(one)),
            ("long", f"{one['system']}, {one['round'] or ABSENT}; {one['source']}"),
            ("long", "; ".join(one["differs"])),
        ]
        for one in compared.figures
    ]
    if not rows:
        return f"<h2>What is normal</h2><ul>{lines}</ul>"
    names = ("Published", "Sequences/s a device", "Here", "Share", "Band", "Source", "What differs")
    return (
        f"<h2>What is normal</h2>{table(names, rows)}"
        f"<details><summary>in words</summary><ul>{lines}</ul></details>"
    )


def _band(one: Mapping[str, Any]) -> str:
    low, high = one["lowest_sequences/s"], one["highest_sequences/s"]
    return f"{low:.4g} to {high:.4g}"


def _color(one: Mapping[str, Any]) -> str:
    if "is_below_band" not in one:
        return "muted"
    return "bad" if one["is_below_band"] else "good"


def _judged(one: Mapping[str, Any]) -> str:
    if "is_below_band" not in one:
        return "not compared"
    return "below" if one["is_below_band"] else "in it or above"


def _speed(done: Qualification) -> str:
    """The step at each batch size, and in other precisions."""
    step = figures_of(done, "step")
    precision, best = step.get("precision", ABSENT), step.get("best_batch_size", ABSENT)
    found = [
        ([str(size), precision], one) for size, one in by_number(step.get("by_batch_size")).items()
    ]
    found += [([str(best), name], one) for name, one in (step.get("by_precision") or {}).items()]
    if not found:
        return ""
    notes = "Rates are sums over the ranks. Batch size: sequences a rank."
    if "too_large_batch_size" in step:
        notes += f" {step['too_large_batch_size']} a rank did not fit into the memory."
    notes += (
        " p_train: sequences/s of all steps; p_core: without the waiting for batches; p_whole: "
        "with the evaluations that MLPerf asks for."
    )
    columns = (*SPEED_COLUMNS, *THROUGHPUT_COLUMNS)
    return _of_rows("Step", ("Batch size", "Precision"), columns, found, notes)


def _scaling(done: Qualification) -> str:
    """The step on more and more ranks."""
    figures = figures_of(done, "scaling")
    found = [([str(count)], one) for count, one in by_number(figures.get("by_ranks")).items()]
    if not found:
        return ""
    columns = (("Efficiency", "efficiency"), *SPEED_COLUMNS,
               ("Waits for gradients (s)", "seconds_reduction"))  # fmt: skip
    notes = f"Batch size: {figures.get('batch_size', ABSENT)} a rank."
    return _of_rows("Scaling", ("Ranks",), columns, found, notes)


def _of_rows(
    title: str,
    first: Sequence[str],
    columns: Sequence[tuple[str, str]],
    found: Sequence[tuple[Sequence[str], Mapping[str, Any]]],
    notes: str,
) -> str:
    """A table of figures by name. found: the first cells of each row, and its figures."""
    rows = [
        [*(("", cell) for cell in cells), *(("number", _figure(key, one)) for _, key in columns)]
        for cells, one in found
    ]
    names = (*first, *(name for name, _ in columns))
    return f"<h2>{title}</h2>{table(names, rows)}<p class=muted>{html.escape(notes)}</p>"


def _figure(key: str, one: Mapping[str, Any]) -> str:
    value = one.get(key)
    if key in SECONDS:
        return _seconds(value)
    return _share(value) if key in SHARES else _number(value)


def _limits(done: Qualification) -> str:
    """What was measured of the device: of the ranks the slowest and the fastest."""
    figures = figures_of(done, "limits")
    rows = [
        [("", name), ("number", _ends(figures[key].get("alone"))),
         ("number", _ends(figures[key].get("at_once")))]
        for key, name in RATES.items() if key in figures
    ]  # fmt: skip
    rows += [
        [("", f"Product {shape.replace('x', ' x ')} in {kind} (TFLOP/s)"), ("number", ABSENT),
         ("number", _ends(rates))]
        for kind, by_shape in (figures.get("matrix_tflop/s") or {}).items()
        for shape, rates in by_shape.items()
    ]  # fmt: skip
    rows += [
        [("", f"All-reduce of {size} MB (GB/s of the bus)"), ("number", ABSENT),
         ("number", _number(one.get("bus_gb/s")))]
        for size, one in by_number(figures.get("all_reduce")).items()
    ]  # fmt: skip
    if "all_reduce_latency_seconds" in figures:
        latency = 1e6 * figures["all_reduce_latency_seconds"]
        rows.append([("", "All-reduce of one number (us)"), ("number", ABSENT),
                     ("number", _number(latency))])  # fmt: skip
    if not rows:
        return ""
    names = ("Limit", "One rank alone", "All ranks at once")
    return _folded("Limits", names, rows, "", is_open=True)


def _kernels(done: Qualification) -> str:
    """Each kernel, its worst error against its bound; those that are wrong first."""
    figures = figures_of(done, "kernels")
    kernels = figures.get("kernels") or {}

    def order(item: tuple[str, Mapping[str, Any]]) -> tuple[bool, float]:
        return item[1].get("verdict") != FAIL, -(item[1].get("worst_share") or 0.0)

    timed = any(one.get("forward_backward_s") for one in kernels.values())
    rows = []
    for name, one in sorted(kernels.items(), key=order):
        wrong = one.get("verdict") == FAIL
        row = [("", name), ("bad" if wrong else "good", "wrong" if wrong else "right"),
               ("number", _number(one.get("worst_share")))]  # fmt: skip
        if timed:
            row.append(("number", _milliseconds(one.get("forward_backward_s"))))
        rows.append([*row, ("long", one.get("fault") or one.get("implementation") or ABSENT)])
    rows += [
        [("", name), ("muted", "not here"), *(("number", ABSENT) for _ in range(1 + timed)),
         ("long", str(why))]
        for name, why in (figures.get("unavailable") or {}).items()
    ]  # fmt: skip
    if not rows:
        return ""
    names = ["Kernel", "Verdict", "Worst error by bound"]
    names += ["Forward + backward (ms)"] if timed else []
    notes = (
        "Operator, provider and dtype; against float64, forward and gradients. A worst error of 1 "
        "or more by its bound is wrong."
    )
    wrong = any(one.get("verdict") == FAIL for one in kernels.values())
    return _folded("Kernels", [*names, "How, or what is wrong"], rows, notes, is_open=wrong)


def _versions(done: Qualification) -> str:
    """What the stage `software` found."""
    figures = figures_of(done, "software")
    rows = [[("", name), ("long", str(value))]
            for group in ("versions", "variables")
            for name, value in (figures.get(group) or {}).items()]  # fmt: skip
    return _folded("Software", ("Name", "Value"), rows, "", is_open=False) if rows else ""


def _folded(
    title: str,
    names: Sequence[str],
    rows: Sequence[Sequence[tuple[str, str]]],
    notes: str,
    is_open: bool,
) -> str:
    """A table under a heading; a long one is folded unless it must be seen."""
    told = f"<p class=muted>{html.escape(notes)}</p>" if notes else ""
    if len(rows) <= LONG_TABLE:
        return f"<h2>{title}</h2>{table(names, rows)}{told}"
    return (
        f"<h2>{title}</h2><details{' open' if is_open else ''}><summary>{len(rows)} rows</summary>"
        f"{table(names, rows)}</details>{told}"
    )


def how_to_compare(done: Qualification) -> str:
    """The command that compares two machines, dates or drivers."""
    command = (
        "python -m bert_pretraining qualify compare BEFORE/qualification.json qualification.json"
    )
    return (
        "<h2>Compare</h2><p>All figures are in <code>qualification.json</code> beside this page. "
        "To compare two machines, two dates or two drivers:</p>"
        f"<pre><code>{html.escape(command)}</code></pre><p>It marks a throughput that fell by 5% "
        "or more, a kernel that was lost and a fingerprint that changed, and ends with exit code 1 "
        "then. Both must have been qualified with the same settings.</p>"
    )


def _ends(rates: Sequence[float] | None) -> str:
    """The rates of the ranks: one number, or the lowest and the highest."""
    if not rates:
        return ABSENT
    low, high = _number(min(rates)), _number(max(rates))
    return low if low == high else f"{low} to {high}"


def _share(value: object) -> str:
    return f"{value:.1%}" if isinstance(value, int | float) else ABSENT


def _seconds(value: object) -> str:
    """Of a step, or of its part: to the millisecond."""
    return f"{value:,.3f}" if isinstance(value, int | float) else ABSENT


def _milliseconds(seconds: object) -> str:
    return _number(1e3 * seconds) if isinstance(seconds, int | float) else ABSENT


def _number(value: object) -> str:
    """With four digits."""
    if not isinstance(value, int | float):
        return ABSENT
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
