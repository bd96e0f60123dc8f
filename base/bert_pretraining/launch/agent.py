"""torchrun's agent: it starts the ranks of this machine and waits for them."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from bert_pretraining.launch.plan import Plan
from bert_pretraining.launch.rank import trainer_command
from bert_pretraining.runtime import compat


class RankLogs(LogsSpecs):
    """Where torchrun writes the ranks' output: one file a rank and the terminal, or no files."""

    def __init__(self, folder: Path, log_paths: dict[int, Path]) -> None:
        super().__init__()
        self._folder = folder
        self._log_paths = log_paths

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """The paths by local rank. torch writes its own error reports to `error_files`."""
        logs = {
            local: str(self._log_paths[int(variables["RANK"])])
            for local, variables in envs.items()
            if self._log_paths
        }
        none = dict.fromkeys(envs, "")
        errors = {local: str(self._folder / f"torch_error_{local}.json") for local in envs}
        return LogsDest(stdouts=logs or none, stderrs=none, tee_stdouts=logs, error_files=errors)

    @property
    def root_log_dir(self) -> str:
        """torch asks for this folder; no log is kept there."""
        return str(self._folder)


class Agent(threading.Thread):
    """torchrun's agent in a thread of its own, so that the main thread can handle signals.

    The agent waits in C++ for the other machines, and meanwhile no Python signal handler would
    run on its thread. On the main thread it would also replace the launcher's signal handlers.

    Attributes:
        exit_codes: of the ranks that failed, by rank; negative if a signal ended the rank.
        error: any other exception that ended the agent.
    """

    def __init__(self, plan: Plan, port: int, folder: Path, log_paths: dict[int, Path]) -> None:
        super().__init__(name="torchrun", daemon=True)
        self.exit_codes: dict[int, int] = {}
        self.error: Exception | None = None
        settings, flags = plan.resolved.config, plan.flags
        _quieten_torchrun()
        self._config = LaunchConfig(
            min_nodes=settings.nnodes,
            max_nodes=settings.nnodes,
            nproc_per_node=settings.nproc_per_node,
            run_id="bert_pretraining",
            rdzv_backend="static",
            rdzv_endpoint=f"{flags.master_addr}:{port}",
            rdzv_configs={"rank": flags.node_rank, "timeout": 900},
            # The launcher does the restarts: torchrun would restart after a signal too.
            max_restarts=0,
            monitor_interval=0.1,
            logs_specs=RankLogs(folder, log_paths),
            log_line_prefix_template="[rank ${rank}] ",
        )
        self._command = trainer_command("rank", plan.trainer_flags)

    def run(self) -> None:
        """Run until every rank has ended, or one has failed and the others were ended."""
        interpreter, *entry = self._command
        try:
            with compat.torchrun_without_signal_handlers():
                elastic_launch(self._config, interpreter)(*entry)
        except ChildFailedError as error:
            self.exit_codes = {rank: end.exitcode for rank, end in error.failures.items()}
        except Exception as error:  # the main thread raises it again
            self.error = error


def _quieten_torchrun() -> None:
    """Turn off torchrun's own report of a failure, which would hide the rank's error."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.distributed.launcher")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
