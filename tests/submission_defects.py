"""Defects of a submission: each function adds one and returns path, line and words to find."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from submission_tree import SYSTEM, line_of, read_events, write_events


def log(root: Path, run: int) -> Path:
    return root / "results" / SYSTEM / "bert" / f"result_{run}.txt"


def description(root: Path) -> Path:
    return root / "systems" / f"{SYSTEM}.json"


def edit(path: Path, change: Callable[[list[dict]], list[dict] | None]) -> None:
    """Change a log's records in place, or replace them by what `change` returns."""
    events = read_events(path)
    write_events(path, change(events) or events)


def set_value(root: Path, run: int, key: str, value: object) -> None:
    def change(events: list[dict]) -> None:
        for event in events:
            if event["key"] == key:
                event["value"] = value

    edit(log(root, run), change)


def set_status(events: list[dict], status: str) -> None:
    stop = next(event for event in events if event["key"] == "run_stop")
    stop["metadata"]["status"] = status


def last_accuracy(events: list[dict]) -> dict:
    return [event for event in events if event["key"] == "eval_accuracy"][-1]


def copied_log(root: Path) -> tuple[Path, int | None, str]:
    shutil.copyfile(log(root, 2), log(root, 7))
    return log(root, 7), None, "the same bytes as result_2.txt"


def copied_log_with_another_seed(root: Path) -> tuple[Path, int | None, str]:
    shutil.copyfile(log(root, 2), log(root, 7))
    set_value(root, 7, "seed", 77)
    return log(root, 7), line_of(log(root, 7), "run_start"), "those of result_2.txt: one run twice"


def copied_log_with_another_seed_and_clock(root: Path) -> tuple[Path, int | None, str]:
    def change(events: list[dict]) -> None:
        for event in events:
            event["time_ms"] += 10**8

    shutil.copyfile(log(root, 2), log(root, 9))
    set_value(root, 9, "seed", 77)
    edit(log(root, 9), change)
    line = line_of(log(root, 9), "eval_accuracy")
    return log(root, 9), line, "to the last digit those of result_2.txt"


def copied_system(root: Path) -> tuple[Path, int | None, str]:
    other = root / "results" / "another" / "bert"
    shutil.copytree(log(root, 0).parent, other)
    shutil.copyfile(description(root), root / "systems" / "another.json")
    return other / "result_4.txt", None, f"the same bytes as {log(root, 4)}"


def token_without_a_space(root: Path) -> tuple[Path, int | None, str]:
    lines = log(root, 4).read_text().splitlines(keepends=True)
    lines[20] = lines[20].replace(":::MLLOG {", ":::MLLOG{")
    log(root, 4).write_text("".join(lines))
    return log(root, 4), 21, "without a space after it"


def configuration_in_the_log(root: Path) -> tuple[Path, int | None, str]:
    set_value(root, 4, "max_predictions_per_seq", "global_batch_size=512")
    line = line_of(log(root, 4), "max_predictions_per_seq")
    return log(root, 4), line, "contains 'global_batch_size': the RCP checker takes the line"


def another_batch_size(root: Path) -> tuple[Path, int | None, str]:
    set_value(root, 3, "global_batch_size", 512)
    line = line_of(log(root, 3), "global_batch_size")
    return log(root, 3), line, "global_batch_size is 512, but 768 in 9 other logs"


def another_learning_rate(root: Path) -> tuple[Path, int | None, str]:
    set_value(root, 4, "opt_base_learning_rate", 0.001)
    line = line_of(log(root, 4), "opt_base_learning_rate")
    return log(root, 4), line, "opt_base_learning_rate is 0.001, but 0.00096 in 9 other logs"


def another_platform(root: Path) -> tuple[Path, int | None, str]:
    set_value(root, 0, "submission_platform", "2xH200")
    line = line_of(log(root, 0), "submission_platform")
    return log(root, 0), line, 'submission_platform is "2xH200"'


def open_in_the_description(root: Path) -> tuple[Path, int | None, str]:
    text = description(root).read_text().replace('"closed"', '"open"')
    description(root).write_text(text)
    line = line_of(log(root, 5), "submission_division")
    return log(root, 5), line, "skips the seed and RCP checks"


def another_organization(root: Path) -> tuple[Path, int | None, str]:
    for run in range(10):
        set_value(root, run, "submission_org", "ACME")
    line = line_of(log(root, 1), "submission_org")
    return log(root, 1), line, 'submission_org is "ACME", but submitter'


def another_status(root: Path) -> tuple[Path, int | None, str]:
    for run in range(10):
        set_value(root, run, "submission_status", "cloud")
    line = line_of(log(root, 8), "submission_status")
    return log(root, 8), line, '(line 4) is "Available on-premise"'


def aborted_after_success(root: Path) -> tuple[Path, int | None, str]:
    edit(log(root, 3), lambda events: set_status(events, "aborted"))
    return log(root, 3), line_of(log(root, 3), "run_stop"), "status 'aborted', but line"


def success_below_the_target(root: Path) -> tuple[Path, int | None, str]:
    def change(events: list[dict]) -> None:
        accuracies = [event for event in events if event["key"] == "eval_accuracy"]
        accuracies[3]["value"], accuracies[-1]["value"] = 0.7201, 0.7188

    edit(log(root, 6), change)
    return log(root, 6), line_of(log(root, 6), "run_stop"), "0.71880, below 0.72"


def evaluation_left_out(root: Path) -> tuple[Path, int | None, str]:
    def change(events: list[dict]) -> list[dict]:
        marks = [i for i, event in enumerate(events) if event["key"] == "eval_start"]
        return events[: marks[5]] + events[marks[6] :]

    edit(log(root, 2), change)
    line = line_of(log(root, 2), "eval_accuracy", 5)
    return log(root, 2), line, "no evaluation near 900,000 samples"


def evaluation_between(root: Path) -> tuple[Path, int | None, str]:
    def change(events: list[dict]) -> list[dict]:
        marks = [i for i, event in enumerate(events) if event["key"] == "eval_start"]
        again = json.loads(json.dumps(events[marks[5] : marks[6]]))
        for event in again:
            if "epoch_num" in event["metadata"]:
                event["metadata"]["epoch_num"] += 75_000
        return events[: marks[6]] + again + events[marks[6] :]

    edit(log(root, 2), change)
    line = line_of(log(root, 2), "eval_accuracy", 6)
    return log(root, 2), line, "off the schedule: every 150,000 samples at global batch size 768"


def long_init(root: Path) -> tuple[Path, int | None, str]:
    def change(events: list[dict]) -> None:
        for event in events[: [event["key"] for event in events].index("submission_org")]:
            event["time_ms"] -= 31 * 60_000

    edit(log(root, 1), change)
    return log(root, 1), line_of(log(root, 1), "init_stop"), "31.7 minutes after init_start"


def work_before_the_clock(root: Path) -> tuple[Path, int | None, str]:
    def change(events: list[dict]) -> None:
        for event in events[: [event["key"] for event in events].index("run_start")]:
            event["time_ms"] -= 120_000

    edit(log(root, 1), change)
    return log(root, 1), line_of(log(root, 1), "run_start"), "120 s after init_stop"


def two_runs_in_one_file(root: Path) -> tuple[Path, int | None, str]:
    edit(log(root, 0), lambda events: events + events)
    return log(root, 0), line_of(log(root, 0), "run_start", 1), "two runs in one file"


def nine_logs(root: Path) -> tuple[Path, int | None, str]:
    log(root, 9).unlink()
    return log(root, 9).parent, None, "9 logs result_*.txt, not 10"


def misnumbered_logs(root: Path) -> tuple[Path, int | None, str]:
    log(root, 9).rename(log(root, 10))
    return log(root, 9).parent, None, "not numbered result_0.txt to result_9.txt"


def two_records_on_a_line(root: Path) -> tuple[Path, int | None, str]:
    lines = log(root, 4).read_text().splitlines(keepends=True)
    lines[10] = lines[10].rstrip("\n")
    log(root, 4).write_text("".join(lines))
    return log(root, 4), 11, "2 :::MLLOG records on one line"


def text_after_a_record(root: Path) -> tuple[Path, int | None, str]:
    lines = log(root, 4).read_text().splitlines(keepends=True)
    lines[10] = lines[10].rstrip("\n") + " 37%|###\n"
    log(root, 4).write_text("".join(lines))
    return log(root, 4), 11, "not a whole :::MLLOG record"


def accuracy_as_text(root: Path) -> tuple[Path, int | None, str]:
    def change(events: list[dict]) -> None:
        last_accuracy(events)["value"] = "0.7203"

    edit(log(root, 5), change)
    line = line_of(log(root, 5), "eval_accuracy", -1)
    return log(root, 5), line, "eval_accuracy is '0.7203': no number"


def accuracy_without_samples(root: Path) -> tuple[Path, int | None, str]:
    def change(events: list[dict]) -> None:
        del last_accuracy(events)["metadata"]["epoch_num"]

    edit(log(root, 5), change)
    line = line_of(log(root, 5), "eval_accuracy", -1)
    return log(root, 5), line, "the RCP checker reads the samples"


def repeated_seed(root: Path) -> tuple[Path, int | None, str]:
    seed = next(event["value"] for event in read_events(log(root, 0)) if event["key"] == "seed")
    set_value(root, 6, "seed", seed)
    return log(root, 6), line_of(log(root, 6), "seed"), f"seed {seed} is also that of result_0.txt"


def no_seed(root: Path) -> tuple[Path, int | None, str]:
    edit(log(root, 6), lambda events: [event for event in events if event["key"] != "seed"])
    return log(root, 6), None, "no seed"


def caches_not_cleared(root: Path) -> tuple[Path, int | None, str]:
    set_value(root, 3, "cache_clear", False)
    return log(root, 3), line_of(log(root, 3), "cache_clear"), "cache_clear is False"


def fewer_evaluation_samples(root: Path) -> tuple[Path, int | None, str]:
    set_value(root, 3, "eval_samples", 1114)
    return log(root, 3), line_of(log(root, 3), "eval_samples"), "eval_samples is 1114"


def other_train_samples(root: Path) -> tuple[Path, int | None, str]:
    set_value(root, 3, "train_samples", 3_000_000)
    return log(root, 3), line_of(log(root, 3), "train_samples"), "train_samples is 3000000, but"


def too_fast(root: Path) -> tuple[Path, int | None, str]:
    def change(events: list[dict]) -> None:
        for event in events:
            if "epoch_num" in event["metadata"]:
                event["metadata"]["epoch_num"] //= 2

    for run in range(10):
        edit(log(root, run), change)
    return log(root, 0).parent, None, "converges too fast: 1,19"


def no_description(root: Path) -> tuple[Path, int | None, str]:
    description(root).unlink()
    return description(root), None, "is missing"


def description_without_a_field(root: Path) -> tuple[Path, int | None, str]:
    text = description(root).read_text().replace('    "cooling": "",\n', "")
    description(root).write_text(text)
    return description(root), None, "no field 'cooling'"


def number_in_the_description(root: Path) -> tuple[Path, int | None, str]:
    text = description(root).read_text().replace('"number_of_nodes": "1"', '"number_of_nodes": 1')
    description(root).write_text(text)
    return description(root), 6, "'number_of_nodes' is 1, not text in quotes"


def no_setup(root: Path) -> tuple[Path, int | None, str]:
    code = root / "benchmarks" / "bert" / "implementations" / "pytorch"
    (code / "setup.sh").unlink()
    return code, None, "no setup.sh"


def stray_file(root: Path) -> tuple[Path, int | None, str]:
    path = log(root, 0).with_name("result_0.txt.orig")
    path.write_text("x")
    return path, None, "does not belong beside"


def stale_scaling(root: Path) -> tuple[Path, int | None, str]:
    path = log(root, 0).with_name("scaling.json")
    path.write_text('{"scaling_factor": 1.0001}')
    return path, None, "scaling_factor 1.0001, but the logs give 1.0"


DEFECTS = [
    copied_system, token_without_a_space, configuration_in_the_log,
    copied_log, copied_log_with_another_seed, copied_log_with_another_seed_and_clock,
    another_batch_size, another_learning_rate, another_platform, open_in_the_description,
    another_organization, another_status, aborted_after_success, success_below_the_target,
    evaluation_left_out, evaluation_between, long_init, two_runs_in_one_file, nine_logs,
    misnumbered_logs, two_records_on_a_line, text_after_a_record, accuracy_as_text,
    accuracy_without_samples, repeated_seed, no_seed, caches_not_cleared,
    fewer_evaluation_samples, other_train_samples, too_fast, no_description,
    description_without_a_field, number_in_the_description, no_setup, stray_file, stale_scaling,
]  # fmt: skip
