"""Simulated hosts on this machine: network namespaces with their own host names, on one bridge.

They share the disk. They need Linux, root and iproute2.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PORT = 29500


def ip(*words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run iproute2's `ip`."""
    return subprocess.run(
        ["ip", *map(str, words)], capture_output=True, text=True, check=check, timeout=300
    )


def obstacle() -> str | None:
    """Why this machine cannot have namespaces; None if it can."""
    if sys.platform != "linux" or not shutil.which("ip") or not shutil.which("unshare"):
        return "network namespaces need Linux with iproute2 (ip) and util-linux (unshare)"
    name = f"bert{os.getpid()}probe"
    made = ip("netns", "add", name, check=False)
    if made.returncode:
        return f"network namespaces are not permitted here: {made.stderr.strip()}"
    linked = ip("-n", name, "link", "add", "v0", "type", "veth", "peer", "name", "v1", check=False)
    ip("netns", "del", name)
    return f"no veth pairs here: {linked.stderr.strip()}" if linked.returncode else None


class Launcher:
    """`run_training.sh` on a host."""

    def __init__(self, words: list[str], folder: Path, name: str, environment: dict[str, str]):
        self.name = name
        self._output = folder / f"{name}.out"
        self._errors = folder / f"{name}.err"
        with self._output.open("w") as output, self._errors.open("w") as errors:
            self.process = subprocess.Popen(
                words, stdout=output, stderr=errors, cwd=folder, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "base"),
                     **environment},
            )  # fmt: skip

    @property
    def output(self) -> str:
        return self._output.read_text()

    @property
    def errors(self) -> str:
        return self._errors.read_text()

    @property
    def last_line(self) -> str:
        """The last line of stderr, which has the reason."""
        return (self.errors.splitlines() or [""])[-1]

    def wait_for(self, text: str, seconds: float = 600) -> None:
        """Wait until the output has this text."""
        deadline = time.monotonic() + seconds
        while text not in self.output:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{self.name}: no '{text}'\n{self.output}\n{self.errors}")
            time.sleep(0.05)

    def trainers(self) -> list[int]:
        """Process ids of its ranks."""
        found = []
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
                words = (directory / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if parent == self.process.pid and b"train" in words:
                found.append(int(directory.name))
        return found


class Hosts:
    """`count` hosts, hosta, hostb, ..., at 10.77.0.1, 10.77.0.2, ...; a context manager."""

    def __init__(self, count: int) -> None:
        self._prefix = f"bert{os.getpid()}"
        self._bridge = f"{self._prefix}bridge"
        self._count = count
        self._launchers: list[Launcher] = []

    def __enter__(self) -> Hosts:
        ip("netns", "add", self._bridge)
        ip("-n", self._bridge, "link", "add", "bridge", "type", "bridge")
        ip("-n", self._bridge, "link", "set", "bridge", "up")
        for host in range(self._count):
            inside, port = self._namespace(host), f"port{host}"
            ip("netns", "add", inside)
            ip("link", "add", port, "netns", self._bridge,
               "type", "veth", "peer", "name", "eth0", "netns", inside)  # fmt: skip
            ip("-n", self._bridge, "link", "set", port, "master", "bridge", "up")
            ip("-n", inside, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
            ip("-n", inside, "link", "set", "lo", "up")
            ip("-n", inside, "link", "set", "eth0", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for launcher in self._launchers:
            if launcher.process.poll() is None:  # its ranks end with it
                launcher.process.kill()
                launcher.process.wait()
        for name in [self._bridge, *map(self._namespace, range(self._count))]:
            ip("netns", "del", name, check=False)

    @staticmethod
    def address(host: int) -> str:
        return f"10.77.0.{host + 1}"

    def cut(self, host: int) -> None:
        """Take a host's link down."""
        ip("-n", self._namespace(host), "link", "set", "eth0", "down")

    def fix(self, host: int) -> None:
        ip("-n", self._namespace(host), "link", "set", "eth0", "up")

    def launch(
        self, host: int, folder: Path, *flags: object, nodes: int | None = None, **environment: str
    ) -> Launcher:
        """Start `launch` as machine `host` of `nodes`, one rank each unless the flags differ."""
        nodes = nodes or self._count
        name = f"host{chr(ord('a') + host)}"
        words = [sys.executable, "-m", "bert_pretraining", "launch", "--name", "mini", "--config",
                 "CPUx1x1", "--device", "cpu", "--nnodes", str(nodes), "--node_rank", str(host),
                 "--master_addr", self.address(0), "--master_port", str(PORT),
                 *map(str, flags)]  # fmt: skip
        inside = ["ip", "netns", "exec", self._namespace(host), "unshare", "--uts",
                  "sh", "-c", 'hostname "$0" && exec "$@"', name, *words]  # fmt: skip
        launcher = Launcher(inside, folder, name, environment)
        self._launchers.append(launcher)
        return launcher

    def launch_all(self, folder: Path, *flags: object, **environment: str) -> list[Launcher]:
        return [self.launch(host, folder, *flags, **environment) for host in range(self._count)]

    def processes(self) -> list[int]:
        """The ids of all processes that still run on any host."""
        found = []
        for host in range(self._count):
            found += map(int, ip("netns", "pids", self._namespace(host)).stdout.split())
        return found

    def wait_until_empty(self) -> None:
        """Wait until no process runs on any host: those that are killed take a moment to end."""
        deadline = time.monotonic() + 20
        while left := self.processes():
            assert time.monotonic() < deadline, f"left behind: {left}"
            time.sleep(0.05)

    def _namespace(self, host: int) -> str:
        return f"{self._prefix}host{host}"


def end(launchers: list[Launcher], seconds: float = 600) -> list[int]:
    """Wait until the launchers have ended, and return their exit codes."""
    deadline = time.monotonic() + seconds
    return [one.process.wait(max(1.0, deadline - time.monotonic())) for one in launchers]


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
