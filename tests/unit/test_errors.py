"""The errors that users see."""

from __future__ import annotations

import pickle

from bert_pretraining.errors import UserError


def test_a_user_error_is_one_line_and_keeps_its_parts_between_processes() -> None:
    error = pickle.loads(pickle.dumps(UserError("no shards in data", "pass --data_dir DIR")))
    assert str(error) == "no shards in data; pass --data_dir DIR"
    assert (error.problem, error.fix) == ("no shards in data", "pass --data_dir DIR")
