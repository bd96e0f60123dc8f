"""The settings of logs, checkpoints and MLPerf submissions; no loss or weight depends on them."""

from __future__ import annotations

from dataclasses import dataclass

from bert_pretraining.config.fields import setting


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
        "folder in which to write the values of steps and evaluations for TensorBoard, too",
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
