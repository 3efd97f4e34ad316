"""Every family against transformers: the same random checkpoint gives the same logits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="parity needs torch (pip install gossamer[dev])")
transformers = pytest.importorskip(
    "transformers", reason="parity needs transformers (pip install gossamer[dev])"
)

from gossamer import _native  # noqa: E402
from gossamer.backends.cpu.program import CpuProgram, StepShape  # noqa: E402
from gossamer.backends.reference import ReferenceModel, export_tensors  # noqa: E402
from gossamer.checkpoint.safetensors import Checkpoint  # noqa: E402
from gossamer.checkpoint.weights import check_tensors  # noqa: E402
from gossamer.graph.families import FAMILIES, build_graph  # noqa: E402
from gossamer.graph.ops.attention import KVState, SpanRows  # noqa: E402

from .configs import BARE, CASES, Case  # noqa: E402

ROUNDING = 2e-5
"""Largest difference allowed, of the largest logit: float32 sums taken in another order."""


@dataclass(frozen=True)
class Pair:
    """A checkpoint on disk, our model of it, and transformers' logits of two prompts."""

    case: Case
    model: ReferenceModel
    directory: Path
    prompts: list[Any]
    logits: list[Any]
    inv_freq: list[Any]


@pytest.fixture(scope="module", params=CASES, ids=str)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    case = CASES[request.param]
    directory = tmp_path_factory.mktemp("model")
    generator = torch.Generator().manual_seed(7)
    theirs = transformers.AutoModelForCausalLM.from_config(case.config(), attn_implementation="eager").eval()
    randomise(theirs, generator)
    theirs.save_pretrained(directory)
    prompts = [torch.randint(0, 101, (n,), generator=generator) for n in case.lengths]
    with torch.inference_mode():
        logits = [theirs(ids[None]).logits[0] for ids in prompts]
    inv_freq = [b.clone() for name, b in theirs.named_buffers() if name.endswith(".inv_freq")]
    return Pair(case, load(directory, context=case.context), directory, prompts, logits, inv_freq)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small are faster without a pool, and the machine is shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randomise(model: Any, generator: Any) -> None:
    """Every parameter away from its initial value, norms and biases too."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
                if "norm" in name or "ln_" in name:
                    parameter.add_(0.0 if "Gemma" in type(model).__name__ else 1.0)
            else:
                width = 1.0 if "emb" in name or "wte" in name else parameter.shape[-1] ** -0.5
                parameter.copy_(1.5 * width * torch.randn(parameter.shape, generator=generator))


def load(directory: Path, dtype: Any = None, context: int | None = None) -> ReferenceModel:
    graph = build_graph(json.loads((directory / "config.json").read_text()), context=context)
    source = Checkpoint(directory)
    check_tensors(graph, {name: source.info(name).shape for name in source.names()})
    return ReferenceModel.load(graph, source, dtype or torch.float32)


def step(model: ReferenceModel, parts: list[tuple[Any, int, int]], cache: Any) -> list[Any]:
    """One forward of several sequences at once: (ids, start, stop) each; logits of each."""
    spans, ids, positions, row = [], [], [], 0
    for sequence, (tokens, start, stop) in enumerate(parts):
        spans.append(SpanRows(sequence, row, stop - start, start))
        ids.append(tokens[start:stop])
        positions.append(torch.arange(start, stop))
        row += stop - start
    with torch.inference_mode():
        out = model(torch.cat(ids), torch.cat(positions), torch.arange(row), KVState(tuple(spans), cache))
    return [out["logits"][s.row : s.row + s.count] for s in spans]


def close(ours: Any, theirs: Any) -> None:
    error = (ours - theirs).abs().max().item()
    assert error <= ROUNDING * theirs.abs().max().item(), f"logits differ by {error}"


def test_prefill_of_two_sequences_without_a_cache(pair: Pair) -> None:
    parts = [(ids, 0, len(ids)) for ids in pair.prompts]
    for ours, theirs in zip(step(pair.model, parts, None), pair.logits, strict=True):
        close(ours, theirs)


def test_batch_of_equal_lengths(pair: Pair) -> None:
    with torch.inference_mode():
        close(pair.model.logits(pair.prompts[0][None].repeat(2, 1))[1], pair.logits[0])


def test_prefill_then_decode_step_by_step(pair: Pair) -> None:
    cache: dict[Any, Any] = {}
    at = [17, 11]
    for i, ours in enumerate(
        step(pair.model, [(ids, 0, at[i]) for i, ids in enumerate(pair.prompts)], cache)
    ):
        close(ours, pair.logits[i][: at[i]])
    while any(at[i] < len(ids) for i, ids in enumerate(pair.prompts)):
        parts = [(ids, at[i], min(at[i] + 1, len(ids))) for i, ids in enumerate(pair.prompts)]
        for i, ours in enumerate(step(pair.model, parts, cache)):
            if len(ours):
                close(ours[0], pair.logits[i][at[i]])
                at[i] += 1


@pytest.mark.parametrize("isa", _native.isas())
def test_the_cpu_backend_prefilled_in_chunks(pair: Pair, isa: str) -> None:
    """Both sequences side by side, in chunks that pages and windows do not divide."""
    graph, chunk = pair.model.graph, 7
    shape = StepShape(
        tokens=2 * chunk, rows=2 * chunk, spans=2, page_size=16, pages=8, table=4, kv_dtype="f32"
    )
    program = CpuProgram(graph, Checkpoint(pair.directory), shape, isa=isa, threads=2)
    for start in range(0, max(pair.case.lengths), chunk):
        row, spans = 0, []
        for i, ids in enumerate(pair.prompts):
            part = ids[start : start + chunk].numpy()
            if not len(part):
                continue
            program.ids[row : row + len(part)] = part
            program.positions[row : row + len(part)] = range(start, start + len(part))
            program.rows[row : row + len(part)] = range(row, row + len(part))
            program.spans[len(spans)] = (row, len(part), start, 4 * len(spans), -1)
            spans.append((i, row, len(part)))
            row += len(part)
        tables = [page for i, _, _ in spans for page in range(4 * i, 4 * i + 4)] * len(graph.kv_groups)
        program.tables[: len(tables)] = tables
        program.run(row, len(spans), row, 4 * len(spans), sample=False)
        ours = torch.from_numpy(program.value("logits", row).copy())
        for i, first, count in spans:
            close(ours[first : first + count], pair.logits[i][start : start + count])


def test_rotary_frequencies_agree_to_the_last_bit_or_nearly(pair: Pair) -> None:
    ours = [w for name, w in pair.model.graph.weights.items() if name.startswith("rotary.")]
    assert len(ours) == len({tuple(f.tolist()) for f in pair.inv_freq})
    for weight in ours:
        ulps = min(
            (torch.tensor(weight.expr.values).view(torch.int32) - f.view(torch.int32)).abs().max().item()
            for f in pair.inv_freq
            if f.shape == weight.shape
        )
        assert ulps <= 1


def test_bfloat16_stays_near(pair: Pair) -> None:
    model = load(pair.directory, torch.bfloat16, pair.case.context)
    with torch.inference_mode():
        ours = model.logits(pair.prompts[1][None])[0]
    assert ours.dtype == torch.bfloat16
    theirs = pair.logits[1]
    # The median token: rounding may send a token to other experts, which is another model for it.
    error = ((ours.float() - theirs).norm(dim=-1) / theirs.norm(dim=-1)).median().item()
    assert error < 0.05


def test_weights_go_back_under_the_family_s_names(pair: Pair) -> None:
    source = Checkpoint(pair.directory)
    exported = export_tensors(pair.model)
    assert set(exported) == set(source.names())
    for name, array in exported.items():
        error = abs(array - source.read(name)).max()
        assert error <= 1e-6, f"{name} came back {error} away"


def test_every_family_is_here() -> None:
    built = {
        transformers.AutoModelForCausalLM._model_mapping[type(c.config())].__name__ for c in CASES.values()
    }
    assert built == set(FAMILIES) == set(BARE)


@pytest.mark.parametrize("architecture", BARE)
def test_absent_fields_have_transformers_defaults(architecture: str) -> None:
    kind, bare = BARE[architecture]
    names = {"architectures": [architecture]}
    spelled_out = json.loads(json.dumps(kind(**bare, **names).to_dict()))
    assert build_graph({**bare, **names}) == build_graph(spelled_out)


@pytest.mark.parametrize("name", ["stories260K", "llama2xs"])
def test_a_real_model_tells_transformers_story(shared: Path, name: str) -> None:
    directory = shared / "models" / name
    if not directory.is_dir():
        pytest.skip(f"{name} is absent from ../shared/models")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model = load(directory)
    ids = [1, 403, 407, 261, 378]
    with torch.inference_mode():
        story = theirs.generate(torch.tensor([ids]), max_new_tokens=60, do_sample=False)[0].tolist()
        close(model.logits(torch.tensor([story]))[0], theirs(torch.tensor([story])).logits[0])
    cache: dict[Any, Any] = {}
    start = 0
    while len(ids) < len(story):
        (logits,) = step(model, [(torch.tensor(ids), start, len(ids))], cache)
        start = len(ids)
        ids.append(int(logits[-1].argmax()))
    assert ids == story
