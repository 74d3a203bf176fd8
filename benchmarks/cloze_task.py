"""A small multiple-choice task of lm-eval from a text file: which of four passages goes on?

    python -m benchmarks.cloze_task TEXT DIRECTORY [--questions 200]

writes `cloze.jsonl` and `cloze.yaml` into DIRECTORY, for `lm_eval --include_path DIRECTORY --tasks cloze`. It needs no
network, unlike the tasks that lm-eval comes with. A question is 48 words of the text and the 12 words behind them; the
three wrong answers are the 12 words behind other questions. All is drawn with a fixed seed.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_SHOWN, _ASKED, _CHOICES = 48, 12, 4

_TASK = """\
task: cloze
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{shown}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: " "
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""


def questions(text: str, count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Questions from places all over the text; SystemExit where it has too few words."""
    words = text.split()
    span = _SHOWN + _ASKED
    if count < _CHOICES or len(words) < count * span:
        raise SystemExit(
            f"{count} questions take {count * span:,} words and are at least {_CHOICES}; there are {len(words):,}"
        )
    places = [place * (len(words) // count) for place in range(count)]
    answers = [" ".join(words[place + _SHOWN : place + span]) for place in places]
    dice = random.Random(seed)  # noqa: S311 - not a secret
    for number, place in enumerate(places):
        others = dice.sample([each for each in range(count) if each != number], _CHOICES - 1)
        choices = [number, *others]
        dice.shuffle(choices)
        yield {
            "shown": " ".join(words[place : place + _SHOWN]),
            "choices": [answers[each] for each in choices],
            "answer": choices.index(number),
        }


def main() -> None:
    """Write the task."""
    parser = argparse.ArgumentParser()
    parser.add_argument("text", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--questions", type=int, default=200)
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    data = arguments.directory.resolve() / "cloze.jsonl"
    found = questions(arguments.text.read_text(encoding="utf-8"), arguments.questions)
    data.write_text("".join(f"{json.dumps(each)}\n" for each in found), encoding="utf-8")
    (arguments.directory / "cloze.yaml").write_text(_TASK.format(data=data), encoding="utf-8")
    print(f"{data.parent}: {arguments.questions} questions")


if __name__ == "__main__":
    main()
