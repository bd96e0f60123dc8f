"""What a run reads is checked before it starts: cheaply, once, in the trainer's words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bert_pretraining.checkpoint import read_weights
from bert_pretraining.config import resolve
from bert_pretraining.config.settings import Config
from bert_pretraining.data.inputs import data_paths, faults
from bert_pretraining.data.shards import list_shards
from bert_pretraining.errors import UserError
from helpers import ROOT, command

BERT_CONFIG = {
    "vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 8, "max_position_embeddings": 8,
}  # fmt: skip
CHECKPOINT = "model.ckpt-28252.apex.pt"


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Everything that can be told without opening a shard or a checkpoint is right."""
    root = tmp_path / "data"
    for name in ("2048_shards_uncompressed", "eval_set_uncompressed"):
        (root / name).mkdir(parents=True)
        (root / name / "part_0.hdf5").touch()
    (root / "bert_config.json").write_text(json.dumps(BERT_CONFIG))
    (root / CHECKPOINT).write_bytes(b"weights")
    return root


def settings(data_dir: Path | None, **values: object) -> Config:
    place = {} if data_dir is None else {"data_dir": str(data_dir)}
    values = {name: str(value) for name, value in values.items()}
    return resolve({"name": "default", "config": "V100x1x1", **place, **values}).config


def test_paths_of_a_data_set_and_their_overrides(data_dir: Path, tmp_path: Path) -> None:
    paths = data_paths(settings(data_dir))
    assert paths.train_dir == data_dir / "2048_shards_uncompressed"
    assert paths.bert_config == data_dir / "bert_config.json"
    assert paths.init_checkpoint == data_dir / CHECKPOINT
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "part").touch()
    elsewhere = settings(data_dir, eval_dir=tmp_path / "elsewhere", init_checkpoint="random")
    assert data_paths(elsewhere).eval_dir == tmp_path / "elsewhere"
    assert data_paths(elsewhere).init_checkpoint is None
    assert faults(elsewhere) == []


def test_no_data_at_all(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    with pytest.raises(UserError, match=r"no such data_dir: .*make-mini --output_dir .*a_mini$"):
        data_paths(settings(tmp_path / "a_mini"))
    with pytest.raises(
        UserError,
        match=r"no such data_dir: .*absent; check the path, or pass the folder with 2048_s",
    ):
        data_paths(settings(absent))
    with pytest.raises(UserError, match=r"^no data; pass --data_dir DIR \("):
        data_paths(settings(None))
    with pytest.raises(UserError, match="did not name: --eval_dir, --bert_config_path"):
        data_paths(settings(None, train_dir=absent, init_checkpoint="random"))
    absent.touch()
    with pytest.raises(UserError, match=r"absent is a file; pass the directory that holds 2048_"):
        data_paths(settings(absent))
    with pytest.raises(UserError, match=r"cannot read a+: the name is too long .*; "):
        data_paths(settings(Path("a" * 400)))


def test_a_name_like_that_of_a_data_set_nearby(data_dir: Path, tmp_path: Path) -> None:
    """The data set that is there is named, and no other is to be made under a wrong name."""
    (tmp_path / "sets").mkdir()
    right = data_dir.rename(tmp_path / "sets" / "bert_mini")
    (tmp_path / "sets" / "bert_man").mkdir()  # holds no data set
    for wrong in ("sets/bert_min", "set/bert_mini"):
        with pytest.raises(UserError) as caught:
            data_paths(settings(tmp_path / wrong))
        hint = f"no such data_dir: {tmp_path / wrong}; did you mean {right}?"
        assert caught.value.problem == hint
    assert str(caught.value).startswith(f"{hint}; check the path, or make the mini data set with: ")
    with pytest.raises(UserError) as caught:
        data_paths(resolve({"name": "mini", "data_dir": str(tmp_path / "sets/bert_min")}).config)
    assert caught.value.fix.startswith("check the path, or pass the folder with 2048_shards_unc")
    with pytest.raises(UserError, match=r"^no such data_dir: [^;]*wikipedia; check the path"):
        data_paths(settings(tmp_path / "sets/wikipedia"))


@pytest.mark.parametrize(
    ("flag", "name"),
    [("train_dir", "2048_shards_uncompressed"), ("eval_dir", "eval_set_uncompressed")],
)
def test_a_missing_directory_is_fixed_by_its_own_flag(
    data_dir: Path, tmp_path: Path, flag: str, name: str
) -> None:
    wrong = settings(data_dir, **{flag: tmp_path / "absent"})
    with pytest.raises(UserError, match=f"absent; pass the right --{flag}, .* to take .*{name}$"):
        data_paths(wrong)
    (data_dir / name / "part_0.hdf5").rename(data_dir / name / "part_0.hdf5.partial")
    with pytest.raises(UserError, match=rf"no shards in .*{name}: .*--data_dir .*--{flag} DIR$"):
        data_paths(settings(data_dir))
    (data_dir / name / "part_0.hdf5.partial").unlink()
    (data_dir / name).rmdir()
    with pytest.raises(UserError, match=rf"no such data directory: .*{name}; .*--{flag} DIR$"):
        data_paths(settings(data_dir))


def test_checkpoints_that_are_none(data_dir: Path, tmp_path: Path) -> None:
    def refused(path: Path) -> str:
        with pytest.raises(UserError) as caught:
            data_paths(settings(data_dir, init_checkpoint=path))
        with pytest.raises(UserError) as later:
            read_weights(path)
        assert str(later.value) == str(caught.value), "launcher and trainer say the same"
        return str(caught.value)

    assert "no checkpoint at" in refused(tmp_path / "absent.pt")
    assert refused(data_dir).endswith(f"a directory, not a checkpoint; pass --init_checkpoint "
                                      f"{data_dir / CHECKPOINT}")  # fmt: skip
    assert "--init_checkpoint FILE" in refused(data_dir / "eval_set_uncompressed")
    (tmp_path / "empty.pt").touch()
    assert "empty.pt: an empty file, not a checkpoint; copy it again" in refused(
        tmp_path / "empty.pt"
    )


def test_checkpoints_of_every_kind_are_let_through(data_dir: Path, tmp_path: Path) -> None:
    """A directory or a name without a file of its own may be a checkpoint too."""
    (tmp_path / "hugging_face").mkdir()
    (tmp_path / "hugging_face" / "model.safetensors.index.json").write_text("{}")
    for name in ("model.ckpt-1.index", "model.ckpt-1.data-00000-of-00001", "a.safetensors"):
        (tmp_path / name).write_text("not opened here")
    for name in ("hugging_face", "model.ckpt-1", "model.ckpt-1.index", "a.safetensors"):
        path = tmp_path / name
        assert data_paths(settings(data_dir, init_checkpoint=path)).init_checkpoint == path
    with pytest.raises(UserError, match=r"one part of a TensorFlow checkpoint; pass .*ckpt-1$"):
        data_paths(
            settings(data_dir, init_checkpoint=tmp_path / "model.ckpt-1.data-00000-of-00001")
        )


def test_bert_config_is_read(data_dir: Path) -> None:
    (data_dir / "bert_config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        data_paths(settings(data_dir))


def test_training_on_the_evaluation_set_is_refused(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(data_dir / "eval_set_uncompressed")
    for same in (data_dir / "eval_set_uncompressed", tmp_path / "link"):
        with pytest.raises(UserError, match=r"the same directory.*pass an --eval_dir"):
            data_paths(settings(data_dir, train_dir=same))


def test_faults_are_all_there(data_dir: Path, tmp_path: Path) -> None:
    (data_dir / CHECKPOINT).unlink()
    (data_dir / "bert_config.json").unlink()
    (data_dir / "2048_shards_uncompressed" / "part_0.hdf5").unlink()
    found = faults(settings(data_dir, eval_dir=tmp_path / "absent"))
    words = ["no checkpoint at", "cannot read", "no shards in", "no such data directory"]
    assert [word in fault.problem for word, fault in zip(words, found, strict=True)] == [True] * 4
    assert len(faults(settings(None))) == 1


def test_shards_are_listed_and_never_opened(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2,048 files on network storage: one listing, no look at each."""
    train_dir = data_dir / "2048_shards_uncompressed"
    for number in range(100):
        (train_dir / f"part_{number}.hdf5").touch()
    seen: list[str] = []
    real_stat = os.stat

    def spy(path: object, *arguments: object, **options: object) -> os.stat_result:
        seen.append(str(path))
        return real_stat(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", spy)
    data_paths(settings(data_dir))
    assert seen
    assert [path for path in seen if "part_" in path] == []


def test_of_the_ranks_one_on_each_machine_lists_the_folders(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others find out only whether the folders are there."""

    def never(path: object) -> None:
        raise AssertionError(f"{path} was listed")

    with monkeypatch.context() as patched:
        patched.setattr("os.scandir", never)
        patched.setattr("os.listdir", never)
        paths = data_paths(settings(data_dir), list_folders=False)
    assert paths == data_paths(settings(data_dir))
    (paths.eval_dir / "part_0.hdf5").unlink()
    data_paths(settings(data_dir), list_folders=False)
    with pytest.raises(UserError, match=r"no shards in .*eval_set_uncompressed"):
        data_paths(settings(data_dir))
    paths.eval_dir.rmdir()
    for listing in (False, True):
        with pytest.raises(UserError, match=r"no such data directory: .*eval_set_uncompressed; "):
            data_paths(settings(data_dir), list_folders=listing)


def test_the_trainer_lists_the_same_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no shards in .*; make a data set with"):
        list_shards(tmp_path)


def test_a_launch_is_refused_before_ranks_start(data_dir: Path, tmp_path: Path) -> None:
    (data_dir / "eval_set_uncompressed" / "part_0.hdf5").unlink()
    done = command(
        "launch", "--name", "mini", "--config", "CPUx1x2", "--data_dir", data_dir,
        "--output_dir", "out", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("Error: no shards in ")
    assert not (tmp_path / "out").exists()


def test_checks_and_dry_run_need_no_package(data_dir: Path, tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "for name in ('torch', 'numpy', 'h5py', 'tokenizers'): sys.modules[name] = None\n"
        "from bert_pretraining.__main__ import main\n"
        "sys.exit(main())\n"
    )
    flags = ["--name", "mini", "--config", "CPUx1x2", "--data_dir", str(data_dir), "--dry_run"]
    done = subprocess.run(
        [sys.executable, "-c", program, "launch", *flags],
        env={**os.environ, "PYTHONPATH": str(ROOT / "base")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, "WORLD_SIZE=2" in done.stdout) == (0, True), done.stderr
    assert "Note: " not in done.stderr


def test_dry_run_notes_what_a_launch_would_refuse(data_dir: Path, tmp_path: Path) -> None:
    (data_dir / CHECKPOINT).unlink()
    flags = ("--name", "mini", "--config", "CPUx1x2", "--dry_run")
    done = command("launch", *flags, "--data_dir", data_dir, "--train_dir", "x", cwd=tmp_path)
    assert done.returncode == 0
    assert "WORLD_SIZE=2" in done.stdout
    notes = [line for line in done.stderr.splitlines() if line.startswith("Note: ")]
    assert len(notes) == 2
    assert notes[0].startswith("Note: a launch on this machine would be refused: no checkpoint at")
    assert "no such data directory: x; " in notes[1]
    # Without flags, a launch makes the data set.
    done = command("launch", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0
    assert "data/datasets/bert_mini not found here; the launch would make it" in done.stderr
    assert not (tmp_path / "data" / "datasets").exists()
