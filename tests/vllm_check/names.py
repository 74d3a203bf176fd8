"""The table of vLLM's own names: run by the Python of vLLM's environment, it prints what `families/vllm.json` holds.

Of every architecture that generates text: which Linears become one (`packed_modules_mapping` of its class), and how
modules are renamed (`hf_to_vllm_mapper`). Both are what vLLM hands to its quantization.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

from tests.vllm_check import media

Table = dict[str, Any]


def main() -> None:
    """Print the table."""
    media.prepare()
    import vllm
    from vllm.model_executor.models import registry

    models = [registry._TEXT_GENERATION_MODELS, registry._MULTIMODAL_MODELS, registry._TRANSFORMERS_SUPPORTED_MODELS]
    found: Table = {}
    for name, (module, class_name) in sorted(entry for each in models for entry in each.items()):
        found[name] = {"through": "transformers"} if module == "transformers" else _class_facts(module, class_name)
    sys.stdout.write(json.dumps({"vllm": vllm.__version__, "architectures": found}, indent=1) + "\n")


def _class_facts(module: str, class_name: str) -> Table:
    path = module if "." in module else f"vllm.model_executor.models.{module}"
    try:
        model = getattr(importlib.import_module(path), class_name)
    except (ImportError, AttributeError, RuntimeError) as error:
        return {"unreadable": f"{type(error).__name__}: {error}"[:120]}
    packed = getattr(model, "packed_modules_mapping", None) or {}
    facts: Table = {"fused": {name: [*members] for name, members in packed.items() if len(members) > 1}}
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    return facts | ({} if mapper is None else _renames(mapper.get_rename_mapper()))


def _renames(mapper: Any) -> Table:
    """Renames in the order in which vLLM applies them; empty kinds are left out."""
    assert not mapper.orig_to_new_renaming, "renames by transformers' rules cannot be written down"
    found = {
        "regex": [[pattern.pattern, new] for pattern, new in mapper.orig_to_new_regex.items()],
        "parts": [[*each] for each in mapper.orig_to_new_substr.items()],
        "prefixes": [[*each] for each in mapper.orig_to_new_prefix.items()],
        "suffixes": [[*each] for each in mapper.orig_to_new_suffix.items()],
    }
    return {kind: renames for kind, renames in found.items() if renames}


if __name__ == "__main__":
    main()
