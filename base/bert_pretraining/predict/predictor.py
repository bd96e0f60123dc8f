"""A model that is asked for words and next sentences, and its answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from bert_pretraining.errors import UserError
from bert_pretraining.model.batch import PackedBatch
from bert_pretraining.model.heads import BertForPreTraining
from bert_pretraining.predict.texts import HOW_TO_ASK, Tokens, sentences_of, tokens_of
from bert_pretraining.preparation.vocabulary import Vocabulary


@dataclass(frozen=True)
class Word:
    """A word piece of the vocabulary and its probability, 0 to 1; "##" continues a word."""

    token: str
    id: int
    probability: float


@dataclass(frozen=True)
class Mask:
    """The likeliest words for one [MASK], the likeliest first. place: among the tokens, from 0."""

    place: int
    words: list[Word]


@dataclass(frozen=True)
class Prediction:
    """The answer to one or two sentences.

    tokens: as the model reads them. masks: in the order of the text. is_pair: whether there are
    two sentences. is_next: the probability that the second follows the first; None for one
    sentence, and where the checkpoint has no next-sentence head. unknown: words with a character
    that the vocabulary lacks.
    """

    tokens: list[str]
    masks: list[Mask]
    is_pair: bool
    is_next: float | None
    unknown: list[str]

    def to_json(self) -> dict:
        """Plain data for json.dumps."""
        return asdict(self)

    def describe(self) -> str:
        """Text: a line with the tokens, then the words of each [MASK], then the next sentence."""
        lines = [" ".join(self.tokens)]
        for number, mask in enumerate(self.masks, 1):
            lines.append(f"[MASK] {number}:" if self.masks[1:] else "[MASK]:")
            lines += [f"  {_shown(word.probability):<8} {word.token}" for word in mask.words]
        if self.is_next is not None:
            verdict = "yes" if self.is_next >= 0.5 else "no"
            lines.append(
                f"B follows A: {verdict} (probability that it does: {_shown(self.is_next)})"
            )
        return "\n".join(lines)


class Predictor:
    """Asks a model, which runs without dropout, in the type of its weights.

    Args:
        model: on `device`.
        rows: of the word embedding that take part in the softmax: those of the checkpoint. The
            model may pad them further.
    """

    def __init__(
        self, model: BertForPreTraining, vocabulary: Vocabulary, device: torch.device, rows: int
    ) -> None:
        self._model, self._vocabulary, self._device = model.eval(), vocabulary, device
        self._rows = rows
        self._words = list(vocabulary.ids)

    @torch.inference_mode()
    def predict(self, texts: Sequence[str], top: int = 5) -> Prediction:
        """Answer one or two texts, as `sentences_of` takes them, with `top` words a [MASK].

        Raises UserError for texts that the model cannot be asked.
        """
        config = self._model.config
        tokens = tokens_of(sentences_of(texts), self._vocabulary, config.max_position_embeddings)
        self._require_answerable(tokens)
        batch = _batch(tokens).to(self._device)
        hidden = self._model.bert(batch)
        return Prediction(
            tokens=[self._words[token] for token in tokens.ids],
            masks=self._masks(hidden, tokens, top),
            is_pair=tokens.is_pair,
            is_next=self._is_next(hidden, batch) if tokens.is_pair else None,
            unknown=tokens.unknown,
        )

    @property
    def judges_pairs(self) -> bool:
        """Whether the model has a next-sentence head."""
        return "nsp" in self._model.losses

    def _require_answerable(self, tokens: Tokens) -> None:
        if not tokens.is_pair:
            return
        if self._model.config.type_vocab_size < 2:
            raise UserError(
                "the model has one segment embedding (type_vocab_size 1), so it takes no second "
                "sentence",
                "give one sentence with [MASK]",
            )
        if not tokens.masks and not self.judges_pairs:
            raise UserError(
                "the checkpoint has no next-sentence head, so it does not tell whether B follows A",
                f"{HOW_TO_ASK.split(',')[0]}, or pass a checkpoint with both heads",
            )

    def _masks(self, hidden: Tensor, tokens: Tokens, top: int) -> list[Mask]:
        """hidden: (T, hidden), of every token."""
        if not tokens.masks:
            return []
        places = torch.tensor(tokens.masks, device=self._device)
        logits = self._model.cls.predictions(hidden.index_select(0, places))
        # Rows that pad the checkpoint's vocabulary count, as in its training, but are no words.
        shares = logits[:, : self._rows].cpu().double().softmax(dim=1)[:, : len(self._words)]
        found = shares.topk(min(top, len(self._words)), dim=1)
        return [
            Mask(
                place,
                [
                    Word(self._words[token], token, share)
                    for token, share in zip(ids, values, strict=True)
                ],
            )
            for place, ids, values in zip(
                tokens.masks, found.indices.tolist(), found.values.tolist(), strict=True
            )
        ]

    def _is_next(self, hidden: Tensor, batch: PackedBatch) -> float | None:
        if not self.judges_pairs:
            return None
        logits = self._model.cls.seq_relationship(self._model.bert.pooler(hidden, batch))
        return logits.cpu().double().softmax(dim=1)[0, 0].item()  # label 0: the second one is next


def _shown(probability: float) -> str:
    return f"{probability:.4f}" if probability >= 0.0001 else f"{probability:.1e}"


def _batch(tokens: Tokens) -> PackedBatch:
    """One sequence, on the CPU; its labels are not used."""
    count, masked = len(tokens.ids), len(tokens.masks)
    segments = torch.zeros(count, dtype=torch.int32)
    segments[tokens.first_length :] = 1
    return PackedBatch(
        input_ids=torch.tensor(tokens.ids, dtype=torch.int32),
        segment_ids=segments,
        position_ids=torch.arange(count, dtype=torch.int32),
        cu_seqlens=torch.tensor([0, count], dtype=torch.int32),
        masked_positions=torch.tensor(tokens.masks, dtype=torch.int32),
        masked_labels=torch.zeros(masked, dtype=torch.int64),
        next_sentence_labels=torch.zeros(1, dtype=torch.int64),
        max_seqlen=count,
    )
