"""Claims about evaluating a quantized model: figures are those of whole models by transformers, however it is run."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from actors.protocol import Call, CallKind
from actors.schedule.recovery import Cause
from actors.schedule.units import Stage
from jobs.commands.evaluate import render
from jobs.pipeline.repository_evaluation import EvaluatedRepository, evaluate
from jobs.pipeline.workers import OpenWorkers
from prismaquant_ray.calibration.images import load_images
from prismaquant_ray.compressed.dequantize import QuantizedRepository
from prismaquant_ray.errors import InputError
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.serialization import to_json
from prismaquant_ray.source.checkpoint import Checkpoint
from prismaquant_ray.storage.store import Store
from tests.inprocess import InProcessWorkers, after, in_process, unopened
from tests.repositories import Model, make_model, mixed_choice, rewrite, tensors_of
from tests.tiny import make_checkpoint, make_text

SEQUENCES, LENGTH = 5, 32
IMAGES = Path(__file__).parents[2] / "configs/data/images"


class Quantized:
    """A tiny model, a repository of it in mixed formats, and that repository's weights in BF16."""

    def __init__(self, directory: Path, name: str) -> None:
        self.name = name
        self.model: Model = make_model(directory, name)
        self.choice = mixed_choice(self.model.layout)
        self.source = directory / "source"
        self.repository, self.copy = directory / "repository", directory / "copy"
        self.model.write(self.repository, self.choice)
        QuantizedRepository(Store(self.repository)).write(Store(self.copy))
        self.text = make_text(directory, 8000, seed=5)

    def evaluate(self, open_workers: OpenWorkers | None = None, **options: Any) -> dict[str, Any]:
        return to_json(self.evaluated(open_workers, **options))

    def evaluated(self, open_workers: OpenWorkers | None = None, **options: Any) -> EvaluatedRepository:
        arguments = {"sequences": SEQUENCES, "length": LENGTH, "overrides": ["calibration.microbatch=2"], **options}
        repository = arguments.pop("repository", self.repository)
        workers = in_process(2) if open_workers is None else open_workers
        return evaluate(str(repository), str(self.source), self.text, open_workers=workers, **arguments)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Quantized]:
    made: dict[str, Quantized] = {}

    def make(name: str) -> Quantized:
        if name not in made:
            made[name] = Quantized(tmp_path_factory.mktemp(name), name)
        return made[name]

    return make


def whole(directory: Path, *, sees: bool = False) -> Any:
    auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    return auto.from_pretrained(directory, dtype=torch.float32, experts_implementation="eager")


def printed(found: EvaluatedRepository) -> str:
    shown = io.StringIO()
    render(found, Console(file=shown, width=160))
    return shown.getvalue()


def tokens_of(case: Quantized) -> Tensor:
    """The sequences that an evaluation draws."""
    from transformers import AutoTokenizer

    from prismaquant_ray.calibration.text import load_sequences

    tokenizer = AutoTokenizer.from_pretrained(case.source)
    return load_sequences(case.text, tokenizer, sequences=SEQUENCES, length=LENGTH, seed=0, holdout=0.0).tokens


class Figures:
    """What the figures are, by their definitions, in float64, over logits (sequences, tokens, V) and text."""

    def __init__(self, source: Tensor, quantized: Tensor, tokens: Tensor) -> None:
        p, q = source.double().softmax(-1), quantized.double().softmax(-1)
        self.kl = (p * (p / q).log()).sum(-1)
        self.agrees = (source.argmax(-1) == quantized.argmax(-1)).double()
        self.loss = -q[:, :-1].gather(-1, tokens[:, 1:, None]).log().mean()

    def check(self, found: Mapping[str, Any]) -> None:
        assert found["tokens"] == self.kl.numel()
        assert found["kl_mean"] == pytest.approx(float(self.kl.mean()), rel=1e-4)
        assert found["kl_p90"] == pytest.approx(float(self.kl.flatten().quantile(0.9)), rel=1e-4)
        assert found["kl_p99"] == pytest.approx(float(self.kl.flatten().quantile(0.99)), rel=1e-4)
        # One token of these may change its mind over the last bit.
        assert found["top1_agreement"] == pytest.approx(float(self.agrees.mean()), abs=1.5 / self.kl.numel())
        assert found["loss"] == pytest.approx(float(self.loss), rel=1e-5)
        assert found["perplexity"] == pytest.approx(math.exp(float(self.loss)), rel=1e-4)
        by_sequence = self.kl.mean(-1)
        n = len(by_sequence)
        assert found["kl_standard_error"] == pytest.approx(float(by_sequence.std() / math.sqrt(n)), rel=1e-4)


@pytest.mark.parametrize("name", ["llama_untied", "gemma2", "qwen3_moe", "qwen3_5_text", "deepseek_v3"])
def test_figures_with_rounded_weights_are_those_of_whole_models(
    quantized: Callable[[str], Quantized], name: str
) -> None:
    case = quantized(name)
    tokens = tokens_of(case)
    with torch.no_grad():
        source, rounded = (whole(directory)(tokens).logits for directory in (case.source, case.copy))
    found = case.evaluate()
    Figures(source, rounded, tokens).check(found["weights"])
    assert found["source_figures"]["loss"] == pytest.approx(float(Figures(source, source, tokens).loss), rel=1e-5)
    assert found["activations"]["kl_mean"] != found["weights"]["kl_mean"]


@pytest.mark.parametrize(("name", "first_mixture"), [("qwen3_moe", 0), ("deepseek_v3", 1)])
def test_rerouted_tokens_are_those_whose_experts_differ_in_whole_models(
    quantized: Callable[[str], Quantized], name: str, first_mixture: int
) -> None:
    case = quantized(name)
    tokens = tokens_of(case)

    def experts(directory: Path) -> list[list[frozenset[int]]]:
        """The set of experts of every token, by layer."""
        model, found = whole(directory), []
        layers = model.model.layers[first_mixture:]
        for layer in layers:
            layer.mlp.experts.register_forward_pre_hook(lambda _, args: found.append(args[1]))
        with torch.no_grad():
            model(tokens)
        assert len(found) == len(layers)
        return [[frozenset(token) for token in chosen.tolist()] for chosen in found]

    source, rounded = experts(case.source), experts(case.copy)
    shares = [
        sum(ours != theirs for ours, theirs in zip(*layer, strict=True)) / tokens.numel()
        for layer in zip(source, rounded, strict=True)
    ]
    found = case.evaluated()
    assert found.weights.rerouted == pytest.approx(sum(shares) / len(shares), abs=1e-12)
    assert found.weights.rerouted is not None
    assert 0 < found.weights.rerouted < 1
    told = printed(found)
    assert f"{found.weights.rerouted:.2%}" in told
    assert found.activations.rerouted is not None
    assert ("of tokens meet other experts than in the source" in told) == (found.activations.rerouted > 0.05)


def test_a_model_without_experts_is_not_said_to_reroute(quantized: Callable[[str], Quantized]) -> None:
    found = quantized("llama_untied").evaluated()
    assert found.activations.rerouted is None
    assert "rerouted" not in printed(found)


def test_figures_with_rounded_activations_are_those_of_a_whole_model_that_rounds_them(
    quantized: Callable[[str], Quantized],
) -> None:
    case = quantized("llama_untied")
    tokens, model = tokens_of(case), whole(case.copy)
    stored = case.model.stored(case.choice)

    def rounding(module: str) -> Any:
        name, tensors = stored[module]
        function = FORMATS[name].round_activation

        def hook(_: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            assert function is not None
            (x,) = args
            return (function(x.flatten(0, -2), tensors.get("input_global_scale")).view_as(x),)

        return hook if function is not None else None

    hooked = 0
    for name, module in model.named_modules():
        hook = rounding(name) if name in stored else None
        if hook is not None:
            module.register_forward_pre_hook(hook)
            hooked += 1
    assert hooked > 5
    with torch.no_grad():
        source, rounded = whole(case.source)(tokens).logits, model(tokens).logits
    Figures(source, rounded, tokens).check(case.evaluate()["activations"])


@pytest.mark.slow
def test_images_are_seen_by_both_models(quantized: Callable[[str], Quantized], tmp_path: Path) -> None:
    case = quantized("qwen3_5")
    entry = json.loads((IMAGES / "captions.jsonl").read_text().splitlines()[0])
    captions = tmp_path / "captions.jsonl"
    captions.write_text(json.dumps({**entry, "image": str(IMAGES / entry["image"])}))
    found = case.evaluate(images=captions)
    tokens = tokens_of(case)
    token = case.model.layout.image_token
    assert token is not None
    (image,) = load_images(captions, case.source, image_token=token)
    source, rounded = whole(case.source, sees=True), whole(case.copy, sees=True)
    kl = []
    with torch.no_grad():
        for inputs in ({"input_ids": tokens}, image.inputs):
            ids = inputs["input_ids"]
            p, q = (model(**inputs).logits.double().log_softmax(-1) for model in (source, rounded))
            # Where the next token stands for a piece of an image there is nothing to predict.
            predicts = torch.cat([ids[:, 1:] != token, torch.ones(len(ids), 1, dtype=torch.bool)], dim=1)
            kl.append((p.exp() * (p - q)).sum(-1)[predicts])
    assert found["weights"]["tokens"] == sum(len(part) for part in kl)
    assert found["weights"]["kl_mean"] == pytest.approx(float(torch.cat(kl).mean()), rel=1e-3)
    assert found["text"]["images"] == 1


def test_the_draft_is_judged_by_what_its_own_model_says(quantized: Callable[[str], Quantized]) -> None:
    case = quantized("qwen3_5")
    found = case.evaluate()
    shares = [found[key]["draft_agreement"] for key in ("source_figures", "weights", "activations")]
    assert all(0 <= share <= 1 for share in shares)
    positions = SEQUENCES * (LENGTH - 1)
    assert all(abs(share * positions - round(share * positions)) < 1e-6 for share in shares)
    # The source's figure is the one that the probe reports for a draft that is not quantized.
    from prismaquant_ray.layout import BlockKind
    from prismaquant_ray.model.layout_builder import Scope
    from prismaquant_ray.model.runner import ModelRunner

    runner = ModelRunner(
        Checkpoint(Store(case.source)), dtype=torch.float32, device=torch.device("cpu"), scope=Scope(images=False)
    )
    tokens = tokens_of(case)
    inputs = {"input_ids": tokens}
    with torch.no_grad():
        with runner.entry():
            hidden = runner.embed(inputs)
        for block in runner.layout.of(BlockKind.DECODER):
            hidden = runner.run_block(block.index, runner.load_block(block.index), hidden, inputs)
        (draft,) = runner.layout.of(BlockKind.DRAFT)
        with runner.beside(draft.index):
            guessed = runner.draft_logits(runner.run_block(draft.index, runner.load_block(draft.index), hidden, inputs))
            spoken = runner.logits(hidden[:, 1:])
    agreed = float((guessed.argmax(-1) == spoken.argmax(-1)).double().mean())
    assert shares[0] == pytest.approx(agreed, abs=1.5 / positions)


@pytest.mark.parametrize("name", ["llama", "qwen3_5", "mixtral"])
def test_a_model_against_itself_is_exactly_zero(quantized: Callable[[str], Quantized], name: str) -> None:
    case = quantized(name)
    found = case.evaluate(repository=case.source)
    for key in ("weights", "activations"):
        assert found[key]["kl_mean"] == found[key]["kl_p99"] == found[key]["kl_standard_error"] == 0.0
        assert found[key]["top1_agreement"] == 1.0
        assert found[key]["loss"] == found["source_figures"]["loss"]
    assert found["formats"] == {}
    assert found["bits"]["quantized_linears"] is None
    assert found["bits"]["all_parameters"] == pytest.approx(16, rel=0.01)


def test_a_limit_that_is_missed_is_said_and_ends_with_its_own_exit_code(quantized: Callable[[str], Quantized]) -> None:
    case = quantized("llama_untied")
    held = case.evaluate()["activations"]
    for limits, missed in (
        ({"max_kl": held["kl_mean"], "min_top1": held["top1_agreement"]}, 0),
        ({"max_kl": held["kl_mean"] * 0.999}, 1),
        ({"max_kl": 0.0, "min_top1": 1.0}, 2),
    ):
        found = case.evaluated(**limits)
        assert (len(found.missed), found.exit_code) == (missed, 4 if missed else 0)
        assert printed(found).count("not good enough: ") == missed
    for limits, message in (
        ({"max_kl": -1.0}, "give nats per token"),
        ({"max_kl": math.nan}, "give nats per token"),
        ({"min_top1": 98.0}, "give a share of tokens"),
    ):
        assert message in refused(case, **limits)


def test_bits_have_three_denominators(quantized: Callable[[str], Quantized]) -> None:
    case = quantized("llama_untied")
    bits, formats = case.evaluate()["bits"], case.evaluate()["formats"]
    stored = case.model.stored(case.choice)
    counted = sum(t.numel() * t.element_size() for _, ts in stored.values() for key, t in ts.items() if t.numel() > 2)
    weights = case.model.weights()
    assert bits["quantized_linears"] == pytest.approx(8 * counted / sum(weights[name].numel() for name in stored))
    parameters = sum(math.prod(info.shape) for info in case.model.source.tensors.values())
    files = sum(path.stat().st_size for path in case.repository.iterdir())
    assert bits["files"] == pytest.approx(8 * files / parameters)
    assert bits["quantized_linears"] < bits["all_parameters"] < bits["files"]
    assert sum(formats.values()) == len(stored)
    assert {FormatName(name) for name in formats} == {name for name, _ in stored.values()}


# However it is run ----------------------------------------------------------------------------------------------------


def losing(every: int) -> Callable[[str, Call], Cause | None]:
    """Every so many steps the worker dies that should take one."""
    seen = iter(range(10**6))

    def accident(worker: str, call: Call) -> Cause | None:
        if call.kind in (CallKind.RUN, CallKind.FINISH) and next(seen) % every == every - 1:
            return Cause.PROCESS
        return None

    return accident


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama_untied", "qwen3_5"])
def test_workers_shards_and_losses_change_no_figure(
    quantized: Callable[[str], Quantized], name: str, tmp_path: Path
) -> None:
    case = quantized(name)
    expected = case.evaluate(in_process(1))
    microbatch = "calibration.microbatch=2"
    for workers, limit in ((1, 1), (3, 2), (2, 10)):
        overrides = [microbatch, f"cluster.blocks_per_shard={limit}"]
        assert case.evaluate(in_process(workers), overrides=overrides) == expected
    assert case.evaluate(in_process(2, losing(11))) == expected
    # Stopped after any number of steps and asked again, it continues.
    opened: list[InProcessWorkers] = []
    store = str(tmp_path / "store")
    with pytest.raises(KeyboardInterrupt):
        case.evaluate(in_process(1, after(7), opened), store=store)
    assert case.evaluate(in_process(1, opened=opened), store=store) == expected
    before, again = (
        [call for _, call in found.log if call.kind is CallKind.FINISH and call.shard is not None] for found in opened
    )
    assert before, "some shards were finished when it stopped"
    assert not {call.shard.units for call in before} & {call.shard.units for call in again}
    assert all(call.shard.stage is Stage.EVALUATION for call in again)
    # With other microbatches what was stored of them is of no use.
    elsewhere, halved = str(tmp_path / "halved"), ["calibration.microbatch=1"]
    with pytest.raises(KeyboardInterrupt):
        case.evaluate(in_process(1, after(7)), store=elsewhere)
    found = case.evaluate(in_process(1), store=elsewhere, overrides=halved)
    assert found["weights"]["kl_mean"] == pytest.approx(expected["weights"]["kl_mean"], rel=1e-4)
    assert not [path for path in (tmp_path / "halved" / "evaluations" / "running").rglob("*") if path.is_file()]
    # A third time nothing is run, and what was needed in between is gone.
    assert case.evaluate(in_process(1, after(0)), store=store) == expected
    assert not [path for path in (tmp_path / "store" / "evaluations" / "running").rglob("*") if path.is_file()]


# Bad input ------------------------------------------------------------------------------------------------------------


def refused(case: Quantized, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        case.evaluate(unopened, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_text_that_is_too_short(quantized: Callable[[str], Quantized]) -> None:
    message = refused(quantized("llama_untied"), sequences=10_000)
    assert "10,000 sequences × 32 asked" in message


def test_a_repository_of_another_model(quantized: Callable[[str], Quantized], tmp_path: Path) -> None:
    case = quantized("llama_untied")
    other = make_checkpoint(tmp_path / "other", "llama_untied", hidden=128, intermediate=256, head_dim=64)
    assert "it was made from another model" in refused(case, repository=other)
    assert "it was made from another model" in refused(case, repository=make_checkpoint(tmp_path / "qwen", "qwen2"))


def test_another_tokenizer(quantized: Callable[[str], Quantized], tmp_path: Path) -> None:
    case = quantized("llama_untied")
    changed = tmp_path / "changed"
    shutil.copytree(case.repository, changed)
    body = json.loads((changed / "tokenizer.json").read_text())
    vocabulary = body["model"]["vocab"]
    first, second = [word for word, number in vocabulary.items() if 20 <= number < 22]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (changed / "tokenizer.json").write_text(json.dumps(body))
    assert "have different tokenizers" in refused(case, repository=changed)
    for path in changed.glob("tokenizer*"):
        path.unlink()
    assert case.evaluate(repository=changed)["notes"] == [
        "the repository has no tokenizer of its own; the source's was used"
    ]


def test_a_place_that_is_no_repository(quantized: Callable[[str], Quantized], tmp_path: Path) -> None:
    case = quantized("llama_untied")
    assert "is not a directory" in refused(case, repository=tmp_path / "nowhere")
    assert "config.json" in refused(case, repository=tmp_path)


def test_images_for_a_model_that_does_not_see(quantized: Callable[[str], Quantized]) -> None:
    assert "no vision tower" in refused(quantized("llama_untied"), images=IMAGES / "captions.jsonl")


@pytest.mark.slow
def test_a_repository_that_lost_its_draft_head_is_measured_without(
    quantized: Callable[[str], Quantized], tmp_path: Path
) -> None:
    """As transformers saves it. All else is the same."""
    case = quantized("qwen3_5")
    changed = tmp_path / "changed"
    shutil.copytree(case.repository, changed)
    rewrite(changed, {name: None for name in tensors_of(changed) if name.startswith("mtp.")})
    found, whole_ = case.evaluate(repository=changed), case.evaluate()
    assert found["notes"] == ["the repository has no draft head; the source's was not measured"]
    for key in ("weights", "activations"):
        assert "draft_agreement" not in found[key]
        assert found[key] == {name: value for name, value in whole_[key].items() if name != "draft_agreement"}
