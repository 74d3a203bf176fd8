"""Model cards: what they say is what was found in the run, and no name can make them say anything else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from jobs import planning
from jobs.card import card_of, facts_of
from jobs.run import Run
from prismaquant_ray.allocation.budget import CARD_BYTES
from prismaquant_ray.config import Config, load
from prismaquant_ray.errors import StoreError
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.formats.servability import SERVABILITY
from prismaquant_ray.report.card import card
from prismaquant_ray.report.card_facts import (
    Calibration,
    CardFacts,
    Divergence,
    Experts,
    FormatShare,
    Kept,
    Knee,
    Measured,
    ModuleRow,
    Rounding,
    Source,
    Stated,
    SweepRow,
    stated,
)
from prismaquant_ray.report.markdown import Markdown, code, escaped, fenced, line
from prismaquant_ray.repository.shards import MANIFEST
from prismaquant_ray.repository.verify import verify_repository
from prismaquant_ray.repository.writer import README, Written, WrittenRepository, write_repository
from prismaquant_ray.storage.store import Store
from tests.inprocess import in_process
from tests.tiny import make_checkpoint, make_text
from tests.tiny_families import make_family

# --- facts made up ----------------------------------------------------------------------------------------------


def share(name: FormatName, groups: int = 10) -> FormatShare:
    spec, served = FORMATS[name], SERVABILITY[name]
    return FormatShare(
        name=str(name),
        summary=spec.summary,
        quantized=spec.codec is not None,
        groups=groups,
        matrices=3 * groups,
        parameters=4096 * 4096 * groups,
        weight_bytes=spec.weight_bytes(4096, 4096) * groups,
        width=32 if spec.codec else None,
        loads_from=served.loads_from,
        full_from=served.full_from if spec.round_activation else None,
    )


def made_up(name: str = "a", formats: tuple[FormatName, ...] = (FormatName.NVFP4, FormatName.BF16)) -> CardFacts:
    """Facts in which every text that comes from outside is `name`, and everything a card can speak of is there."""
    counts = {str(format_): 12 for format_ in formats}
    divergence = Divergence(
        kl_mean=0.125, kl_standard_error=0.001, kl_p99=0.75, top1_agreement=0.9, perplexity=17.5, draft_agreement=0.5
    )
    return CardFacts(
        version="1.2.3",
        source=Source(
            title=name,
            name=name,
            hub_id=None,
            revision=name,
            origin=name,
            architecture=name,
            guesses=(name,),
            weight_bytes=10**12,
            stated=Stated(
                license=("other",), license_name=name, license_link=name, language=(name,), derived_from=("a/b",)
            ),
        ),
        budget="5.5 bits per quantizable parameter",
        objective="fisher_trace",
        ruled=True,
        bpp=5.4321,
        bits_all_parameters=6.5,
        weight_bytes=10**11,
        predicted=0.11223,
        standard_error=0.00072,
        predicted_weights=0.03,
        predicted_activations=0.07,
        gap=1e-5,
        formats=tuple(share(format_) for format_ in formats),
        modules=(ModuleRow(kind="decoder layers", name=name, counts=counts),),
        kept=(Kept(reason=name, names={name: 94}),),
        rounding=tuple(
            Rounding(
                format=str(format_),
                matrices=100,
                ratios={"search": 0.5, "gptq": 0.25},
                shipped=0.25,
                won={"gptq": 99, "search": 1},
            )
            for format_ in formats
        ),
        sweep=(
            SweepRow(
                target="5.5bpp",
                bpp=5.4321,
                predicted=0.11223,
                counts=counts,
                bytes_at_most=10**11,
                measured_weights=0.1,
                measured_activations=0.2,
                chosen=True,
            ),
        ),
        more_targets=3,
        swept=True,
        knee=Knee(bpp=5.3, from_bpp=4.5, to_bpp=8.0),
        measured=Measured(
            file=name,
            sha256="0" * 64,
            tokens=12288,
            images=4,
            source_perplexity=17.0,
            source_draft_agreement=0.6,
            weights=divergence,
            activations=divergence,
        ),
        experts=Experts(layers=94, each=128, fewest=0, unseen=7),
        vision_blocks=27,
        agreement={str(format_): 0.5 for format_ in formats},
        draft_weight=0.1,
        head=True,
        expert_formats=("NVFP4",),
        vllm="0.32",
        calibration=Calibration(
            text=name, text_sha256="1" * 64, fingerprint="2" * 64, tokens=16384, images=16, seed=0, labels="sampled"
        ),
        config=yaml.safe_dump({"model": {"source": name}}, allow_unicode=True),
        dtype="float32",
        device="cpu",
        versions={"torch": name},
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


@given(name=ODD)
@settings(max_examples=300)
def test_no_name_changes_what_a_reader_sees_beside_it(name: str) -> None:
    assume(line(name))
    text, plain = card(made_up(name)), card(made_up("a"))
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


def test_the_hub_reads_the_metadata() -> None:
    facts = made_up("a")
    source = replace(facts.source, hub_id="org/model", stated=Stated(license=("apache-2.0",), language=("en", "de")))
    assert front_matter(card(replace(facts, source=source, vision_blocks=0))) == {
        "license": "apache-2.0",
        "language": ["en", "de"],
        "base_model": "org/model",
        "base_model_relation": "quantized",
        "library_name": "vllm",
        "tags": ["compressed-tensors", "quantized", "mixed-precision", "nvfp4", "prismaquant-ray"],
    }
    causal = replace(source, architecture="LlamaForCausalLM")
    assert front_matter(card(replace(facts, source=causal, vision_blocks=0)))["pipeline_tag"] == "text-generation"
    assert front_matter(card(replace(facts, source=causal)))["pipeline_tag"] == "image-text-to-text"


def test_what_cannot_be_known_is_left_out_and_said() -> None:
    facts = made_up("a")
    said = stated(None)
    text = card(replace(facts, source=replace(facts.source, stated=said)))
    assert front_matter(text).keys().isdisjoint({"license", "base_model", "base_model_relation", "language"})
    assert "Not stated here: the source has no README.md." in text
    assert "no base model is named" in text


def test_a_model_left_as_it_is_claims_no_quantization() -> None:
    facts = replace(made_up("a", (FormatName.BF16,)), rounding=())
    text = card(facts)
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
    found = stated(f"---\n{body}\n---\n")
    text = card(replace(made_up("a"), source=replace(made_up("a").source, stated=found)))
    assert front_matter(text)["library_name"] == "vllm"


def test_a_measurement_on_the_calibration_text_says_so() -> None:
    facts = made_up("a")
    assert facts.measured is not None
    other, same = card(facts), card(replace(facts, measured=replace(facts.measured, sha256="1" * 64)))
    assert "another file than the calibration text" in other and "may be too good" not in other
    assert "the text that calibration used, too" in same and "may be too good" in same


# --- size -------------------------------------------------------------------------------------------------------


def test_the_largest_card_fits_into_what_a_budget_keeps_free() -> None:
    long = "é" * 5000
    every = made_up(long, tuple(FormatName))
    names = {f"{long}{number}": 94 for number in range(500)}
    largest = replace(
        every,
        source=replace(every.source, guesses=(long,) * 3, hub_id=None),
        modules=tuple(
            ModuleRow(
                kind="decoder layers", name="mlp.experts.down_projection" * 2, counts={str(f): 94 for f in FormatName}
            )
            for _ in range(500)
        ),
        kept=tuple(
            Kept(reason="router: a wrong expert costs more than its few bytes", names={f"{n:>50}": 94}) for n in names
        )
        + tuple(Kept(reason=f"{reason}", names={f"model.layers.*.{n}": 94 for n in range(9)}) for reason in range(3)),
        sweep=every.sweep * 12,
        config=yaml.safe_dump({"model": {"source": "x" * 120}, "calibration": {"text": "x" * 120}}),
    )
    assert len(card(largest).encode()) < CARD_BYTES


# --- facts of a run ---------------------------------------------------------------------------------------------


def configuration(directory: Path, source: Path, *overrides: str) -> Config:
    """A small run below `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "config.yaml"
    path.write_text(
        f"""
model: {{source: {source}}}
calibration: {{text: {make_text(directory, 6000)}, sequences: 8, length: 32, microbatch: 3, holdout: 0.25}}
budget: {{bpp: 6.0}}
sweep: [5.0, 6.0, 7.0]
cluster: {{address: local, workers: 1}}
store: {{run: {directory / "run"}, output: {directory / "repository"}}}
"""
    )
    return load(path, overrides)


def measured_run(config: Config) -> Run:
    run = Run(config, open_workers=in_process(1))
    run.measure()
    return run


def found(run: Run, plan: Mapping[str, Any], output: Path) -> CardFacts:
    """The facts as the writer of a repository asks for them."""
    facts: list[CardFacts] = []

    def card_of_written(written: Written) -> bytes:
        facts.append(facts_of(run, plan, written))
        return b""

    write(run, plan, output, card_of_written)
    return facts[0]


def write(run: Run, plan: Mapping[str, Any], output: Path, card: Callable[[Written], bytes]) -> WrittenRepository:
    choice = {group: FormatName(name) for group, name in plan["choice"].items()}
    return write_repository(run.source, run.layout, choice, run.candidates, Store(output), manifest={}, card=card)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Config:
    source = make_checkpoint(tmp_path_factory.mktemp("source") / "llama", "llama", layers=3)
    config = configuration(tmp_path_factory.mktemp("run"), source)
    run = measured_run(config)
    planning.sweep_targets(run)
    return config


IMAGES = Path(__file__).parents[1] / "configs/data/images"


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Experts, a vision tower, a draft head and an output head, all quantizable."""
    directory = tmp_path_factory.mktemp("run")
    entries = [{"image": str(IMAGES / name), "text": name} for name in ("maze.png", "clock.png", "handwriting.png")]
    (directory / "images.jsonl").write_text("\n".join(map(json.dumps, entries)))
    source = make_family(tmp_path_factory.mktemp("source") / "qwen3_5_moe", "qwen3_5_moe")
    settings = ("model.quantize_lm_head=true", f"calibration.images={directory / 'images.jsonl'}")
    return measured_run(configuration(directory, source, *settings))


def put(run: Run, key: str, body: Any) -> None:
    run.store.put(key, json.dumps(body).encode())


def measurement(*plans: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "text": {"file": "/somewhere/other.txt", "sha256": "f" * 64, "sequences": 24, "tokens": 12288, "images": 0},
        "source": {"loss": 2.8437, "perplexity": 17.18},
        "plans": list(plans),
    }


def test_the_card_has_the_plan_s_figures(dense: Config, tmp_path: Path) -> None:
    run = Run(dense)
    plan = planning.allocate(run)
    facts = found(run, plan, tmp_path / "repository")
    assert facts.predicted == pytest.approx(plan["predicted_loss"], rel=1e-12)
    assert sum(entry.groups for entry in facts.formats) == len(run.layout.groups)
    assert {entry.name: entry.groups for entry in facts.formats} == {
        name: count for name, count in plan["groups"].items() if count
    }
    assert sum(entry.weight_bytes for entry in facts.formats) == plan["weight_bytes"]
    for name in plan["groups"]:
        assert sum(row.counts.get(name, 0) for row in facts.modules) == plan["groups"][name]
    assert sum(sum(entry.names.values()) for entry in facts.kept) == len(run.layout.ignored)
    assert [row.target for row in facts.sweep] == ["5bpp", "6bpp", "7bpp"]
    assert [row.target for row in facts.sweep if row.chosen] == ["6bpp"]
    text = card(facts)
    assert f"{plan['predicted_loss']:.5f} ± {plan['standard_error']:.5f}" in text
    assert "| **6bpp** |" in text
    assert facts.measured is None and "| Measured loss | not measured |" in text
    for absent in ("Experts:", "Vision tower:", "Draft head:", "speculative", "transformers 5.23 does"):
        assert absent not in text


def test_rounding_ratios_are_those_of_the_matrices_that_ship(dense: Config, tmp_path: Path) -> None:
    run = Run(dense)
    plan = planning.allocate(run)
    facts = found(run, plan, tmp_path / "repository")
    by_linear = {
        name: codecs
        for records in run.records.values()
        for r in records.values()
        for name, codecs in r.metrics.get("linears", {}).items()
    }
    for entry in facts.rounding:
        product, count = 1.0, 0
        for group in run.layout.groups:
            if plan["choice"][group.name] == entry.format:
                for linear in group.linears:
                    errors = by_linear[linear.name][entry.format.lower()]
                    product *= errors["holdout_error"][errors["method"]] / errors["holdout_error"]["nearest"]
                    count += 1
        assert entry.matrices == count == sum(entry.won.values())
        assert entry.shipped == pytest.approx(product ** (1 / count))
        assert entry.shipped <= min(entry.ratios.values()) + 1e-12, "the best way of every matrix is at least as good"


def test_figures_of_another_plan_are_not_this_one_s(dense: Config, tmp_path: Path) -> None:
    run = Run(dense)
    plan = planning.allocate(run)
    output = tmp_path / "repository"
    sweep = json.loads(run.store.get("plans/sweep.json"))
    other = next(target for target in sweep["targets"] if target["target"] == "5bpp")
    assert other["choice"] != plan["choice"]
    figures = {"kl_mean": 0.4711, "kl_p99": 1.5, "top1_agreement": 0.75, "perplexity": 19.25, "tokens": 12288}
    try:
        put(
            run,
            "plans/measured.json",
            measurement({"choice": other["choice"], "weights": figures, "activations": None}),
        )
        facts = found(run, plan, output)
        assert facts.measured is None
        assert [row.measured_weights for row in facts.sweep] == [0.4711, None, None], "but it is that row's"
        own = {"choice": plan["choice"], "weights": None, "activations": figures | {"kl_mean": 0.25}}
        put(run, "plans/measured.json", measurement({"choice": other["choice"], "weights": figures}, own))
        facts = found(run, plan, output)
        assert facts.measured is not None and facts.measured.weights is None
        assert facts.measured.activations == Divergence(kl_mean=0.25, kl_p99=1.5, top1_agreement=0.75, perplexity=19.25)
        text = card(facts)
        assert "`other.txt`" in text and "/somewhere" not in text
        assert "No loss was measured" not in text and "0.2500" in text
        put(run, "plans/measured.json", measurement({"choice": plan["choice"], "weights": None, "activations": None}))
        assert found(run, plan, output).measured is None
        run.store.put("plans/measured.json", b"{")
        with pytest.raises(StoreError, match=r"plans/measured\.json cannot be read"):
            found(run, plan, output)
    finally:
        run.store.delete(["plans/measured.json"])


def test_a_card_does_not_depend_on_what_was_asked_before(dense: Config, tmp_path: Path) -> None:
    run = Run(dense)
    plan = planning.allocate(run)
    output = tmp_path / "repository"
    before = card(found(run, plan, output))
    put(run, "plans/sweep.json", {"targets": [], "knee": None})
    assert card(found(run, plan, output)) == before
    run.store.delete(["plans/sweep.json"])
    assert card(found(run, plan, output)) == before
    assert found(run, plan, output).swept
    out_of_reach = Run(dense.model_copy(update={"sweep": (1.0, 20.0)}))
    facts = found(out_of_reach, plan, output)
    assert not facts.swept and facts.knee is None and [row.chosen for row in facts.sweep] == [True]
    assert "No target of the sweep" in card(facts)


def test_a_long_sweep_is_shown_around_the_plan(dense: Config, tmp_path: Path) -> None:
    run = Run(dense.model_copy(update={"sweep": tuple(4.75 + n / 8 for n in range(28))}))
    facts = found(run, planning.allocate(run), tmp_path / "repository")
    assert len(facts.sweep) + facts.more_targets in (28, 29)
    assert sum(row.chosen for row in facts.sweep) == 1 and len(facts.sweep) == 12


def test_the_configuration_on_the_card_is_the_run_s(dense: Config, tmp_path: Path) -> None:
    run = Run(dense)
    plan = planning.allocate(run)
    facts = found(run, plan, tmp_path / "repository")
    text = card(facts)
    block = re.search(r"^```yaml\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert block is not None
    path = tmp_path / "config.yaml"
    path.write_text(block[1])
    again = load(path)
    for section in ("formats", "budget", "rounding", "allocation"):
        assert getattr(again, section) == getattr(dense, section)
    assert again.calibration == dense.calibration.model_copy(update={"text": Path(dense.calibration.text.name)})
    assert facts.calibration.fingerprint == run.calibration.fingerprint
    assert facts.calibration.tokens == run.calibration.positions == 8 * 32
    assert str(dense.store.run) not in text and str(dense.calibration.text.parent) not in text


def test_a_repository_with_its_card_is_verified_and_counted(dense: Config, tmp_path: Path) -> None:
    run = Run(dense)
    plan = planning.allocate(run)
    output = tmp_path / "repository"
    repository = write(run, plan, output, lambda written: card_of(run, plan, written))
    choice = {group: FormatName(name) for group, name in plan["choice"].items()}
    report = verify_repository(Store(output), run.source, run.layout, choice, run.candidates)
    assert report.problems == ()
    assert repository.total_bytes == sum(path.stat().st_size for path in output.iterdir())
    assert repository.files[README] == (output / README).stat().st_size
    assert json.loads((output / MANIFEST).read_text())["files"][README] == (output / README).stat().st_size
    assert front_matter((output / README).read_text())["pipeline_tag"] == "text-generation"


def test_every_part_of_a_model_is_described(everything: Run, tmp_path: Path) -> None:
    run = everything
    plan = planning.allocate(run)
    facts = found(run, plan, tmp_path / "repository")
    assert {row.kind for row in facts.modules} == {
        "vision blocks", "vision merger", "decoder layers", "draft head", "output head",
    }  # fmt: skip
    seen = [
        t for r in run.records.values() for record in r.values() for t in record.metrics.get("experts", {}).values()
    ]
    assert facts.experts == Experts(
        layers=len(seen), each=len(seen[0]), fewest=min(map(min, seen)), unseen=sum(t.count(0) for t in seen)
    )
    assert facts.agreement is not None and set(facts.agreement) == {"BF16", "NVFP4", "MXFP8"}
    assert (facts.calibration.images, facts.vision_blocks) == (3, 2)
    text = card(facts)
    command = re.search(r"^vllm serve REPOSITORY --speculative-config '(.*)'$", text, re.MULTILINE)
    assert command is not None and json.loads(command[1]) == {"method": "mtp", "num_speculative_tokens": 1}
    assert front_matter(text)["pipeline_tag"] == "image-text-to-text"
    for present in ("Experts:", "Vision tower: 2 blocks", "Draft head:", "`mlp.experts`", "`mtp.fc`"):
        assert present in text
    assert "{{" not in text and "None" not in text
