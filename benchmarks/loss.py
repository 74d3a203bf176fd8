"""How much slower a run is where packets are lost: `.venv/bin/python -m benchmarks.loss [--losing 0.2] [--delay 0]`.

Five hosts of their own on this machine, as in `make faults` (root, namespaces, TUN devices): a run without faults, one
whose hosts lose that share of all packets from its first step on, and one without again. Seconds from the first
step of the forward pass to the last of the backward pass, and what a second gets done: tokens times blocks times two
passes. All results have the same bytes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from benchmarks import results
from prismaquant_ray.records import MEASURED
from prismaquant_ray.storage.store import Store
from tests.hosts import ONE, Hosts
from tests.observed import ObservedRun, Scenery, Size, stored_digests
from tests.s3_server import environment
from tests.tiny import make_checkpoint, make_text

# A microbatch's boundary has 256 KiB, as in tests/jobs/test_hosts.py.
SIZE = Size(layers=6, sequences=64, length=128, microbatch=4, blocks_per_shard=1)
#: Seconds that a run may take.
LONGEST = 3000.0


def measured(hosts: Hosts, scenery: Scenery, place: Path, name: str, losing: float, delay: float) -> dict[str, object]:
    """One run: seconds of both passes, token-blocks a second, lost packets, and digests of what came of it."""
    hosts.restore()
    (place / name).mkdir()
    run = ObservedRun(scenery, place / name, name)
    before = hosts.network.dropped
    driver = hosts.drive(["quantize", run.config])
    driver.until(lambda: hosts.hosts[ONE].doing("forward", "run"))
    hosts.network.losing, hosts.network.delay = losing, delay
    driver.until(lambda: run.store.list(MEASURED), LONGEST)
    hosts.heal()
    driver.end(patience=LONGEST)
    work = run.work()
    seconds = max(each.ended for each in work) - min(each.started for each in work)
    blocks = SIZE.sequences * SIZE.length * SIZE.layers * 2
    return {
        "seconds": round(seconds, 1),
        "token-blocks a second": round(blocks / seconds),
        "silence": round(driver.silence, 1),
        "lost packets": hosts.network.dropped - before,
        "repeated steps": run.repeated(),
        "digests": stored_digests(run.output),
    }


def main() -> None:
    """Three runs, and their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losing", type=float, default=0.2)
    parser.add_argument("--delay", type=float, default=0.0, help="seconds that every packet is late")
    arguments = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory(prefix="loss-") as directory, Hosts() as hosts:
        place = Path(directory)
        hosts.server.make_bucket("hosts")
        os.environ |= environment(hosts.server.endpoint)
        source = Store("s3://hosts/model")
        checkpoint = make_checkpoint(place / "source", "qwen3", layers=SIZE.layers, hidden=128, intermediate=320)
        for path in checkpoint.iterdir():
            source.put(path.name, path.read_bytes())
        text = make_text(place, 60_000)
        scenery = Scenery(bucket="s3://hosts", size=SIZE, source="s3://hosts/model", text=text)
        for name, losing, delay in (
            ("before", 0.0, 0.0), ("lossy", arguments.losing, arguments.delay), ("after", 0.0, 0.0)
        ):  # fmt: skip
            found[name] = measured(hosts, scenery, place, name, losing, delay)
            print(name, {key: value for key, value in found[name].items() if key != "digests"}, flush=True)
    digests = [each.pop("digests") for each in found.values()]
    assert all(each == digests[0] for each in digests), "the bytes differ"
    results.save("loss", {"losing": arguments.losing, "delay": arguments.delay, **found})


if __name__ == "__main__":
    main()
