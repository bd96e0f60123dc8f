"""The command line of `submission ...`: flags in, functions of submission/ called, lines out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from bert_pretraining import config
from bert_pretraining.errors import UserError
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


def check(arguments: list[str]) -> int:
    """`submission check ORG`: 0 for a submission that passes, else 1."""
    parser = _parser("check", "MLPerf's checkers and what they miss, on the directory ORG.")
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    _add_ruleset(parser)
    folder, rest = _first_argument(arguments, "check", "the submission's directory: check ORG")
    values = parser.parse(rest)

    from bert_pretraining.submission.check import check as check_submission

    report = check_submission(Path(folder), values.ruleset)
    print(json.dumps(report.to_json(), indent=2) if values.json else report.describe())
    return 0 if report.passed else 1


def _first_argument(arguments: list[str], command: str, what: str) -> tuple[str, list[str]]:
    """The argument that stands before the flags, and the rest; --help may stand alone."""
    if arguments[:1] in (["-h"], ["--help"]):
        return "", arguments
    if not arguments or arguments[0].startswith("-"):
        raise UserError(f"submission {command} takes {what} [flags]")
    return arguments[0], arguments[1:]


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {"rcp": rcp, "check": check}
