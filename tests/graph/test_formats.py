"""What storing numbers in few bits does to them, against the definitions of the formats."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the specification is written in torch")

from gossamer.config.quantization import GROUPS  # noqa: E402
from gossamer.graph.ops.formats import (  # noqa: E402
    NF4,
    round_activations,
    round_kv,
    round_queries,
    round_weight,
)

GROUPED = [(format, group) for format in GROUPS for group in GROUPS[format]]
QLORA = (  # Dettmers et al., 2023, appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("format", "group"), GROUPED)
def test_zeros_stay_zero_and_no_group_touches_another(format: str, group: int) -> None:
    w = torch.zeros(3, 2 * group + 5)
    w[1, group : 2 * group] = normal(group)
    rounded = round_weight(w, format, group)
    assert rounded.shape == w.shape
    assert rounded[w == 0].abs().max() == 0
    assert torch.equal(
        rounded[1, group : 2 * group], round_weight(w[1:2, group : 2 * group], format, group)[0]
    )


@pytest.mark.parametrize(("format", "group"), GROUPED)
@pytest.mark.parametrize("value", [0.75, -0.75])
def test_constant_groups_are_kept(format: str, group: int, value: float) -> None:
    """To the 11 bits of an fp16 scale."""
    w = torch.full((2, group), value)
    assert (round_weight(w, format, group) - w).abs().max() <= abs(value) * 2**-11


@pytest.mark.parametrize(("format", "group"), GROUPED)
def test_a_group_has_no_more_levels_than_bits_allow(format: str, group: int) -> None:
    rounded = round_weight(normal(50, group), format, group)
    assert max(len(row.unique()) for row in rounded) <= (255 if format == "int8" else 16)


@pytest.mark.parametrize("sign", [1, -1])
def test_uint4_uses_all_its_levels_on_one_side(sign: int) -> None:
    """The range reaches to zero and not beyond, so that steps are half of int4's."""
    w = sign * torch.linspace(0, 3, 32)[None]
    rounded = round_weight(w, "uint4", 32)
    assert len(rounded.unique()) == 16
    assert (rounded - w).abs().max() <= 3 / 15 / 2 * 1.01
    assert (round_weight(w, "int4", 32) - w).abs().max() > 3 / 15 / 2 * 1.5


def test_nf4_is_the_paper_s_to_the_nearest_127th() -> None:
    assert tuple(round(127 * level) for level in QLORA) == NF4
    assert max(abs(127 * level - code) for level, code in zip(QLORA, NF4, strict=True)) < 0.0037 * 127
    w = normal(512, 64)
    most = w.abs().amax(-1, keepdim=True)
    levels = torch.tensor(QLORA)
    exact = levels[(w[..., None] / most[..., None] - levels).abs().argmin(-1)] * most
    error = (round_weight(w, "nf4", 64) - w).square().mean() / (exact - w).square().mean()
    assert 1.0 < error < 1.01


def test_formats_rank_as_they_should_on_normal_weights() -> None:
    w = normal(512, 128)

    def error(format: str, group: int) -> float:
        return (round_weight(w, format, group) - w).square().mean().item()

    assert error("int8", 16) < error("int8", 32) < error("int8", 0) < error("nf4", 64) / 50
    for format in ("int4", "uint4", "nf4"):
        assert error(format, 32) < error(format, 64) < error(format, 128)
    assert error("nf4", 128) < error("uint4", 128) < error("int4", 128)


@pytest.mark.parametrize(("format", "group"), GROUPED)
def test_activations_of_every_grouped_format_are_alike(format: str, group: int) -> None:
    x = normal(5, 3 * group + 7)
    seen = round_activations(x, format, group)
    assert torch.equal(seen, round_activations(x, "int8", group))
    assert (seen - x).abs().max() <= x.abs().max() / 254 * 1.01


def test_fp8_keeps_four_bits_of_every_number_down_to_the_smallest() -> None:
    """E4M3: a fraction of 3 bits, and from max / 448 / 64 on steps of max / 448 / 512."""
    w = normal(40, 300) * torch.logspace(-5, 0, 300)
    rounded, scale = round_weight(w, "fp8"), w.abs().amax(-1, keepdim=True) / 448
    assert ((rounded - w).abs() <= torch.maximum(w.abs() / 16, scale / 1024) * 1.0001).all()
    assert torch.equal(rounded.abs().amax(-1), w.abs().amax(-1).div(448).mul(448))
    assert torch.equal(round_weight(torch.zeros(2, 5), "fp8"), torch.zeros(2, 5))
    assert max(len(row.unique()) for row in rounded) < 256


def test_activations_beside_fp8() -> None:
    x = normal(5, 70)
    x[1] = 0
    seen = round_activations(x, "fp8")
    torch.testing.assert_close(seen, round_weight(x, "fp8"), rtol=0.07, atol=0)
    assert torch.equal(seen, round_kv(x, "fp8")) and not seen[1].any()
    x[2, 3] = torch.nan
    assert round_activations(x, "fp8").isnan().all(-1).tolist() == [False, False, True, False, False]
    assert torch.equal(round_queries(x[:1], "fp8"), x[:1].bfloat16().float())


def test_a_scale_per_head_keeps_what_fp8_alone_would_lose() -> None:
    """Why keys and values have one: small heads fall below E4M3's steps, and large ones leave its range."""
    for size in (1e-3, 1e3):
        x = size * normal(64, 128)
        plain = x.clamp(-448, 448).to(torch.float8_e4m3fn).float()
        assert (round_kv(x, "fp8") - x).norm() < 0.03 * x.norm() < 0.3 * (plain - x).norm()
