"""The set-up of all tests: one thread per process, no cluster, data that is made once per session.

Tests marked `slow` run only with `-m slow`, or when they are named.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# This is set before PyTorch is imported. Test processes share the cores, and results must not
# depend on the number of cores.
os.environ["OMP_NUM_THREADS"] = "1"
# A test uses one machine, even if the tests run in a job of a cluster.
for name in list(os.environ):
    if name.startswith(("SLURM_", "OMPI_", "PMI_", "PMIX_", "TORCHELASTIC_", "BERT_PRETRAINING_")):
        del os.environ[name]
for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(name, None)
# A test's programs would inherit ignored signals, which nohup and background shells set.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(
            number, {signal.SIGINT: signal.default_int_handler}.get(number, signal.SIG_DFL)
        )

import pytest  # noqa: E402
import torch  # noqa: E402

import fake_kernels  # noqa: E402
import testdev_build  # noqa: E402
from bert_pretraining.kernels import PROVIDERS  # noqa: E402
from bert_pretraining.preparation.mini import MiniSettings, make_mini  # noqa: E402
from bert_pretraining.runtime import device as devices  # noqa: E402
from helpers import ROOT, MakeOnce  # noqa: E402

if devices.seen() is None:
    # A launch is refused where PyTorch does not see this machine's accelerator. The tests then
    # train on the CPU all the same, as a user who hides the devices does.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

RUN_SLOW = "bash run_tests.sh -m slow"
not_run_key = pytest.StashKey[int]()


@pytest.fixture(autouse=True)
def deterministic_operators() -> Iterator[None]:
    """A test that asks for deterministic operators leaves the next ones as they are."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.fixture
def use_fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, dict], None]:
    """use_fake(name, faults): this provider is there, in this process and in those it starts."""

    def use(name: str, faults: dict[str, str]) -> None:
        monkeypatch.setitem(PROVIDERS, name, fake_kernels.provider(name, faults))
        variables = fake_kernels.environment(tmp_path, name, faults, ROOT / "base")
        for variable, value in variables.items():
            monkeypatch.setenv(variable, value)

    return use


@pytest.fixture(scope="session", autouse=True)
def temporary_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a killed program leaves in the folder of temporary files goes with pytest's own.

    So do the verdicts on kernels, which are kept in the user's cache folder.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("tmp")))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(tempfile, "tempdir", None)
        yield


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> MakeOnce:
    """make_once(name, make): a folder that `make` fills, once for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = shared / name, shared / f"{name}.done"
        with open(shared / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                make(folder)
                done.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def mini_data(make_once: MakeOnce) -> Path:
    """The mini data set, with its start checkpoint. Tests only read it."""

    def make(directory: Path) -> None:
        assert make_mini(MiniSettings(directory)).has_start_checkpoint

    return make_once("bert_mini", make)


@pytest.fixture(scope="session")
def testdev(make_once: MakeOnce) -> Path:
    """A folder for PYTHONPATH, which makes the type of device `testdev` known to PyTorch."""
    if obstacle := testdev_build.obstacle():
        pytest.skip(obstacle)
    return make_once("testdev", testdev_build.build)


# ---- tests that are marked slow


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave slow tests out, unless -m or a test's own name asks for them."""
    asked = config.option.markexpr or any("::" in word for word in config.args)
    slow = [] if asked else [item for item in items if item.get_closest_marker("slow")]
    if slow:
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
    config.stash[not_run_key] = len(slow)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """Say last how many slow tests were left out. Under pytest-xdist, only workers know it."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["not_run"] = session.config.stash.get(not_run_key, 0)
    result = yield
    not_run = session.config.stash.get(not_run_key, 0)
    if output is None and not_run:
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        reporter.write_line(f"Not run: {not_run} slow tests; {RUN_SLOW} runs them")
    return result


class FromWorkers:
    """Hooks of pytest-xdist, which may not be installed."""

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: object) -> None:
        node.config.stash[not_run_key] = getattr(node, "workeroutput", {}).get("not_run", 0)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(FromWorkers())
