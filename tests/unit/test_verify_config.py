"""`data verify` holds bert_config.json to what a launch and its ranks ask of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from bert_pretraining.errors import UserError
from bert_pretraining.model.bert_config import BertConfig
from bert_pretraining.preparation.verify import verify
from verify_sets import put_sizes, shard, small_files, write_set


@pytest.fixture
def data(tmp_path: Path, mini_data: Path) -> Path:
    """A good small set, to spoil."""
    return write_set(tmp_path / "set", small_files(mini_data), mini_data, "fixed")


def test_what_a_launch_refuses_is_a_problem_in_its_words(data: Path) -> None:
    """All keys that are missing are named at once."""
    put_sizes(data, num_hidden_layers=0, intermediate_size=0, num_layers=4)
    report = verify(data)
    assert report.problems == [
        "bert_config.json: no keys 'num_hidden_layers', 'intermediate_size', which the model "
        "needs; correct it (docs/data.md shows one), or take the file of the start checkpoint's "
        "model"
    ]
    with pytest.raises(UserError) as refused:
        BertConfig.load(data / "bert_config.json")
    assert str(refused.value) == f"{data}/{report.problems[0]}"
    assert any(line.startswith("vocabulary: ") for line in report.not_checked)


def test_the_file_is_missing(data: Path) -> None:
    (data / "bert_config.json").unlink()
    (line,) = verify(data).problems
    assert line.startswith("cannot read bert_config.json: does not exist (errno 2")
    assert "; write one (docs/data.md shows one), or " in line


@pytest.mark.parametrize(
    ("sizes", "fault"),
    [
        ({"vocab_size": 100}, "have a token outside the vocabulary of bert_config.json"),
        (
            {"max_position_embeddings": 60},
            "are longer than max_position_embeddings of bert_config.json",
        ),
    ],
)
def test_sizes_that_do_not_fit_the_shards(data: Path, sizes: dict[str, int], fault: str) -> None:
    put_sizes(data, **sizes)
    (line,) = (
        line for line in verify(data).problems if line.startswith(shard(1)) and fault in line
    )
    assert line.endswith("; use data and a bert_config.json that fit together")
