"""Model cards: what they say is what was found in the run, and no name can make them say anything else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from actors.schedule.run_store import RunStore
from jobs.pipeline.measured import Measured
from jobs.pipeline.run import Run
from prismaquant_ray import records
from prismaquant_ray.allocation.budget import CARD_BYTES
from prismaquant_ray.config import Config, load_config
from prismaquant_ray.errors import StoreError
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.gpus import GpuName
from prismaquant_ray.layout import BlockKind
from prismaquant_ray.records import Divergence, EvaluationText, Knee, PlanRecord, PlanTimes, SourceFigures, TakenText
from prismaquant_ray.report.card import card
from prismaquant_ray.report.card_view import CardView, ExpertCoverage
from prismaquant_ray.report.findings import (
    SCHEMA,
    CalibrationFindings,
    Findings,
    FrontierCurve,
    Machines,
    MeasuredFindings,
    MeasuredLosses,
    ModelFindings,
    PlanFindings,
    RepositoryFindings,
    Timings,
)
from prismaquant_ray.report.gather import format_findings
from prismaquant_ray.report.group_findings import (
    BlockFindings,
    DraftFindings,
    ExpertFindings,
    Gain,
    GroupColumns,
    RoundingFindings,
)
from prismaquant_ray.report.groups import composition
from prismaquant_ray.report.markdown import Markdown, code, escaped, fenced, line
from prismaquant_ray.report.shipped import (
    CalibrationProvenance,
    Ignored,
    ModuleRow,
    Shipped,
    ShippedFormat,
    ShippedRounding,
    Source,
    gather_shipped,
)
from prismaquant_ray.report.source_card import Stated, stated
from prismaquant_ray.repository.manifest import MANIFEST, README
from prismaquant_ray.repository.verify import verify_repository
from prismaquant_ray.repository.writer import Written, WrittenRepository, write_repository
from prismaquant_ray.serialization import to_bytes
from prismaquant_ray.storage.store import Store
from tests.inprocess import unopened
from tests.reported import measured_plan, measurements
from tests.runs import configuration, full_configuration
from tests.runs import measured as measured_run
from tests.tiny import make_checkpoint
from tests.tiny_families import make_family

# --- figures made up --------------------------------------------------------------------------------------------

Facts = tuple[Findings, Shipped]
SWEEP = "sweep=[5.0, 6.0, 7.0]"


def share(name: FormatName) -> ShippedFormat:
    format_ = FORMATS[name]
    return ShippedFormat(
        name=str(name),
        quantized=format_.codec is not None,
        matrices=30,
        width=32 if format_.codec else None,
        loads_from=format_.served.loads_from,
        loads_to=format_.served.loads_to,
        full_from=format_.served.full_from if format_.round_activation else None,
        conditions=format_.served.conditions,
    )


def made_up(
    name: str = "a",
    formats: tuple[FormatName, ...] = (FormatName.NVFP4, FormatName.BF16),
    source: Stated | None = None,
    plans: int = 1,
) -> Facts:
    """Figures in which every text that comes from outside is `name`, and everything a card can speak of is there."""
    said = Stated(license=("other",), license_name=name, license_link=name, language=(name,), derived_from=("a/b",))
    findings = _made_up_findings(name, formats, plans)
    counts = {str(format_): 12 for format_ in formats}
    gain = Gain(
        ratio={"search": 0.5, "gptq": 0.25}, shipped=0.25, low=0.2, high=0.3, won={"gptq": 99, "search": 1}, judged=100
    )
    return findings, Shipped(
        source=Source(title=name, name=name, hub_id=None, revision=name, stated=source or said),
        budget="5.5 bits per quantizable parameter",
        ruled=True,
        bpp=5.4321,
        bits_all_parameters=6.5,
        weight_bytes=10**11,
        prices=findings.groups,
        measured={(plan.choice, plan.kv_cache): plan.measured for plan in findings.plans if plan.measured},
        formats=tuple(map(share, formats)),
        modules=(ModuleRow(kind="decoder layers", name=name, counts=counts),),
        ignored=(Ignored(reason=name, names={name: 94}),),
        rounding=tuple(ShippedRounding(format=str(format_), matrices=100, gain=gain) for format_ in formats),
        equalized=120,
        calibration=CalibrationProvenance(
            text=name,
            text_sha256="1" * 64,
            fingerprint="2" * 64,
            tokens=16384,
            images=16,
            seed=0,
            labels="sampled",
            sources=(TakenText(name=name, sha256="3" * 64, sequences=32, tokens=16384, rows=9, dropped=2),),
        ),
        config=yaml.safe_dump({"model": {"source": name}}, allow_unicode=True),
        dtype="float32",
        device="cpu",
    )


def _made_up_findings(name: str, formats: tuple[FormatName, ...], plans: int) -> Findings:
    divergence = Divergence(
        tokens=12288, kl_mean=0.125, kl_standard_error=0.001, kl_p90=0.5, kl_p99=0.75, top1_agreement=0.9, loss=2.9,
        perplexity=17.5, draft_agreement=0.5,
    )  # fmt: skip
    kinds = (BlockKind.VISION, BlockKind.DECODER, BlockKind.HEAD)
    blocks = [BlockFindings(index=i, kind=kind, prefix=kind, label=kind) for i, kind in enumerate(kinds)]
    entries = format_findings(formats)
    names = [entry.name for entry in entries]
    groups = _columns(blocks, names, len(formats))
    choice = "".join(entry.letter for _ in blocks for entry in entries)
    plan = PlanFindings(
        target="5.5bpp",
        bpp=5.4321,
        predicted_loss=0.11223,
        gap=1e-5,
        weight_bytes=10**11,
        repository_bytes_at_most=10**11,
        groups={str(format_): 12 for format_ in formats},
        loaded_bytes=10**11,
        vram=None,
        times=PlanTimes(
            gpu=GpuName.B200, prefill=1.23, decode=1.11, prefill_seconds=1e-6, decode_seconds=1e-3, prefill_limit=1.25,
            decode_limit=None,
        ),
        standard_error=0.00072,
        choice=choice,
        measured=MeasuredLosses(weights=divergence, activations=divergence),
    )  # fmt: skip
    tokens = [0] * 7 + [100] * 121
    return Findings(
        schema=SCHEMA,
        made="2026-01-01T00:00:00+00:00",
        run=name,
        model=ModelFindings(
            title=name, source=name, revision=name, architecture=name, family=name, guesses=[name], parameters=1,
            quantizable_parameters=1, linears=1, source_bytes=10**12, kept={name: [name]},
        ),
        formats=entries,
        objective="fisher_trace",
        budget=0,
        plans=[plan, *(replace(plan, target=f"{n}bpp") for n in range(1, plans))],
        out_of_reach=[],
        uniform=[],
        frontier=FrontierCurve(bpp=[], predicted_loss=[]),
        surface=[],
        knee=Knee(bpp=5.3, predicted_loss=0.1, from_bpp=4.5, to_bpp=8.0),
        measured=MeasuredFindings(
            text=EvaluationText(file=name, sha256="0" * 64, sequences=24, tokens=12288, images=4),
            calibration_tokens=1,
            source=SourceFigures(loss=2.8, perplexity=17.0, draft_agreement=0.6),
            knee=None,
            others=[],
            stale=[],
        ),
        blocks=blocks,
        groups=groups,
        composition=composition(groups, blocks, entries, choice),
        repository=RepositoryFindings(
            written=None, quantizable_bytes=1, embedding_bytes=1, other_tensor_bytes=1, at_most_bytes=1
        ),
        rounding=RoundingFindings(codecs={}, linears=[]),
        experts=[
            ExpertFindings(
                group=name, block=1, experts=128, even=94.5, fewest=0, median=100, most=100, unseen=7, cold=0,
                tokens=tokens,
            )
        ]
        * 94,
        draft=DraftFindings(
            prefix=name, groups=1, agreement=dict.fromkeys(names, 0.5), tokens=1, weight=0.1, predicted_loss={}
        ),
        calibration=CalibrationFindings(
            text=name, sequences=1, length=1, tokens=1, priced_tokens=1, images=None, digest=None, fingerprint={}
        ),
        timings=Timings(attempts=1, passes=[], planning_seconds=0.0),
        machines=Machines(hosts=[], lost=0, repairs=0, peak_worker_bytes=0),
        versions={
            "prismaquant_ray": "1.2.3", "python": name, "torch": name, "transformers": None,
            "compressed-tensors": name, "ray": name,
        },
        settings={},
    )  # fmt: skip


def _columns(blocks: list[BlockFindings], names: list[str], groups: int) -> GroupColumns:
    """So many groups in every block."""
    rows = [block.index for block in blocks for _ in range(groups)]

    def every(value: Any) -> dict[str, list[Any]]:
        return {name: [value] * len(rows) for name in names}

    return GroupColumns(
        name=[f"group {row}" for row in range(len(rows))],
        block=rows,
        module=["module"] * len(rows),
        parameters=[4096 * 4096] * len(rows),
        experts=[128] * len(rows),
        linears=[1] * len(rows),
        bytes=every(2**23),
        cost=every(0.01),
        standard_error=every(0.001),
        weight_cost=every(0.003),
        activation_cost=every(0.006),
    )


def front_matter(text: str) -> dict[str, Any]:
    """As the hub's own library reads it."""
    body = ModelCard(text, ignore_metadata_errors=False).data.to_dict()
    assert isinstance(body, dict)
    return body


def structure(text: str) -> list[Any]:
    """What a Markdown reader makes of a card's text, without the words: headings, tables, cells, spans, HTML."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(ModelCard(text).text)
    return [
        (token.type, token.tag, token.level, [child.type for child in token.children or () if child.type != "text"])
        for token in tokens
    ]


ODD = st.one_of(
    st.text(max_size=60),
    st.text(alphabet="`|*_[]()<>#&~$-=+!\\\n\r\t\x00\x85\u2028:'\"{}%@ ab1.", min_size=1, max_size=60),
    st.sampled_from(
        [
            "---",
            "\n---\n",
            "a\n---\nlicense: mit\n---\n",
            "```\n# x",
            "| a | b |\n|---|---|",
            "<script>alert(1)</script>",
            "<!--",
            "](http://x) ![y](z)",
            "{{ facts }}{% raw %}",
            "'\"\\",
            "a: b",
            "&lt;b&gt;",
            "\\|",
            "`",
            "no",
            "1e3",
            "x" * 5000,
        ]
    ),
)


@pytest.mark.slow
@given(name=ODD)
@settings(max_examples=300)
def test_no_name_changes_what_a_reader_sees_beside_it(name: str) -> None:
    assume(line(name))
    text, plain = card(*made_up(name)), card(*made_up("a"))
    assert structure(text) == structure(plain)
    found, expected = front_matter(text), front_matter(plain)
    outside = ("license_name", "license_link", "language")
    assert {key: found[key] for key in found if key not in outside} == {
        key: expected[key] for key in expected if key not in outside
    }
    for key in ("license_name", "license_link"):
        assert found[key] == line(name)


@given(text=ODD)
def test_escaped_text_reads_as_the_text(text: str) -> None:
    reader = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    (paragraph,) = [token for token in reader.parse(f"x {escaped(text)} x") if token.type == "inline"]
    (only,) = paragraph.children or ()
    assert (only.type, only.content) == ("text", f"x {line(text)} x")


@given(text=ODD)
def test_a_line_is_one_and_short_and_keeps_its_words(text: str) -> None:
    found = line(text)
    assert found.isprintable() and len(found) <= 200 and found == found.strip()
    assert len(text) > 200 or found.split() == "".join(c if c.isprintable() else " " for c in text).split()


@given(text=ODD)
def test_code_is_one_span_and_a_fence_holds_its_block(text: str) -> None:
    reader = MarkdownIt("commonmark")
    (paragraph,) = [token for token in reader.parse(f"a {code(text)} b") if token.type == "inline"]
    assert [child.type for child in paragraph.children] == ["text", "code_inline", "text"]
    lines = text.replace("\x00", "").replace("\r", "\n")
    block, end = reader.parse(f"{fenced(lines, 'yaml')}\n\n# end")[0:2]
    assert (block.type, end.type) == ("fence", "heading_open")
    assert block.content.strip() == lines.rstrip().strip()


def test_markdown_is_not_escaped_twice() -> None:
    assert escaped(escaped("a|b")) == r"a\|b"
    assert escaped(Markdown("*a*")) == "*a*"
    assert escaped("q_proj _x_") == r"q_proj \_x\_"


# --- metadata ---------------------------------------------------------------------------------------------------


def with_source(facts: Facts, architecture: str = "a", towers: bool = True, **changes: Any) -> str:
    """The card with another source."""
    findings, ships = facts
    blocks = [block for block in findings.blocks if towers or block.kind != BlockKind.VISION]
    findings = replace(findings, model=replace(findings.model, architecture=architecture), blocks=blocks)
    return card(findings, replace(ships, source=replace(ships.source, **changes)))


def test_the_hub_reads_the_metadata() -> None:
    facts, said = made_up("a"), Stated(license=("apache-2.0",), language=("en", "de"))
    assert front_matter(with_source(facts, towers=False, hub_id="org/model", stated=said)) == {
        "license": "apache-2.0",
        "language": ["en", "de"],
        "base_model": "org/model",
        "base_model_relation": "quantized",
        "library_name": "vllm",
        "tags": ["compressed-tensors", "quantized", "mixed-precision", "nvfp4", "prismaquant-ray"],
    }
    causal = "LlamaForCausalLM"
    assert front_matter(with_source(facts, causal, towers=False))["pipeline_tag"] == "text-generation"
    assert front_matter(with_source(facts, causal))["pipeline_tag"] == "image-text-to-text"


def test_what_cannot_be_known_is_left_out_and_said() -> None:
    text = with_source(made_up("a"), stated=stated(None))
    assert front_matter(text).keys().isdisjoint({"license", "base_model", "base_model_relation", "language"})
    assert "Not stated here: the source has no README.md." in text
    assert "no base model is named" in text


def test_a_model_left_as_it_is_claims_no_quantization() -> None:
    findings, ships = made_up("a", (FormatName.BF16,))
    text = card(findings, replace(ships, rounding=()))
    assert front_matter(text)["tags"] == ["prismaquant-ray"]
    assert "with every Linear left in 16 bits" in text and "quantized to" not in text


@pytest.mark.parametrize(
    ("readme", "expected"),
    [
        ("---\nlicense: mit\nlanguage: en\n---\n# x", Stated(license=("mit",), language=("en",))),
        ("\ufeff---\r\nlicense: [mit, gpl-3.0]\r\n---\r\n", Stated(license=("mit", "gpl-3.0"))),
        ("---\nbase_model: a/b\n---\n", Stated(derived_from=("a/b",))),
        ("---\nbase_model: a/b\nbase_model_relation: quantized\n---", Stated(quantized_from=("a/b",))),
        ("---\nbase_model: [a/b, '../c', 'x y', 7]\n---\n", Stated(derived_from=("a/b",))),
        ("---\nlicense: 'm\n\n  ---\n\n  it'\nlanguage: no\npipeline_tag: {a: b}\n---\n", Stated()),
        ('---\nlicense: other\nlicense_name: "a\\n---\\nb"\n---\n', Stated(license=("other",), license_name="a --- b")),
        ("# no metadata\n---\nlicense: mit\n---\n", Stated(problem="the source's README.md has no metadata")),
        ("---\n- a\n---\n", Stated(problem="the metadata of the source's README.md cannot be read")),
        ("---\na: [\n---\n", Stated(problem="the metadata of the source's README.md cannot be read")),
        ("---\na: 2024-13-45\n---\n", Stated(problem="the metadata of the source's README.md cannot be read")),
        ("---\na: " + "[" * 5000 + "\n---\n", Stated(problem="the metadata of the source's README.md cannot be read")),
    ],
)
def test_the_source_s_card_is_believed_only_where_it_is_clear(readme: str, expected: Stated) -> None:
    assert stated(readme) == expected


@given(body=st.one_of(ODD, st.dictionaries(st.sampled_from(["license", "base_model", "language"]), ODD).map(yaml.dump)))
def test_any_card_of_a_source_can_be_read(body: str) -> None:
    text = card(*made_up("a", source=stated(f"---\n{body}\n---\n")))
    assert front_matter(text)["library_name"] == "vllm"


def test_a_measurement_on_the_calibration_text_says_so() -> None:
    findings, ships = made_up("a")
    assert findings.measured is not None
    same_text = replace(findings.measured, text=replace(findings.measured.text, sha256="1" * 64))
    other, same = card(findings, ships), card(replace(findings, measured=same_text), ships)
    assert "another file than the calibration text" in other and "may be too good" not in other
    assert "the text that calibration used, too" in same and "may be too good" in same


# --- size -------------------------------------------------------------------------------------------------------


def test_the_largest_card_fits_into_what_a_budget_keeps_free() -> None:
    long = "é" * 5000
    findings, ships = made_up(long, tuple(FormatName), plans=40)
    names = {f"{long}{number}": 94 for number in range(500)}
    findings = replace(findings, model=replace(findings.model, guesses=[long] * 3))
    largest = replace(
        ships,
        modules=tuple(
            ModuleRow(
                kind="decoder layers", name="mlp.experts.down_projection" * 2, counts={str(f): 94 for f in FormatName}
            )
            for _ in range(500)
        ),
        ignored=tuple(
            Ignored(reason="router: a wrong expert costs more than its few bytes", names={f"{n:>50}": 94})
            for n in names
        )
        + tuple(
            Ignored(reason=f"{reason}", names={f"model.layers.*.{n}": 94 for n in range(9)}) for reason in range(3)
        ),
        config=yaml.safe_dump({"model": {"source": "x" * 120}, "calibration": {"text": "x" * 120}}),
    )
    assert len(CardView(findings=findings, shipped=largest).sweep) == 12
    assert len(card(findings, largest).encode()) < CARD_BYTES


# --- figures of a run -------------------------------------------------------------------------------------------


def opened(config: Config) -> Measured:
    return Run(config, open_workers=unopened).measured()


def found(known: Measured, plan: PlanRecord, output: Path) -> CardView:
    """What a card says, as the writer of a repository asks for it."""
    views: list[CardView] = []

    def card_of_written(written: Written) -> bytes:
        ships = gather_shipped(known.data, plan, written, known.measured_plans())
        views.append(CardView(findings=known.findings(plan), shipped=ships))
        return b""

    write(known, plan, output, card_of_written)
    return views[0]


def text_of(view: CardView) -> str:
    return card(view.findings, view.shipped)


def write(known: Measured, plan: PlanRecord, output: Path, card: Callable[[Written], bytes]) -> WrittenRepository:
    return write_repository(
        known.source, known.layout, plan.choice, known.candidates, Store(output), manifest={}, card=card
    )


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Config:
    source = make_checkpoint(tmp_path_factory.mktemp("source") / "llama", "llama", layers=3)
    config = configuration(tmp_path_factory.mktemp("run"), source, SWEEP)
    measured_run(config)
    return config


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """Experts, a vision tower, a draft head and an output head, all quantizable."""
    source = make_family(tmp_path_factory.mktemp("source") / "qwen3_5_moe", "qwen3_5_moe")
    return measured_run(full_configuration(tmp_path_factory.mktemp("run"), source, SWEEP)).measured()


def test_the_card_has_the_plan_s_figures(dense: Config, tmp_path: Path) -> None:
    known = opened(dense)
    plan = known.plan
    view = found(known, plan, tmp_path / "repository")
    assert view.predicted.cost == pytest.approx(plan.predicted_loss, rel=1e-12)
    assert sum(entry.groups for _, entry, _ in view.formats) == len(known.layout.groups)
    assert {entry.name: there.groups for entry, there, _ in view.formats} == {
        name: count for name, count in plan.groups.items() if count
    }
    assert sum(entry.bytes for _, entry, _ in view.formats) == plan.weight_bytes
    for name in plan.groups:
        assert sum(row.counts.get(name, 0) for row in view.shipped.modules) == plan.groups[name]
    assert sum(sum(entry.names.values()) for entry in view.shipped.ignored) == len(known.layout.ignored)
    assert [row.target for row in view.sweep] == ["5bpp", "6bpp", "7bpp"]
    assert view.plan.target == "6bpp"
    text = text_of(view)
    assert f"{plan.predicted_loss:.5f} ± {plan.standard_error:.5f}" in text
    assert "| **6bpp** |" in text
    assert view.measured is None and "| Measured loss | not measured |" in text
    for absent in ("Experts:", "Vision tower:", "Draft head:", "speculative", "transformers 5.23 does"):
        assert absent not in text


def test_a_card_prices_the_loss_whatever_the_plan_minimises(dense: Config, tmp_path: Path) -> None:
    known = opened(
        dense.model_copy(update={"allocation": dense.allocation.model_copy(update={"objective": "fisher_trace"})})
    )
    plan, table = known.plan, known.planner.table
    view = found(known, plan, tmp_path / "repository")
    for shown in view.sweep:
        target = next(target for target in known.sweep.targets if target.target == shown.target)
        prices = [
            table.token_fisher[row, table.formats.index(target.choice[group])] for row, group in enumerate(table.groups)
        ]
        assert view.predicted_loss(shown) == pytest.approx(sum(prices), rel=1e-12)
    assert view.predicted.standard_error == pytest.approx(plan.standard_error)
    text = text_of(view)
    assert f"{view.predicted.cost:.5f} ± {plan.standard_error:.5f}" in text
    assert "(plans chosen by `fisher_trace`)" in text


def test_rounding_ratios_are_those_of_the_matrices_that_ship(dense: Config, tmp_path: Path) -> None:
    known = opened(dense)
    plan = known.plan
    by_linear = {name: codecs for record in known.forward.values() for name, codecs in record.linears.items()}
    for entry in found(known, plan, tmp_path / "repository").shipped.rounding:
        product, count = 1.0, 0
        for group in known.layout.groups:
            if plan.choice[group.name] == entry.format:
                for linear in group.linears:
                    errors = by_linear[linear.name][entry.format.lower()]
                    ((method, of),) = errors.matrices()
                    product *= of[method] / of["nearest"]
                    count += 1
        assert entry.matrices == count == sum(entry.gain.won.values())
        assert entry.gain.shipped == pytest.approx(product ** (1 / count))
        best = min(entry.gain.ratio.values())
        assert entry.gain.shipped <= best + 1e-12, "the best way of every matrix is at least as good"


def test_figures_of_another_plan_are_not_this_one_s(dense: Config, tmp_path: Path) -> None:
    known = opened(dense)
    plan, store = known.plan, known.store
    output = tmp_path / "repository"
    other = next(target for target in known.sweep.targets if target.target == "5bpp")
    assert other.choice != plan.choice
    text_of_other = EvaluationText(file="/somewhere/other.txt", sha256="f" * 64, sequences=24, tokens=12288, images=0)
    figures = Divergence(
        tokens=12288, kl_mean=0.4711, kl_standard_error=0.01, kl_p90=1.0, kl_p99=1.5, top1_agreement=0.75, loss=2.95,
        perplexity=19.25,
    )  # fmt: skip
    own_figures = replace(figures, kl_mean=0.25)
    theirs = measured_plan(other, weights=figures)
    try:
        store.put(records.MEASURED_PLANS, to_bytes(measurements([theirs], text=text_of_other, run=RunStore(store).run)))
        view = found(opened(dense), plan, output)
        assert view.measured is None
        shown = [view.measured_of(row) for row in view.sweep]
        assert [entry and entry.weights for entry in shown] == [figures, None, None], "but it is that row's"
        assert "| 0.4711 |" in text_of(view)
        # Also when it was made for another budget: the same choice is the same model.
        own = measured_plan(plan, target="123456B", label="123456B", activations=own_figures)
        store.put(
            records.MEASURED_PLANS, to_bytes(measurements([theirs, own], text=text_of_other, run=RunStore(store).run))
        )
        view = found(opened(dense), plan, output)
        assert view.measured is not None and view.measured.weights is None
        assert view.measured.activations == own_figures
        text = text_of(view)
        assert "`other.txt`" in text and "/somewhere" not in text
        assert "No loss was measured" not in text and "0.2500" in text
        store.put(records.MEASURED_PLANS, b"{")
        with pytest.raises(StoreError, match=r"plans/measured\.json cannot be read"):
            found(opened(dense), plan, output)
    finally:
        store.delete([records.MEASURED_PLANS])


def test_a_card_does_not_depend_on_what_was_asked_before(dense: Config, tmp_path: Path) -> None:
    known = opened(dense)
    plan, store = known.plan, known.store
    output = tmp_path / "repository"
    before = text_of(found(known, plan, output))
    store.put(records.SWEEP, json.dumps({"targets": [], "out_of_reach": [], "knee": None}).encode())
    assert text_of(found(opened(dense), plan, output)) == before
    store.delete([records.SWEEP])
    view = found(opened(dense), plan, output)
    assert text_of(view) == before
    assert len(view.findings.plans) > 1
    out_of_reach = opened(dense.model_copy(update={"sweep": (1.0, 20.0)}))
    view = found(out_of_reach, plan, output)
    assert view.findings.plans == [view.plan] and view.findings.knee is None and view.sweep == [view.plan]
    assert "No target of the sweep" in text_of(view)


def test_a_long_sweep_is_shown_around_the_plan(dense: Config, tmp_path: Path) -> None:
    known = opened(dense.model_copy(update={"sweep": tuple(4.75 + n / 8 for n in range(28))}))
    view = found(known, known.plan, tmp_path / "repository")
    plans = len(view.findings.plans)
    assert plans in (28, 29) and f"\n{plans - 12} more budgets were swept.\n" in text_of(view)
    assert view.sweep.count(view.plan) == 1 and len(view.sweep) == 12


def test_the_configuration_on_the_card_is_the_run_s(dense: Config, tmp_path: Path) -> None:
    known = opened(dense)
    view = found(known, known.plan, tmp_path / "repository")
    text = text_of(view)
    block = re.search(r"^```yaml\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert block is not None
    path = tmp_path / "config.yaml"
    path.write_text(block[1])
    again = load_config(path)
    for section in ("formats", "budget", "rounding", "allocation"):
        assert getattr(again, section) == getattr(dense, section)
    (text_source,) = dense.calibration.text
    assert "  text: text.txt\n" in block[1]
    named = text_source.model_copy(update={"path": text_source.name})
    assert again.calibration == dense.calibration.model_copy(update={"text": (named,)})
    assert view.shipped.calibration.fingerprint == known.calibration.fingerprint
    assert view.shipped.calibration.tokens == known.calibration.positions == 8 * 32
    assert str(dense.store.run) not in text and str(Path(text_source.path).parent) not in text


def test_a_repository_with_its_card_is_verified_and_counted(dense: Config, tmp_path: Path) -> None:
    known = opened(dense)
    plan = known.plan
    output = tmp_path / "repository"

    def readme(written: Written) -> bytes:
        return card(known.findings(plan), gather_shipped(known.data, plan, written, None)).encode()

    repository = write(known, plan, output, readme)
    report = verify_repository(Store(output), known.source, known.layout, plan.choice, known.candidates)
    assert report.problems == ()
    assert repository.total_bytes == sum(path.stat().st_size for path in output.iterdir())
    assert repository.files[README] == (output / README).stat().st_size
    assert json.loads((output / MANIFEST).read_text())["files"][README] == (output / README).stat().st_size
    assert front_matter((output / README).read_text())["pipeline_tag"] == "text-generation"


def test_every_part_of_a_model_is_described(everything: Measured, tmp_path: Path) -> None:
    known = everything
    view = found(known, known.plan, tmp_path / "repository")
    assert {row.kind for row in view.shipped.modules} == {
        "vision blocks", "vision merger", "decoder layers", "draft head", "output head",
    }  # fmt: skip
    seen = [tokens for record in known.forward.values() for tokens in record.experts.values()]
    assert view.experts == ExpertCoverage(
        layers=len(seen), each=len(seen[0]), fewest=min(map(min, seen)), unseen=sum(t.count(0) for t in seen)
    )
    assert view.findings.draft is not None and set(view.findings.draft.agreement) == {"BF16", "NVFP4", "MXFP8"}
    assert (view.shipped.calibration.images, view.vision_blocks) == (3, 2)
    text = text_of(view)
    command = re.search(r"^vllm serve REPOSITORY --speculative-config '(.*)'$", text, re.MULTILINE)
    assert command is not None and json.loads(command[1]) == {"method": "mtp", "num_speculative_tokens": 1}
    assert front_matter(text)["pipeline_tag"] == "image-text-to-text"
    for present in ("Experts:", "Vision tower: 2 blocks", "Draft head:", "`mlp.experts`", "`mtp.fc`"):
        assert present in text
    assert "{{" not in text and "None" not in text
