"""Claims about sources of text: how they are read, rendered, packed and shared out, and what is refused."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from jobs.pipeline.sources import text_digest
from prismaquant_ray.calibration.dataset import CalibrationSet
from prismaquant_ray.calibration.packing import Drawing, divide, load_texts, packed
from prismaquant_ray.calibration.reading import TextReader
from prismaquant_ray.calibration.rows import document
from prismaquant_ray.errors import InputError, ResourceError
from prismaquant_ray.settings.data import CalibrationConfig, EvaluationConfig
from prismaquant_ray.settings.texts import MIX_KINDS, shares_of
from tests.tiny import make_text, tokenizer

PLAIN = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}</s>{% endfor %}"
WITH_BOS = "{{ bos_token }}" + PLAIN
CHAT = [{"role": "user", "content": "which river"}, {"role": "assistant", "content": "the old one"}]


def with_bos(template: str | None, *, begins: bool) -> PreTrainedTokenizerBase:
    """The tiny tokenizer with a template; `begins`: it puts BOS before every text."""
    made = copy.deepcopy(tokenizer())
    made.chat_template = template
    if begins:
        made.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def draw(text: Any, known: PreTrainedTokenizerBase | None = None, **changed: Any) -> CalibrationSet:
    reader = changed.pop("reader", None) or TextReader()
    part = changed.pop("part", "calibration")
    settings = CalibrationConfig(text=text, **{"sequences": 4, "length": 16} | changed)
    drawing = Drawing(sequences=settings.sequences, length=settings.length, seed=settings.seed)
    return load_texts(settings.text, part, reader, known or tokenizer(), drawing, holdout=0.25)


def rows_file(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def many(count: int = 40) -> list[dict[str, Any]]:
    return [{"messages": [{"role": "user", "content": f"the river and letter number {n}"}]} for n in range(count)]


# One plain text, as it always was ----------------------------------------------------------------------------------


def test_one_plain_text_gives_the_windows_it_always_gave(tmp_path: Path) -> None:
    path = make_text(tmp_path, 6000)
    ids = tokenizer()(path.read_text(), add_special_tokens=False, verbose=False)["input_ids"]
    windows = [ids[start : start + 16] for start in range(0, len(ids) - 15, 16)]
    order = np.random.Generator(np.random.PCG64(5)).permutation(len(windows))[:4]
    found = draw(path, seed=5)
    assert found.tokens.tolist() == [windows[place] for place in order]
    (said,) = found.sources
    assert (said.name, said.sequences, said.tokens, said.rows) == ("text.txt", 4, 64, None)


def test_a_source_is_known_by_its_content_and_not_by_its_path(tmp_path: Path) -> None:
    text = make_text(tmp_path / "one", 500)
    other = tmp_path / "two.md"
    other.write_bytes(text.read_bytes())
    digests = [text_digest(CalibrationConfig(text=path), TextReader()) for path in (text, other)]
    assert digests == [hashlib.sha256(text.read_bytes()).hexdigest()] * 2
    rows = [rows_file(tmp_path / name, many()) for name in ("a.jsonl", "b.jsonl")]
    settings = [CalibrationConfig(text=[path, text]) for path in rows]
    assert text_digest(settings[0], TextReader()) == text_digest(settings[1], TextReader())
    rows_file(rows[1], many(41))
    shared = CalibrationConfig(text=[{"path": rows[0], "share": 0.75}, str(text)])
    assert len({text_digest(each, TextReader()) for each in (*settings, shared)}) == 3


# Rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("template", [WITH_BOS, PLAIN])
def test_special_tokens_are_there_exactly_once(template: str, begins: bool) -> None:
    """A chat has those that its template wrote, a text those of the tokenizer, a sequence one BOS at its start."""
    known = with_bos(template, begins=begins)
    chat = document("row", {"messages": CHAT}, known)
    rendered = known.apply_chat_template(CHAT, tokenize=False)
    assert chat == known(rendered, add_special_tokens=False)["input_ids"]
    assert (chat.count(1), chat.count(2)) == (int(template is WITH_BOS), 2)
    text = document("row", {"text": "the old river"}, known)
    assert (text.count(1), text.count(2)) == (int(begins), 1)
    assert text[-1] == 2 and (text[0] == 1) == begins
    for literal in ("<s>the river", "the river</s>"):
        ids = document("row", {"text": literal}, known)
        assert ids.count(1) <= 1 and ids.count(2) == 1
    rows: list[Any] = [*many(), *({"text": f"garden {n}"} for n in range(40))]
    found = draw("python:", known, reader=TextReader(calibration=rows), length=23)
    pairs = zip(found.tokens[:, :-1].flatten().tolist(), found.tokens[:, 1:].flatten().tolist(), strict=True)
    assert (1, 1) not in set(pairs)
    assert not begins or (found.tokens[:, 0] == 1).all()


def test_prompt_and_completion_are_a_chat() -> None:
    known = with_bos(PLAIN, begins=False)
    expected = document("row", {"messages": CHAT}, known)
    assert document("row", {"prompt": "which river", "completion": "the old one"}, known) == expected
    assert document("row", {"prompt": CHAT[:1], "completion": CHAT[1:]}, known) == expected
    assert document("row", json.dumps({"messages": CHAT, "id": 3, "text": None}), known) == expected


def test_tools_and_reasoning_reach_the_template_and_nulls_of_tables_do_not() -> None:
    template = (
        "{{ tools[0]['name'] if tools else '' }}{% for m in messages %}{{ m['reasoning_content'] or '' }}"
        "{{ 'CALLS' if 'tool_calls' in m else '' }}{{ m['content'] }}{% endfor %}"
    )
    known = with_bos(template, begins=False)
    message = {"role": "assistant", "content": "old", "reasoning_content": "think", "tool_calls": None}
    for tools in ([{"name": "find"}], '[{"name": "find"}]'):
        assert known.decode(document("row", {"messages": [message], "tools": tools}, known)) == "findthinkold"
    assert known.decode(document("row", {"messages": [message], "tools": None}, known)) == "thinkold"


def test_rows_without_text_are_dropped_and_counted(tmp_path: Path) -> None:
    empty = [{"text": " \n"}, {"messages": []}, {"text": None}, {"prompt": "", "completion": " "}]
    path = rows_file(tmp_path / "rows.jsonl", [*empty, *many(6)])
    with pytest.raises(InputError, match=r"rows\.jsonl has \d+ tokens in 10 rows, 4 of them empty, 400 sequences"):
        draw(path, sequences=400)
    found = draw(path, sequences=2)
    assert found.sources[0].dropped == 4 and found.sources[0].rows == 10


# Packing and shares -------------------------------------------------------------------------------------------------


@given(
    documents=st.lists(st.lists(st.integers(3, 9), min_size=0, max_size=12), max_size=12),
    length=st.integers(2, 9),
    start=st.sampled_from([[], [1]]),
    own=st.booleans(),
)
def test_packing_loses_and_repeats_nothing(
    documents: list[list[int]], length: int, start: list[int], own: bool
) -> None:
    given_documents = [[*start, *each] if own and each else each for each in documents]
    found = list(packed(given_documents, length=length, start=start))
    assert all(len(each) == length for each in found)
    assert all(each[: len(start)] == start and each[1:2] != [1] for each in found)
    stream = [token for each in given_documents for token in each if token != 1]
    kept = [token for each in found for token in each if token != 1]
    assert kept == stream[: len(kept)]
    assert len(stream) - len(kept) < length


@given(total=st.integers(0, 5000), weights=st.lists(st.integers(1, 1000), min_size=1, max_size=12))
@example(total=100, weights=[1, 1, 1])
def test_shares_are_rounded_by_the_largest_remainder(total: int, weights: list[int]) -> None:
    shares = [weight / sum(weights) for weight in weights]
    parts = divide(total, shares)
    assert sum(parts) == total and min(parts) >= 0
    errors = [part - total * share for part, share in zip(parts, shares, strict=True)]
    assert all(abs(error) < 1 for error in errors)
    # No sequence moved from one source to another would come closer.
    assert max(errors) - min(errors) <= 1 + 1e-6


def test_every_source_has_its_share_of_the_sequences(tmp_path: Path) -> None:
    text, rows = make_text(tmp_path, 6000), rows_file(tmp_path / "rows.jsonl", many())
    found = draw([{"path": rows, "share": 0.3}, text], with_bos(PLAIN, begins=False), sequences=10, length=12)
    assert [(each.name, each.sequences) for each in found.sources] == [("rows.jsonl", 3), ("text.txt", 7)]
    of_text = set(map(tuple, draw(text, sequences=7, length=12).tokens.tolist()))
    assert len(of_text & set(map(tuple, found.tokens.tolist()))) == 7
    places = [place for place, each in enumerate(found.tokens.tolist()) if tuple(each) not in of_text]
    assert places != [0, 1, 2], "sources are mixed, not one behind the other"


def test_shares_that_are_not_given_are_what_is_left() -> None:
    def shares(*given_shares: float | None) -> list[float]:
        texts = [{"path": f"{n}.txt", "share": share} for n, share in enumerate(given_shares)]
        return shares_of(CalibrationConfig(text=texts).text)

    assert shares(None) == [1.0]
    assert shares(0.5, None, None) == [0.5, 0.25, 0.25]
    assert shares(0.333, 0.333, 0.333) == pytest.approx([1 / 3] * 3)


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", '{"text": "x"}\n{"text": "y"}\n', "a.txt: holds JSON, one object a line, not plain text; name it"),
        ("a.txt", " \n", "a.txt is empty; give a text"),
        ("a.jsonl", "\n\n", "a.jsonl: there are no rows"),
        ("a.jsonl", "plain words\n", "a.jsonl, line 1 is not JSON"),
        ("a.jsonl", "[1]\n", "a.jsonl, line 1 is not a JSON object; write one JSON object a line"),
        ("a.jsonl", '{"question": "x", "id": 1}\n', "line 1: has id, question; write rows with text, prompt and"),
        ("a.jsonl", '{"prompt": "x"}\n', "line 1: there is no completion"),
        ("a.jsonl", '{"text": 3}\n', "line 1: text is no string"),
        ("a.jsonl", '{"messages": "x"}\n', "line 1: messages is no list"),
        ("a.jsonl", '{"messages": [{"content": "x"}]}\n', "line 1: a message in messages has no role"),
        ("a.jsonl", '{"messages": [{"role": "x", "content": "y"}], "tools": 3}\n', "tools is no list"),
        ("a.json", "[]", "a.json: .json is not read; write one object a line, as .jsonl"),
        ("a.csv", "a,b", "a.csv: .csv is not read"),
        ("missing.jsonl", None, "missing.jsonl: cannot be read (No such file"),
    ],
)
def test_a_source_that_cannot_be_used_is_named(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as caught:
        draw(tmp_path / name)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_chat_needs_a_template_that_takes_it(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "rows.jsonl", many(1))
    with pytest.raises(InputError, match=r"line 1: is a chat, and the tokenizer of .* has no chat template; add its"):
        draw(path, with_bos(None, begins=False))
    with pytest.raises(InputError, match=r"line 1: the chat template does not take it \(no systems\)"):
        draw(path, with_bos("{{ raise_exception('no systems') }}", begins=False))


def test_a_share_of_no_sequence_is_refused_and_too_few_tokens_are_counted(tmp_path: Path) -> None:
    text, rows = make_text(tmp_path, 4000), rows_file(tmp_path / "rows.jsonl", many(2))
    with pytest.raises(InputError, match=r"rows\.jsonl: a share of 0\.01 of 4 sequences is none"):
        draw([{"path": rows, "share": 0.01}, text])
    with pytest.raises(InputError, match=r"rows\.jsonl has \d+ tokens in 2 rows, 20 sequences × 16 asked"):
        draw([rows, text], sequences=40)
    with pytest.raises(InputError, match=r"text\.txt has [\d,]+ tokens, 4 sequences × 4,096 asked"):
        draw(text, length=4096)


# Standard input, programs, packages ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [True, False])
def test_standard_input_is_rows_or_text(rows: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = rows_file(tmp_path / "a.jsonl", many()) if rows else make_text(tmp_path, 3000)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
    reader = TextReader()
    found = draw("-", reader=reader)
    assert torch.equal(found.tokens, draw(path).tokens)
    assert found.sources[0].name == "standard input"
    assert torch.equal(draw("-", reader=reader).tokens, found.tokens), "it is read once"
    with pytest.raises(InputError, match="standard input is empty"):
        draw("-")


def test_rows_of_a_program_may_be_an_iterator_and_are_known_by_content(tmp_path: Path) -> None:
    settings = CalibrationConfig(text="python:")
    texts = [row["messages"][0]["content"] for row in many()]
    readers = [TextReader(calibration=given) for given in (iter(texts), [{"text": text} for text in texts])]
    first, second = (draw("python:", reader=reader) for reader in readers)
    assert torch.equal(first.tokens, second.tokens)
    assert text_digest(settings, readers[0]) == text_digest(settings, readers[1])
    for rows, message in (
        (None, "was given by a program"), ("one string", "is one string"), ([3], "row 1 of the calibration text is in"),
        ([], "there are no rows"), ([{"text": {1, 2}}], "row 1: its values are not those of JSON"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            draw("python:", reader=TextReader(calibration=rows))  # type: ignore[arg-type]


class Streamed:
    """Stands in for the package `datasets`: a stream of rows, and what it was asked for."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], error: Exception | None = None) -> None:
        self.rows, self.error, self.read = rows, error, 0
        self.asked: tuple[Any, ...] = ()

    def load_dataset(self, name: str, config: str | None, **options: Any) -> Iterator[Mapping[str, Any]]:
        self.asked = (name, config, options["split"], options["revision"], options["streaming"])
        if self.error is not None:
            raise self.error
        return self._stream()

    def _stream(self) -> Iterator[Mapping[str, Any]]:
        for row in self.rows:
            self.read += 1
            yield row


def test_a_dataset_of_the_hub_is_streamed_as_far_as_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Streamed([{**row, "id": n, "text": None} for n, row in enumerate(many(100_000))])
    monkeypatch.setitem(sys.modules, "datasets", hub)  # type: ignore[arg-type]
    found = draw("hf://datasets/ada/talks@v1:short:test")
    assert hub.asked == ("ada/talks", "short", "test", "v1", True)
    assert 20 < hub.read < 200
    assert torch.equal(found.tokens, draw("python:", reader=TextReader(calibration=many(hub.read))).tokens)
    draw("hf://datasets/ada/talks")
    assert hub.asked == ("ada/talks", None, "train", None, True)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (FileNotFoundError("no dataset ada/talks"), InputError, r"cannot be read \(no dataset ada/talks\)"),
        (ValueError('Bad split: "x"'), InputError, "cannot be read .Bad split"),
        (ConnectionError("nobody there"), ResourceError, "the hub does not answer"),
    ],
)
def test_a_dataset_that_cannot_be_had_is_one_line(
    error: Exception, kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", Streamed([], error))  # type: ignore[arg-type]
    with pytest.raises(kind, match=rf"hf://datasets/ada/talks: {message}"):
        draw("hf://datasets/ada/talks")


def test_a_missing_package_is_one_line_that_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for package, source in (("datasets", "hf://datasets/ada/talks"), ("pyarrow", str(tmp_path / "a.parquet"))):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(InputError, match=rf"the package {package}; pip install 'prismaquant-ray\[datasets\]'"):
            draw(source)


def test_parquet_columns_that_rows_have_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for pyarrow: the columns that are asked for, and the errors of it."""
    table = [{**row, "text": None, "id": 3} for row in many()]

    class File:
        def __init__(self, data: bytes) -> None:
            if data != b"PAR1":
                raise ValueError("no magic bytes")
            self.schema_arrow = SimpleNamespace(names=[*table[0]])

        def read(self, *, columns: list[str]) -> Any:
            return SimpleNamespace(to_pylist=lambda: [{key: row[key] for key in columns} for row in table])

    pyarrow, parquet = ModuleType("pyarrow"), SimpleNamespace(ParquetFile=File)
    pyarrow.BufferReader, pyarrow.parquet = bytes, parquet  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyarrow", pyarrow)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)  # type: ignore[arg-type]
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")
    assert torch.equal(draw(path).tokens, draw("python:", reader=TextReader(calibration=many())).tokens)
    path.write_bytes(b"text")
    with pytest.raises(InputError, match=r"a\.parquet: is no parquet file that can be read \(no magic bytes\)"):
        draw(path)
    path.write_bytes(b"PAR1")
    table[:] = [{"question": "x"}]
    with pytest.raises(InputError, match=r"a\.parquet: has the columns question; rows have text"):
        draw(path)


# The mix ------------------------------------------------------------------------------------------------------------


def mixed(part: Any, kind: str) -> list[str]:
    settings = CalibrationConfig(text=f"mix:{kind}")
    return [str(row) for _, row in TextReader().read(settings.text[0], part, characters=0).rows]


def test_the_mix_is_a_megabyte_of_six_kinds_whose_parts_share_no_passage() -> None:
    total = 0
    for kind in MIX_KINDS:
        calibration, evaluation = mixed("calibration", kind), mixed("evaluation", kind)
        total += sum(map(len, calibration))
        assert sum(map(len, evaluation)) > 90_000
        seen = {text[start : start + 150] for text in calibration for start in range(0, len(text) - 149, 50)}
        assert not any(text[start : start + 150] in seen for text in evaluation for start in range(len(text) - 149))
    assert total > 1_500_000


def test_without_a_text_all_kinds_are_drawn_alike_and_evaluation_has_its_own_part() -> None:
    assert [text.path for text in (*CalibrationConfig().text, *EvaluationConfig().text)] == ["mix:all"] * 2
    found = draw("mix:all", sequences=14, length=64)
    assert [(each.name, each.sequences) for each in found.sources] == [
        (f"mix:{kind}", 3 if place < 2 else 2) for place, kind in enumerate(MIX_KINDS)
    ]
    held_out = draw("mix:all", sequences=14, length=64, part="evaluation")
    assert {each.sha256 for each in found.sources}.isdisjoint(each.sha256 for each in held_out.sources)
    chats = draw("mix:chat", with_bos(PLAIN, begins=False), sequences=20, length=64)
    assert "[assistant]" in tokenizer().decode(chats.tokens.flatten())


def test_a_model_without_a_template_gets_the_mix_without_chats() -> None:
    found = draw("mix:all", with_bos(None, begins=False), sequences=10, length=64)
    assert [(each.name, each.sequences) for each in found.sources] == [(f"mix:{kind}", 2) for kind in MIX_KINDS[1:]]
    with pytest.raises(InputError, match=r"mix:chat, row \d+: is a chat, and the tokenizer"):
        draw("mix:chat", with_bos(None, begins=False))


def test_every_package_of_the_mix_is_named_with_its_licence() -> None:
    import prismaquant_ray.calibration.mix as module

    page = (Path(module.__file__).parent / "mix" / "README.md").read_text()
    packages = {row["package"] for row in module._documents()} - {"this script"}
    assert len(packages) > 10
    for package in packages:
        assert f"\n| {package} | " in page and f"\n## {package}\n" in page
