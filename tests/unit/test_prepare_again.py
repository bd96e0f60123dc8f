"""`data prepare` again in the same folder: what a changed setting makes outdated, and no more."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from bert_pretraining.data.shards import read_arrays
from bert_pretraining.errors import UserError
from bert_pretraining.preparation import held_out
from bert_pretraining.preparation import prepare as stages
from bert_pretraining.preparation.examples import ExampleSettings
from bert_pretraining.preparation.prepare import PrepareSettings, TextSettings
from bert_pretraining.runtime.words import counted

VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]


@pytest.fixture
def small_texts(tmp_path: Path) -> PrepareSettings:
    """Two training texts and an evaluation text of a few sentences."""
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    (tmp_path / "text.txt").write_text("b a\nd c\n\nf e\nh g\n" * 3)
    text = TextSettings(tmp_path / "vocab.txt", ExampleSettings(32, 5, dupe_factor=2))
    (tmp_path / "texts").mkdir()
    for name in ("part-0", "part-1"):
        (tmp_path / "texts" / name).write_text(f"a b\nc d\n\ne f\ng {name[-1]}\n" * 4)
    return PrepareSettings(
        tmp_path / "texts", tmp_path / "text.txt", tmp_path / "out", text,
        num_shards=4, num_eval_examples=5,
    )  # fmt: skip


def contents(directory: Path) -> dict[str, object]:
    """The arrays of every shard as lists, by its path in the directory."""
    return {
        str(path.relative_to(directory)): {
            key: array.tolist() for key, array in read_arrays(path).items()
        }
        for path in directory.rglob("*.hdf5")
    }


@pytest.mark.parametrize(
    ("wrong", "flag", "made_again"),
    [
        ({"num_eval_examples": 5000}, "--num_eval_examples 5000, not 5", 0),
        ({"num_shards": 4000}, "--shards 4000, not 4", 0),
        ({"eval_text": "vocab.txt", "num_shards": 4000}, "another --eval_text", 1),
    ],
)
def test_a_rerun_with_a_corrected_flag_goes_on(
    tmp_path: Path, small_texts: PrepareSettings, wrong: dict, flag: str, made_again: int
) -> None:
    if "eval_text" in wrong:
        wrong = {**wrong, "eval_text": tmp_path / wrong["eval_text"]}
    with pytest.raises(UserError, match=r"a smaller --(num_eval_examples|shards)$"):
        stages.prepare(dataclasses.replace(small_texts, **wrong))
    messages = stages.prepare(small_texts)
    assert any(flag in line for line in messages)
    assert f"examples: {counted(made_again, 'file')} made, {3 - made_again} there" in messages
    fresh = dataclasses.replace(small_texts, output_dir=tmp_path / "fresh")
    stages.prepare(fresh)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_changed_text_is_made_again_with_the_shards(
    tmp_path: Path, small_texts: PrepareSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):
        interrupted.setattr(stages, "write_whole", stop)  # when all shards are made
        stages.prepare(small_texts)
    (tmp_path / "texts" / "part-1").write_text("h g\nf e\n\nd c\nb a\n" * 5)
    messages = stages.prepare(small_texts)
    assert any("other files in --text_dir" in line for line in messages)
    assert {"examples: 1 file made, 2 there", "shards: 4 made, 0 there"} <= set(messages)
    fresh = dataclasses.replace(small_texts, output_dir=tmp_path / "fresh")
    stages.prepare(fresh)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_text_changed_to_another_of_the_same_size_is_made_again(
    tmp_path: Path, small_texts: PrepareSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):
        interrupted.setattr(stages, "write_whole", stop)  # when all shards are made
        stages.prepare(small_texts)
    part, times = tmp_path / "texts" / "part-1", (tmp_path / "texts" / "part-1").stat()
    part.write_text(part.read_text().replace("c", "h"))
    os.utime(part, ns=(times.st_atime_ns, times.st_mtime_ns))  # as some copies set it
    assert part.stat().st_size == times.st_size
    messages = stages.prepare(small_texts)
    assert any("other files in --text_dir" in line for line in messages)
    assert "examples: 1 file made, 2 there" in messages
    fresh = dataclasses.replace(small_texts, output_dir=tmp_path / "fresh")
    stages.prepare(fresh)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    eval_text = small_texts.eval_text
    eval_text.write_text(eval_text.read_text().replace("h", "e"))
    with pytest.raises(UserError, match="is finished, and was made with another --eval_text"):
        stages.prepare(small_texts)


def test_files_that_did_not_change_are_not_read_again(
    small_texts: PrepareSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="a smaller --num_eval_examples"):
        stages.prepare(dataclasses.replace(small_texts, num_eval_examples=5000))
    read: list[str] = []
    compare = held_out.compare

    def noted(path: Path, evaluation: held_out.EvalText) -> held_out.Comparison:
        read.append(path.name)
        return compare(path, evaluation)

    monkeypatch.setattr(held_out, "compare", noted)
    os.utime(small_texts.text_dir / "part-0")  # the same content with another time
    messages = stages.prepare(small_texts)
    assert read == ["part-0"]
    assert "examples: 0 files made, 3 there" in messages


def test_a_data_set_of_an_earlier_version_is_gone_on_with(small_texts: PrepareSettings) -> None:
    """It told texts apart by size."""
    stages.prepare(small_texts)
    manifest = small_texts.output_dir / "prepare.json"
    settings = json.loads(manifest.read_text())
    notes = settings.pop("files")
    settings["texts"] = {name: text["size"] for name, text in notes["texts"].items()}
    settings["eval_text"] = notes["eval_bytes"]
    manifest.write_text(json.dumps(settings))
    assert "nothing to do" in stages.prepare(small_texts)[0]
    settings["texts"]["part-0"] += 1
    manifest.write_text(json.dumps(settings))
    with pytest.raises(UserError, match="made with other files in --text_dir"):
        stages.prepare(small_texts)


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_settings_that_all_examples_depend_on_are_refused(
    tmp_path: Path, small_texts: PrepareSettings
) -> None:
    too_many = dataclasses.replace(small_texts, num_eval_examples=5000)
    with pytest.raises(UserError):
        stages.prepare(too_many)
    before = contents(tmp_path / "out")
    text = dataclasses.replace(small_texts.text, seed=7)
    with pytest.raises(UserError, match=r"begun with --random_seed 12345, not 7, .* all examples"):
        stages.prepare(dataclasses.replace(too_many, text=text))
    text = dataclasses.replace(small_texts.text, examples=ExampleSettings(32, 6, dupe_factor=2))
    with pytest.raises(UserError, match="begun with --max_predictions_per_seq 5, not 6"):
        stages.prepare(dataclasses.replace(too_many, text=text))
    assert contents(tmp_path / "out") == before
    stages.prepare(small_texts)


def test_the_manifest_of_another_program_is_refused(small_texts: PrepareSettings) -> None:
    small_texts.output_dir.mkdir()
    (small_texts.output_dir / "prepare.json").write_text("[]")
    with pytest.raises(UserError, match="holds no settings of data prepare; choose another"):
        stages.prepare(small_texts)
    (small_texts.output_dir / "prepare.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*prepare.json"):
        stages.prepare(small_texts)
