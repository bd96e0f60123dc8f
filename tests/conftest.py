"""Fixtures that are made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from bert_pretraining.preparation.mini import MiniSettings, make_mini


@pytest.fixture(scope="session")
def mini_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mini data set, with its start checkpoint."""
    directory = tmp_path_factory.mktemp("data") / "bert_mini"
    report = make_mini(MiniSettings(directory))
    assert report.has_start_checkpoint
    return directory
