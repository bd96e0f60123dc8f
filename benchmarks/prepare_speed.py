"""Compare `data create-examples` with the script of the MLPerf reference, in one process.

    PYTHONPATH=base python benchmarks/prepare_speed.py --reference CREATE.py \\
        --reference_tokenization TOKENIZATION.py --text PART --vocab VOCAB --output FOLDER

The scripts of the reference (create_pretraining_data.py, the HDF5 variant, and tokenization.py)
are not part of this project; name your copies. They run unchanged. In place of TensorFlow and absl
they get a module with what they use: flags, opening files, logging. Both outputs are compared.
Processor time is reported beside wall time, because a busy machine disturbs it less.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np

from bert_pretraining.bench import record
from bert_pretraining.data.shards import SCHEMA
from bert_pretraining.preparation.prepare import TextSettings, create_file


class Anything:
    """Stands for any part of TensorFlow that only has to exist."""

    def __getattr__(self, name: str) -> Anything:
        return self

    def __call__(self, *_: object, **__: object) -> Anything:
        return self


class Flags:
    """What the scripts define with flags.DEFINE_*, at their defaults."""

    def __init__(self) -> None:
        self.FLAGS = types.SimpleNamespace()

    def __getattr__(self, name: str) -> Callable[..., None]:
        def define(flag: str, default: object = None, *_: object, **__: object) -> None:
            setattr(self.FLAGS, flag, default)

        return define


def tensorflow() -> types.ModuleType:
    """A module with the parts of TensorFlow 1 and 2 that the scripts touch."""
    module = types.ModuleType("tensorflow")
    flags = Flags()
    parts = types.SimpleNamespace(
        flags=flags,
        app=flags,
        logging=types.SimpleNamespace(info=lambda *_: None),
        gfile=types.SimpleNamespace(GFile=lambda path, mode="r": open(path, mode)),  # noqa: SIM115
    )
    module.__dict__.update(vars(parts))
    module.compat = types.SimpleNamespace(v1=parts)
    module.train = Anything()
    return module


def load_reference(script: Path, tokenization: Path) -> tuple[types.ModuleType, types.ModuleType]:
    """The two scripts as modules."""
    sys.modules["tensorflow"] = stand_in = tensorflow()
    sys.modules["absl"] = stand_in  # `from absl import flags`
    modules = []
    for name, path in (("tokenization", tokenization), ("create_pretraining_data", script)):
        module = types.ModuleType(name)
        sys.modules[name] = module
        exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
        modules.append(module)
    return modules[0], modules[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("reference", "reference_tokenization", "text", "vocab", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    tokenization, script = load_reference(arguments.reference, arguments.reference_tokenization)
    with tempfile.TemporaryDirectory() as folder:
        outputs = {"reference": Path(folder, "theirs"), "ours": Path(folder, "ours.hdf5")}

        def theirs() -> None:
            tokenizer = tokenization.FullTokenizer(str(arguments.vocab), True)
            examples = script.create_training_instances(
                [str(arguments.text)], tokenizer, 512, 10, 0.1, 0.15, 76, random.Random(12345)
            )
            script.write_instance_to_example_files(
                examples, tokenizer, 512, 76, [str(outputs["reference"])]
            )

        def ours() -> None:
            create_file([arguments.text], outputs["ours"], TextSettings(arguments.vocab))

        wall: dict[str, list[float]] = {"reference": [], "ours": []}
        processor: dict[str, list[float]] = {"reference": [], "ours": []}
        for _ in range(arguments.repeats):
            for name, run in (("reference", theirs), ("ours", ours)):
                started, used = time.perf_counter(), time.process_time()
                run()
                wall[name].append(time.perf_counter() - started)
                processor[name].append(time.process_time() - used)
        found = next(path for path in Path(folder).iterdir() if path.name.startswith("theirs"))
        with h5py.File(found) as one, h5py.File(outputs["ours"]) as other:
            for key in SCHEMA:
                assert one[key].dtype == other[key].dtype
                assert np.array_equal(one[key][()], other[key][()]), key
            count = len(other["next_sentence_labels"])
    figures = {"text_bytes": arguments.text.stat().st_size, "examples": count}
    for what, times in (("wall", wall), ("processor", processor)):
        spreads = {name: record.spread(values) for name, values in times.items()}
        ratio = spreads["reference"]["median"] / spreads["ours"]["median"]
        figures[f"{what}_seconds"] = {**spreads, "reference over ours": ratio}
        print(
            f"{what} time: reference {spreads['reference']['median']:.2f} s "
            f"({spreads['reference']['min']:.2f} to {spreads['reference']['max']:.2f}), "
            f"ours {spreads['ours']['median']:.2f} s ({spreads['ours']['min']:.2f} to "
            f"{spreads['ours']['max']:.2f}): {ratio:.2f}x"
        )
    print(f"{count} examples, equal in every dataset")
    record.write(arguments.output / "prepare_speed.json", figures)


if __name__ == "__main__":
    main()
