"""Launches and host waits of a worker's calls, on a CUDA device that is not there. Budgets may only fall.

A launch costs the host some microseconds, which for small kernels is more than the kernel; a wait ends its lead. Counts
are of tiny models: more layers or tokens change none of them, larger matrices few.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from prismaquant_ray.formats import FORMATS, codecs_of
from tests.device.test_pretended_cuda import child
from tests.repositories import SEVEN

pytestmark = pytest.mark.device

#: By call: the most launches and waits of one. Of a finish, 650 launches and 13 waits choose and apply factors. The
#: scales of an FP8 KV cache take two launches a microbatch, 12 to 14 and three waits of a finish, its price 27 to 31
#: launches of a microbatch that is priced.
BUDGETS = {
    ("llama", "float32"): {
        "forward block microbatch": (114, 2),
        "forward block finish": (1_597, 35),
        "backward block microbatch": (305, 2),
        "backward block finish": (3, 3),
    },
    ("llama", "bfloat16"): {
        "forward block microbatch": (133, 2),
        "forward block finish": (1_632, 35),
        "backward block microbatch": (305, 2),
        # Two pieces; two of the waits load the head.
        "backward exit microbatch": (144, 6),
        "backward block finish": (3, 3),
    },
    ("qwen3_moe", "bfloat16"): {
        "forward block microbatch": (179, 2),
        "forward block finish": (1_795, 38),
        "backward block microbatch": (394, 2),
        "experts priced microbatch": (59, 0),
        "backward block finish": (3, 3),
    },
}


@pytest.mark.parametrize(("name", "dtype"), BUDGETS)
def test_a_call_launches_and_waits_no_more_than_before(tmp_path: Path, name: str, dtype: str) -> None:
    settings = ("formats=[NVFP4, MXFP8, BF16]", "cluster.blocks_per_shard=1", f"model.dtype={dtype}")
    found = child(
        "from pathlib import Path\nfrom tests.pretended.costs import costs_of\n"
        f"result = costs_of({name!r}, Path({str(tmp_path)!r}), *{settings!r})"
    )
    for call, (launches, waits) in BUDGETS[name, dtype].items():
        assert found[call]["launches"] <= launches, (call, found[call]["launches"], found[call]["launched"])
        assert found[call]["waits"] <= waits, (call, found[call]["waits"], found[call]["waited"])


def test_rounding_a_wide_matrix_takes_few_launches() -> None:
    kernels = {codec.name for codec in codecs_of(SEVEN).values()}
    found = child("from tests.pretended.costs import rounding_costs\nresult = rounding_costs(4096)")
    factor, waits = found.pop("factor")
    # Whether a factorization failed must be known before it is used.
    assert waits == 1
    assert len(found) == 2 * len(codecs_of(FORMATS))
    for call, (launches, waits) in found.items():
        assert waits == 0, call
        # Formats without a kernel of their own search by torch.
        search = 20 if call.removesuffix(" search") in kernels else 40
        assert (launches if call.endswith("search") else factor + launches) <= (
            search if call.endswith("search") else 40
        )
