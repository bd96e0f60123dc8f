"""The commands `submission ...`: flags in, functions of submission/ called, lines out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from bert_pretraining import config, launch
from bert_pretraining.errors import EXIT_CONVERGED, EXIT_NOT_CONVERGED, UserError
from bert_pretraining.runtime.words import counted
from bert_pretraining.submission.rulesets import (
    DEFAULT_RULESET,
    RULESETS,
    RUNS,
    TARGET_MLM_ACCURACY,
)

SERIES_DIR = "output/submission"


def _parser(command: str, text: str | None = None) -> config.FlagParser:
    return config.FlagParser(
        prog=f"python -m bert_pretraining submission {command}", allow_abbrev=False,
        description=text,
    )  # fmt: skip


def _add_ruleset(parser: config.FlagParser) -> None:
    parser.add_argument(
        "--ruleset",
        default=DEFAULT_RULESET,
        metavar="VERSION",
        help=f"MLPerf Training ruleset: {', '.join(RULESETS)} (default: {DEFAULT_RULESET})",
    )


def rcp(arguments: list[str]) -> None:
    """`submission rcp`: the samples that runs at a global batch size must take, before any run."""
    parser = _parser("rcp", "Prints the reference convergence point (RCP) of a global batch size.")
    add = parser.add_argument
    add(
        "--global_batch_size",
        type=int,
        required=True,
        metavar="N",
        help="sequences of one update, over all ranks, 1 or more (required)",
    )
    add("--runs", type=int, default=RUNS, metavar="N",
        help=f"runs of the submission, 3 or more (default: {RUNS})")  # fmt: skip
    add(
        "--mean_samples",
        type=float,
        metavar="X",
        help="mean samples to the target of your runs: prints whether they pass, and their scale "
        "factor (default: not printed)",
    )
    add("--json", action="store_true", help="print the figures as JSON (default: as text)")
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
    print(f"  least mean that passes   {least:,.0f} samples ({counted(values.runs, 'run')})")
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
    parser = _parser(
        "check",
        "Runs MLPerf's checkers on the directory ORG, and checks what they do not. "
        "Exit code 0 if the submission passes, else 1.",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the report as JSON (default: as text)"
    )
    _add_ruleset(parser)
    parser.add_argument(
        "folder", type=Path, metavar="ORG", help="the directory that holds results/ and systems/"
    )
    values = parser.parse(arguments)

    from bert_pretraining.submission.check import check as check_submission

    report = check_submission(values.folder, values.ruleset)
    print(json.dumps(report.to_json(), indent=2) if values.json else report.describe())
    return 0 if report.passed else 1


def run(arguments: list[str]) -> int:
    """`submission run ... -- TRAINING FLAGS`: a series; 0 if all but one run converged, else 3."""
    parser = _parser(
        "run",
        "Runs one training command several times; its flags follow after --. The same command "
        "again continues a series that was stopped. Exit code 0 if at most one run missed the "
        "target, else 3.",
    )
    add = parser.add_argument
    add("--runs", type=int, default=RUNS, metavar="N",
        help=f"runs in the series, 1 or more (default: {RUNS})")  # fmt: skip
    add(
        "--output_dir",
        type=Path,
        default=Path(SERIES_DIR),
        metavar="DIR",
        help=f"directory of the series (default: {SERIES_DIR})",
    )
    add(
        "--drop_caches", choices=("auto", "never", "required"), default="auto",
        help="drop the page caches before each run: where it is allowed, never, or fail where "
        "it is not (default: auto)",
    )  # fmt: skip
    add(
        "--show",
        action="store_true",
        help="the runs print here (default: into DIR/run_00/terminal.txt and so on)",
    )
    _add_ruleset(parser)
    own, training = _split(arguments)
    values = parser.parse(own)
    if values.runs < 1:
        raise UserError(f"--runs {values.runs} is less than 1", "pass 1 or more")

    from bert_pretraining.submission.series import run_series

    for line in _before(_training_config(training), values.ruleset):
        print(line)
    series = run_series(
        values.output_dir, training, values.runs, values.drop_caches, values.show,
        lambda line: print(line, flush=True),
    )  # fmt: skip
    converged = len(series.runs) - series.unconverged
    print(f"{converged} of {counted(len(series.runs), 'run')} converged; next: "
          "python -m bert_pretraining "
          f"submission assemble --series {values.output_dir} --system NAME")  # fmt: skip
    tolerated = 1 if len(series.runs) > 1 else 0
    return EXIT_CONVERGED if series.unconverged <= tolerated else EXIT_NOT_CONVERGED


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The flags before --, and the training flags after it."""
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def _training_config(training: list[str]) -> config.Config:
    """The configuration of the training flags. Raises UserError if a series cannot run it."""
    parser = config.FlagParser(prog="bash run_training.sh", allow_abbrev=False)
    launch.add_launch_flags(parser)
    config.add_config_flags(parser)
    flags, values = launch.split_flags(vars(parser.parse(training)))
    if not ("name" in values or "config" in values):
        raise UserError(
            "the training flags after -- name no configuration", "pass --name and --config there"
        )
    for name, why in (
        ("seed", "every run draws its own seed"),
        (
            "output_dir",
            "every run has its own; --output_dir before -- names the directory of the series",
        ),
    ):
        if name in values:
            raise UserError(f"--{name} after --: {why}", "leave it out")
    for name, why in (
        ("dry_run", "a series runs its command"),
        ("max_restarts", "a timed run starts only once"),
        ("exit_zero_without_target", "exit code 3 tells the series which runs have not converged"),
    ):
        if getattr(flags, name):
            raise UserError(f"--{name} after --: {why}", "leave it out")
    settings = config.resolve(values).config
    if settings.nnodes > 1:
        raise UserError(
            f"{settings.nnodes} machines: submission run starts runs on one machine only",
            "start each run with "
            "run_training.sh on all of them, then: python -m bert_pretraining submission assemble "
            "--logs LOG...",
        )
    if settings.submission_org == "unknown":
        raise UserError(
            "the logs must name the organization that made the runs",
            "pass --submission_org ORG after --",
        )
    return settings


def _before(settings: config.Config, ruleset: str) -> list[str]:
    """What the rules say of the configuration, printed before the first run."""
    from bert_pretraining.submission.rcp import convergence_point

    size = settings.global_batch_size
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
    """`submission assemble`: write the tree ORG/ from a series or from logs."""
    parser = _parser(
        "assemble",
        "Writes the tree ORG/{systems,benchmarks,results} from a series, or from logs in any "
        "order. With --logs, the training flags of the runs follow after --.",
    )
    add = parser.add_argument
    add(
        "--series",
        type=Path,
        metavar="DIR",
        help=f"the directory of a series, such as {SERIES_DIR} (this or --logs is required)",
    )
    add(
        "--logs",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="the mllog.txt of each run (this or --series is required)",
    )
    add(
        "--system",
        required=True,
        metavar="NAME",
        help="the system's name, such as 1xH200; its directory gets it (required)",
    )
    add(
        "--output_dir",
        type=Path,
        default=Path("."),
        metavar="DIR",
        help="where ORG/ is written (default: the current directory)",
    )
    add("--implementation", default="bert_pretraining", metavar="NAME", help="name of the "
        "directory for the code (default: bert_pretraining)")  # fmt: skip
    add("--system_fields", type=Path, metavar="FILE", help="a JSON object with fields of "
        "the system's description, in place of what was found here (default: none)")  # fmt: skip
    own, training = _split(arguments)
    values = parser.parse(own)
    if (values.series is None) == (values.logs is None):
        raise UserError(
            "one of --series and --logs is needed, and only one",
            "pass --series DIR, or --logs FILE...",
        )
    if values.logs is not None and not training:
        raise UserError(
            "--logs is given without the flags of their runs, which run_and_time.sh repeats",
            "put them behind --",
        )
    if values.logs is None and training:
        raise UserError("flags of the runs after -- belong to --logs", "leave them out")

    from bert_pretraining.submission import assemble as assembling

    runs = (
        assembling.runs_of_series(values.series)
        if values.series
        else assembling.runs_of_logs(values.logs, training)
    )
    made = assembling.assemble(
        runs, values.output_dir, values.system, values.implementation, values.system_fields
    )
    print(
        f"Made {made.folder}: {counted(len(runs.logs), 'log')}, the system's description, the code"
    )
    for remark in made.remarks:
        print(f"Note: {remark}")
    if made.blanks:
        print(f"Only a person can fill in, in {made.description}: {', '.join(made.blanks)}")
    print(f"Next: python -m bert_pretraining submission check {made.folder}")


def summarize(arguments: list[str]) -> int:
    """`submission summarize PATH...`: 0 if every system has a score, else 1."""
    parser = _parser(
        "summarize",
        "Prints the scored time and a table of the runs, as Markdown, of a submission, a series "
        "or logs. Exit code 0 if every system has a score, else 1.",
    )
    parser.add_argument(
        "paths",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="the directory ORG, that of a series, or logs",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the same as JSON (default: as Markdown)"
    )
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
