"""What docs/task-scores.md runs beside lm-eval: a task from a text, and the difference of two scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.cloze_task import questions
from benchmarks.paired_scores import paired, scores
from tests.tiny import make_text


def test_the_right_answer_is_what_follows_in_the_text(tmp_path: Path) -> None:
    text = make_text(tmp_path, 20_000).read_text()
    whole = " ".join(text.split())
    found = list(questions(text, 30))
    assert found == list(questions(text, 30))
    assert len({each["answer"] for each in found}) == 4
    for each in found:
        assert len(set(each["choices"])) == 4
        goes_on = [f"{each['shown']} {choice}" in whole for choice in each["choices"]]
        assert goes_on == [place == each["answer"] for place in range(4)]


def test_a_text_that_is_too_short_for_a_task_is_refused() -> None:
    with pytest.raises(SystemExit, match="10 questions take 600 words"):
        list(questions("word " * 599, 10))


def test_what_is_hard_for_both_models_cancels() -> None:
    source = dict(enumerate([1.0, 0.0] * 50))
    same = paired(source, source)
    assert (same.difference, same.error, same.worse, same.better) == (0.0, 0.0, 0, 0)
    assert same.unpaired_error == pytest.approx(0.0711, abs=1e-4)
    lost = paired(source, {**source, 0: 0.0, 1: 1.0, 2: 0.0})
    # Two fell and one rose of 100: sd of the changes is √(3/99 − 100/99·0.01²).
    assert (lost.difference, lost.worse, lost.better) == (pytest.approx(-0.01), 2, 1)
    assert lost.error == pytest.approx(((3 - 100 * 0.01**2) / 99) ** 0.5 / 10)


def test_scores_of_other_questions_are_not_paired(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2 and 1 questions cannot be paired"):
        paired({0: 1.0, 1: 0.0}, {0: 1.0})
    samples = tmp_path / "samples.jsonl"
    samples.write_text("".join(json.dumps({"doc_id": n, "acc": n % 2, "metrics": ["acc"]}) + "\n" for n in range(3)))
    assert scores(samples, "acc") == {0: 0.0, 1: 1.0, 2: 0.0}
    with pytest.raises(SystemExit, match=r"has no acc_norm; it has acc"):
        scores(samples, "acc_norm")
