"""Two real hosts, as network namespaces: one training over both; see also benchmarks/hosts.py."""

from __future__ import annotations

from pathlib import Path

import pytest

import hosts
from bert_pretraining.errors import EXIT_CRASH, EXIT_NOT_CONVERGED, EXIT_USAGE
from helpers import command

OBSTACLE = hosts.obstacle()
pytestmark = pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))
SHORT = ["--seed", 7, "--max_steps", 5, "--log_freq", 1, "--num_eval_examples", 64,
         "--save_checkpoint"]  # fmt: skip


def checkpoint(output_dir: Path) -> Path:
    return next(output_dir.glob("run-*/model.ckpt-5.pt"))


@pytest.mark.slow
def test_two_hosts_train_to_the_same_weights_as_one(mini_data: Path, tmp_path: Path) -> None:
    # The order of sums inside a rank depends on its number of threads.
    flags = [*SHORT, "--data_dir", mini_data, "--bind", "none", "--output_dir"]
    with hosts.Hosts(2) as two:
        launchers = two.launch_all(tmp_path, *flags, "two")
        assert hosts.end(launchers) == [EXIT_NOT_CONVERGED] * 2, launchers[1].errors
        two.wait_until_empty()
    with hosts.Hosts(1) as one:
        alone = one.launch(0, tmp_path, *flags, "one", "--nproc_per_node", 2)
        assert hosts.end([alone]) == [EXIT_NOT_CONVERGED], alone.errors
    first, second = launchers
    assert '"event": "FINISHED"' in first.output
    assert "[PerfLog]" not in second.output
    assert ":::MLLOG" not in second.output
    pair = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two")
    done = command("checkpoint", "diff", *pair, "--training_state", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_rank_killed_on_another_host(mini_data: Path, tmp_path: Path) -> None:
    with hosts.Hosts(2) as both:
        first, second = both.launch_all(
            tmp_path, "--data_dir", mini_data, "--target_mlm_accuracy", 1, "--log_freq", 1
        )
        first.wait_for('"event": "STEP_END"')
        hosts.kill(second.trainers()[0])
        assert hosts.end([first, second]) == [EXIT_CRASH] * 2
        both.wait_until_empty()
    reason = "rank 1 was killed by SIGKILL"
    assert second.last_line.startswith(f"Error: {reason}")
    assert first.last_line.startswith(f"Error: machine 1 (hostb) ended: {reason}")


def test_hosts_that_were_given_different_settings(mini_data: Path, tmp_path: Path) -> None:
    with hosts.Hosts(2) as both:
        flags = [tmp_path, "--data_dir", mini_data, "--learning_rate"]
        launchers = [both.launch(host, *flags, f"0.0{host + 1}") for host in range(2)]
        assert hosts.end(launchers) == [EXIT_USAGE] * 2
        both.wait_until_empty()
    for launcher in launchers:
        assert launcher.last_line == (
            "Error: --learning_rate is 0.01 on machine 0 (hosta) and 0.02 on machine 1 (hostb); "
            "run the same command, from the same checkout, on both"
        )
