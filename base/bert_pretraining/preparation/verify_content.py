"""The checks of `data verify` for data that can be read and is wrong as a whole.

Every row may be right, and the set still teach nothing: all next sentences true, nothing masked.
The limits are such that text made as BERT's procedure makes it never meets them.
"""

from __future__ import annotations

from collections.abc import Sequence

from bert_pretraining.preparation.verify_report import CheckResults, FileSummary

FEWEST_SEQUENCES = 32  # below, all labels are the same by chance once in two thousand million
# Of sequences with next_sentence_labels 1. BERT's procedure gives about a half.
LABEL_LIMITS, USUAL_LABELS = (0.02, 0.98), (0.3, 0.75)
# Of masked tokens that stand in input_ids as they are. BERT's procedure leaves a tenth.
MOST_UNMASKED, USUAL_UNMASKED = 0.5, 0.2
USUAL_MASKED = (0.08, 0.22)  # of all tokens. BERT masks 15%, MLPerf's longest sequences a bit less.


def check_content(set_name: str, files: Sequence[FileSummary], results: CheckResults) -> None:
    """Check the next-sentence labels and masked tokens of a directory as a whole."""
    readable = [file for file in files if file.readable and file.num_sequences]
    _check_next_sentences(set_name, readable, results)
    _check_masks(set_name, readable, results)
    forms: dict[str, list[str]] = {}
    for file in readable:
        for form in file.forms:
            forms.setdefault(form, []).append(file.name)
    for form, names in forms.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        results.notes.append(f"{names[0]}{more}: {form}; training reads it")


def _check_next_sentences(
    set_name: str, files: Sequence[FileSummary], results: CheckResults
) -> None:
    again = "make them with documents of several sentences each, or train with --objective mlm"
    sequences = sum(file.num_sequences for file in files)
    ones = sum(file.next_sentence_ones for file in files)
    if sequences < FEWEST_SEQUENCES:
        return
    share = ones / sequences
    told = f"{set_name}: next_sentence_labels is 1 in {ones} of {sequences} sequences ({share:.1%})"
    if not LABEL_LIMITS[0] <= share <= LABEL_LIMITS[1]:
        kind = "next-sentence labels all alike"
        results.problem(kind, f"{told}, expected about half: nothing to learn; {again}")
        return
    if not USUAL_LABELS[0] <= share <= USUAL_LABELS[1]:
        results.notes.append(f"{told}, expected about half")
    for file in files:
        alike = file.next_sentence_ones in (0, file.num_sequences)
        if alike and file.num_sequences >= FEWEST_SEQUENCES:
            value = int(file.next_sentence_ones > 0)
            line = f"{file.name}: next_sentence_labels is {value} in all sequences of this file"
            results.problem("next-sentence labels all alike in a file", f"{line}; {again}")


def _check_masks(set_name: str, files: Sequence[FileSummary], results: CheckResults) -> None:
    masked = sum(file.num_masked for file in files)
    tokens = sum(int(file.length_counts @ range(len(file.length_counts))) for file in files)
    sequences = sum(file.num_sequences for file in files)
    if not masked or sequences < FEWEST_SEQUENCES:
        return
    share = masked / tokens
    if not USUAL_MASKED[0] <= share <= USUAL_MASKED[1]:
        results.notes.append(
            f"{set_name}: {masked} of {tokens} tokens are masked ({share:.1%}), expected about 15%"
        )
    unmasked = sum(file.num_unmasked for file in files)
    share = unmasked / masked
    told = f"{set_name}: {unmasked} of {masked} masked tokens ({share:.1%}) stand in input_ids"
    if share > MOST_UNMASKED:
        kind = "answers in the text"
        fix = "put [MASK] in their place (data create-examples does)"
        results.problem(kind, f"{told}, so that the model sees the answers; {fix}")
    elif share > USUAL_UNMASKED:
        results.notes.append(f"{told}, expected about 10%")
