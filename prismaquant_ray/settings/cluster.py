"""Where a run computes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from prismaquant_ray.settings.values import Bytes, Section


class ClusterConfig(Section):
    """Where the run computes. Only `threads` and `device` affect results."""

    address: str = Field(
        default="auto",
        description="Ray cluster to join. `auto`: the one that RAY_ADDRESS or the submitted job names, else a Ray "
        "started on this machine. `local`: always one started on this machine.",
    )
    workers: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        default="auto", description="Number of workers; `auto` is as many as fit."
    )
    threads: int = Field(
        default=1,
        ge=1,
        description="CPU cores per worker with `device: cpu`; a GPU's worker uses its share of the node's.",
    )
    device: Literal["auto", "cpu", "gpu"] = Field(
        default="auto",
        description="`gpu`: a worker takes one GPU. `cpu`: `threads` cores. `auto`: GPUs if the cluster has any.",
    )
    placement: Literal["spread", "pack"] = Field(
        default="spread", description="Spread workers over nodes, or pack them on few."
    )
    labels: dict[str, str] = Field(default_factory=dict, description="Ray labels of the nodes that may have workers.")
    blocks_per_shard: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        default="auto", description="Blocks a worker loads at a time; `auto` derives the number from `memory`."
    )
    memory: Literal["auto"] | Bytes = Field(
        default="auto",
        description="Most memory a worker may take on its device; `auto` is the free memory, shared by its workers. "
        "A worker that takes more than a given limit ends the run.",
    )
    wait: float = Field(default=0.0, ge=0.0, description="Seconds to wait for nodes from an autoscaler.")
    timeout: Literal["auto"] | Annotated[float, Field(gt=0.0)] = Field(
        default="auto", description="Seconds a call to a worker may take; `auto`: 300, or 20 times what such ones take."
    )
