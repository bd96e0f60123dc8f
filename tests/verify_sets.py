"""Small data sets in the layout of the real one, to spoil."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np

from bert_pretraining.data.shards import read_arrays, write_shard, write_varlength_shard

TRAIN, EVAL = "2048_shards_uncompressed", "eval_set_uncompressed"
ROWS, SHARDS = 60, 4
Arrays = dict[str, np.ndarray]


def small_files(mini_data: Path) -> dict[str, Arrays]:
    """File -> arrays: the first rows of mini shards, as shards of a set of four."""
    files = {
        shard(number): read_arrays(mini_data / TRAIN / f"part_{number:05d}_of_00016.hdf5")
        for number in range(SHARDS)
    }
    files[f"{EVAL}/part_eval.hdf5"] = read_arrays(mini_data / EVAL / "part_eval.hdf5")
    return {
        name: {key: array[:ROWS] for key, array in arrays.items()} for name, arrays in files.items()
    }


def write_set(directory: Path, files: dict[str, Arrays], mini_data: Path, form: str) -> Path:
    write = write_shard if form == "fixed" else write_varlength_shard
    for name, arrays in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        write(directory / name, arrays)
    config = (mini_data / "bert_config.json").read_text()
    (directory / "bert_config.json").write_text(config)
    return directory


def shard(number: int) -> str:
    return f"{TRAIN}/part_{number:05d}_of_{SHARDS:05d}.hdf5"


def rewrite(path: Path, key: str, change: Callable[[np.ndarray], object]) -> None:
    """Change one dataset of a file."""
    with h5py.File(path, "a") as file:
        values = file[key][()]
        change(values)
        file[key][()] = values


def put_sizes(data: Path, **sizes: int) -> None:
    """Change sizes in bert_config.json; 0 takes a key out."""
    values = json.loads((data / "bert_config.json").read_text()) | sizes
    kept = {key: value for key, value in values.items() if value != 0 or key.endswith("prob")}
    (data / "bert_config.json").write_text(json.dumps(kept))


def put(place: object, value: object, values: np.ndarray) -> None:
    values[place] = value
