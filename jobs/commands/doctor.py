"""`doctor`: the cluster before a job."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from actors.diagnosis import Rates
from jobs.pipeline.diagnosis import Diagnosis, Examined, doctor
from prismaquant_ray.config import Config
from prismaquant_ray.formatting import gigabytes, seconds, size


def run(config: Config) -> Diagnosis:
    """Devices, kernels, storage and memory of the workers that a run would have, and its time."""
    return doctor(config)


def render(result: Diagnosis, console: Console) -> None:
    """Print a worker's checks, its rates, and the stages."""
    for examined in result.workers:
        _render_worker(examined, console)
    if result.stages:
        table = Table("stage", "seconds", "bound by", title="This job, by these rates", title_justify="left")
        for stage in result.stages:
            bound = "computation" if stage.compute >= stage.storage else "storage"
            table.add_row(stage.stage, f"{stage.seconds:,.1f}", bound)
        console.print(table)
        total = sum(stage.seconds for stage in result.stages)
        console.print(
            f"about {seconds(total)} in {result.dtype}, {result.blocks_per_shard} blocks a shard, without attention, "
            "norms, starting and waiting"
        )
    checked = sum(len(examined.checks) for examined in result.workers)
    console.print(f"{len(result.failed)} of {checked} checks failed; {result.seconds:.0f} s")


def _render_worker(examined: Examined, console: Console) -> None:
    diagnosis = examined.diagnosis
    if diagnosis is None:
        console.print(f"{examined.worker}")
    else:
        machine = diagnosis.machine
        found = {"CUDA": diagnosis.cuda, "driver": diagnosis.driver, "compute capability": diagnosis.capability}
        built = "".join(f", {name} {value}" for name, value in found.items() if value)
        console.print(
            f"{examined.worker}: {machine.device} on {machine.host}, {diagnosis.cores} cores, "
            f"{gigabytes(machine.free_bytes)} to plan with, torch {diagnosis.torch_version}{built}"
        )
    for check in examined.checks:
        mark = "ok    " if check.passed else "FAILED"
        console.print(f"  {mark} {check.name}: {check.found}", soft_wrap=True)
        if not check.passed and check.advice:
            console.print(f"         {check.advice}", soft_wrap=True)
    if diagnosis is not None:
        console.print(f"  rates  {_rates(diagnosis.rates)}", soft_wrap=True)


def _rates(rates: Rates) -> str:
    parts = [f"products {rates.products / 1e12:,.3g} TFLOP/s", f"encoding {rates.encoding / 1e6:,.3g} M weights/s"]
    if rates.to_device is not None and rates.to_host is not None:
        parts.append(f"to the GPU {size(rates.to_device)}/s, back {size(rates.to_host)}/s")
    parts.append(f"SHA-256 {size(rates.digest)}/s")
    parts.append(f"run store: writing {size(rates.write)}/s, reading {size(rates.read)}/s")
    return ", ".join(parts)
