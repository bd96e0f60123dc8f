"""`data segment`: sentences, articles, and the MLPerf reference's evaluation articles."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from bert_pretraining.errors import UserError
from bert_pretraining.preparation.documents import documents_of
from bert_pretraining.preparation.segment import (
    SegmentReport,
    describe,
    eval_choice,
    segment,
)
from bert_pretraining.preparation.sentences import sentences

WIKI = """<doc id="1" url="https://example.org/1" title="Tea">
Tea

Tea is a drink. It is old.
H<sub>2</sub>O boils &amp; steams.<br>See <a href="x y">3.14 cups</a>! &lt;ref name="a"&gt;

</doc>
<doc id="2" url="https://example.org/2" title="Nothing">
Nothing

</doc>
<doc id="3" url="https://example.org/3" title="Rain">
Rain
One paragraph without an end
Rain falls if a &lt;b and c&gt; d.
</doc>
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Wait... What?! Yes.", ["Wait...", "What?!", "Yes."]),
        ("It is 3.14 m. 2 more follow. then none", ["It is 3.14 m.", "2 more follow. then none"]),
        ('She said "No." He left. (So.) Then', ['She said "No."', "He left.", "(So.)", "Then"]),
        ('Go. "Now?" [sic] Go. (Or not.)', ["Go.", '"Now?"', "[sic] Go.", "(Or not.)"]),
        ("Ends.\u201d \u201cStarts. \u00c9tat", ["Ends.\u201d", "\u201cStarts.", "\u00c9tat"]),
        ("Mr. Smith met (Dr. Who) vs. MRS. Dalloway.", None),
        ("J. R. R. Tolkien and J.-P. Sartre of the U.S. Army, e.g. Tom, i.e. Them.", None),
        ("Tea, milk, etc. The rest, Ph.D. Students too.", None),
        ("See No. 5, Fig. 2, pp. 7 and Jan. 3 of Vol. 1.", None),
        ("She said no. They left.", ["She said no.", "They left."]),
        ("Not etc.) The rest", ["Not etc.)", "The rest"]),
        ("In 1990. In x. The A.B. C", ["In 1990.", "In x.", "The A.B. C"]),
        ("  much \t white\u00a0\n space. Here  ", ["much white space.", "Here"]),
        ("no.Space v2.0.Next", None),
        (" \n ", []),
    ],
)  # fmt: skip
def test_sentences(text: str, expected: list[str] | None) -> None:
    assert sentences(text) == ([text] if expected is None else expected)


def test_wiki_extractor_output(tmp_path: Path) -> None:
    source = tmp_path / "wiki_00"
    source.write_text(WIKI)
    report = segment([source], tmp_path / "out", 0, 1)
    assert (tmp_path / "out" / "part-00000-of-00001").read_text() == (
        "Tea is a drink.\nIt is old.\nH2O boils & steams.\nSee 3.14 cups!\n\n"
        "One paragraph without an end\nRain falls if a <b and c> d.\n\n"
    )
    assert (tmp_path / "out" / "eval.txt").read_bytes() == b""
    assert report == SegmentReport(tmp_path / "out", 1, 2, 0, 6, 1)
    assert describe(report) == (
        f"Made {tmp_path / 'out'}: 2 articles in 1 part to train on, 0 in eval.txt, "
        "6 sentences in all\nLeft out 1 article without text"
    )


def test_plain_paragraphs() -> None:
    single = "\n\n\nOne\nline. <b>\n \nTwo.\n\n\n"
    assert list(documents_of(single, "blank_line", "x")) == [["One\nline. <b>"], ["Two."]]
    double = "One.\n\nStill one.\r\n\t\r\n\r\n\r\nTwo.\n"
    assert list(documents_of(double, "blank_line", "x")) == [["One.", "Still one."], ["Two."]]


def test_plain_text_with_a_byte_order_mark_and_wrapped_lines(tmp_path: Path) -> None:
    source = tmp_path / "text"
    source.write_bytes("\ufeffOne sentence on\r\ntwo lines. Next.\r\n\r\nNew.\r\n".encode())
    segment([source], tmp_path / "out", 0, 1)
    expected = b"One sentence on two lines.\nNext.\n\nNew.\n\n"
    assert (tmp_path / "out" / "part-00000-of-00001").read_bytes() == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (WIKI.removesuffix("</doc>\n"), "cut off, its last </doc> is missing"),
        (WIKI.replace("</doc>\n<doc", "<doc", 1), "line 7 does not fit"),
        (WIKI.replace("</doc>\n<doc", "</doc>\nstray\n<doc", 1), "line 8 does not fit"),
        (WIKI.replace("</doc>\n<doc", "</doc>\n</doc>\n<doc", 1), "line 8 does not fit"),
        (" \n\n", "empty; give text"),
        ("<doc >\nTitle\n</doc>\n", "0 documents with text, but 1 is wanted for evaluation alone;"),
        ("Only one.\n", "1 document, and 1 is wanted for evaluation, so that none is left"),
    ],
)
def test_bad_text(tmp_path: Path, text: str, message: str) -> None:
    source = tmp_path / "text"
    source.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        segment([source], tmp_path / "out", 1, 3)
    assert str(caught.value).startswith(str(source))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["text"], "something was left behind"


def test_bad_files_and_arguments(tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "text"
    good.write_text("One.\n\nTwo.\n")
    bad.write_bytes(b"caf\xe9")
    output = tmp_path / "out"
    with pytest.raises(UserError, match=r"text: not UTF-8 text \(byte 3\)"):
        segment([good, bad], output, 0, 1)
    with pytest.raises(UserError, match=r"cannot read .*absent: does not exist"):
        segment([tmp_path / "absent"], output, 0, 1)
    with pytest.raises(UserError, match="good: given twice"):
        segment([good, tmp_path / "." / "x" / ".." / "good"], output, 0, 1)
    for inputs, wanted, files in (
        ([], 0, None),
        ([good], -1, None),
        ([good], 0, 2),
        ([good], 0, 0),
    ):
        with pytest.raises(UserError, match="give an input, no negative number"):
            segment(inputs, output, wanted, 1, files)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "text"]
    with pytest.raises(UserError, match="exists; delete it"):
        segment([good], tmp_path, 0, 1)
    with pytest.raises(UserError, match=r"cannot write .*good/out \(Not a directory\)"):
        segment([good], good / "out", 0, 1)


def test_too_few_documents_name_the_file(tmp_path: Path) -> None:
    for name, count in (("a", 9), ("b", 2), ("c", 9)):
        (tmp_path / name).write_text("".join(f"Number {index}.\n\n" for index in range(count)))
    paths = [tmp_path / name for name in "abc"]
    with pytest.raises(
        UserError,
        match=r"b: 2 documents, but 3 are wanted for evaluation: each of 3 inputs gives its share",
    ):
        segment(paths, tmp_path / "out", 9, 1)
    assert not (tmp_path / "out").exists()
    assert segment(paths, tmp_path / "out", 4, 1).train_articles >= 16


def test_too_few_documents_of_one_file_each_name_the_folder(tmp_path: Path) -> None:
    (tmp_path / "articles").mkdir()
    for number in range(19):
        (tmp_path / f"articles/a{number}.txt").write_text(f"Number {number}.\n")
    said = (
        f"{tmp_path}/articles: 19 documents, but 20 are wanted for evaluation alone; give more "
        "text, or a smaller --num_eval_articles"
    )
    for inputs in ([tmp_path / "articles"], sorted((tmp_path / "articles").iterdir())):
        with pytest.raises(UserError) as caught:
            segment(inputs, tmp_path / "out", 20, 1)
        assert str(caught.value) == said


def write_corpus(directory: Path, counts: list[int]) -> list[Path]:
    """Files of one- and two-sentence articles; given in an order that is not sorted."""
    directory.mkdir()
    paths = []
    for number, count in enumerate(counts):
        path = directory / f"wiki_{number:02d}"
        texts = [f"File {number} article {index}. It ends." for index in range(count)]
        path.write_text("\n\n".join(texts))
        paths.append(path)
    return paths[::-1]


def reference_separation(texts: list[str], wanted: int, seed: int) -> tuple[list[str], list[str]]:
    """Evaluation articles and each file's others, by the reference's rule, on its own terms.

    texts: segmented files, as they are before the separation.
    """
    evaluation: list[str] = []
    training = []
    for number, text in enumerate(texts):
        pieces = text.split("\n\n")
        tests = int((number + 1) * wanted / len(texts)) - int(number * wanted / len(texts))
        draws = random.Random(seed + number * 13)
        ids: list[int] = []
        while len(ids) < tests:
            draw = int(draws.random() * len(pieces))
            if draw not in ids:
                ids.append(draw)
        evaluation += [piece for index, piece in enumerate(pieces) if index in ids and piece]
        others = [piece for index, piece in enumerate(pieces) if index not in ids and piece]
        training.append("".join(piece + "\n\n" for piece in others))
    return evaluation, training


@pytest.mark.parametrize("seed", [12345, 7, 8])
@pytest.mark.parametrize("wanted", [0, 1, 10, 37])
def test_separation_is_the_references(tmp_path: Path, seed: int, wanted: int) -> None:
    counts = [20, 30, 11, 25]
    paths = write_corpus(tmp_path / "in", counts)
    segment(paths, tmp_path / "whole", 0, seed)
    names = [f"part-{number:05d}-of-00004" for number in range(4)]
    texts = [(tmp_path / "whole" / name).read_text() for name in names]
    assert [text.count("\n\n") for text in texts] == counts
    report = segment(paths, tmp_path / "out", wanted, seed)
    evaluation, training = reference_separation(texts, wanted, seed)
    assert [(tmp_path / "out" / name).read_text() for name in names] == training
    expected = "".join(article + "\n\n" for article in evaluation)
    assert (tmp_path / "out" / "eval.txt").read_bytes() == expected.encode()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["eval.txt", *names]
    assert report.eval_articles == len(evaluation)
    assert report.train_articles == sum(counts) - len(evaluation)
    assert report.sentences == 2 * sum(counts)
    assert wanted - 4 <= len(evaluation) <= wanted


def test_the_draw_is_pinned() -> None:
    assert sorted(eval_choice(100, 5, 12345)) == [1, 29, 36, 41, 82]
    assert eval_choice(6, 6, 1) == set(range(6))


def test_the_empty_piece_takes_part_in_the_draw(tmp_path: Path) -> None:
    paths = write_corpus(tmp_path / "in", [3])
    made = {seed: segment(paths, tmp_path / f"{seed}", 2, seed) for seed in range(20)}
    short = [seed for seed in made if 3 in eval_choice(4, 2, seed)]
    assert 0 < len(short) < 20
    assert [seed for seed in made if made[seed].eval_articles == 1] == short


def test_inputs_gathered_into_fewer_files(tmp_path: Path) -> None:
    paths = write_corpus(tmp_path / "in", [3, 1, 4, 2, 5])
    segment(paths, tmp_path / "single", 2, 5)
    segment(paths, tmp_path / "out", 2, 5, num_parts=2)
    parts = [(tmp_path / "single" / f"part-0000{n}-of-00005").read_text() for n in range(5)]
    assert (tmp_path / "out" / "part-00000-of-00002").read_text() == "".join(parts[:3])
    assert (tmp_path / "out" / "part-00001-of-00002").read_text() == "".join(parts[3:])
    evaluation = (tmp_path / "out" / "eval.txt").read_bytes()
    assert evaluation == (tmp_path / "single" / "eval.txt").read_bytes()


def test_same_arguments_same_bytes(tmp_path: Path) -> None:
    paths = write_corpus(tmp_path / "in", [30, 30])

    def made(name: str, given: list[Path], seed: int) -> dict[str, bytes]:
        segment(given, tmp_path / name, 20, seed)
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    first = made("first", paths, 1)
    assert made("again", paths[::-1], 1) == first
    assert made("other", paths, 2) != first


SPEECH = "Friends, hear me. We begin.\n\nA second paragraph. It goes on.\n\nThe end. Thanks.\n"
JSON = "".join(
    json.dumps(
        {"id": str(n), "title": f"T{n}", "text": f"T{n}\nA dog &amp; a cat. {n} run.\nEnd {n}."}
    )
    + "\n"
    for n in range(3)
)
OF_JSON = "".join(f"A dog & a cat.\n{n} run.\nEnd {n}.\n\n" for n in range(3))


def test_json_and_lists_of_objects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = f"[{','.join(JSON.splitlines())}]"
    for name, text in (
        ("lines", JSON),
        ("list", listed),
        ("pretty", listed.replace("{", "\n {")),
        ("objects", JSON.replace("{", "{\n  ").replace(', "', ',\n  "')),
    ):
        (tmp_path / name).write_text(text)
        segment([tmp_path / name], tmp_path / f"{name}.out", 0, 1)
        assert (tmp_path / f"{name}.out" / "part-00000-of-00001").read_text() == OF_JSON
        assert "Documents: json (1 file), guessed by the files" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "One."}\nTwo.\n', "line 2 is no JSON object; give one object a line"),
        ('{"text": "One."}\n[1]\n', "line 2 is no JSON object"),
        ('{"content": "One.", "id": 1}\n', 'line 1 has no text under "text" .it has: content, id.'),
        ('{"text": null}\n', 'line 1 has no text under "text" .it has: text.'),
        ('[{"text": "One."}, 2]', "object 2 is no JSON object"),
        ('{\n"text": "One."\n}\n{\n"text":', "object 2 is no JSON object"),
        ('{"data": [\n{"text": "One."}]}', 'object 1 has no text under "text" .it has: data.'),
    ],
)
def test_json_that_is_wrong_names_its_place(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "text").write_text(text)
    with pytest.raises(UserError, match=rf"^{tmp_path}/text: .*{message}"):
        segment([tmp_path / "text"], tmp_path / "out", 0, 1)
    assert not (tmp_path / "out").exists()


def test_many_small_files_are_a_document_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(12):
        (tmp_path / f"{number:02d}.txt").write_text(SPEECH.replace("Friends", f"Friends {number}"))
    paths = sorted(tmp_path.glob("*.txt"))
    report = segment(paths, tmp_path / "out", 2, 1)
    told = capsys.readouterr().err
    assert "Documents: file (12 files), guessed by the files; --documents says otherwise" in told
    assert "Summary of the training text: 10 documents, 6.0 sentences a document, 2.5 words" in told
    assert "Warning" not in told
    assert (report.train_articles, report.eval_articles, report.num_parts) == (10, 2, 1)
    expected = "".join(f"Friends {n}, hear me.\n" for n in range(12))
    parts = [(tmp_path / "out" / name).read_text() for name in ("part-00000-of-00001", "eval.txt")]
    lines = [line for part in parts for line in part.split("\n") if line.startswith("Friends")]
    assert "\n".join(sorted(lines, key=lambda line: int(line.split()[1][:-1]))) + "\n" == expected

    paragraphs = segment(paths, tmp_path / "as", 2, 1, form="blank_line")
    assert paragraphs.train_articles + paragraphs.eval_articles == 36
    segment(paths[:3], tmp_path / "few", 0, 1)
    told = capsys.readouterr().err
    assert "Documents: blank_line (3 files), guessed" in told
    assert "each paragraph of 3 plain files became a document, of 2.0 sentences" in told
    assert "pass --documents file; if not" in told


def test_small_files_are_gathered_by_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bert_pretraining.preparation.segment.PART_BYTES", 3 * len(SPEECH))
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text(SPEECH)
    report = segment(sorted(tmp_path.glob("*.txt")), tmp_path / "out", 0, 1, form="file")
    assert (report.num_parts, report.train_articles) == (3, 8)


def test_the_form_that_is_asked_for_is_taken(tmp_path: Path) -> None:
    (tmp_path / "wiki").write_text(WIKI)
    with pytest.raises(
        UserError, match=r"wiki: line 1 is no JSON object; .* pass the right --docu"
    ):
        segment([tmp_path / "wiki"], tmp_path / "out", 0, 1, form="json")
    (tmp_path / "speech").write_text(SPEECH)
    with pytest.raises(UserError, match="speech: line 1 does not fit <doc"):
        segment([tmp_path / "speech"], tmp_path / "out", 0, 1, form="doc_tags")
    report = segment([tmp_path / "speech"], tmp_path / "out", 0, 1, form="file")
    assert (report.train_articles, report.sentences) == (1, 6)


def test_copies_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path, *_) = write_corpus(tmp_path / "in", [20])
    copy = tmp_path / "in" / "wiki_01"
    copy.write_text(path.read_text())
    segment([path, copy], tmp_path / "out", 4, 1)
    told = capsys.readouterr().err
    assert f"trained on twice: {copy} has the content of {path}\n" in told
    # Articles that are picked from both files are no training articles.
    picked = [eval_choice(21, 2, seed) - {20} for seed in (1, 14)]
    copies, total = len(picked[0] ^ picked[1]), len(picked[0]) + len(picked[1])
    assert copies > 0
    assert f"{copies} of {total} evaluation articles are in the training text too" in told
    copy.unlink()
    os.link(path, copy)
    with pytest.raises(UserError, match=r"wiki_01: given twice, .* .the same file as .*wiki_00."):
        segment([path, copy], tmp_path / "other", 4, 1)


def test_folders_and_missing_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = write_corpus(tmp_path / "in", [4, 5])
    (tmp_path / "in" / "._wiki_00").write_text("macOS")
    segment(paths, tmp_path / "files", 0, 1)
    segment([tmp_path / "in"], tmp_path / "folder", 0, 1)
    assert "Left out of --input: " in capsys.readouterr().err
    for path in (tmp_path / "files").iterdir():
        assert (tmp_path / "folder" / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(UserError, match="is in the --input folder"):
        segment([tmp_path / "in"], tmp_path / "in" / "out", 0, 1)
    parts = tmp_path / "folder" / "part-00001-of-00002"
    with pytest.raises(UserError, match=r"--input: 1 of 2 parts is there .not number 0.; copy"):
        segment([parts], tmp_path / "out", 0, 1)
    segment([parts], tmp_path / "out", 0, 1, allow_missing_parts=True)
    assert "Warning: --input: 1 of 2 parts is there" in capsys.readouterr().err
