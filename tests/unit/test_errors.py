"""The errors that users see."""

from __future__ import annotations

import ast
import pickle
import re

from bert_pretraining.errors import UserError
from helpers import ROOT

GROUPS = "config|data|checkpoint|bench|submission"
COMMAND = re.compile(rf"(?<!bert_pretraining )\b({GROUPS}) (show|list|[a-z]+-[a-z]+|"
                     r"(prepare|segment|verify|inspect|convert|diff|step|optimizer|run|assemble|"
                     r"check|rcp|summarize)(?= -|'))")  # fmt: skip


def test_a_user_error_is_one_line_and_keeps_its_parts_between_processes() -> None:
    error = pickle.loads(pickle.dumps(UserError("no shards in data", "pass --data_dir DIR")))
    assert str(error) == "no shards in data; pass --data_dir DIR"
    assert (error.problem, error.fix) == ("no shards in data", "pass --data_dir DIR")


def test_commands_in_the_fix_of_an_error_can_be_typed() -> None:
    """As "python -m bert_pretraining config list"."""
    fixes = 0
    for path in sorted((ROOT / "base").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or getattr(node.func, "id", "") != "UserError":
                continue
            for fix in node.args[1:]:
                fixes += 1
                found = COMMAND.search(ast.unparse(fix))
                assert found is None, f"{path}:{node.lineno}: {found}"
    assert fixes > 100
    assert COMMAND.search("'config list' prints all")
    assert not COMMAND.search("python -m bert_pretraining config list prints all")
