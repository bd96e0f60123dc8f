"""Compare the time of `data verify` with that of only reading the files, at the real size.

    PYTHONPATH=base python benchmarks/verify_speed.py --histogram FILE --output results/DATE_input

The files are in the page cache, so that reading is as fast as possible. Reading, and verifying
with each number of jobs, take turns in one run. Compare their ratios.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from input_speed import VOCABULARY, draw_lengths, make_shards

from bert_pretraining.bench import record
from bert_pretraining.data.shards import read_arrays
from bert_pretraining.preparation.verify import verify

SHARD = 76_500  # sequences in each of the 2048 real shards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--histogram", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--num_shards", type=int, default=4)
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shards, evaluation = Path(folder, "2048_shards_uncompressed"), Path(folder, "eval_set")
        for directory, count in ((shards, arguments.num_shards), (evaluation, 1)):
            directory.mkdir()
            size = SHARD if directory == shards else 1000
            make_shards(directory, draw_lengths(arguments.histogram, size * count), count)
        evaluation.rename(Path(folder, "eval_set_uncompressed"))
        Path(folder, "bert_config.json").write_text(f'{{"vocab_size": {VOCABULARY}}}\n')
        paths = sorted(shards.iterdir())
        megabytes = sum(path.stat().st_size for path in paths) / 1e6

        def read() -> None:
            for path in paths:
                read_arrays(path)

        candidates = {"read only": read}
        for jobs in arguments.jobs:
            candidates[f"verify, {jobs} jobs"] = lambda jobs=jobs: verify(Path(folder), jobs)
        rates: dict[str, list[float]] = {name: [] for name in candidates}
        for _ in range(arguments.repeats):
            for name, run in candidates.items():
                started = time.perf_counter()
                run()
                rates[name].append(megabytes / (time.perf_counter() - started))
    spreads = {name: record.spread(values) for name, values in rates.items()}
    for name, spread in spreads.items():
        print(f"{name}: {spread['median']:.0f} MB/s ({spread['min']:.0f} to {spread['max']:.0f})")
    figures = {"shards": len(paths), "megabytes": megabytes, "megabytes_per_second": spreads}
    record.write(arguments.output / "verify_speed.json", figures)


if __name__ == "__main__":
    main()
