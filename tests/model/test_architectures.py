"""Architectures without a family: run as transformers runs them, written and verified, or refused in a line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from rich.console import Console

from jobs.commands import inspect as inspect_command
from jobs.commands import verify as verify_command
from jobs.pipeline.assembly import verify
from prismaquant_ray.compressed.dequantize import QuantizedRepository
from prismaquant_ray.config import Config
from prismaquant_ray.errors import InputError
from prismaquant_ray.model.conversions import Conversions
from prismaquant_ray.model.runner import ModelRunner
from prismaquant_ray.source.checkpoint import Checkpoint
from prismaquant_ray.storage.store import Store
from tests.architectures import REFUSED, VOCABULARY, WORKING, make_architecture
from tests.model.test_models import streamed
from tests.runs import configuration, quantized

UNKNOWN_TO_VLLM = {"bamba", "ctrl", "mpt", "roformer"}


@pytest.fixture(scope="module", params=WORKING)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name = request.param
    return make_architecture(tmp_path_factory.mktemp("model") / name, WORKING[name])


def test_blocks_one_by_one_give_the_logits_of_transformers(checkpoint: Path) -> None:
    architecture = WORKING[checkpoint.name]
    whole = getattr(transformers, architecture.name).from_pretrained(checkpoint, dtype=torch.float32)
    tokens = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(3))
    runner = ModelRunner(Checkpoint(Store(checkpoint)), dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        expected = whole(tokens).logits
        found = streamed(runner, tokens)[1]
    # Experts are summed in another order.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for end in architecture.kept:
        assert any(name.endswith(end) for name in runner.layout.ignored), end
        assert not any(linear.name.endswith(end) for linear in runner.layout.linears()), end


def test_the_whole_job_writes_a_repository_that_verifies(checkpoint: Path, tmp_path: Path) -> None:
    settings = ("rounding.gptq=null", "rounding.scale_search.grid=2", "calibration.sequences=4")
    config = configuration(tmp_path, checkpoint, *settings, bpp=7.0)
    quantized(config)
    found = verify(config)
    assert found.bpp <= 7.0
    assert divergence_of_the_copy(config, checkpoint, tmp_path / "copy") < 0.1
    known = checkpoint.name not in UNKNOWN_TO_VLLM
    assert found.named_by == ("vLLM 0.33.0" if known else None)
    card = (Path(config.store.output) / "README.md").read_text()
    assert ("modules in a server are assumed to be those of the checkpoint" in " ".join(card.split())) is not known
    console = Console(record=True, width=200)
    verify_command.render(found, console)
    assert ("verified, but for serving names" in console.export_text()) is not known


def divergence_of_the_copy(config: Config, checkpoint: Path, copy: Path) -> float:
    """Mean KL of the model that `dequantize` makes of the repository from the source, in nats per token.

    transformers loads the copy as it loads the source.
    """
    QuantizedRepository(Store(config.store.output)).write(Store(copy))
    tokens = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(4))
    logits = []
    whole, report = getattr(transformers, WORKING[checkpoint.name].name).from_pretrained(
        copy, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    for directory in (checkpoint, copy):
        runner = ModelRunner(Checkpoint(Store(directory)), dtype=torch.float32, device=torch.device("cpu"))
        with torch.no_grad():
            logits.append(streamed(runner, tokens)[1].log_softmax(-1))
    with torch.no_grad():
        torch.testing.assert_close(logits[1], whole(tokens).logits.log_softmax(-1), rtol=1e-4, atol=1e-4)
    source, dequantized = logits
    return float((source.exp() * (source - dequantized)).sum(-1).mean())


def test_a_key_that_is_the_value_answers_for_both_where_the_value_is_not_there(tmp_path: Path) -> None:
    source = Checkpoint(Store(make_architecture(tmp_path / "gemma4_moe", WORKING["gemma4_moe"])))
    layout = ModelRunner(source, dtype=torch.float32, device=torch.device("cpu")).layout
    attention = "model.layers.{}.self_attn.{}_proj"
    named = [attention.format(layer, "v") in layout.aliases_of(attention.format(layer, "k")) for layer in (0, 1)]
    stored = [f"{attention.format(layer, 'v')}.weight" in source.tensors for layer in (0, 1)]
    assert (stored, named) == ([True, False], [False, True])


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_had_is_refused_by_inspect(tmp_path: Path, name: str) -> None:
    architecture, words = REFUSED[name]
    config = configuration(tmp_path, make_architecture(tmp_path / "source", architecture))
    with pytest.raises(InputError, match=words) as raised:
        inspect_command.run(config)
    assert "\n" not in str(raised.value)


def test_weights_that_transformers_computes_are_refused_by_name() -> None:
    stored = Conversions(tensors={"a.gate_up_proj": ("b.w13",)}, computed={"a.gate_up_proj": "Interleave"})
    with pytest.raises(InputError, match=r"a\.gate_up_proj is made of b\.w13 by Interleave when transformers loads it"):
        stored.tensor("a.gate_up_proj")
