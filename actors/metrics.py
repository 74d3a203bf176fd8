"""Prometheus metrics of a run, through Ray's own exporter on every node. A listener of events."""

from __future__ import annotations

from prismaquant_ray.events import Event, ShardDone, StepDone, WorkerLost


class Metrics:
    """Counts events; Ray exports every name with the prefix `ray_`. Make one when Ray is connected."""

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Counter, Gauge, Histogram

        tags = {"run": run}
        self.steps = Histogram(
            "prismaquant_step_seconds",
            description="Seconds of one step of a worker.",
            boundaries=[0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300],
            tag_keys=("run", "stage", "worker"),
        )
        self.tokens = Counter(
            "prismaquant_tokens_total",
            description="Calibration tokens that shards have seen.",
            tag_keys=("run", "stage", "worker"),
        )
        self.bytes = Counter(
            "prismaquant_bytes_total",
            description="Bytes moved: between workers (hop), from (read) and to the stores (written).",
            tag_keys=("run", "stage", "kind"),
        )
        self.shards_left = Gauge(
            "prismaquant_shards_left", description="Shards of a pass that are not finished.", tag_keys=("run", "stage")
        )
        self.blocks = Counter(
            "prismaquant_blocks_total", description="Blocks encoded or priced.", tag_keys=("run", "stage")
        )
        self.lost = Counter("prismaquant_lost_workers_total", description="Workers lost.", tag_keys=("run", "cause"))
        for metric in (self.steps, self.tokens, self.bytes, self.shards_left, self.blocks, self.lost):
            metric.set_default_tags(tags)

    def __call__(self, event: Event) -> None:
        """Count an event."""
        match event:
            case StepDone():
                who = {"stage": event.stage, "worker": event.worker}
                self.steps.observe(event.seconds, tags=who)
                if event.tokens:
                    self.tokens.inc(event.tokens, tags=who)
                moved = {"hop": event.hop_bytes, "read": event.read_bytes, "written": event.written_bytes}
                for kind, count in moved.items():
                    if count:
                        self.bytes.inc(count, tags={"stage": event.stage, "kind": kind})
            case ShardDone():
                self.shards_left.set(event.left, tags={"stage": event.stage})
                if event.produced:
                    self.blocks.inc(event.produced, tags={"stage": event.stage})
            case WorkerLost():
                self.lost.inc(1, tags={"cause": event.cause})
