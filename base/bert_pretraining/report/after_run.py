"""The report that a run writes into its folder after training."""

from __future__ import annotations

from pathlib import Path

from bert_pretraining.report.command import make_report


def report_on(folder: Path) -> str:
    """Draw the run that left its logs in `folder` into `folder/report`; says what came of it.

    Nothing that goes wrong here is raised: what was trained has been trained.
    """
    try:
        made = make_report([folder], folder / "report")
    except Exception as error:
        return (
            f"Warning: no report was made: {error or type(error).__name__}; the logs are whole: "
            f"python -m bert_pretraining report {folder} --output_dir DIR"
        )
    return f"Report: {made.files[0]}"
