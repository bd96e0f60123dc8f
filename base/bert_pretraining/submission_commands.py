"""The command line of `submission ...`: flags in, functions of submission/ called, lines out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

from bert_pretraining import config
from bert_pretraining.submission.rulesets import DEFAULT_RULESET, RUNS


def _parser(command: str, text: str | None = None) -> config.FlagParser:
    return config.FlagParser(
        prog=f"python -m bert_pretraining submission {command}", allow_abbrev=False,
        description=text,
    )  # fmt: skip


def _add_ruleset(parser: config.FlagParser) -> None:
    parser.add_argument(
        "--ruleset", default=DEFAULT_RULESET, help=f"1.0.0 to 5.0.0 ({DEFAULT_RULESET})"
    )


def rcp(arguments: list[str]) -> None:
    """`submission rcp`: what a global batch size must reach, before anything is run."""
    parser = _parser("rcp", "The reference convergence point of a global batch size.")
    add = parser.add_argument
    add("--global_batch_size", type=int, required=True, help="sequences an update, over all ranks")
    add("--runs", type=int, default=RUNS, help=f"of the submission ({RUNS})")
    add("--mean_samples", type=float, help="of your runs: do they pass, with which scale factor?")
    add("--json", action="store_true", help="the figures as JSON")
    _add_ruleset(parser)
    values = parser.parse(arguments)

    from bert_pretraining.submission.rcp import convergence_point

    point = convergence_point(values.global_batch_size, values.ruleset)
    least = point.least_mean(values.runs)
    figures = {
        **dataclasses.asdict(point),
        "runs": values.runs,
        "least_passing_mean": least,
        "greatest_scale_factor": least and point.scale_factor(least),
    }
    if values.mean_samples is not None:
        figures["mean_samples_of_runs"] = values.mean_samples
        figures["passes"] = point.passes(values.mean_samples, values.runs)
        figures["scale_factor"] = point.scale_factor(values.mean_samples)
    if values.json:
        print(json.dumps(figures, indent=2))
        return
    print(f"Ruleset {point.ruleset}, global batch size {point.global_batch_size:,}:")
    print(f"  basis                    {point.describe()}")
    if least is None:
        return
    print(f"  RCP mean                 {point.mean_samples:,.0f} samples")
    print(f"  standard deviation       {point.standard_deviation:,.0f} samples")
    print(f"  least mean that passes   {least:,.0f} samples ({values.runs} runs)")
    print(
        f"  scale factor             1 from the RCP mean on, up to "
        f"{figures['greatest_scale_factor']:.4f} below it: RCP mean / mean of the runs"
    )
    if values.mean_samples is not None:
        verdict = "passes" if figures["passes"] else "fails"
        factor = f", scale factor {figures['scale_factor']:.4f}" if figures["passes"] else ""
        print(f"  a mean of {values.mean_samples:,.0f}      {verdict}{factor}")


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {"rcp": rcp}
