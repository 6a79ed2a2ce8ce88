"""Singular values of differences: known spectra, ranks of low-rank updates, types, refusals, and the figure."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from fullrank.analysis.draw_spectrum import draw, make_figure
from fullrank.analysis.spectrum import Spectrum, matrix_types, measure, spectrum, table
from fullrank.errors import CheckpointError, ConfigError, UnsupportedError
from fullrank.weights import Weights, from_tensors

ATTENTION = ("q_proj", "k_proj", "v_proj")
SHAPES = {**dict.fromkeys(ATTENTION, (24, 24)), "up_proj": (40, 24), "down_proj": (24, 40)}


def name_of(kind: str, layer: int) -> str:
    return f"model.layers.{layer}.{'self_attn' if kind in ATTENTION else 'mlp'}.{kind}.weight"


def model(seed: int = 0, *, num_layers: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The weights of a LLaMA, as few as are looked at."""
    draw_from = torch.Generator().manual_seed(seed)
    weights = {
        name_of(kind, layer): torch.randn(shape, generator=draw_from).mul(0.02).to(dtype)
        for layer in range(num_layers)
        for kind, shape in SHAPES.items()
    }
    return weights | {"model.norm.weight": torch.ones(24), "model.embed_tokens.weight": torch.randn(50, 24)}


def with_values(shape: tuple[int, ...], values: Tensor, seed: int = 0) -> Tensor:
    """U diag(values) V^T of this shape."""
    draw_from = torch.Generator().manual_seed(seed)
    u, v = (
        torch.linalg.qr(torch.randn(size, len(values), generator=draw_from, dtype=torch.float64)).Q for size in shape
    )
    return u * values @ v.T


def low_rank(shape: tuple[int, ...], rank: int, seed: int) -> Tensor:
    draw_from = torch.Generator().manual_seed(seed)
    return (torch.randn(shape[0], rank, generator=draw_from) @ torch.randn(rank, shape[1], generator=draw_from)) * 0.01


def as_weights(tensors: dict[str, Tensor], source: str = "trained") -> Weights:
    return from_tensors(tensors, source=source)


def measured(trained: dict[str, Tensor], base: dict[str, Tensor], **options: object) -> Spectrum:
    return spectrum(as_weights(trained), as_weights(base, "base"), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(24, 24), (40, 24), (24, 40)])
def test_a_known_spectrum_is_found(shape: tuple[int, int]) -> None:
    values = torch.logspace(0.5, -2, 24, dtype=torch.float64)
    found = measure(with_values(shape, values), name="w", threshold=0.1)
    torch.testing.assert_close(found.values, values)
    assert found.num_below == int((values < 0.1).sum())
    assert found.numerical_rank == 24
    shares = values / values.sum()
    assert found.effective_rank == pytest.approx(math.exp(-float((shares * shares.log()).sum())))
    assert found.largest == pytest.approx(10**0.5)
    assert found.shape == shape


def test_equal_values_have_an_effective_rank_of_their_number() -> None:
    found = measure(with_values((30, 20), torch.full((7,), 3.0, dtype=torch.float64)), name="w")
    assert found.effective_rank == pytest.approx(7)
    assert (found.numerical_rank, found.num_below) == (7, 13)


def test_the_numerical_rank_is_that_of_torch() -> None:
    """At the floor too: values on both sides of max(m, n) * eps * s_1."""
    floor = 40 * torch.finfo(torch.float32).eps
    values = torch.tensor([1.0, 0.5, 1.1 * floor, 0.9 * floor], dtype=torch.float64)
    matrix = with_values((40, 24), values)
    expected = torch.linalg.matrix_rank(matrix, rtol=floor)
    assert measure(matrix, name="w").numerical_rank == int(expected) == 3


def test_a_difference_of_zero_has_no_rank_and_no_nan(caplog: pytest.LogCaptureFixture) -> None:
    found = measured(model(), model())
    assert list(found.types) == ["k_proj", "q_proj", "v_proj", "down_proj", "up_proj"]
    for kind in found.types.values():
        assert (kind.effective_rank, kind.numerical_rank, kind.largest) == (0.0, 0.0, 0.0)
        assert kind.num_below == kind.num_values == 48
    assert "NaN" not in json.dumps(found.to_dict())
    assert "are equal in all 10 matrices" in caplog.text


def test_one_value_counts_below_the_threshold_only_if_smaller() -> None:
    assert measure(torch.eye(3) * 0.5, name="w", threshold=0.5).num_below == 0
    assert measure(torch.eye(3) * 0.5, name="w", threshold=0.5001).num_below == 3


@pytest.mark.parametrize("num_merges", [1, 2, 3])
def test_merged_updates_add_their_ranks(num_merges: int) -> None:
    """A LoRA update has rank r, k of them merged into float32 weights k * r: ReLoRA's claim."""
    rank, base = 4, model()
    trained = {name: weight.clone() for name, weight in base.items()}
    for merge in range(num_merges):
        for number, (kind, shape) in enumerate(SHAPES.items()):
            for layer in range(2):
                trained[name_of(kind, layer)] += low_rank(shape, rank, 100 * merge + 10 * number + layer)
    for kind in measured(trained, base).types.values():
        assert kind.numerical_rank == num_merges * rank
        assert kind.num_below >= kind.num_values - 2 * num_merges * rank
        assert 1 < kind.effective_rank < num_merges * rank + 0.01


def test_means_over_layers() -> None:
    base, trained = model(), model()
    curves = [torch.linspace(2, 0.01, 24, dtype=torch.float64), torch.linspace(1, 0.05, 24, dtype=torch.float64)]
    for layer, values in enumerate(curves):
        trained[name_of("q_proj", layer)] = base[name_of("q_proj", layer)] + with_values((24, 24), values)
    found = measured(trained, base, target_modules=["q_proj"]).types["q_proj"]
    torch.testing.assert_close(found.mean_values(), (curves[0] + curves[1]) / 2)
    assert found.num_below == sum(int((values < 0.1).sum()) for values in curves)
    ranks = [measure(with_values((24, 24), values), name="w").effective_rank for values in curves]
    assert found.effective_rank == pytest.approx(sum(ranks) / 2)
    assert found.largest == pytest.approx(2)


def test_layers_of_several_widths_have_one_curve() -> None:
    names = [f"layers.{layer}.mlp.up.weight" for layer in range(2)]
    base = {names[0]: torch.zeros(9, 9), names[1]: torch.zeros(5, 5)}
    trained = {names[0]: torch.diag(torch.arange(1.0, 10)), names[1]: torch.diag(torch.tensor([1.0, 3, 5, 7, 9]))}
    curve = measured(trained, base, target_modules=["mlp"]).types["up"].mean_values()
    torch.testing.assert_close(curve, torch.arange(9.0, 0, -1, dtype=torch.float64))


def test_given_tensors_are_left_alone() -> None:
    trained, base = model(1, dtype=torch.float64), model(0, dtype=torch.float64)
    before = {name: weight.clone() for name, weight in trained.items()}
    measured(trained, base)
    assert all(torch.equal(before[name], weight) for name, weight in trained.items())


def test_only_matrices_that_match_are_measured() -> None:
    trained, base = model(1), model(0)
    trained["model.layers.0.mlp.up_proj.bias"] = torch.ones(40)  # not a matrix: its absence from the base is no matter
    found = measured(trained, base, target_modules=["mlp.up", "q_proj"])
    assert list(found.types) == ["up_proj", "q_proj"], "in the order of the patterns"
    assert found.types["up_proj"].matrices[1].name == "model.layers.1.mlp.up_proj.weight"


def test_layers_are_in_order_of_their_number() -> None:
    found = measured(model(1, num_layers=12), model(0, num_layers=12), target_modules=["q_proj"])
    assert [matrix.name for matrix in found.types["q_proj"].matrices] == [name_of("q_proj", n) for n in range(12)]


@pytest.mark.parametrize(
    ("names", "types"),
    [
        (["model.layers.0.self_attn.q_proj.weight", "model.layers.11.mlp.up_proj.weight"], ["q_proj", "up_proj"]),
        (["gpt_neox.layers.1.attention.query_key_value.weight"], ["query_key_value"]),
        (
            ["h.0.attn.c_attn.weight", "h.0.attn.c_proj.weight", "h.0.mlp.c_proj.weight", "h.1.mlp.c_proj.weight"],
            ["c_attn", "attn.c_proj", "mlp.c_proj", "mlp.c_proj"],
        ),
        (
            ["layer.0.attention.output.dense.weight", "layer.0.output.dense.weight", "layer.0.attention.key.weight"],
            ["attention.output.dense", "output.dense", "key"],
        ),
        (["layers.0.mlp.experts.0.up.weight", "layers.0.mlp.experts.1.up.weight"], ["up", "up"]),
        (["layers.0.mlp.0.weight", "layers.1.mlp.0.weight", "layers.0.mlp.2.weight"], ["0", "0", "2"]),
        (["attn.in_proj_weight"], ["in_proj_weight"]),
    ],
)
def test_types_are_told_apart_by_few_words(names: list[str], types: list[str]) -> None:
    assert matrix_types(names) == types


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"threshold": 0.0}, "threshold must be a number above 0, got 0.0"),
        ({}, {"threshold": math.nan}, "threshold must be a number above 0, got nan"),
        ({}, {"target_modules": "attn"}, "must list parts of names, got 'attn'"),
        ({}, {"target_modules": []}, r"must list parts of names, got \[\]"),
        ({}, {"target_modules": ["mlp", ""]}, "must list parts of names"),
        ({}, {"target_modules": ["mlp", "attention"]}, "'attention' matches no matrix of trained. Near names: .*attn"),
        ({}, {"target_modules": ["norm"]}, "'norm' matches no matrix of trained"),
        (
            {name_of("q_proj", 1): None},
            {},
            "1 of 10 matrices are in trained and not in base, first .*1.self_attn.q_proj",
        ),
        ({name_of("q_proj", 2): torch.ones(24, 24)}, {}, "1 of 11 matrices are in base and not in trained"),
        ({name_of("q_proj", 1): torch.ones(24, 25)}, {}, r"is \(24, 24\) in trained and \(24, 25\) in base"),
        ({name_of("q_proj", 1): torch.ones(24)}, {}, r"is \(24, 24\) in trained and \(24,\) in base"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    change: dict[str, Tensor | None], options: dict[str, object], message: str
) -> None:
    base = {name: weight for name, weight in (model() | change).items() if weight is not None}
    with pytest.raises(ConfigError, match=message):
        measured(model(1), base, **options)


def test_weights_that_are_no_numbers_are_refused() -> None:
    broken = model(1)
    broken[name_of("q_proj", 0)][0, 0] = math.nan
    with pytest.raises(CheckpointError, match=r"0.self_attn.q_proj.weight of trained is not finite"):
        measured(broken, model())
    for dtype in (torch.uint8, torch.float8_e4m3fn):
        broken[name_of("q_proj", 0)] = torch.zeros(24, 24).to(dtype)
        with pytest.raises(UnsupportedError, match="quantized weights cannot be subtracted"):
            measured(broken, model())


def test_the_table_has_a_line_for_each_type_and_run() -> None:
    first, second = measured(model(1), model(0)), measured(model(0), model(0), target_modules=["attn"])
    lines = table({"full": first, "a-longer-name": second}).splitlines()
    assert lines[0].split() == [
        "matrix",
        "run",
        "below",
        "0.1",
        "of",
        "effective",
        "rank",
        "numerical",
        "rank",
        "largest",
    ]
    assert [line.split()[:2] for line in lines[1:]] == [
        ["k_proj", "full"],
        ["k_proj", "a-longer-name"],
        ["q_proj", "full"],
        ["q_proj", "a-longer-name"],
        ["v_proj", "full"],
        ["v_proj", "a-longer-name"],
        ["down_proj", "full"],
        ["up_proj", "full"],
    ]
    assert len({len(line) for line in lines}) == 1
    kind = first.types["down_proj"]
    assert lines[7].split()[2:6] == [str(kind.num_below), "48", f"{kind.effective_rank:.1f}", "24.0"]


def test_the_result_is_ready_for_json() -> None:
    found = measured(model(1), model(0))
    content = json.loads(json.dumps(found.to_dict()))
    assert (content["weights"], content["base"], content["threshold"]) == ("trained", "base", 0.1)
    kind = content["types"]["up_proj"]
    assert kind["mean_values"] == pytest.approx(found.types["up_proj"].mean_values().tolist(), rel=1e-5)
    assert kind["num_values"] == 48
    assert sum(matrix["num_below"] for matrix in kind["matrices"]) == kind["num_below"]
    assert kind["matrices"][1]["shape"] == [40, 24]


def test_the_figure_has_a_panel_for_each_type_and_a_line_for_each_run(tmp_path: Path) -> None:
    spectra = {
        "full": measured(model(1), model(0)),
        "nothing": measured(model(0), model(0)),
        "attention": measured(model(1), model(0), target_modules=["attn"], threshold=0.05),
    }
    figure = make_figure(spectra)
    panels = {axes.get_title(): axes for axes in figure.axes}
    assert list(panels) == ["k_proj", "q_proj", "v_proj", "down_proj", "up_proj"]
    assert len(panels["q_proj"].lines) == 3 + 2
    assert len(panels["up_proj"].lines) == 2 + 2
    line = panels["up_proj"].lines[0]
    assert list(line.get_ydata()) == pytest.approx(spectra["full"].types["up_proj"].mean_values().tolist())
    assert line.get_xdata()[-1] == 100
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "full",
        "nothing",
        "attention",
        "threshold 0.05",
        "threshold 0.1",
    ]
    with Image.open(draw(spectra, tmp_path / "spectrum.png")) as image:
        assert image.format == "PNG"
        assert image.width > 800
    with pytest.raises(ConfigError, match="at least one run"):
        draw({}, tmp_path / "none.png")
