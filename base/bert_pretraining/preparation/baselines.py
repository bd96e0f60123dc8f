"""The accuracy of two predictors without a network, to compare the target with."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np


def baselines(train: dict[str, np.ndarray], evaluation: dict[str, np.ndarray]) -> dict[str, float]:
    """Masked-token accuracy on `evaluation` of predictors that count tokens in `train`.

    "commonest token" always predicts the token that is masked most often. "neighbour
    statistics" predicts the label that is most frequent between this left and this right
    token, else after this left token, else in all.

    train, evaluation: arrays as in a shard.
    """
    common: Counter[int] = Counter()
    after: defaultdict[int, Counter[int]] = defaultdict(Counter)
    between: defaultdict[tuple[int, int], Counter[int]] = defaultdict(Counter)
    for left, right, label in _masked(train):
        common[label] += 1
        after[left][label] += 1
        between[left, right][label] += 1
    commonest = common.most_common(1)[0][0]
    hits = {"commonest token": 0, "neighbour statistics": 0}
    total = 0
    for left, right, label in _masked(evaluation):
        counts = between.get((left, right)) or after.get(left) or common
        hits["commonest token"] += label == commonest
        hits["neighbour statistics"] += label == counts.most_common(1)[0][0]
        total += 1
    return {name: count / max(total, 1) for name, count in hits.items()}


def _masked(arrays: dict[str, np.ndarray]) -> list[tuple[int, int, int]]:
    """(left token, right token, label) of every masked token; the tokens are the input's."""
    row, column = np.nonzero(arrays["masked_lm_ids"])
    position = arrays["masked_lm_positions"][row, column]
    ids = arrays["input_ids"]
    columns = (ids[row, position - 1], ids[row, position + 1], arrays["masked_lm_ids"][row, column])
    return list(zip(*(part.tolist() for part in columns), strict=True))
