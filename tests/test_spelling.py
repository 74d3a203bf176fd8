"""Names as servers spell them: vLLM's own table, its renames, and the families beside it."""

from __future__ import annotations

import pytest

from prismaquant_ray.families import FAMILIES
from prismaquant_ray.families.base import LATENT
from prismaquant_ray.families.serving import server_names
from prismaquant_ray.layout import spelled
from prismaquant_ray.spelling import Spelling


def test_renames_are_applied_in_turn_as_vllm_applies_them() -> None:
    spelling = Spelling(
        regex=((r"^h\.(\d+)\.", r"model.layers.\1."),),
        parts=((".conv.", ".short_conv."), ("layers", "blocks")),
        prefixes=(("model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")),
        suffixes=((".scale_inv", ".scale"), (".in_proj.weight", ".in.weight")),
    )
    assert spelling.of("h.3.conv.conv.in_proj") == "language_model.model.blocks.3.short_conv.conv.in"
    assert spelling.of("lm_head") == "language_model.lm_head"
    assert spelling.of("model.layers.0.experts.{}.up_proj") == "language_model.model.blocks.0.experts.{}.up_proj"
    assert spelled(["a", "model"], [Spelling(), spelling]) == (("a", "model"), ("a", "language_model.model"))


@pytest.mark.parametrize(
    ("architecture", "name", "other"),
    [
        ("Lfm2ForCausalLM", "model.layers.0.conv.in_proj", "model.layers.0.short_conv.in_proj"),
        ("GptOssForCausalLM", "model.layers.1.self_attn.q_proj", "model.layers.1.attn.q_proj"),
        (
            "Mistral3ForConditionalGeneration",
            "model.language_model.layers.0.mlp.up_proj",
            "language_model.model.layers.0.mlp.up_proj",
        ),
        ("NemotronHForCausalLM", "backbone.layers.0.mixer.up_proj", "model.layers.0.mixer.up_proj"),
        ("GraniteMoeHybridForCausalLM", "model.layers.0.mamba.in_proj", "model.layers.0.mixer.in_proj"),
    ],
)
def test_the_table_has_what_vllm_calls_them(architecture: str, name: str, other: str) -> None:
    found = server_names(architecture)
    assert found is not None
    assert other in [names[0] for names in spelled([name], found.spellings)]


def test_what_is_fused_comes_from_the_table_too() -> None:
    lfm2 = server_names("Lfm2ForCausalLM")
    assert lfm2 is not None
    assert lfm2.fused["w13"] == ("w1", "w3")
    assert lfm2.runtime == "vLLM 0.33.0"
    assert server_names("MptForCausalLM") is None
    olmo2 = server_names("Olmo2ForCausalLM")
    assert olmo2 is not None
    assert olmo2.through_transformers


def test_families_fuse_what_vllm_says_it_fuses() -> None:
    for family in FAMILIES:
        for architecture in family.architectures:
            found = server_names(architecture)
            assert found is not None, architecture
            rules = {rule.name: rule.members for rule in family.fused}
            # Some rules are added when a model is built, which its class does not say.
            added = {*(rule.name for rule in LATENT.fused), *(["gate_up_proj"] if "Qwen3Moe" in architecture else [])}
            assert {name for name in rules if name not in found.fused} <= added, architecture
            assert rules == {**rules, **{name: found.fused[name] for name in rules if name in found.fused}}
