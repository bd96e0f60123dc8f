"""Bindings, plans and what the launcher makes of its ranks' ends."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
from pathlib import Path

import pytest

from bert_pretraining import config, launch, topology
from bert_pretraining.commands import submission
from bert_pretraining.doctor import run
from bert_pretraining.errors import UserError
from bert_pretraining.launch import LaunchFlags, checks, network
from bert_pretraining.launch.port import port_holder
from bert_pretraining.launch.result import explain
from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime import rank_reports
from helpers import in_process

FLAGS = LaunchFlags()


def plan(name: str, stem: str, **changes: object) -> launch.Plan:
    resolved = config.resolve({"name": name, "config": stem})
    flags = LaunchFlags(**{**FLAGS.__dict__, **changes})
    return launch.make_plan(resolved, flags, ["--name", name, "--config", stem])


def fake_numactl(folder: Path, script: str) -> str:
    path = folder / "numactl"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_numactl_that_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = "echo 'set_mempolicy: Operation not permitted' >&2; exit 1"
    monkeypatch.setenv("PATH", fake_numactl(tmp_path, refusal))
    refused = plan("mini", "CPUx1x2")
    assert refused.binder == "affinity"
    assert "Operation not permitted; binding by CPU affinity" in refused.notices[0]
    assert plan("mini", "CPUx1x2", bind="none").binder == "none"
    with pytest.raises(UserError, match=r"--bind required: .*Operation not permitted"):
        plan("mini", "CPUx1x2", bind="required")


def test_numactl_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", fake_numactl(tmp_path, "exit 0"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    made = plan("mini", "CPUx1x2")
    assert made.binder == "numactl"
    text = launch.describe(made)
    assert "RANK=1 LOCAL_RANK=1 OMP_NUM_THREADS=" in text
    assert "numactl --physcpubind=" in text
    assert "-m bert_pretraining train --name mini --config CPUx1x2" in text


def test_threads_that_the_user_exported_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert "OMP_NUM_THREADS=" not in launch.describe(plan("mini", "CPUx1x2"))


def test_the_number_of_threads_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert "OMP_NUM_THREADS=3 " in launch.describe(plan("mini", "CPUx1x2", threads=3))


def test_threads_follow_the_binding_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    alone = plan("mini", "CPUx1x2")
    for name, value in (
        ("OMP_NUM_THREADS", "1"), ("TORCHELASTIC_RUN_ID", "none"), ("LOCAL_WORLD_SIZE", "2"),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    joined = plan("mini", "CPUx1x2")
    assert joined.rank_setup(1)["threads"] == alone.bindings[1].threads


def test_help_gives_every_flags_values_and_default() -> None:
    parser = config.FlagParser()
    launch.add_launch_flags(parser)
    text = " ".join(parser.format_help().split())
    described = text.partition("launch:")[2].split(" --")[1:]
    assert len(described) == len(LaunchFlags.__dataclass_fields__)
    assert [each for each in described if "default:" not in each] == []
    assert "--bind {auto,none,required}" in text
    assert "--hang_timeout SECONDS" in text and "(default: 600)" in text
    assert "torchrun turns a rank's exit code 3 into 1" in text


@pytest.mark.parametrize("name", sorted(submission.COMMANDS))
def test_help_of_submission_gives_defaults(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        submission.COMMANDS[name](["--help"])
    options = capsys.readouterr().out.partition("options:")[2].split("\n  --")[1:]
    assert options
    for option in options:
        text = " ".join(option.split())
        assert "(default: " in text or "required)" in text, text


@pytest.mark.parametrize(("name", "stem"), config.config_names())
def test_every_config_can_be_planned(name: str, stem: str) -> None:
    nodes, processes = config.parse_topology(stem)
    address = "10.0.0.1" if nodes > 1 else "127.0.0.1"
    text = launch.describe(plan(name, stem, master_addr=address, node_rank=nodes - 1))
    assert f"WORLD_SIZE={nodes * processes}" in text
    first = (nodes - 1) * processes
    for local_rank in range(processes):
        assert f"RANK={first + local_rank} LOCAL_RANK={local_rank}" in text


def test_many_machines_need_an_address_and_a_rank() -> None:
    with pytest.raises(UserError, match=r"^--config V100x2x8 wants 2 machines, .*--master_addr"):
        plan("iluvatar", "V100x2x8")
    resolved = config.resolve({"name": "mini", "config": "CPUx1x2", "nnodes": 3})
    with pytest.raises(UserError, match=r"^--nnodes 3 wants 3 machines, .*--node_rank 0 to 2; "):
        launch.make_plan(resolved, FLAGS, [])
    with pytest.raises(
        UserError, match="--node_rank 2 is no machine of --nnodes 2; pass --node_rank 0 to 1"
    ):
        plan("iluvatar", "V100x2x8", master_addr="10.0.0.1", node_rank=2)


def in_a_pod(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_pods_are_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    in_a_pod(monkeypatch, RANK="1", WORLD_SIZE="2", MASTER_ADDR="10.0.0.1", MASTER_PORT="23456")
    flags, _ = launch.split_flags(dict.fromkeys(LaunchFlags.__dataclass_fields__))
    assert (flags.node_rank, flags.master_addr, flags.master_port) == (1, "10.0.0.1", 23456)
    resolved = config.resolve({"name": "iluvatar", "config": "V100x2x8"})
    assert launch.make_plan(resolved, flags, []).first_rank == 8
    one = config.resolve({"name": "mini", "config": "CPUx1x2"})
    message = (
        r"WORLD_SIZE=2, RANK=1, .* this is machine 1 of 2, but --config CPUx1x2 wants 1; pass "
        r"--nnodes 2; or --nnodes 1 .*'unset RANK WORLD_SIZE MASTER_ADDR MASTER_PORT'"
    )
    with pytest.raises(UserError, match=message):
        launch.make_plan(one, flags, [])
    alone = config.resolve({"name": "mini", "config": "CPUx1x2", "nnodes": 1})
    made = launch.make_plan(alone, flags, [])
    assert (made.first_rank, made.flags.master_addr) == (0, "127.0.0.1")
    # Who gives the machine's number and address does not mean the variables.
    by_hand = LaunchFlags(node_rank=0, master_addr="10.0.0.9")
    three = config.resolve({"name": "mini", "config": "CPUx1x2", "nnodes": 3})
    assert launch.make_plan(three, by_hand, []).flags.master_addr == "10.0.0.9"


def test_an_interface_that_is_not_there_is_refused() -> None:
    checks.check_interface({})
    checks.check_interface({"GLOO_SOCKET_IFNAME": "lo"})
    with pytest.raises(UserError, match=r"GLOO_SOCKET_IFNAME=lo,eth99 names eth99, .*\(lo"):
        checks.check_interface({"GLOO_SOCKET_IFNAME": "lo,eth99"})


def test_a_machine_without_loopback_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    checks.check_loopback("127.0.0.1")
    monkeypatch.setattr(network, "loopback_fault", lambda: "Network is unreachable")
    checks.check_loopback("10.0.0.1")
    refusal = r"meet at 127.0.0.1, .*\(Network is unreachable\); run 'ip link set lo up'"
    with pytest.raises(UserError, match=refusal):
        launch.run(plan("mini", "CPUx1x2"))
    problem = run.loopback()
    assert (problem.status, problem.fix[:22]) == ("problem", "run 'ip link set lo up")


def test_a_busy_port_is_a_user_error_that_names_the_holder() -> None:
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        port = holder.getsockname()[1]
        name = Path("/proc/self/comm").read_text().strip()
        held = rf"in use: {re.escape(name)} \(process {os.getpid()}\) holds it"
        with pytest.raises(UserError, match=f"--master_port {port} cannot be used .*{held}"):
            launch.run(plan("mini", "CPUx1x2", master_port=port))
    assert port_holder(port) is None


@pytest.mark.parametrize("more", [[], ["--dry_run"]])
@pytest.mark.parametrize("port", ["99999", "-3", "abc"])
def test_a_wrong_port_is_refused_also_by_a_dry_run(
    tmp_path: Path, port: str, more: list[str]
) -> None:
    words = ["launch", "--name", "mini", "--config", "CPUx1x2", f"--master_port={port}"]
    done = in_process(*words, *more, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    said = f"Error: argument --master_port: {port} is no port, 1 to 65535; see "
    assert done.stderr.startswith(said) and done.stderr.count("\n") == 1


@pytest.mark.parametrize("more", [[], ["--dry_run"]])
@pytest.mark.parametrize(
    ("port", "words"),
    [("99999", "MASTER_PORT=99999 is no port, 1 to 65535"), ("abc", "'abc' is not a whole number")],
)
def test_a_wrong_port_of_another_launcher_is_refused_also_by_a_dry_run(
    tmp_path: Path, port: str, words: str, more: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**variables, "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    flags = ["--name", "mini", "--config", "CPUx1x2", "--data_dir", "x", *more]
    done = in_process("launch", *flags, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr and done.stderr.count("\n") == 1


def test_a_dry_run_shows_the_port_of_another_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**variables, "MASTER_PORT": "29517"}.items():
        monkeypatch.setenv(name, value)
    flags = ["--name", "mini", "--config", "CPUx1x2", "--data_dir", "x", "--dry_run"]
    assert "MASTER_PORT=29517" in in_process("launch", *flags, cwd=tmp_path).stdout


def test_far_too_many_ranks_for_the_cpus_get_a_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores = (topology.Core((0,), 0), topology.Core((1,), 0))
    machine = topology.Machine(cores, (topology.Node(0, True, {}),))
    monkeypatch.setattr(topology, "read_machine", lambda *_: machine)
    flags = ("--name", "mini", "--config", "GPUx1x1", "--data_dir", tmp_path, "--dry_run")

    def notices(*more: object) -> list[str]:
        done = in_process("launch", *flags, *more, cwd=tmp_path)
        assert done.returncode == 0
        return [line for line in done.stderr.splitlines() if " ranks compute on " in line]

    (told,) = notices("--nproc_per_node", 9, "--device", "cpu")
    assert told == (
        f"Notice: 9 ranks compute on the 2 CPUs of {os.uname().nodename}: they will be very slow, "
        "and each takes memory of its own; pass --nproc_per_node 2 to train, or at most 8 to try "
        "things"
    )
    assert notices("--nproc_per_node", 8, "--device", "cpu") == []
    monkeypatch.setattr(devices, "seen", lambda: None)
    assert notices("--nproc_per_node", 9, "--device", "auto") == [told]
    monkeypatch.setattr(devices, "seen", lambda: "cuda")
    assert notices("--nproc_per_node", 9, "--device", "auto") == []
    half = dataclasses.replace(machine, cpu_quota=0.5)
    monkeypatch.setattr(topology, "read_machine", lambda *_: half)
    (told,) = notices("--nproc_per_node", 3, "--device", "cpu")
    assert "on the 0.5 CPUs" in told and "--nproc_per_node 1 to train, or at most 2 to" in told


def test_too_few_gpus_is_one_line_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    words = "this machine has 4; pass --nproc_per_node 4, with --gradient_accumulation_steps 2 "
    with pytest.raises(UserError, match=f"^--config V100x1x8 wants 8 GPUs, and {words}"):
        launch.run(plan("default", "V100x1x8"))


def test_the_command_of_a_rank_is_not_for_users() -> None:
    with pytest.raises(UserError, match="'rank' is a command of the launcher's own; use launch"):
        launch.run_rank([])


def test_outcomes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(rank_reports.FOLDER_VARIABLE, raising=False)
    assert rank_reports.record_finish(0, 3) is False
    monkeypatch.setenv(rank_reports.FOLDER_VARIABLE, str(tmp_path))
    assert rank_reports.read_finish(tmp_path) is None
    assert rank_reports.record_finish(10, 0)
    assert rank_reports.record_finish(2, 3)
    assert rank_reports.read_finish(tmp_path) == 3
    assert rank_reports.finished_ranks(tmp_path) == {2, 10}
    rank_reports.record_failure(3, 2, "first")
    rank_reports.record_failure(0, 1, "second", "trace")
    assert [failure.message for failure in rank_reports.read_failures(tmp_path)] == [
        "first",
        "second",
    ]


def test_a_rank_that_starts_late_learns_of_the_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(rank_reports.FOLDER_VARIABLE, str(tmp_path))
    assert rank_reports.register(1) is None
    rank_reports.ask_to_stop(tmp_path, 15)
    assert rank_reports.register(0) == 15
    assert rank_reports.read_processes(tmp_path) == {0: os.getpid(), 1: os.getpid()}


def test_explaining_ends(tmp_path: Path) -> None:
    killed = explain(tmp_path, {1: -9, 0: -15})
    assert (killed.exit_code, killed.may_restart) == (1, True)
    assert "rank 1 was killed by SIGKILL" in killed.message
    assert "rank 1 ended with exit code 7" in explain(tmp_path, {1: 7}).message
    assert (
        "rank 1 ended with exit code 7" in explain(tmp_path, {0: -9, 1: 7}, frozenset({0})).message
    )
    failure = {"rank": 1, "time": 1.0, "exit_code": 2, "message": "no data", "detail": ""}
    (tmp_path / "failure-1.json").write_text(json.dumps(failure))
    refused = explain(tmp_path, {1: 2, 0: -15})
    assert (refused.exit_code, refused.may_restart) == (2, False)
    assert refused.text({}) == "Error: no data"
    assert refused.text({1: Path("/logs/1")}) == "Error: no data (log of rank 1: /logs/1)"
    assert explain(tmp_path, {0: -6, 1: 2}).exit_code == 2, "an abort on the way out is no cause"
    assert explain(tmp_path, {0: -9, 1: 2}).exit_code == 1
    assert explain(tmp_path, {0: -9, 1: 2}, frozenset({0})).exit_code == 2, "killed by the launcher"
