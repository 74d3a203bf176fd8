"""A few tokens before a run: what would end it after hours ends it in seconds, in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from actors.context import loss_of
from jobs.commands import inspect as inspect_command
from jobs.pipeline.inspection import inspect
from jobs.pipeline.run import Run
from prismaquant_ray.errors import InputError
from prismaquant_ray.events import Event, Preflighted
from prismaquant_ray.model import meta_model
from prismaquant_ray.model.runner import ModelRunner
from prismaquant_ray.preflight import Preflight, preflight
from tests.architectures import WORKING, make_architecture
from tests.inprocess import in_process
from tests.runs import configuration, full_configuration
from tests.tiny import make_checkpoint
from tests.tiny_families import make_family


def flown(config: Any) -> Preflight:
    run = Run(config)
    runner = ModelRunner(run.source, dtype=torch.float32, device=torch.device("cpu"))
    return preflight(runner, run.calibration, loss_of(run.config, runner))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "source", "llama_untied")


def changed(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def test_one_block_stands_for_all_of_its_structure(tmp_path: Path, source: Path) -> None:
    assert flown(configuration(tmp_path, source)).tried == ("model.layers.0",)
    # Full and sliding attention have equal shapes; a dense layer precedes experts.
    mixed = make_architecture(tmp_path / "mixed", WORKING["exaone4"])
    kinds = json.loads((mixed / "config.json").read_text())["layer_types"]
    assert len(flown(configuration(tmp_path / "1", mixed)).tried) == len(set(kinds))
    experts = make_architecture(tmp_path / "experts", WORKING["glm4_moe"])
    assert flown(configuration(tmp_path / "2", experts)).tried == ("model.layers.0", "model.layers.1")


def test_images_drafts_and_the_head_are_tried_as_well(tmp_path: Path) -> None:
    config = full_configuration(tmp_path, make_family(tmp_path / "source", "qwen3_5_moe"))
    tried = inspect(config, deep=True).preflight
    assert tried is not None
    assert {"model.visual.blocks.0", "model.visual.merger", "mtp", "lm_head"} <= {*tried.tried}


def test_a_run_begins_with_it_and_a_continued_one_does_not(tmp_path: Path, source: Path) -> None:
    config, heard = configuration(tmp_path, source), list[Event]()
    Run(config, open_workers=in_process(), on_event=heard.append).measure()
    (event,) = [event for event in heard if isinstance(event, Preflighted)]
    assert event.tried == ["model.layers.0"]
    first = [type(event).__name__ for event in heard]
    assert first.index("Preflighted") < first.index("PassBegan")
    (Path(config.store.run) / "measured.json").unlink()
    heard.clear()
    Run(config, open_workers=in_process(), on_event=heard.append).measure()
    assert not [event for event in heard if isinstance(event, Preflighted)]


def ends(config: Any, words: str) -> None:
    """A run ends in one line, before anything of either pass is stored."""
    with pytest.raises(InputError, match=words) as raised:
        Run(config, open_workers=in_process()).measure()
    assert "\n" not in str(raised.value)
    assert not [*Path(config.store.run).glob("*ward/*")]


def test_gradients_of_zero_do_not_end_it(tmp_path: Path, source: Path) -> None:
    def silence(tensors: dict[str, Tensor]) -> None:
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            tensors[f"model.layers.0.{name}.weight"].zero_()
        for name in ("q_proj", "k_proj", "v_proj"):
            tensors[f"model.layers.0.self_attn.{name}.weight"].zero_()

    changed(source, silence)
    found = flown(configuration(tmp_path, source))
    # What has a gradient of zero is tried; its prices say the rest.
    assert found.tried == ("model.layers.0",)


def test_activations_that_overflow_are_named(tmp_path: Path, source: Path) -> None:
    changed(source, lambda tensors: tensors["model.layers.0.mlp.down_proj.weight"].fill_(3e38))
    ends(configuration(tmp_path, source), r"model\.layers\.0 puts out NaN or infinite activations for a few tokens")


def test_logits_that_overflow_are_named(tmp_path: Path, source: Path) -> None:
    changed(source, lambda tensors: tensors["lm_head.weight"].fill_(3e38))
    ends(configuration(tmp_path, source), "logits or loss of a few tokens are NaN or infinite")


def test_a_buffer_that_nobody_fills_is_named(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = meta_model.build_on_meta

    def build(*args: Any) -> Any:
        model = original(*args)
        model.model.layers[1].register_buffer("mup_vector", torch.full((4,), float("nan")), persistent=False)
        return model

    monkeypatch.setattr(meta_model, "build_on_meta", build)
    ends(configuration(tmp_path, source), r"model\.layers\.1\.mup_vector is a buffer that transformers fills itself")


def test_a_linear_that_its_block_does_not_call_is_named(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a fused kernel multiplies by its weight."""
    original = meta_model.MetaModel.new_layer

    def new_layer(self: Any, index: int) -> nn.Module:
        layer = original(self, index)
        attention: Any = layer.self_attn
        linear = attention.o_proj
        object.__setattr__(linear, "forward", None)
        attention.__dict__["_modules"]["o_proj"] = _ByWeight(linear)
        return layer

    monkeypatch.setattr(meta_model.MetaModel, "new_layer", new_layer)
    ends(configuration(tmp_path, source), r"self_attn\.o_proj: its block does not call it, so it cannot be measured")


def test_a_block_without_any_gradient_ends_the_run(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = ModelRunner.run_block

    def run_block(self: Any, index: int, module: nn.Module, hidden: Tensor, inputs: Any) -> Tensor:
        return original(self, index, module, hidden, inputs).detach() + hidden

    monkeypatch.setattr(ModelRunner, "run_block", run_block)
    ends(configuration(tmp_path, source), r"model\.layers\.0: no gradient reaches any of its Linears")


def test_what_a_block_fails_with_is_one_line_that_names_it(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Tensor:
        raise RuntimeError("shapes do\nnot match")

    monkeypatch.setattr(ModelRunner, "run_block", fail)
    ends(
        configuration(tmp_path, source), r"model\.layers\.0 cannot be run by itself: .* RuntimeError \(shapes do not m"
    )


class _ByWeight(nn.Linear):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")

    def __call__(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


def test_inspect_deep_says_what_it_tried_and_needs_weights(tmp_path: Path, source: Path) -> None:
    found = inspect_command.run(configuration(tmp_path, source), deep=True)
    assert found.preflight is not None
    assert found.preflight.tried == ("model.layers.0",)
    (source / "model.safetensors").unlink()
    with pytest.raises(InputError, match="has no weights, which --deep would run"):
        inspect_command.run(configuration(tmp_path / "bare", source), deep=True)
