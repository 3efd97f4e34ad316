"""`gossamer probe`: what this machine is, and its measured limits."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from gossamer.cli.options import flag
from gossamer.cli.show import emit_json, facts_table, stderr

if TYPE_CHECKING:
    from rich.table import Table

    from gossamer.backends.cpu.tuning import Choice
    from gossamer.backends.cuda.rates import GpuRates
    from gossamer.planner.hardware import Hardware, Rates

__all__ = ["probe"]


def probe(
    threads: Annotated[int | None, flag("--threads", "-t", metavar="N", help="Worker threads.")] = None,
    isa: Annotated[
        str | None, flag("--isa", metavar="NAME", help="Force scalar, avx2 or avx512 kernels.")
    ] = None,
    seconds: Annotated[float, flag("--seconds", help="Time for each of the four figures.")] = 0.5,
    calibrate: Annotated[
        bool, flag("--calibrate", help="Measure too what kernels reach, for predictions (a minute).")
    ] = False,
    json: Annotated[bool, flag("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure this machine: DRAM read bandwidth and int8, bf16 and fp32 peaks, and what its GPU reaches."""
    from gossamer.backends.cpu.tuning import tuned_layers
    from gossamer.config import HardwareKernels, ParallelComputing
    from gossamer.errors import ConfigError, GossamerError
    from gossamer.planner.gpu_rates import measure_gpu
    from gossamer.planner.hardware import Prober, hardware
    from gossamer.runtime.start import tuning_directory

    HardwareKernels(isa=isa)  # type: ignore[arg-type]  # these two refuse what cannot be
    ParallelComputing(threads=threads)
    if not 0 < seconds <= 60:
        raise ConfigError(f"seconds {seconds} is not in (0, 60]")
    if calibrate:
        _calibrate(isa)
    machine = hardware()
    rates = Prober(isa, threads).measure(seconds)
    tuned = tuned_layers(tuning_directory(), rates.isa, rates.threads)
    gpu, why = None, ""
    try:
        gpu = measure_gpu()
    except GossamerError as error:  # a GPU that kernels do not run on says nothing about the processor
        why = str(error)
    if json:
        choices = {name: {rows: asdict(c) for rows, c in found.items()} for name, found in tuned.items()}
        found = {} if gpu is None else {"gpu": asdict(gpu)}
        emit_json(asdict(rates) | {"hardware": asdict(machine), "tuned": choices} | found)
    else:
        _print(machine, rates, tuned, gpu)
    if why:
        stderr().print(f"the GPU is not measured: {why}", soft_wrap=True)


def _calibrate(isa: str | None) -> None:
    """Measures efficiencies, and says where they are kept."""
    from gossamer.bench.calibration import calibrate_machine
    from gossamer.planner.efficiencies import measured_file
    from gossamer.progress import status_line

    with status_line(sys.stderr.isatty()) as progress:
        calibrate_machine(
            None if isa is None else [isa],
            progress=lambda done, total: progress(f"{done} of {total} programs measured"),
        )
    stderr().print(f"efficiencies of this machine are in {measured_file()}", soft_wrap=True)


def _print(
    machine: Hardware, rates: Rates, tuned: dict[str, dict[int, Choice]], gpu: GpuRates | None
) -> None:
    from rich.console import Console

    from gossamer.cli.sizes import format_size

    table = facts_table(f"[bold]{machine.cpu}[/]")
    table.add_column()
    table.add_row("processors", f"{machine.cores} usable, {rates.threads} threads measured")
    table.add_row("instructions", f"{', '.join(machine.isas)}; best {machine.best_isa}, measured {rates.isa}")
    for cache in machine.caches:
        table.add_row(
            f"L{cache.level} {cache.kind}", f"{format_size(cache.bytes)}, shared by {cache.shared_by}"
        )
    limit = (
        "" if machine.memory_limit is None else f"; this group may take {format_size(machine.memory_limit)}"
    )
    table.add_row(
        "memory",
        f"{format_size(machine.memory_total)}, {format_size(machine.memory_available)} available{limit}",
    )
    table.add_section()
    table.add_row("DRAM read", f"[bold]{rates.read_gb_s:.1f}[/] GB/s")
    table.add_row("int8", f"[bold]{rates.int8_gmacs:.0f}[/] GMAC/s")
    table.add_row("bf16", f"[bold]{rates.bf16_gmacs:.0f}[/] GMAC/s")
    table.add_row("fp32", f"[bold]{rates.fp32_gmacs:.0f}[/] GMAC/s")
    console = Console(highlight=False)
    console.print(table)
    if gpu is not None:
        console.print(_gpu(gpu))
    if tuned:
        console.print(_tuned(tuned))


def _gpu(gpu: GpuRates) -> Table:

    from gossamer.cli.sizes import format_size

    table = facts_table(f"[bold]{gpu.name}[/]")
    table.add_column()
    table.add_row("chip", f"{gpu.isa}, {gpu.multiprocessors} multiprocessors")
    table.add_row("memory", f"{format_size(gpu.memory_total)}, {format_size(gpu.memory_free)} free")
    table.add_section()
    table.add_row("copy (read + write)", f"[bold]{gpu.copy_gb_s:.0f}[/] GB/s")
    for kind, rate in gpu.tflops.items():
        table.add_row(kind, f"[bold]{rate:.1f}[/] {'TOP/s' if kind == 'int8' else 'TFLOP/s'}")
    table.add_row("from the host", f"[bold]{gpu.to_device_gb_s:.1f}[/] GB/s, pinned")
    table.add_row("to the host", f"[bold]{gpu.to_host_gb_s:.1f}[/] GB/s, pinned")
    table.add_row("launch", f"[bold]{gpu.launch_us:.1f}[/] us")
    return table


def _tuned(tuned: dict[str, dict[int, Choice]]) -> Table:
    """How layers are cut: tiles per thread, and rows per sweep where that is not the default."""
    from rich import box
    from rich.table import Table

    from gossamer.backends.cpu.tuning import DEFAULT, ROWS

    table = Table(
        title="tuned layers: tiles per thread, rows per sweep",
        title_justify="left",
        title_style="",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("layer", overflow="fold")
    for rows in ROWS:
        table.add_column(f"{rows} row{'s' if rows > 1 else ''}", justify="right")
    for name, choices in sorted(tuned.items()):
        cells = []
        for rows in ROWS:
            choice = choices.get(rows)
            text = "-" if choice is None else f"{choice.tiles}"
            if choice is not None and choice.block_rows != DEFAULT.block_rows:
                text += f", {choice.block_rows}"
            cells.append(text if choice != DEFAULT else f"[dim]{text}[/]")
        table.add_row(name, *cells)
    return table
