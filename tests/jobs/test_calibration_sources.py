"""Claims about whole runs that are calibrated on chats, on rows of a program, and on the mix."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from jobs.commands.progress import told as shown_line
from jobs.pipeline.library import OpenRun
from jobs.pipeline.run import Run
from jobs.pipeline.stages import quantize
from prismaquant_ray import InputError, records
from prismaquant_ray.calibration.stored import read_calibration
from prismaquant_ray.config import Config
from prismaquant_ray.events import Event, TextsRead
from prismaquant_ray.records import CalibrationRecord
from prismaquant_ray.serialization import from_json
from prismaquant_ray.storage.record import read_record
from tests.inprocess import in_process
from tests.runs import configuration
from tests.tiny import make_checkpoint, tokenizer

CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"Which garden did captain {number} cross?"},
            {"role": "assistant", "content": f"The old one behind market {number}, twice, and never the bridge."},
        ]
    }
    for number in range(30)
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "source", "llama")


def configured(directory: Path, source: Path, *overrides: str) -> Config:
    return configuration(directory, source, *overrides)


def test_a_run_on_chats_and_prose_says_what_it_took(source: Path, tmp_path: Path) -> None:
    """From a JSONL of chats in the model's template to the model card; the evaluation is of the mix."""
    rows = tmp_path / "chats.jsonl"
    rows.write_text("".join(f"{json.dumps(row)}\n" for row in [*CHATS, {"text": ""}]))
    text = f"calibration.text=[{{path: {rows}, share: 0.75}}, {tmp_path / 'text.txt'}]"
    config = configured(tmp_path, source, text, "evaluation={sequences: 7, length: 24}")
    heard: list[Event] = []
    result = quantize(config, on_event=heard.append, open_workers=in_process())
    told = [event for event in heard if isinstance(event, TextsRead)]
    assert [event.purpose for event in told] == ["calibration", "evaluation"]
    run = Run(config, open_workers=in_process())
    stored = read_record(run.store, records.CALIBRATION_RECORD, run=run.run_store.run)
    assert stored is not None
    record = from_json(CalibrationRecord, stored.metrics)
    assert record.sources == told[0].sources and record.fingerprint == told[0].fingerprint
    taken = [(each.name, each.sequences, each.tokens, each.rows, each.dropped) for each in record.sources]
    assert taken == [("chats.jsonl", 6, 6 * 32, 22, 1), ("text.txt", 2, 2 * 32, None, None)]
    assert shown_line(told[0]) == (
        "text of the calibration: chats.jsonl 6 × 32 from 22 rows, 1 without text dropped; text.txt 2 × 32; "
        f"fingerprint {record.fingerprint[:12]}"
    )
    tokens = read_calibration(run.store, run=run.run_store.run).tokens
    shown = tokenizer().decode(tokens.flatten())
    assert "</s>\n<s>assistant\nThe old one" in shown and "<s><s>" not in shown
    assert result.evaluation is not None and result.evaluation.text.file == "mix:all"
    assert len(result.evaluation.text.sources) == 6
    card = (tmp_path / "repository" / "README.md").read_text()
    assert "- `chats.jsonl`: 6 sequences, 192 tokens of 22 rows, 1 without text dropped; sha256" in card
    assert "share: 0.75" in card and str(tmp_path) not in card
    OpenRun(config, open_workers=in_process()).report(str(tmp_path / "report"))
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Of these: chats.jsonl 6 (22 rows, 1 without text dropped), text.txt 2." in page


def test_rows_of_a_program_make_the_run_of_the_file_that_holds_them(source: Path, tmp_path: Path) -> None:
    config = configured(tmp_path, source)
    run = OpenRun(config, text=iter(CHATS), open_workers=in_process())
    prices = run.prices()
    again = OpenRun(config, text=CHATS, open_workers=in_process())
    assert torch.equal(torch.from_numpy(again.prices().token_fisher), torch.from_numpy(prices.token_fisher))
    with pytest.raises(InputError, match=r"holds a run with another calibration\.text"):
        OpenRun(config, text=CHATS[1:], open_workers=in_process()).measure()
    with pytest.raises(InputError, match=r"holds a run with another calibration\.text"):
        OpenRun(config, open_workers=in_process()).measure()


def test_bad_rows_are_refused_before_a_store_is_made(source: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "which river"}\n')
    run = Run(configured(tmp_path, source, f"calibration.text={rows}"), open_workers=in_process())
    with pytest.raises(InputError, match=r"rows\.jsonl, line 1: has question; write rows with text"):
        run.check()
    assert not (tmp_path / "run" / records.RUN).exists()
