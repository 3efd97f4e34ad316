"""`gossamer plan`: what to run a model with, predicted from config.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gossamer.cli.engine_flags import EngineFlags
from gossamer.cli.options import flag
from gossamer.cli.said import decided, said_flags
from gossamer.cli.show import emit_json, stderr
from gossamer.errors import ConfigError

if TYPE_CHECKING:
    from gossamer.planner.model import PlannedModel
    from gossamer.planner.quality import SensitivityFile

__all__ = ["plan"]

_GOAL = "Goal"


def plan(
    ctx: typer.Context,
    engine: EngineFlags,
    objective: Annotated[
        str,
        flag(
            "--objective",
            "-O",
            panel=_GOAL,
            metavar="NAME",
            help="memory, latency, throughput, easy, production (throughput within a limit on the time "
            "between tokens) or production-latency.",
        ),
    ] = "easy",
    input_len: Annotated[
        int | None, flag("--input-len", panel=_GOAL, metavar="TOKENS", help="Of a prompt; 256 if not given.")
    ] = None,
    output_len: Annotated[
        int | None,
        flag("--output-len", panel=_GOAL, metavar="TOKENS", help="Of an answer; 128 if not given."),
    ] = None,
    concurrency: Annotated[
        int | None,
        flag("--concurrency", panel=_GOAL, metavar="N", help="Requests at once, all of which must run."),
    ] = None,
    itl_limit_ms: Annotated[
        float | None,
        flag("--itl-limit-ms", panel=_GOAL, metavar="MS", help="Most time between a request's tokens."),
    ] = None,
    ttft_limit_ms: Annotated[
        float | None, flag("--ttft-limit-ms", panel=_GOAL, metavar="MS", help="Most time to the first token.")
    ] = None,
    quality_limit: Annotated[
        str | None,
        flag(
            "--quality-limit",
            panel=_GOAL,
            metavar="LOSS",
            help="Most that may be lost: 0.02 nats per token, or 2% of perplexity. Needs a certificate or "
            "sensitivities.",
        ),
    ] = None,
    sensitivity: Annotated[
        Path | None,
        flag(
            "--sensitivity",
            panel=_GOAL,
            metavar="FILE",
            help="gossamer_sensitivity.json, as mixed bits leaves it; one in the model's folder is found.",
        ),
    ] = None,
    acceptance: Annotated[
        list[str] | None,
        flag(
            "--acceptance",
            panel=_GOAL,
            metavar="METHOD=RATE",
            help="How likely a guess is right that follows right ones, so that speculation is planned for: "
            "ngram=0.6. `gossamer bench speculation` measures it. Repeatable.",
        ),
    ] = None,
    full: Annotated[
        bool, flag("--full", help="Try every format and limit, not the usual ones alone.")
    ] = False,
    accuracy: Annotated[
        bool, flag("--accuracy", help="Show how right earlier predictions were, on this machine.")
    ] = False,
    out: Annotated[
        Path | None, flag("-o", "--out", metavar="FILE", help="Write the choice as TOML, for --config.")
    ] = None,
    json: Annotated[bool, flag("--json", help="Print one JSON object.")] = False,
) -> int | None:
    """Choose formats and limits for MODEL and an objective, from config.json alone: bytes, times, and why.

    Flags of the engine that are given stand; the plan decides the others. For --device cuda nothing is
    decided: the plan is what the flags take, of the GPU here or of --memory-budget.
    """  # fmt: skip
    if accuracy:
        from gossamer.cli.plan_accuracy import show_accuracy

        return show_accuracy(json)
    config = engine.config()
    if config.backend == "cuda":
        from gossamer.cli.plan_gpu import plan_on_gpu

        searched = {
            "--objective": objective != "easy",
            "--itl-limit-ms": itl_limit_ms is not None,
            "--ttft-limit-ms": ttft_limit_ms is not None,
            "--quality-limit": quality_limit is not None,
            "--sensitivity": sensitivity is not None,
            "--acceptance": bool(acceptance),
            "--full": full,
            "--out": out is not None,
        }
        plan_on_gpu(
            config,
            searched=searched,
            input_len=input_len,
            output_len=output_len,
            concurrency=concurrency,
            json=json,
        )
        return None
    from gossamer.memory import available_memory
    from gossamer.planner.drafts import parse_acceptance
    from gossamer.planner.hardware import hardware
    from gossamer.planner.model import open_planned
    from gossamer.planner.objectives import Goal, Limits, QualityLimit
    from gossamer.planner.plan import make_plan, toml
    from gossamer.planner.remembered import measure

    accepted = parse_acceptance(acceptance or ())
    there = available_memory()
    limits = Limits(
        memory=there if config.memory_budget is None else config.memory_budget,
        itl_ms=itl_limit_ms,
        ttft_ms=ttft_limit_ms,
        quality=None if quality_limit is None else QualityLimit.parse(quality_limit),
    )
    Goal.of(objective, limits, input_len=input_len, output_len=output_len, concurrency=concurrency)
    model = open_planned(config)
    goal = Goal.of(
        objective,
        limits,
        input_len=input_len,
        output_len=output_len,
        concurrency=concurrency,
        most=config.max_model_len or model.graph.max_positions,
    )
    kernels, parallel = config.hardware_kernels, config.parallel_computing
    rates = measure("scalar" if kernels is None else kernels.isa, 1 if parallel is None else parallel.threads)
    found = make_plan(
        model,
        config,
        goal,
        rates,
        given=decided(ctx, config),
        said=said_flags(ctx),
        sensitivity=_sensitivities(sensitivity, model),
        acceptance=accepted,
        full=full,
    )
    if out is not None:
        _write(out, toml(found))
    if json:
        from gossamer.cli.show_plan import plan_json

        emit_json(plan_json(found, hardware()))
        return None
    from gossamer.cli.show_plan import show_plan

    show_plan(found, hardware(), there)
    if out is not None:
        stderr().print(f"written to {out}; `gossamer serve --config {out}` runs it", soft_wrap=True)
    return None


def _sensitivities(path: Path | None, model: PlannedModel) -> SensitivityFile | None:
    from gossamer.planner.quality import SENSITIVITY, read_sensitivity

    if path is not None:
        return read_sensitivity(path, model)
    own = model.directory / SENSITIVITY
    return read_sensitivity(own, model) if own.is_file() and model.certificate is None else None


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write the plan to {path}: {error.strerror}") from None
