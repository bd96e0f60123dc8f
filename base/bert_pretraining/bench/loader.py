"""`bench loader`: how fast this machine reads and packs a data set, without training."""

from __future__ import annotations

import resource
import time
from pathlib import Path

from bert_pretraining.bench import record
from bert_pretraining.bench.flags import BENCH, bench_parser, require_at_least_one
from bert_pretraining.bench.timing import announce
from bert_pretraining.data.loader import LoaderConfig, TrainingLoader
from bert_pretraining.data.order import SampleOrder
from bert_pretraining.data.shards import list_shards
from bert_pretraining.errors import UserError


def main(arguments: list[str]) -> int:
    """Print the sequences and tokens of one rank's loader per second, for each way of batching."""
    parser = bench_parser(
        f"{BENCH} loader", "Time reading and packing a data set on this machine, without training."
    )
    parser.add_argument(
        "--train_dir", type=Path, required=True, metavar="DIR",
        help="a directory of shards (required)",
    )  # fmt: skip
    parser.add_argument(
        "--shard_pattern", metavar="GLOB",
        help="names of the shards, such as '*.h5' (default: all with 'part' in the name)",
    )  # fmt: skip
    parser.add_argument(
        "--batch_size", type=int, default=48, metavar="N",
        help="sequences, at least 1 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--world_size", type=int, default=1, metavar="N",
        help="load as rank 0 of N, at least 1 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, default=10.0, metavar="S",
        help="time for each way of batching, above 0 (default: %(default)s)",
    )  # fmt: skip
    flags = parser.parse(arguments)
    require_at_least_one(flags, "batch_size", "world_size")
    if not flags.seconds > 0:
        raise UserError(f"--seconds {flags.seconds}: it must be above 0", "pass a number above 0")
    shards = list_shards(flags.train_dir, flags.shard_pattern, announce)
    sizes = [shard.num_sequences for shard in shards]
    results = {}
    for batching in ("random", "balanced"):
        announce(f"{batching} batches, {flags.seconds:g} s")
        wanted = LoaderConfig(flags.batch_size, 0, flags.world_size, 2**31, None, batching)
        batches = iter(TrainingLoader(shards, SampleOrder(sizes, 1, flags.world_size), wanted))
        started = time.perf_counter()
        first = next(batches)
        waited = time.perf_counter() - started
        sequences, tokens = first.num_sequences, first.num_tokens
        while time.perf_counter() - started < flags.seconds:
            batch = next(batches)
            sequences += batch.num_sequences
            tokens += batch.num_tokens
        seconds = time.perf_counter() - started
        batches.close()
        results[batching] = {
            "sequences_per_second": sequences / seconds,
            "tokens_per_second": tokens / seconds,
            "seconds_to_first_batch": waited,
            "epochs": sequences * flags.world_size / sum(sizes),
            "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        print(
            f"{batching:<9} {sequences / seconds:>9.0f} sequences/s {tokens / seconds:>11.0f} "
            f"tokens/s; first batch after {waited:.2f} s; "
            f"{results[batching]['peak_memory_mib']:.0f} MiB at most so far"
        )
    if flags.output:
        described = {
            "shards": len(shards),
            "sequences": sum(sizes),
            "batch_size": flags.batch_size,
            "world_size": flags.world_size,
            "results": results,
        }
        record.write(flags.output, described)
    return 0
