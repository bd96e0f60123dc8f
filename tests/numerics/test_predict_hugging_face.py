"""What `predict` answers, compared with Hugging Face's BertForPreTraining on the same weights."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from bert_pretraining.checkpoint import write_weights
from bert_pretraining.predict import Sources, load
from bert_pretraining.preparation.grammar import vocabulary
from helpers import REFERENCE, distinct_weights, in_process, needs_reference, tiny_config

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

TEXTS = [
    ["the [MASK] ."],
    ["[MASK]"],
    ["these [MASK] boats [MASK] calmly , near the[MASK]."],
    ["anna likes her rose .", "[MASK] likes the wall ."],
    ["when those boats sail , [MASK] sees", "she is at the pier but the Lamp glows"],
    ["martha peter " * 20, "[MASK]s and [MASK] !"],
]


def theirs(
    model: torch.nn.Module, tokenizer: object, texts: list[str]
) -> tuple[list[str], torch.Tensor, float]:
    """Tokens, (M, vocabulary) probabilities of each [MASK], and that of the next sentence."""
    encoded = tokenizer(*texts, return_tensors="pt")
    with torch.no_grad():
        found = model(**encoded)
    ids = encoded["input_ids"][0]
    shares = found.prediction_logits[0].softmax(dim=1)[ids == tokenizer.mask_token_id]
    return (
        tokenizer.convert_ids_to_tokens(ids),
        shares,
        found.seq_relationship_logits.softmax(dim=1)[0, 0].item(),
    )


def assert_equal_answers(
    source: Path, sizes: Path, vocab: Path, folder: Path, trim: bool, has_padding: bool
) -> None:
    """Ours, from `source` and from its export, and theirs from the export."""
    flags = ["--trim_vocab"] if trim else []
    done = in_process(
        "checkpoint", "convert", source, folder, "--to", "hf", "--bert_config", sizes, *flags,
        cwd=folder.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Where the export has as many rows as the source, both must give their answers.
    paths = [folder] if trim and has_padding else [folder, source]
    predictors = [
        load(Sources(path, None if path == folder else sizes, vocab), "cpu", pytest.fail)
        for path in paths
    ]
    tokenizer = transformers.BertTokenizer(str(vocab), do_lower_case=True)
    model = transformers.BertForPreTraining.from_pretrained(folder).eval()
    for texts in TEXTS:
        tokens, shares, is_next = theirs(model, tokenizer, texts)
        for ours in (predictor.predict(texts, top=7) for predictor in predictors):
            assert ours.tokens == tokens
            assert [tokens[mask.place] for mask in ours.masks] == ["[MASK]"] * len(shares)
            assert ours.unknown == []
            for mask, row in zip(ours.masks, shares, strict=True):
                values, ids = row.topk(7)
                assert [word.id for word in mask.words] == ids.tolist()
                assert [word.probability for word in mask.words] == pytest.approx(
                    values.tolist(), abs=1e-5, rel=0
                )
            if texts[1:]:
                assert ours.is_next == pytest.approx(is_next, abs=1e-5, rel=0)
            else:
                assert ours.is_next is None


@pytest.mark.parametrize("trim", [False, True], ids=["padded", "trimmed"])
def test_a_random_model(tmp_path: Path, trim: bool) -> None:
    tokens = [*vocabulary(), "!"]
    config = tiny_config(vocab_size=len(tokens), max_position_embeddings=64)
    assert config.padded_vocab_size > len(tokens)
    weights = distinct_weights(config)
    weights = {name: value * 0.3 for name, value in weights.items()}
    weights["cls.predictions.decoder.weight"] = weights["bert.embeddings.word_embeddings.weight"]
    for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"):
        weights[name][len(tokens) :] = 0.0
    write_weights(tmp_path / "a.pt", weights)
    (tmp_path / "sizes.json").write_text(json.dumps(asdict(config)))
    (tmp_path / "words.txt").write_text("\n".join(tokens) + "\n")
    names = ("a.pt", "sizes.json", "words.txt", "hf")
    assert_equal_answers(*(tmp_path / name for name in names), trim, has_padding=True)


@needs_reference
def test_the_reference_checkpoint(tmp_path: Path) -> None:
    folder = REFERENCE / "checkpoint"
    sizes, vocab = folder / "bert_config.json", REFERENCE / "vocab.txt"
    # TensorFlow's file has no rows that pad the vocabulary, so none takes part in the softmax.
    for source, trim in (("model.ckpt-28252.apex.pt", False), ("tf1/model.ckpt-28252", True)):
        made = tmp_path / ("trimmed" if trim else "padded")
        assert_equal_answers(folder / source, sizes, vocab, made, trim, has_padding=not trim)
