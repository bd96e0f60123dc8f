"""Compare the seconds of a LAMB update: DeepSparkHub's `Lamb` (its `default`) and ours, in turn.

    PYTHONPATH=base python benchmarks/lamb_against_upstream.py \\
        --upstream .../base/optimizers/lamb.py --output results/DATE_optimizer/upstream.json

`--upstream` names base/optimizers/lamb.py of DeepSparkHub's BERT sample. The parameters are those
of BERT-large in float32. The update of DeepSparkHub does less: it has no clipping and no bias
correction, and so needs no norm of all gradients.
"""

from __future__ import annotations

import argparse
import importlib.util
import warnings
from pathlib import Path

import torch
from torch import nn

from bert_pretraining.bench import record
from bert_pretraining.bench.optimizer import shapes_of, times_of_updates
from bert_pretraining.bench.timing import timed
from bert_pretraining.bench.workload import BERT_LARGE

CPU = torch.device("cpu")


def seconds_of_theirs(path: Path, shapes: dict[str, torch.Size], count: int) -> list[float]:
    """The seconds of `times_of_updates`, for DeepSparkHub's class."""
    spec = importlib.util.spec_from_file_location("upstream_lamb", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    parameters = [nn.Parameter(torch.full(shape, 0.02)) for shape in shapes.values()]
    optimizer = module.Lamb(parameters, lr=1e-4, weight_decay=0.01)
    seconds = []
    for _ in range(1 + count):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 1e-3)
        seconds.append(timed(optimizer.step, CPU))
    return seconds[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--upstream", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    flags = parser.parse_args()
    warnings.filterwarnings("ignore", message="This overload of add")
    shapes = shapes_of(BERT_LARGE)
    names = ("upstream", "reference", "flat")
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(flags.repeats):
        times["upstream"] += seconds_of_theirs(flags.upstream, shapes, 1)
        for name in names[1:]:
            times[name] += times_of_updates(name, shapes, CPU, torch.float32, 1).seconds
    spreads = {name: record.spread(seconds) for name, seconds in times.items()}
    for name, spread in spreads.items():
        ratio = spreads["upstream"]["median"] / spread["median"]
        print(
            f"{name}: {spread['median']:.3f} s ({spread['min']:.3f} to {spread['max']:.3f}, "
            f"n {spread['n']}), {ratio:.2f} times as fast as upstream"
        )
    if flags.output:
        record.write(flags.output, {"threads": torch.get_num_threads(), "seconds": spreads})


if __name__ == "__main__":
    main()
