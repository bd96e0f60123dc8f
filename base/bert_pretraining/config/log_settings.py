"""The settings of logs, checkpoints and MLPerf submissions; no loss or weight depends on them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from bert_pretraining.config.fields import setting
from bert_pretraining.config.trackers import TRACKERS, split_names

_STEPS = re.compile(r"([0-9]+):([0-9]+)")


def steps_of(text: str) -> range | None:
    """ "10:15" -> range(10, 15); None for another form, and for a range that holds no step."""
    match = _STEPS.fullmatch(text)
    steps = range(int(match[1]), int(match[2])) if match else range(0)
    return steps if steps and steps.start else None


def _no_steps(text: str) -> str | None:
    return None if steps_of(text) else "must be FIRST:END, with FIRST at least 1 and END above it"


@dataclass(frozen=True)
class LogSettings:
    """A part of every `Config`."""

    log_freq: int = setting(
        1,
        "logging",
        "updates between STEP_END lines; 0 to log only steps with an evaluation",
        minimum=0,
        changes_numbers=False,
    )
    save_checkpoint: bool = setting(
        False,
        "logging",
        "write checkpoints model.ckpt-<step>.pt during the run and at its end",
        changes_numbers=False,
    )
    num_samples_per_checkpoint: int = setting(
        500_000,
        "logging",
        "sequences between checkpoints; 0 to write only one at the end",
        minimum=0,
        changes_numbers=False,
    )
    min_samples_to_start_checkpoints: int = setting(
        3_000_000,
        "logging",
        "sequences before the first checkpoint",
        minimum=0,
        changes_numbers=False,
    )
    keep_n_most_recent_checkpoints: int = setting(
        20, "logging", "latest checkpoints to keep; 0 for all", minimum=0, changes_numbers=False
    )
    resume: str | None = setting(
        None,
        "logging",
        "auto: resume from the newest complete training checkpoint in output_dir, if there is one, "
        "else from --init_checkpoint, if that is a training checkpoint; required: the same, but "
        "stop with an error if there is neither; never: do not resume; by default resume only from "
        "such an --init_checkpoint, which may be any file of any run",
        choices=("auto", "never", "required"),
        changes_numbers=False,
        fix="pass one of these, or --init_checkpoint FILE to go on from a certain checkpoint",
    )

    report: bool = setting(
        False,
        "logging",
        "at the end, write the run's report into its folder, as the command 'report' does",
        changes_numbers=False,
    )
    tensorboard_dir: str | None = setting(
        None,
        "logging",
        "folder for TensorBoard's files, which asks for that tracker, too; by default they are in "
        "the run's folder",
        changes_numbers=False,
    )
    track: str = setting(
        "",
        "logging",
        "trackers that get the run's figures, too: one name, or several between commas or blanks",
        choices=tuple(TRACKERS),
        several=True,
        changes_numbers=False,
    )
    energy: str = setting(
        "auto",
        "logging",
        "auto: measure the run's energy where counters of the GPUs (NVML) or of the CPUs (RAPL) "
        "can be read, once a second, into power.csv; mlperf: also write MLPerf's power log, and "
        "stop with an error where there is no counter; off: read none",
        choices=("auto", "off", "mlperf"),
        changes_numbers=False,
    )
    profile_steps: str | None = setting(
        None,
        "logging",
        "steps of the run to record with torch.profiler, as FIRST:END without END, such as 10:15 "
        "for the steps 10 to 14: a trace of each rank for Perfetto and a table of the costliest "
        "operators go into the run's folder; these steps are slower",
        changes_numbers=False,
        fault=_no_steps,
        fix="pass, for example, --profile_steps 10:15 for the steps 10 to 14",
    )
    profile_memory: bool = setting(
        False,
        "logging",
        "write a snapshot of the device's memory, for https://pytorch.org/memory_viz: of the "
        "profiled steps, or, without profile_steps, after the first steps and where memory runs "
        "out",
        changes_numbers=False,
    )
    machine_lines: str = setting(
        "auto",
        "logging",
        "print the [PerfLog] and :::MLLOG lines on stdout, too; auto: unless stdout is a terminal; "
        "they are in the run's folder in any case",
        choices=("auto", "on", "off"),
        changes_numbers=False,
    )

    submission_org: str = setting(
        "unknown", "submission", "organisation in the MLPerf log", changes_numbers=False
    )
    submission_platform: str = setting(
        "", "submission", "platform; by default the host's name", changes_numbers=False
    )
    submission_division: str = setting(
        "closed",
        "submission",
        "division in the MLPerf log",
        choices=("closed", "open"),
        changes_numbers=False,
    )
    submission_status: str = setting(
        "onprem",
        "submission",
        "status in the MLPerf log",
        choices=("cloud", "onprem", "preview", "research"),
        changes_numbers=False,
    )

    @property
    def trackers(self) -> list[str]:
        """The trackers that `track` and `tensorboard_dir` ask for, in the order of TRACKERS."""
        asked = split_names(self.track) + (["tensorboard"] if self.tensorboard_dir else [])
        return [name for name in TRACKERS if name in asked]

    @property
    def steps_to_profile(self) -> range | None:
        """The steps that profile_steps names; None without it."""
        return None if self.profile_steps is None else steps_of(self.profile_steps)
