"""The command line of `submission ...`: flags in, functions of submission/ called, lines out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from bert_pretraining import config, launch
from bert_pretraining.errors import EXIT_CONVERGED, EXIT_NOT_CONVERGED, UserError
from bert_pretraining.submission.rulesets import DEFAULT_RULESET, RUNS, TARGET_MLM_ACCURACY

SERIES_DIR = "output/submission"


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
    parser.add_argument("folder", type=Path, metavar="ORG", help="of ORG/results, ORG/systems")
    values = parser.parse(arguments)

    from bert_pretraining.submission.check import check as check_submission

    report = check_submission(values.folder, values.ruleset)
    print(json.dumps(report.to_json(), indent=2) if values.json else report.describe())
    return 0 if report.passed else 1


def run(arguments: list[str]) -> int:
    """`submission run ... -- TRAINING FLAGS`: a series; 0 if all but one run converged, else 3."""
    parser = _parser(
        "run",
        "Run after run of one training command, given after --. The same command again goes on "
        "where it was stopped.",
    )
    add = parser.add_argument
    add("--runs", type=int, default=RUNS, help=f"in the series ({RUNS})")
    add("--output_dir", type=Path, default=Path(SERIES_DIR), help=f"of the series ({SERIES_DIR})")
    add(
        "--drop_caches", choices=("auto", "never", "required"), default="auto",
        help="the page caches, before each run: where allowed, never, or else fail (auto)",
    )  # fmt: skip
    add("--show", action="store_true", help="runs print here, not into run_00/terminal.txt")
    _add_ruleset(parser)
    own, training = _split(arguments)
    values = parser.parse(own)
    if values.runs < 1:
        raise UserError(f"--runs {values.runs}: must be at least 1")

    from bert_pretraining.submission.series import run_series

    for line in _before(_training_config(training), values.ruleset):
        print(line)
    series = run_series(
        values.output_dir, training, values.runs, values.drop_caches, values.show,
        lambda line: print(line, flush=True),
    )  # fmt: skip
    converged = len(series.runs) - series.unconverged
    print(f"{converged} of {len(series.runs)} runs converged; next: submission assemble --series "
          f"{values.output_dir} --system NAME")  # fmt: skip
    tolerated = 1 if len(series.runs) > 1 else 0
    return EXIT_CONVERGED if series.unconverged <= tolerated else EXIT_NOT_CONVERGED


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The flags before --, and those of the training after it."""
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def _training_config(training: list[str]) -> config.Config:
    """The configuration that training flags mean. Raises UserError for what no series can run."""
    parser = config.FlagParser(prog="bash run_training.sh", allow_abbrev=False)
    launch.add_launch_flags(parser)
    config.add_config_flags(parser)
    flags, values = launch.split_flags(vars(parser.parse(training)))
    if not ("name" in values or "config" in values):
        raise UserError("the training flags after -- name no configuration: pass --name, --config")
    for name, why in (
        ("seed", "every run draws its own from the system's entropy"),
        ("output_dir", "every run has its own; --output_dir before -- is that of the series"),
    ):
        if name in values:
            raise UserError(f"--{name} after --: {why}; leave it out")
    if flags.dry_run or flags.max_restarts:
        name = "dry_run" if flags.dry_run else "max_restarts"
        raise UserError(f"--{name} after --: a timed run starts once; leave it out")
    settings = config.resolve(values).config
    if settings.nnodes > 1:
        raise UserError(
            f"{settings.nnodes} machines: submission run starts runs on one; start each run with "
            "run_training.sh on all of them, then: submission assemble --logs LOG..."
        )
    if settings.submission_org == "unknown":
        raise UserError("the logs name whose runs they are: pass --submission_org ORG after --")
    return settings


def _before(settings: config.Config, ruleset: str) -> list[str]:
    """What is known before any time is spent."""
    from bert_pretraining.submission.rcp import convergence_point

    size = settings.train_batch_size * settings.gradient_accumulation_steps * settings.world_size
    point = convergence_point(size, ruleset)
    lines = [f"Ruleset {ruleset}, global batch size {size:,}: {point.describe()}"]
    if point.mean_samples is not None:
        lines[0] += f"; at least {point.least_mean():,.0f} samples in the mean"
    notes = {
        "target_mlm_accuracy": settings.target_mlm_accuracy != TARGET_MLM_ACCURACY,
        "eval_steps": settings.eval_steps != 0,
        "eval_interval_samples": settings.eval_interval_samples != 0,
        "num_eval_examples": settings.num_eval_examples != 10_000,
    }
    lines += [
        f"Note: {name} = {getattr(settings, name)} is not MLPerf's; 'submission check' will object"
        for name, differs in notes.items()
        if differs and settings.submission_division == "closed"
    ]
    return lines


def assemble(arguments: list[str]) -> None:
    """`submission assemble`: the tree ORG/ of a series or of logs."""
    parser = _parser(
        "assemble",
        "The tree ORG/{systems,benchmarks,results} of a series, or of logs in any order: the "
        "flags of their runs then follow --.",
    )
    add = parser.add_argument
    add("--series", type=Path, metavar="DIR", help=f"of submission run (such as {SERIES_DIR})")
    add("--logs", type=Path, nargs="+", metavar="FILE", help="mllog.txt of each run instead")
    add("--system", required=True, metavar="NAME", help="such as 1xH200: its directory's name")
    add("--output_dir", type=Path, default=Path("."), help="gets ORG/ (here)")
    add("--implementation", default="bert_pretraining", metavar="NAME", help="of the code's "
        "directory (bert_pretraining)")  # fmt: skip
    add("--system_fields", type=Path, metavar="FILE", help="JSON of fields of the system's "
        "description that take the place of what was found")  # fmt: skip
    own, training = _split(arguments)
    values = parser.parse(own)
    if (values.series is None) == (values.logs is None):
        raise UserError("pass --series DIR, or --logs FILE...")
    if bool(training) == (values.logs is None):
        raise UserError(
            "the flags of the runs follow -- where --logs are given, and only there: the "
            "submission's run_and_time.sh repeats them"
        )

    from bert_pretraining.submission import assemble as assembling

    runs = (
        assembling.runs_of_series(values.series)
        if values.series
        else assembling.runs_of_logs(values.logs, training)
    )
    made = assembling.assemble(
        runs, values.output_dir, values.system, values.implementation, values.system_fields
    )
    print(f"Made {made.folder}: {len(runs.logs)} logs, the system's description, the code")
    for remark in made.remarks:
        print(f"Note: {remark}")
    if made.blanks:
        print(f"Only a person can fill in, in {made.description}: {', '.join(made.blanks)}")
    print(f"Next: submission check {made.folder}")


def summarize(arguments: list[str]) -> int:
    """`submission summarize PATH...`: 0 if every system has a score, else 1."""
    parser = _parser(
        "summarize",
        "Scored time and a table of the runs, as Markdown, of a submission, a series or logs. "
        "Exit code 1 where a system has no score.",
    )
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="ORG, series or logs")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    _add_ruleset(parser)
    values = parser.parse(arguments)

    from bert_pretraining.submission.summarize import summarize as summarize_paths

    summaries = summarize_paths(values.paths, values.ruleset)
    if values.json:
        print(json.dumps([summary.to_json() for summary in summaries], indent=2))
    else:
        print("\n\n".join(summary.to_markdown() for summary in summaries))
    return 0 if all(summary.score.fault is None for summary in summaries) else 1


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "run": run,
    "assemble": assemble,
    "check": check,
    "rcp": rcp,
    "summarize": summarize,
}
