"""Compare the speed of this loader with that of per-sample tensors through a DataLoader.

    PYTHONPATH=base python benchmarks/input_speed.py --histogram FILE --output results/DATE_input

The shards have sequences of 512 tokens and by default the size of the real ones (76,500
sequences). Lengths follow the real histogram (a JSON file with `counts` of lengths 1, 2, ...) or,
without one, are uniform. The DataLoader is set up as in DeepSparkHub's sample: one dataset for each
shard, tensors made for each sample, workers started for each shard. All take turns in one run.
Compare their ratios.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from bert_pretraining.bench import record
from bert_pretraining.data.loader import LoaderConfig, TrainingLoader
from bert_pretraining.data.order import SampleOrder
from bert_pretraining.data.shards import list_shards, write_shard

LENGTH, PREDICTIONS, VOCABULARY = 512, 76, 30522


class SampleDataset(Dataset):
    """A shard as a map of single samples, which become tensors when they are asked for."""

    def __init__(self, path: Path) -> None:
        with h5py.File(path) as file:
            self.arrays = {key: file[key][()] for key in file}

    def __len__(self) -> int:
        return len(self.arrays["next_sentence_labels"])

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        row = {key: torch.from_numpy(np.asarray(array[index], dtype=np.int64))
               for key, array in self.arrays.items()}  # fmt: skip
        labels = torch.zeros(LENGTH, dtype=torch.long)
        count = torch.count_nonzero(row["masked_lm_positions"])
        labels[row["masked_lm_positions"][:count]] = row["masked_lm_ids"][:count]
        return [
            row["input_ids"],
            row["segment_ids"],
            row["input_mask"],
            labels,
            row["next_sentence_labels"],
        ]


def draw_lengths(histogram: Path | None, count: int) -> np.ndarray:
    """Sequence lengths, drawn from the histogram."""
    random = np.random.RandomState(0)
    if histogram is None:
        return random.randint(16, LENGTH + 1, count)
    counts = np.array(json.loads(histogram.read_text())["counts"], dtype=float)
    return random.choice(np.arange(1, len(counts) + 1), count, p=counts / counts.sum())


def make_shards(directory: Path, lengths: np.ndarray, num_shards: int) -> None:
    """Random content of these lengths; 15% of the tokens masked."""
    random = np.random.RandomState(1)
    for index, part in enumerate(np.array_split(lengths, num_shards)):
        count = len(part)
        mask = np.arange(LENGTH) < part[:, None]
        masked = np.arange(PREDICTIONS) < np.clip(part * 15 // 100, 1, PREDICTIONS)[:, None]
        arrays = {
            "input_ids": random.randint(5, VOCABULARY, (count, LENGTH)) * mask,
            "input_mask": mask.astype("i1"),
            "segment_ids": (np.arange(LENGTH) >= part[:, None] // 2) & mask,
            "masked_lm_positions": (np.arange(PREDICTIONS) + 1) * masked,
            "masked_lm_ids": random.randint(5, VOCABULARY, (count, PREDICTIONS)) * masked,
            "next_sentence_labels": random.randint(0, 2, count),
        }
        write_shard(directory / f"part_{index:05d}_of_{num_shards:05d}.hdf5", arrays)


def packed(directory: Path, batch_size: int, batching: str) -> Iterator[int]:
    """The loader of this package: the number of sequences in each batch."""
    shards = list_shards(directory)
    order = SampleOrder([shard.num_sequences for shard in shards], seed=1, lanes=1)
    loader_config = LoaderConfig(batch_size, 0, 1, VOCABULARY, LENGTH, batching)
    for batch in TrainingLoader(shards, order, loader_config):
        yield batch.num_sequences


def per_sample(directory: Path, batch_size: int, workers: int) -> Iterator[int]:
    """Per-sample tensors through a DataLoader. Each shard starts a new DataLoader."""
    while True:
        for path in sorted(directory.iterdir()):
            loader = DataLoader(
                SampleDataset(path), batch_size, shuffle=True, num_workers=workers, drop_last=True
            )
            for batch in loader:
                yield len(batch[-1])


def rate(batches: Iterator[int], sequences: int) -> float:
    """Sequences per second over at least `sequences`, the start included."""
    started = time.perf_counter()
    done = 0
    while done < sequences:
        done += next(batches)
    return done / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--histogram", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--sequences", type=int, default=229_500)
    parser.add_argument("--num_shards", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=27)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        lengths = draw_lengths(arguments.histogram, arguments.sequences)
        make_shards(directory, lengths, arguments.num_shards)
        size = arguments.batch_size
        candidates = {
            "packed, random": lambda: packed(directory, size, "random"),
            "packed, balanced": lambda: packed(directory, size, "balanced"),
            "DataLoader, no workers": lambda: per_sample(directory, size, 0),
            "DataLoader, 4 workers": lambda: per_sample(directory, size, 4),
        }
        rates: dict[str, list[float]] = {name: [] for name in candidates}
        for _ in range(arguments.repeats):
            for name, make in candidates.items():
                epochs = 2 if name.startswith("packed") else 0.25
                batches = make()
                rates[name].append(rate(batches, int(epochs * arguments.sequences)))
                batches.close()
        memory = []
        batches = packed(directory, size, "balanced")
        for _ in range(10):
            rate(batches, arguments.sequences)
            memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        batches.close()
    spreads = {name: record.spread(values) for name, values in rates.items()}
    for name, spread in spreads.items():
        ratio = spreads["packed, random"]["median"] / spread["median"]
        print(f"{name}: {spread['median']:.0f} sequences/s ({spread['min']:.0f} to "
              f"{spread['max']:.0f}); packed, random is {ratio:.1f}x this")  # fmt: skip
    print(f"peak memory after each of 10 epochs, MiB: {memory}")
    figures = {
        "sequences": arguments.sequences,
        "mean_length": float(lengths.mean()),
        "batch_size": size,
        "sequences_per_second": spreads,
        "peak_memory_mib_after_epochs": memory,
    }
    record.write(arguments.output / "input_speed.json", figures)


if __name__ == "__main__":
    main()
