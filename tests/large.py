"""Large models without weights, and run stores of them that were never measured: what the driver alone must manage."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from actors.schedule.units import PASSES, Stage
from jobs.pipeline.run import Run
from prismaquant_ray import records
from prismaquant_ray.block_records import BackwardRecord, ForwardRecord, LinearRounding, Price, PriceOn
from prismaquant_ray.calibration.stored import store_calibration
from prismaquant_ray.config import Config
from prismaquant_ray.formats import FORMATS, codecs_of
from prismaquant_ray.layout import Block, LinearSpec
from prismaquant_ray.model.config_only import ConfigOnlyCheckpoint
from prismaquant_ray.records import DeviceRecord, MeasuredRecord
from prismaquant_ray.serialization import to_bytes, to_json
from prismaquant_ray.source.files import SINGLE
from prismaquant_ray.storage.record import Artifact, Record
from prismaquant_ray.storage.store import Store
from tests.inprocess import unopened
from tests.runs import configuration
from tests.tiny import SPECIAL_TOKENS, VOCABULARY, tokenizer

_SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": len(SPECIAL_TOKENS) - 1,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def dense(directory: Path, layers: int) -> Path:
    """A decoder of so many layers: headers, and no byte of weights on the disk."""
    return _sparse(directory, "LlamaForCausalLM", model_type="llama", num_hidden_layers=layers)


def mixture(directory: Path, layers: int, experts: int) -> Path:
    """The same with so many experts in every layer."""
    return _sparse(
        directory,
        "Qwen3MoeForCausalLM",
        model_type="qwen3_moe",
        num_hidden_layers=layers,
        num_experts=experts,
        num_experts_per_tok=8,
        moe_intermediate_size=64,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )


def _sparse(directory: Path, architecture: str, **config: Any) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({**_SHARED, "architectures": [architecture], **config}))
    tokenizer().save_pretrained(directory)
    entries, stop = {}, 0
    for packed in ConfigOnlyCheckpoint(Store(directory)).tensors.values():
        for name, shape in _by_expert(packed.name, packed.shape):
            size = 2 * math.prod(shape)
            entries[name] = {"dtype": packed.dtype, "shape": list(shape), "data_offsets": [stop, stop + size]}
            stop += size
    header = json.dumps(entries).encode()
    with (directory / SINGLE).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(file.tell() + stop)
    return directory


def _by_expert(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Tensors as files have them: of packed experts one for each."""
    layer, experts, matrix = name.rpartition(".experts.")
    if not experts:
        yield name, shape
        return
    count, rows, columns = shape
    parts = ("gate_proj", "up_proj") if matrix == "gate_up_proj" else (matrix,)
    for expert in range(count):
        for part in parts:
            yield f"{layer}.experts.{expert}.{part}.weight", (rows // len(parts), columns)


def measured_run(directory: Path, source: Path, sweep: Sequence[float] = (5.0, 5.5, 6.0, 7.0, 8.0)) -> Config:
    """The configuration of a run whose store has a record of every block, with figures that are made up."""
    config = configuration(directory, source, sweep=sweep)
    run = Run(config, open_workers=unopened)
    chance = random.Random(0)
    for block in run.layout.blocks:
        made = {Stage.FORWARD: _forward(block, config, chance), Stage.BACKWARD: _backward(block, config, chance)}
        for stage in PASSES:
            run.run_store.write_record(stage, block.index, made[stage])
    store_calibration(run.store, run.calibration, run=run.run_store.run)
    run.store.put(records.DEVICE, to_bytes(DeviceRecord(device="cpu")))
    run.store.put(records.MEASURED, to_bytes(MeasuredRecord(peak_bytes=10**9)))
    return config


def _forward(block: Block, config: Config, chance: random.Random) -> Record:
    codecs = codecs_of(config.formats)
    made = ForwardRecord(
        linears={linear.name: {name: _rounding(linear, chance) for name in codecs} for linear in block.linears},
        experts={
            group.name: [chance.randrange(500) for _ in range(group.experts)] for group in block.groups if group.experts
        },
    )
    candidates = {
        str(name): Artifact(key=f"forward/{block.key}/made-up/{name}.safetensors", size=1, sha256="0" * 64)
        for name in config.formats
        if FORMATS[name].codec is not None
    }
    return Record(artifacts=candidates, metrics=to_json(made))


def _rounding(linear: LinearSpec, chance: random.Random) -> LinearRounding:
    def drawn(scale: float) -> float | list[float]:
        found = [scale * chance.uniform(0.5, 1.0) for _ in range(linear.experts or 1)]
        return found if linear.experts else found[0]

    return LinearRounding(
        method=["gptq"] * linear.experts if linear.experts else "gptq",
        holdout_error={"nearest": drawn(2.0), "search": drawn(1.0), "gptq": drawn(0.5)},
        weight_mse=drawn(1e-4),
    )


def _backward(block: Block, config: Config, chance: random.Random) -> Record:
    def price(bits: float) -> Price:
        cost = chance.lognormvariate(0, 1) * 4.0**-bits
        on = PriceOn(cost=cost, standard_error=0.1 * cost, weight_cost=0.4 * cost, activation_cost=0.5 * cost)
        return Price(
            cost=cost,
            standard_error=0.1 * cost,
            weight_cost=0.4 * cost,
            activation_cost=0.5 * cost,
            held_out=on,
            fitted=on,
        )

    quantized = [name for name in config.formats if FORMATS[name].codec is not None]
    made = BackwardRecord(
        groups={
            group.name: {name: price(FORMATS[name].bits(4096, 4096)) for name in quantized} for group in block.groups
        },
        fisher_trace={
            linear.name: [chance.random() for _ in range(linear.experts)] if linear.experts else chance.random()
            for linear in block.linears
        },
        tokens=256,
        held_out_tokens=32,
    )
    return Record(metrics=to_json(made))
