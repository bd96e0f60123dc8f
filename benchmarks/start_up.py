"""Time from a start to the first batch, with thousands of shards on a slow file system.

    PYTHONPATH=base python benchmarks/start_up.py --mini MINI_DATA_SET --scratch FOLDER \
        --output results/DATE_start_up/start_up.json

It needs Linux, the right to mount, a C compiler, and libfuse 3.12 or newer with headers (Debian:
libfuse3-dev). The file system is slow_fs.c: each request of the kernel waits for the given time.
It is mounted anew before each start, so that the kernel remembers nothing.

--package names the folder of another version of the package, to compare with; such a start has no
index if that version knows none. "index" in the result says whether one lay beside the shards.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bert_pretraining.bench import record
from bert_pretraining.data.inputs import TRAIN_NAME
from bert_pretraining.data.shards import read_arrays, write_shard

ROOT = Path(__file__).resolve().parents[1]
SEQUENCES = 128  # of each shard; a real one has 76,500
INDEX = ".shard_index.json"
# What a rank does before it trains, with the public functions of data/: run as a process of its own
# with the package that is measured.
START = """
import json, sys, time
from pathlib import Path
from bert_pretraining.data.loader import LoaderConfig, TrainingLoader
from bert_pretraining.data.order import SampleOrder
from bert_pretraining.data.shards import list_shards
started = time.perf_counter()
shards = list_shards(Path(sys.argv[1]))
listed = time.perf_counter() - started
order = SampleOrder([shard.num_sequences for shard in shards], 1, 1)
batches = iter(TrainingLoader(shards, order, LoaderConfig(16, 0, 1, 2**31, None)))
next(batches)
print(json.dumps([listed, time.perf_counter() - started]))
sys.stdout.flush()
batches.close()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mini", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--package", type=Path, default=ROOT)
    parser.add_argument("--shards", type=int, default=4320)
    parser.add_argument("--latency", type=float, nargs="+", default=[0, 1, 5, 20], metavar="MS")
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2], help="of whole runs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--indexed", choices=["no", "yes", "both"], default="both")
    flags = parser.parse_args()
    data, program = flags.scratch / f"data_{flags.shards}", flags.scratch / "slow_fs"
    flags.scratch.mkdir(parents=True, exist_ok=True)
    if not program.exists():
        build(program)
    if not data.exists():
        make_data(flags.mini, data, flags.shards)
    index = data / TRAIN_NAME / INDEX
    results = []
    for latency in flags.latency:
        for indexed in (False, True):
            if flags.indexed == ("no", "yes")[not indexed]:
                continue
            for ranks in [0, *flags.ranks]:
                starts = []
                for _ in range(flags.repeats):
                    if not indexed:
                        index.unlink(missing_ok=True)
                    with mounted(program, data, latency) as (folder, requests):
                        found = whole_run(folder, flags, ranks) if ranks else start(folder, flags)
                    starts.append({**found, "requests": requests[0]})
                results.append(
                    {
                        "latency_ms": latency,
                        "index": indexed,
                        "what": f"whole run, {ranks} ranks" if ranks else "first batch alone",
                        **{key: record.spread([one[key] for one in starts]) for key in starts[0]},
                    }
                )
                print(json.dumps(results[-1]), flush=True)
    described = {"shards": flags.shards, "sequences_of_a_shard": SEQUENCES, "results": results}
    record.write(flags.output, described)


def build(program: Path) -> None:
    """Compile slow_fs.c."""
    asked = ["pkg-config", "--cflags", "--libs", "fuse3"]
    options = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.split()
    source = str(Path(__file__).with_name("slow_fs.c"))
    subprocess.run(["gcc", "-O2", source, "-o", str(program), "-rdynamic", *options], check=True)


def make_data(mini: Path, data: Path, count: int) -> None:
    """A data set of `count` training shards, which repeat the sequences of the mini data set."""
    shutil.copytree(mini, data, ignore=shutil.ignore_patterns(TRAIN_NAME))
    folder = data / TRAIN_NAME
    data.chmod(0o755)
    folder.mkdir()
    sources = sorted((mini / TRAIN_NAME).iterdir())
    names = [f"part_{number:05d}_of_{count:05d}.hdf5" for number in range(count)]
    for number, name in enumerate(names):
        if number < len(sources):
            arrays = read_arrays(sources[number])
            write_shard(folder / name, {key: rows[:SEQUENCES] for key, rows in arrays.items()})
        else:
            shutil.copyfile(folder / names[number % len(sources)], folder / name)


@contextlib.contextmanager
def mounted(program: Path, data: Path, latency: float) -> Iterator[tuple[Path, list[int]]]:
    """The data behind the slow file system; the list gets the number of its requests at the end."""
    requests: list[int] = []
    with tempfile.TemporaryDirectory() as point:
        command = [str(program), str(data), str(latency), point]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        while not os.path.ismount(point):
            if server.poll() is not None:
                raise SystemExit("slow_fs cannot mount")
            time.sleep(0.01)
        try:
            yield Path(point), requests
        finally:
            subprocess.run(["umount", point], check=True)
            requests.append(int(server.communicate()[0]))


def environment(package: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(package / "base"), "OMP_NUM_THREADS": "1"}


def start(folder: Path, flags: argparse.Namespace) -> dict[str, float]:
    """Seconds until the shards are known, and until the first batch; without imports."""
    command = [sys.executable, "-c", START, str(folder / TRAIN_NAME)]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=environment(flags.package)
    )
    listed, first = json.loads(done.stdout)
    return {"listed": listed, "first_batch": first}


def whole_run(folder: Path, flags: argparse.Namespace, ranks: int) -> dict[str, float]:
    """Seconds from the command line to the line of the first update."""
    with tempfile.TemporaryDirectory() as output:
        command = [
            *("bash", "run_training.sh", "--name", "mini", "--config", f"CPUx1x{ranks}"),
            *("--data_dir", str(folder), "--output_dir", output, "--log_freq", "1"),
            *("--max_steps", "1", "--num_eval_examples", "16", "--exit_zero_without_target"),
        ]
        began = time.perf_counter()
        with subprocess.Popen(
            command, cwd=flags.package, stdout=subprocess.PIPE, text=True,
            env={**environment(flags.package), "PYTHON": sys.executable},
        ) as run:  # fmt: skip
            seconds = None
            for line in run.stdout:
                if seconds is None and re.match(r"Step 1/", line):
                    seconds = time.perf_counter() - began
        if run.returncode or seconds is None:
            raise SystemExit(f"the run failed with exit code {run.returncode}")
    return {"first_update": seconds}


if __name__ == "__main__":
    main()
