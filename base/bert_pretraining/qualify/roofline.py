"""The picture of the measured limits, and of what the parts of a step reach of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from bert_pretraining.report.style import Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Bytes of an element of the operands, and of the result.
BYTES = {"fp32": (4, 4), "tf32": (4, 4), "bf16": (2, 2), "fp16": (2, 2), "fp8": (1, 2)}
MARKS = "osD^vP"
WHOLE, FORWARD_BACKWARD = "the whole step", "forward and backward"


def data_of(limits: Mapping[str, Any], step: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the panels draw; None without measured limits.

    Keys: `memory`, GB/s; `products`, kind -> shape -> TFLOP/s; `kind`, that of the step's products,
    or None; `steps`, batch size -> (what, TFLOP/s); `lines`, the same of the fastest batch size.
    All are of one rank: rates of all ranks at once, divided by their number.
    """
    try:
        memory = statistics.mean(limits["memory_copy_gb/s"]["at_once"])
        products = {
            kind: {shape: statistics.mean(rates) for shape, rates in by_shape.items()}
            for kind, by_shape in limits["matrix_tflop/s"].items()
            if kind in BYTES and by_shape
        }
    except KeyError:
        return None
    if not products:
        return None
    found = {int(size): one for size, one in step.get("by_batch_size", {}).items()}
    known = {size: found[size] for size in sorted(found) if found[size].get("tflop/s")}
    ranks = step.get("ranks") or 1
    data: dict[str, Any] = {"memory": memory, "products": products, "kind": None, "lines": {}}
    data["steps"] = {size: _reached(one, ranks) for size, one in known.items()}
    best = step.get("best_batch_size")
    if best in known:
        data["kind"] = _kind(products, step.get("precision"), known[best], ranks)
        data["lines"] = {f"{name}, {best} a rank": rate for name, rate in data["steps"][best]}
    return data


def _reached(one: Mapping[str, Any], ranks: int) -> list[tuple[str, float]]:
    """What is computed, and its TFLOP/s on one rank."""
    rate = one["tflop/s"] / ranks
    found = [(WHOLE, rate)]
    seconds = one.get("seconds_forward_backward")
    if seconds and one.get("step_seconds_median"):
        found.insert(0, (FORWARD_BACKWARD, rate * one["step_seconds_median"] / seconds))
    return found


def _kind(
    products: Mapping[str, Mapping[str, float]], precision: str | None, one: Mapping, ranks: int
) -> str | None:
    """The kind of the step's products. In fp32 the rate that `train` measured tells tf32 apart."""
    if precision == "fp32" and "tf32" in products and one.get("matrix_share"):
        measured = one["tflop/s"] / one["matrix_share"] / ranks
        kinds = [kind for kind in ("fp32", "tf32") if kind in products]
        return min(kinds, key=lambda kind: abs(np.log(peak(products, kind) / measured)))
    return precision if precision in products else None


def peak(products: Mapping[str, Mapping[str, float]], kind: str) -> float:
    """The best product's TFLOP/s."""
    return max(products[kind].values())


def short(rate: float) -> str:
    """With three digits at least."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def intensity(shape: str, kind: str) -> float:
    """Floating-point operations by bytes of a product "MxKxN", each matrix moved once."""
    m, k, n = map(int, shape.split("x"))
    operand, result = BYTES[kind]
    return 2.0 * m * k * n / (operand * (m * k + k * n) + result * m * n)


def roof(axes: Axes, data: Mapping[str, Any], theme: Theme) -> None:
    """The measured roofs, the products as points, and the fastest step as lines."""
    products, memory = data["products"], data["memory"] / 1e3
    places = [intensity(shape, kind) for kind, shapes in products.items() for shape in shapes]
    ridges = [peak(products, kind) / memory for kind in products]
    x = np.geomspace(min(*places, *ridges) / 8, 2.5 * max(*places, *ridges), 400)
    for kind, color, mark in zip(products, theme.series, MARKS, strict=False):
        highest = peak(products, kind)
        axes.plot(x, np.minimum(memory * x, highest), color=color, linewidth=2,
                  label=f"{kind}, {short(highest)} TFLOP/s")  # fmt: skip
        axes.plot([intensity(shape, kind) for shape in products[kind]], products[kind].values(),
                  mark, color=color, markersize=7, markeredgecolor=theme.background)  # fmt: skip
    for (name, rate), dashes in zip(data["lines"].items(), ((0, (6, 2)), (0, (1, 1.2))),
                                    strict=False):  # fmt: skip
        axes.axhline(rate, color=theme.text, linewidth=1.5, linestyle=dashes, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_title(f"Roofline of one rank, memory {data['memory']:,.0f} GB/s")
    axes.set_xlabel("Intensity (operations by bytes)")
    axes.set_ylabel("TFLOP/s of one rank")


def rows(data: Mapping[str, Any]) -> list[tuple[str, float, int]]:
    """Name, TFLOP/s and number of the colour of each bar, from the top."""
    kind = data["kind"]
    found = [
        (f"product {shape.replace('x', ' x ')} in {kind}", rate, 0)
        for shape, rate in data["products"].get(kind, {}).items()
    ]
    for number, name in enumerate((FORWARD_BACKWARD, WHOLE), 1):
        for size, reached in data["steps"].items():
            found += [(f"{name}, {size} a rank", rate, number) for key, rate in reached
                      if key == name]  # fmt: skip
    return found


def reached(axes: Axes, data: Mapping[str, Any], theme: Theme) -> None:
    """A bar for each product and for each part of a step, with its share of the best product."""
    bars = rows(data)
    axes.barh(range(len(bars)), [rate for _, rate, _ in bars], 0.66,
              color=[theme.series[number] for _, _, number in bars])  # fmt: skip
    best = peak(data["products"], data["kind"]) if data["kind"] else None
    for row, (_, rate, _) in enumerate(bars):
        share = f" ({rate / best:.0%})" if best else ""
        axes.text(1.015, row, f"{short(rate)}{share}", va="center", fontsize=9.5,
                  transform=axes.get_yaxis_transform())  # fmt: skip
    axes.set_yticks(range(len(bars)), [name for name, _, _ in bars])
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.set_title("Reached" + (" (share of the best product)" if best else ""))
    axes.set_xlabel("TFLOP/s of one rank")
