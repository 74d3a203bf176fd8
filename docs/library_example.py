# %% [markdown]
# # prismaquant-ray as a library
#
# The stages of a run as functions: typed results, events by a callback, nothing printed. Run it cell by cell, or as
# `python docs/library_example.py CONFIG.yaml DIRECTORY`; DIRECTORY takes the repositories that it makes.

# %%
import sys
from collections import Counter
from pathlib import Path

import torch

from prismaquant_ray import (
    BudgetConfig,
    Event,
    dequantize,
    dequantize_weight,
    inspect,
    load_config,
    open_run,
    quantize_weight,
)

config, directory = load_config(Path(sys.argv[1])), Path(sys.argv[2])

# %% [markdown]
# ## Before anything is computed
# Headers are enough to know the layout, the formats that every group can take, and the memory of a worker.

# %%
plan_ahead = inspect(config)
print(plan_ahead.architecture, plan_ahead.groups_per_format)
print(f"a worker needs {plan_ahead.worker_bytes / 1e9:.2f} GB")

# %% [markdown]
# ## Measure once
# Both passes run on the workers of the configured cluster. Afterwards every call below answers from the run store.

# %%
seen: Counter[str] = Counter()


def count(event: Event) -> None:
    """Events are dataclasses: `StepDone`, `ShardDone`, `WorkerLost`, …"""
    seen[type(event).__name__] += 1


run = open_run(config, on_event=count)
summary = run.measure()
print(f"{summary.groups} groups in {summary.blocks} blocks; events: {dict(seen)}")
print("most sensitive:", summary.most_sensitive[0].group)

# %% [markdown]
# ## Choose as often as you like
# A plan is exact, and takes milliseconds. `explain` says why a group has its format.

# %%
for bits in (5.5, 7.0):
    plan = run.plan(BudgetConfig(bpp=bits))
    print(f"{bits} bits: predicted loss {plan.predicted_loss:.4f} ± {plan.standard_error:.4f}, gap {plan.gap:.0e}")
sweep = run.sweep()
print("knee:", sweep.knee.bpp if sweep.knee else "none")
group = next(iter(plan.choice))
print("\n".join(run.explain(group).lines()))

# %% [markdown]
# ## Assemble, and read it back
# The repository is verified before it is there. `dequantize` writes the BF16 weights that vLLM computes with.

# %%
repository = run.assemble(plan, directory / "repository")
print(f"{repository.repository}: {repository.total_bytes / 1e6:.2f} MB, {repository.bpp:.4f} bits per parameter")
copy = dequantize(repository.repository, str(directory / "copy"))
print(copy.modules)

# %% [markdown]
# ## One matrix by itself
# Without inputs the scales are searched; with inputs GPTQ runs, too.

# %%
generator = torch.Generator().manual_seed(0)
weight, inputs = torch.randn(64, 128, generator=generator), torch.randn(512, 128, generator=generator)
for given in (None, inputs):
    tensors = quantize_weight(weight, "NVFP4", given)
    error = (dequantize_weight(tensors, "NVFP4").float() - weight) @ inputs.T
    print(sorted(tensors), f"output error {float(error.square().mean()):.4f}")
