"""Mixtral. transformers calls the routed MLP `mlp` and packs its experts; checkpoints and vLLM do not."""

from prismaquant_ray.families.base import ATTENTION, ROUTER, ExpertNames, Family

FAMILY = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    blocks="model.layers",
    fused=(ATTENTION,),
    ignored=(("gate", ROUTER),),
    experts=ExpertNames(gate="w1", up="w3", down="w2"),
    renamed=((".mlp.", ".block_sparse_moe."),),
)
