"""A path that begins with ~ means the home folder wherever it is given."""

from __future__ import annotations

from pathlib import Path

import pytest

from bert_pretraining import config
from bert_pretraining.config.home import expanded
from bert_pretraining.errors import UserError


def test_the_home_folder_in_flags_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    parser = config.FlagParser()
    config.add_config_flags(parser)
    values = vars(parser.parse(["--data-dir=~/data", "--output_dir", "~"]))
    assert values == {"data_dir": "/home/me/data", "output_dir": "/home/me"}
    file = tmp_path / "CPUx1x1.toml"
    file.write_text('data_dir = "~/data"\ninit_checkpoint = "a~b"\n')
    resolved = config.resolve({"name": "mini", "config": str(file)})
    assert resolved.config.data_dir == "/home/me/data"
    assert resolved.config.init_checkpoint == "a~b"
    assert expanded("./~/x") == "./~/x"


def test_an_unknown_home_folder_is_refused() -> None:
    with pytest.raises(UserError, match=r"^~no.such.user/x: the home folder ~no.such.user is not"):
        expanded("~no.such.user/x")
