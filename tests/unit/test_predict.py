"""`predict`, as a user runs it: texts, files, answers and refusals. The numbers of the answers are
compared with Hugging Face's in tests/numerics/test_predict_hugging_face.py."""

from __future__ import annotations

import io
import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bert_pretraining.checkpoint import read_weights, save_checkpoint, write_weights
from helpers import ROOT, in_process
from screens import read_until

START = "model.ckpt-28252.apex.pt"
BOATS = "martha likes her white boat and she likes the pier ."
NEXT = "she is near the sand but those white boats sail calmly ."
OTHER = "he is near the gate but those ripe pears ripen slowly ."


@pytest.fixture
def ask(mini_data: Path, tmp_path: Path) -> object:
    """ask(word, ...): `predict` on the mini data set's start checkpoint, or on `checkpoint`."""

    def run(*words: object, checkpoint: Path = mini_data / START) -> subprocess.CompletedProcess:
        return in_process("predict", checkpoint, *words, cwd=tmp_path)

    return run


def answers(done: subprocess.CompletedProcess) -> list[dict]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def words_of(answer: dict, mask: int = 0) -> list[str]:
    return [word["token"] for word in answer["masks"][mask]["words"]]


# ---- what is answered


def test_text_for_people(ask: object) -> None:
    done = ask("those boats [MASK] white .", "they [MASK] .", "--top", 2)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "[CLS] those boat ##s [MASK] white . [SEP] they [MASK] . [SEP]"
    assert [lines[1], lines[4]] == ["[MASK] 1:", "[MASK] 2:"]
    assert [line[:4] for line in (lines[2], lines[3], lines[5], lines[6])] == ["  0."] * 4
    assert lines[7].startswith("B follows A: ")
    assert len(lines) == 8


def test_the_start_checkpoint_has_learned_some_of_the_grammar(ask: object) -> None:
    (found,) = answers(ask("julia , who [MASK] the roof , likes the fierce dragon .", "--json"))
    assert set(words_of(found)[:2]) == {"likes", "sees"}
    assert len(words_of(found)) == 5
    (found,) = answers(ask(BOATS, NEXT, "--json"))
    assert found["masks"] == []
    assert found["is_next"] > 0.8
    (found,) = answers(ask(BOATS, OTHER, "--json"))
    assert found["is_next"] < 0.1


def test_two_texts_are_one_text_with_sep(ask: object) -> None:
    two = ask(BOATS, "she [MASK] .", "--json").stdout
    assert ask(f"{BOATS} [SEP] she [MASK] .", "--json").stdout == two
    assert ask(f"[CLS] {BOATS} [SEP] she [MASK] . [SEP]", "--json").stdout == two
    (one,) = answers(ask("[CLS] she [MASK] . [SEP]", "--json"))
    assert one["tokens"] == ["[CLS]", "she", "[MASK]", ".", "[SEP]"]
    assert (one["is_pair"], one["is_next"]) == (False, None)


def test_probabilities_of_the_whole_vocabulary(ask: object) -> None:
    """`--top` may exceed it; two of the model's 240 rows are padding and no words."""
    (found,) = answers(ask("the [MASK] .", "--top", 1000, "--json"))
    shares = [word["probability"] for word in found["masks"][0]["words"]]
    assert len(shares) == 238
    assert shares == sorted(shares, reverse=True)
    assert 0.99 < sum(shares) < 1.0


def test_marks_beside_a_mask_and_capitals(ask: object) -> None:
    (found,) = answers(ask("The[MASK], ([MASK])s [MASK][MASK]!", "--json"))
    assert found["tokens"] == [
        "[CLS]", "the", "[MASK]", ",", "[UNK]", "[MASK]", "[UNK]", "s", "[MASK]", "[MASK]",
        "[UNK]", "[SEP]",
    ]  # fmt: skip
    assert [mask["place"] for mask in found["masks"]] == [2, 5, 8, 9]


def test_what_the_vocabulary_cannot_spell_is_told(ask: object) -> None:
    # Half of the second character's bytes, as LANG=C hands them over, is put together again.
    done = ask("caf\u00e9 \udce4\udcb8\udcad [MASK] [UNK] 7", "--json")
    (found,) = answers(done)
    assert found["tokens"][:6] == ["[CLS]", "c", "##a", "##f", "##e", "[UNK]"]
    assert found["unknown"] == ["\u4e2d", "7"]
    assert done.stderr == (
        "Notice: [UNK] stands for what the vocabulary cannot spell: '\u4e2d', '7'\n"
    )


def test_the_longest_text(ask: object) -> None:
    (found,) = answers(ask("[MASK] " * 62, "--top", 1, "--json"))
    assert len(found["masks"]) == 62
    done = ask("[MASK] " * 63)
    assert done.returncode == 2
    assert done.stderr == (
        "Error: 65 tokens, [CLS] and [SEP] included, but the model has 64 positions; give a "
        "shorter text\n"
    )


# ---- what is refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], 'no text; pass one, such as "the [MASK] sleeps .", or --interactive'),
        ([""], "the text is empty"),
        (["a", " "], "sentence 2 is empty"),
        (["[SEP] a"], "sentence 1 is empty"),
        (["\u200b", "a"], "sentence 1 has no visible characters"),
        (["the boat"], "no [MASK] in it; write [MASK] in place of a word, or give a second"),
        (["a", "b", "c"], "3 sentences, but BERT takes one or two"),
        (["a [SEP] b [SEP] c"], "3 sentences, but BERT takes one or two"),
        (["a <mask>"], "the text holds '<mask>'; write [MASK], in capitals"),
        (["a", "b [Mask] [MASK]"], "sentence 2 holds '[Mask]'; write [MASK]"),
        (["a [CLS] [MASK]"], "the text holds [CLS], which stands for no word"),
        (["[MASK] [PAD]"], "the text holds [PAD], which stands for no word"),
        (["a \udce9 [MASK]"], "the text is not UTF-8: byte 0xE9 after 2 characters"),
        (["[MASK]", "--top", "0"], "argument --top: 0 is less than 1"),
        (["[MASK]", "--device", "nonsense"], "--device nonsense: this PyTorch sees no such"),
        (["[MASK]", "--interactive"], "--interactive reads texts from standard input"),
        (["[MASK]", "--jsn"], "unknown flag --jsn; did you mean --json"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_one_line_says_what_is_wrong(ask: object, words: list[str], message: str) -> None:
    done = ask(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("Error: ")
    assert message in done.stderr


def test_a_text_may_look_like_a_flag(ask: object) -> None:
    (found,) = answers(ask("--json", "--", "--a-b [MASK]"))
    assert found["unknown"] == ["--a-b"]


# ---- files


def test_every_kind_of_checkpoint_gives_the_same_answer(
    ask: object, mini_data: Path, tmp_path: Path
) -> None:
    expected = ask(BOATS, "she [MASK] .", "--json").stdout
    weights = read_weights(mini_data / START)
    run = tmp_path / "run-1"
    run.mkdir()
    settings = {"data_dir": str(mini_data), "bert_config_path": None}
    (run / "config.json").write_text(json.dumps(settings))
    save_checkpoint(run / "model.ckpt-7.pt", weights, {}, {"global_steps": 7})
    # A run's own checkpoint needs no flag: its settings name the data set.
    assert ask(BOATS, "she [MASK] .", "--json", checkpoint=run / "model.ckpt-7.pt").stdout == (
        expected
    )
    (run / "config.json").write_text(json.dumps({"data_dir": "data/gone"}))
    done = ask("[MASK]", checkpoint=run / "model.ckpt-7.pt")
    assert done.returncode == 2
    assert done.stderr.endswith(
        "pass --bert_config FILE, or run this in the folder from which data/gone is found\n"
    )
    (run / "config.json").write_text(json.dumps(settings))
    done = in_process("checkpoint", "convert", run / "model.ckpt-7.pt", "hf", "--to", "hf",
                      cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    for path in (tmp_path / "hf", tmp_path / "hf/model.safetensors"):
        done = ask(
            "--vocab", mini_data / "vocab.txt", BOATS, "--json", "she [MASK] .", checkpoint=path
        )
        assert (done.stdout, done.stderr) == (expected, "")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    shutil.copy(mini_data / "vocab.txt", tmp_path / "hf")
    done = ask(BOATS, "she [MASK] .", "--json", checkpoint=tmp_path / "hf")
    assert done.stdout == expected
    assert "'gelu' means the erf form to Hugging Face" in done.stderr


def test_files_that_are_missing_or_of_another_model(
    ask: object, mini_data: Path, tmp_path: Path
) -> None:
    shutil.copy(mini_data / START, tmp_path / "a.pt")
    alone = tmp_path / "a.pt"
    done = ask("[MASK]", checkpoint=alone)
    assert f"{alone}: no bert_config.json beside it" in done.stderr
    sizes = tmp_path / "sizes"
    sizes.mkdir()
    shutil.copy(mini_data / "bert_config.json", sizes)
    flags = ("--bert_config", sizes / "bert_config.json")
    done = ask("[MASK]", *flags, checkpoint=alone)
    assert f"no vocab.txt beside {alone} or {sizes / 'bert_config.json'}" in done.stderr
    words = (mini_data / "vocab.txt").read_text().splitlines()
    (sizes / "vocab.txt").write_text("\n".join([*words, "more"]))
    done = ask("[MASK]", *flags, checkpoint=alone)
    assert done.returncode == 2
    assert "has 239 word pieces, but the model has 238" in done.stderr
    # Sizes may count the padding.
    values = json.loads((mini_data / "bert_config.json").read_text())
    (sizes / "bert_config.json").write_text(json.dumps({**values, "vocab_size": 240}))
    assert ask("[MASK]", *flags, checkpoint=alone).returncode == 0
    (sizes / "bert_config.json").write_text(json.dumps({**values, "num_hidden_layers": 3}))
    done = ask("[MASK]", *flags, "--vocab", mini_data / "vocab.txt", checkpoint=alone)
    assert done.returncode == 2
    assert "num_hidden_layers 2 instead of 3" in done.stderr
    done = ask("[MASK]", checkpoint=mini_data)
    assert f"a directory, not a checkpoint; pass {mini_data / START}" in done.stderr


def test_a_cased_vocabulary_keeps_capitals(ask: object, mini_data: Path, tmp_path: Path) -> None:
    words = (mini_data / "vocab.txt").read_text().splitlines()
    words[-1] = "Anna"
    (tmp_path / "cased.txt").write_text("\n".join(words))
    flags = ("--vocab", tmp_path / "cased.txt", "--json", "Anna Sees [MASK]")
    done = ask(*flags)
    (found,) = answers(done)
    assert found["tokens"] == ["[CLS]", "Anna", "[UNK]", "[MASK]", "[SEP]"]
    assert "cased.txt has words in capitals, so the text is not lower-cased" in done.stderr
    done = ask(*flags, "--do_lower_case")
    (found,) = answers(done)
    assert found["tokens"] == ["[CLS]", "anna", "sees", "[MASK]", "[SEP]"]
    assert done.stderr == ""


def test_heads_that_a_checkpoint_lacks(ask: object, mini_data: Path, tmp_path: Path) -> None:
    weights = read_weights(mini_data / START)
    shutil.copy(mini_data / "bert_config.json", tmp_path)
    shutil.copy(mini_data / "vocab.txt", tmp_path)

    def without(*beginnings: str, **more: torch.Tensor) -> Path:
        kept = {name: value for name, value in weights.items() if not name.startswith(beginnings)}
        write_weights(tmp_path / "a.pt", {**kept, **more})
        return tmp_path / "a.pt"

    pair = (BOATS, "she [MASK] .", "--json")
    (whole,) = answers(ask(*pair))
    done = ask(*pair, checkpoint=without("cls.seq_relationship", "bert.pooler"))
    (found,) = answers(done)
    assert found == {**whole, "is_next": None}
    assert done.stderr == (
        "Notice: the checkpoint has no next-sentence head, so whether B follows A is not told\n"
    )
    done = ask(BOATS, NEXT, checkpoint=tmp_path / "a.pt")
    assert "the checkpoint has no next-sentence head, so it does not tell" in done.stderr
    for gone, message in (
        ("cls.", "lacks the head that predicts words (cls.predictions.*)"),
        ("cls.predictions.transform", "lacks 4 tensors of its heads (cls.predictions.transform"),
    ):
        done = ask(*pair, checkpoint=without(gone))
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr
        assert "--missing_weights" not in done.stderr
    # The head of another task does no harm.
    done = ask(*pair, checkpoint=without("none", **{"classifier.weight": torch.ones(2, 64)}))
    assert answers(done) == [whole]


def test_weights_of_no_training_are_told(ask: object, mini_data: Path, tmp_path: Path) -> None:
    weights = read_weights(mini_data / START)
    weights["bert.pooler.dense.weight"] = torch.zeros(64, 64)
    write_weights(tmp_path / "a.pt", weights)
    flags = ("--bert_config", mini_data / "bert_config.json", "[MASK]")
    done = ask(*flags, checkpoint=tmp_path / "a.pt")
    assert done.returncode == 0
    assert "Notice: " in done.stderr
    assert "these were never trained" in done.stderr
    weights["bert.pooler.dense.weight"][3, 4] = float("nan")
    write_weights(tmp_path / "a.pt", weights)
    done = ask(*flags, checkpoint=tmp_path / "a.pt")
    assert done.returncode == 2
    assert "1 of 4,096 numbers of bert.pooler.dense.weight are NaN or infinite" in done.stderr


# ---- --interactive


def piped(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_lines_of_a_pipe(ask: object, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = b"the [MASK] .\n\nno mask\n caf\xe4 [MASK]\nanna [SEP] she [MASK] ."
    piped(monkeypatch, lines)
    done = ask("--interactive", "--top", 1)
    assert done.returncode == 2
    first, second, rest = done.stdout.split("\n\n")
    assert first.splitlines()[:2] == ["[CLS] the [MASK] . [SEP]", "[MASK]:"]
    assert second.splitlines()[-1].startswith("B follows A: ")
    assert rest == ""
    errors = done.stderr.splitlines()
    assert [error.split(":")[:2] for error in errors] == [
        ["Error", " line 3"],
        ["Error", " line 4"],
    ]
    assert "not UTF-8: byte 0xE4 after 3 characters" in errors[1]
    piped(monkeypatch, lines)
    done = ask("--interactive", "--json")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [next(iter(one)) for one in found] == ["tokens", "error", "error", "tokens"]
    piped(monkeypatch, b"the [MASK] .")
    assert ask("--interactive").returncode == 0
    piped(monkeypatch, b"")
    assert ask("--interactive").stdout == ""
    monkeypatch.setattr(sys, "stdin", None)
    assert "--interactive: standard input is closed" in ask("--interactive").stderr


def test_a_conversation_on_a_terminal(mini_data: Path) -> None:
    ours, its = pty.openpty()
    program = [sys.executable, "-m", "bert_pretraining", "predict", str(mini_data / START)]
    started = subprocess.Popen(
        [*program, "--interactive", "--top", "1"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "base"), "LC_ALL": "C"},
        stdin=its, stdout=its, stderr=its,
    )  # fmt: skip
    os.close(its)

    try:
        assert "Ctrl-D ends" in read_until(ours, "\r\n> ")
        os.write(ours, b"the [MASK] .\n")
        assert "[CLS] the [MASK] . [SEP]\r\n[MASK]:\r\n  0." in read_until(ours, "\r\n> ")
        os.write(ours, b"nothing\n")
        assert "Error: nothing to predict" in read_until(ours, "\r\n> ")
        os.write(ours, b"\x04")
        assert started.wait(timeout=600) == 0
    finally:
        started.kill()
        started.wait()
        os.close(ours)
