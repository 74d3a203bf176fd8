"""Claims about the configuration: every mistake is one line that names the key and the nearest right one."""

from __future__ import annotations

from pathlib import Path

import pytest

from prismaquant_ray.config import Config, load_config
from prismaquant_ray.errors import ConfigError
from prismaquant_ray.settings.budget import BudgetConfig
from prismaquant_ray.settings.values import parse_bytes

GOOD = """
model: {source: somewhere}
calibration: {text: text.txt}
budget: {bpp: 5.5}
store: {run: a/run, output: a/out}
"""


def write(directory: Path, text: str) -> Path:
    path = directory / "config.yaml"
    path.write_text(text)
    return path


def test_defaults_are_those_of_the_documentation(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD))
    assert [str(name) for name in config.formats] == ["NVFP4", "FP8", "MXFP8", "BF16"]
    assert config.sweep == (4.5, 4.75, 5.0, 5.25, 5.5, 6.0, 7.0, 8.25)
    assert config.rounding.gptq is not None
    assert (config.rounding.scale_search.grid, config.rounding.scale_search.span) == (32, (0.5, 1.5))
    assert (config.model.quantize_lm_head, config.calibration.images) == (False, None)
    assert (config.allocation.objective, config.allocation.mtp_weight) == ("token_fisher", 0.1)
    assert (config.allocation.force, config.allocation.floor) == ((), ())
    limits = config.allocation.limits
    assert (limits.prefill, limits.decode, str(limits.gpu), limits.given) == (None, None, "b200", False)
    assert [str(name) for name in config.paired_formats] == ["NVFP4", "NVFP4A16", "FP8", "MXFP8", "BF16"]
    assert (config.budget.sequences, config.kv_cache, config.budget.margin) == (1, "bf16", 0.15)


@pytest.mark.parametrize(
    ("margin", "read"), [("15%", 0.15), (0.15, 0.15), ("0%", 0.0), ("4GB", 4 * 10**9), (0, 0), (123, 123)]
)
def test_a_margin_is_a_share_or_bytes(margin: str | float, read: float) -> None:
    budget = BudgetConfig.model_validate({"vram": "24GB", "context": 1, "margin": margin})
    assert (budget.margin, type(budget.margin)) == (pytest.approx(read), type(read))


@pytest.mark.parametrize("budget", [{"bpp": 5.5}, {"vram": "24GB", "context": 9, "margin": "5%"}])
def test_a_budget_can_be_stored_and_read_again(budget: dict[str, object]) -> None:
    found = BudgetConfig.model_validate(budget)
    assert BudgetConfig.model_validate(found.model_dump(mode="json")) == found


def test_budgets_have_a_name_each() -> None:
    budgets = (
        BudgetConfig(bpp=5.5),
        BudgetConfig(bytes=19),
        BudgetConfig(vram=19, context=8),
        BudgetConfig(vram=19, context=8, sequences=2),
    )
    assert len({budget.target for budget in budgets}) == len(budgets)


def test_the_settings_of_memory_stay_when_the_kind_of_budget_is_replaced(tmp_path: Path) -> None:
    memory = ["budget.vram=24GB", "budget.context=32768", "budget.sequences=8"]
    config = load_config(write(tmp_path, GOOD), memory[1:] + memory[:1])
    assert (config.budget.vram, config.budget.context, config.budget.sequences) == (24 * 10**9, 32_768, 8)
    again = load_config(write(tmp_path, GOOD), [*memory, "budget.bpp=5"])
    assert (again.budget.bpp, again.budget.vram, again.budget.context) == (5.0, None, 32_768)


def test_the_shipped_configuration_loads() -> None:
    assert isinstance(load_config(Path(__file__).parent.parent / "configs" / "demo.yaml"), Config)


def test_overrides_are_yaml_and_one_budget_replaces_the_other(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, GOOD), ["budget.bytes=19GB", "formats=[NVFP4]", "rounding.gptq=null", "sweep=[5]"]
    )
    assert config.budget.bytes == 19_000_000_000
    assert config.budget.bpp is None
    assert config.rounding.gptq is None
    assert config.sweep == (5.0,)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("formats=[NVFP5]", "unknown format 'NVFP5'; did you mean NVFP4?"),
        ("formats=[nvfp4]", "unknown format 'nvfp4'; did you mean NVFP4?"),
        ("formats=[]", "at least one format"),
        ("formats=[BF16, BF16]", "each once"),
        ("calibraton.text=x", "unknown key calibraton; did you mean calibration?"),
        ("calibration.text=[]", "calibration.text: name at least one source"),
        ("calibration.text=3", "calibration.text: '3' is no source of text; give a path or a list of sources"),
        ("calibration.text=[a.txt, a.txt]", "calibration.text: a.txt is named twice"),
        ("calibration.text={path: a.txt, share: 1.5}", "calibration.text.0.share: "),
        ("calibration.text={path: a.txt, share: half}", "calibration.text.0.share: "),
        ("calibration.text={path: a.txt, share: 0.5}", "the shares are 0.5 in all; make them 1, or leave one out"),
        ("calibration.text={path: a.txt, shar: 1}", "unknown key calibration.text.0.shar; did you mean share?"),
        ("calibration.text={share: 1}", "calibration.text.0.path is missing"),
        (
            "calibration.text=[{path: a, share: 0.7}, {path: b, share: 0.7}]",
            "the shares are 1.4 in all; they are parts",
        ),
        ("calibration.text=[{path: a, share: 1}, b]", "the shares are 1 already, which leaves nothing for b"),
        ("calibration.text=mix:chats", "unknown kind 'mix:chats'; did you mean mix:chat?"),
        ("calibration.text=hf://ORG/NAME", "'hf://ORG/NAME' names no dataset; write hf://datasets/ORG/NAME[@REVISION]"),
        ("calibration.text=s3://bucket/a.txt", "s3://bucket/a.txt: text is read from files and from hf://datasets/"),
        ("calibration.lenght=3", "unknown key calibration.lenght; did you mean length?"),
        ("rounding.gptq.dampening=3", "unknown key rounding.gptq.dampening; did you mean damping?"),
        ("calibration.length=abc", "calibration.length: "),
        ("calibration.holdout=1.5", "calibration.holdout: "),
        ("budget.bpp=-1", "budget.bpp: "),
        ("budget.bytes=many", "'many' is not a size"),
        ("budget={}", "give exactly one of bpp, bytes and vram"),
        ("budget={bpp: 5, vram: 24GB, context: 1}", "give exactly one of bpp, bytes and vram"),
        ("budget.vram=24GB", "context is missing: the KV cache is computed"),
        ("budget.sequences=8", "context is missing: the KV cache is computed"),
        ("budget={vram: 24GB, context: 0}", "budget.context: "),
        ("kv_cache=int4", "kv_cache: Input should be 'bf16', 'fp8' or 'auto'"),
        ("kv_cache=auto", "kv_cache: auto needs budget.vram"),
        ("budget.kv_cache=fp8", "budget: kv_cache is a setting of its own now; write kv_cache: fp8 beside budget"),
        ("budget={vram: 24GB, context: 1, margin: 100%}", "'100%' is not a share; write 15%, or bytes as 4GB"),
        ("budget={vram: 24GB, context: 1, margin: -1}", "-1 is not a margin"),
        ("budget={vram: 24GB, contxt: 1}", "unknown key budget.contxt; did you mean context?"),
        ("allocation.force=[{match: a, format: NVFP5}]", "unknown format 'NVFP5'; did you mean NVFP4?"),
        ("allocation.floor=[{mach: a, format: BF16}]", "unknown key allocation.floor.0.mach; did you mean match?"),
        ("allocation.floor=[{match: a}]", "allocation.floor.0.format is missing"),
        ("allocation.max_bf16_fraction=0.1", "is gone; limit the time that BF16 costs by limits: {prefill: 1.25}"),
        ("allocation.limits.prefill=0.9", "allocation.limits.prefill: "),
        ("allocation.limits.prefil=1.1", "unknown key allocation.limits.prefil; did you mean prefill?"),
        ("allocation.limits.gpu=b100", "allocation.limits.gpu: "),
        ("allocation.refine=8", "allocation.refine needs evaluation: {text: FILE}, or evaluation: {}, the mix"),
        ("allocation.refine=-1", "allocation.refine: "),
        ("allocation={refine: 4, objective: fisher_trace}", "allocation.refine needs evaluation"),
        ("rounding.scale_search.span=[0.5, 2]", "head-room"),
        ("store.run=ftp://bucket/run", "store.run: ftp:// is not supported; give a directory or one of s3, gs://"),
        ("store.run=a/out/run", "must be separate directories"),
        ("store.run=a/out/run", "must be separate directories"),
        ("cluster.workers=0", "cluster.workers: Input should be 'auto' or greater than or equal to 1"),
        ("cluster.workers=two", "cluster.workers: Input should be 'auto' or a valid integer"),
        ("cluster.timeout=soon", "cluster.timeout: Input should be 'auto' or a valid number"),
        ("cluster.timeout=-1", "cluster.timeout: Input should be 'auto' or greater than 0"),
        (
            "cluster.memory=lots",
            "Input should be 'auto' or 'lots' is not a size; write 19GB",
        ),
        ("model.quantise_lm_head=true", "unknown key model.quantise_lm_head; did you mean quantize_lm_head?"),
        ("calibration.image=x.jsonl", "unknown key calibration.image; did you mean images?"),
        ("allocation.mtp_weights=1", "unknown key allocation.mtp_weights; did you mean mtp_weight?"),
        ("allocation.mtp_weight=-0.1", "allocation.mtp_weight: "),
        ("nonsense", "expected key=value"),
        ("model.source.deep=1", "is not a section"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, GOOD), [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_text_is_one_source_or_several_and_is_stored_as_it_was_written(tmp_path: Path) -> None:
    several = "[{path: a.jsonl, share: 0.5}, 'hf://datasets/o/n@v1:c:s', '-']"
    config = load_config(write(tmp_path, GOOD), [f"calibration.text={several}"])
    assert [(text.path, text.share) for text in config.calibration.text] == [
        ("a.jsonl", 0.5), ("hf://datasets/o/n@v1:c:s", None), ("-", None),
    ]  # fmt: skip
    assert Config.model_validate(config.model_dump(mode="json")) == config
    assert load_config(write(tmp_path, GOOD)).model_dump(mode="json")["calibration"]["text"] == ["text.txt"]
    default = load_config(write(tmp_path, GOOD.replace("calibration:", "evaluation: {} #")))
    assert default.evaluation is not None
    assert [text.path for text in (*default.calibration.text, *default.evaluation.text)] == ["mix:all", "mix:all"]


def test_standard_input_cannot_be_both_texts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="both read standard input; put one of them in a file"):
        load_config(write(tmp_path, GOOD), ['calibration.text="-"', 'evaluation.text="-"'])


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="store is missing"):
        load_config(write(tmp_path, GOOD.replace("store:", "#")))


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "not YAML"), ("- 1", "expected sections"), ("\x00", "not YAML")]
)
def test_what_is_not_a_configuration_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "size"), [("19GB", 19 * 10**9), ("1.5 GiB", 3 * 2**29), ("700", 700), ("10kb", 10_000), ("2MiB", 2**21)]
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_bytes(text) == size
