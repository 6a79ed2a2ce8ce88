"""The share of a gradient's norm that its largest entries hold, and the figure of it."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.image import imread
from torch import Tensor, nn

from fullrank.analysis.draw_sparsity import WEIGHT, draw, gaussian_norm_share, make_figure
from fullrank.analysis.sparsity import (
    DENSITIES,
    GradientSparsity,
    Row,
    combined,
    gradient_sparsity,
    mean_gradient,
    norm_share,
    summarise,
)
from fullrank.errors import ConfigError, TrainingError, UnsupportedError


class Classifier(nn.Module):
    """A small model with dropout, a tied weight, a frozen layer and one that nothing reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.mlp_up = nn.Linear(6, 10)
        self.dropout = nn.Dropout(0.5)
        self.mlp_down = nn.Linear(10, 6, bias=False)
        self.unused = nn.Linear(6, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight
        self.mlp_down.requires_grad_(False)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        hidden = self.mlp_down(self.dropout(torch.tanh(self.mlp_up(self.embed(ids)))))
        logits = self.head(hidden)
        return SimpleNamespace(loss=None if labels is None else nn.functional.cross_entropy(logits, labels))


@pytest.fixture
def model() -> Classifier:
    torch.manual_seed(0)
    return Classifier().double()


def batch_of(size: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids, labels = torch.randint(7, (2, size), generator=generator)
    return {"ids": ids, "labels": labels}


BATCHES = [batch_of(5, seed) for seed in range(3)]


def random_gradient(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def brute_force(values: list[float], count: int) -> tuple[float, float, float]:
    """The three shares of the largest ``count`` numbers, in exactly rounded sums of Python numbers."""
    ordered = sorted((abs(value) for value in values), reverse=True)
    squares = [value * value for value in ordered]
    squared = math.fsum(squares[:count]) / math.fsum(squares)
    return math.sqrt(squared), squared, math.fsum(ordered[:count]) / math.fsum(ordered)


# The shares.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(40, 25), (1000,), (10, 4, 5, 5)])
def test_shares_equal_brute_force(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """At every density, in any order of densities."""
    grad = random_gradient(*shape, dtype=dtype)
    counts = [10, 1, 1000, 500, 3]
    shares = norm_share(grad, [count / 1000 for count in counts])
    for place, count in enumerate(counts):
        norm, squared, absolute = brute_force(grad.flatten().tolist(), count)
        assert shares.norm[place] == pytest.approx(norm, rel=1e-12)
        assert shares.squared[place] == pytest.approx(squared, rel=1e-12)
        assert shares.absolute[place] == pytest.approx(absolute, rel=1e-12)


def test_one_hot_is_held_by_one_entry() -> None:
    """The sign does not matter."""
    grad = torch.zeros(20, 50)
    grad[3, 4] = -2.0
    shares = norm_share(grad, [0.0001, 0.5, 1.0])
    assert shares.norm == shares.squared == shares.absolute == [1.0, 1.0, 1.0]


def test_uniform_shares_are_known() -> None:
    """A quarter of equal entries holds a quarter of the squares and of the sum, and half of the norm."""
    shares = norm_share(torch.full((40, 10), -0.3), [0.25, 0.01])
    assert shares.squared == pytest.approx([0.25, 0.01], rel=1e-12)
    assert shares.absolute == pytest.approx([0.25, 0.01], rel=1e-12)
    assert shares.norm == pytest.approx([0.5, 0.1], rel=1e-12)


def test_two_sizes_of_entries() -> None:
    """3 and 4: the norm is 5, so that the larger one holds 4/5 of the norm, 16/25 of the squares, 4/7 of the sum."""
    shares = norm_share(torch.tensor([3.0, -4.0]), [0.5])
    assert (shares.norm, shares.squared, shares.absolute) == (
        [pytest.approx(0.8)],
        [pytest.approx(0.64)],
        [pytest.approx(4 / 7)],
    )


@pytest.mark.parametrize(
    ("density", "numel", "count"), [(0.07, 100, 7), (0.071, 100, 8), (0.001, 10, 1), (0.29, 100, 29), (1, 10, 10)]
)
def test_count_is_the_ceiling_of_the_decimal(density: float, numel: int, count: int) -> None:
    """0.07 * 100 and 0.29 * 100 are not whole in binary."""
    assert norm_share(torch.ones(numel), [density]).squared == pytest.approx([count / numel], rel=1e-12)


def test_several_tensors_are_their_concatenation() -> None:
    parts = [random_gradient(8, 5), 10 * random_gradient(30, seed=1), random_gradient(2, 2, 2, seed=2)]
    joined = torch.cat([part.flatten() for part in parts])
    assert norm_share(parts, [0.1, 0.5]) == norm_share(joined, [0.1, 0.5])
    assert norm_share(parts, [0.1]) != norm_share(parts[:2], [0.1])


def test_shares_do_not_depend_on_order_sign_shape_or_scale() -> None:
    """Down to entries whose square is zero even in float64."""
    grad = random_gradient(30, 40)
    shuffled = grad.flatten()[torch.randperm(1200, generator=torch.Generator().manual_seed(1))]
    expected = norm_share(grad, DENSITIES)
    assert norm_share(-shuffled.view(40, 30), DENSITIES).norm == pytest.approx(expected.norm, rel=1e-12)
    for scale in (1e-200, 1e200):
        assert norm_share(scale * grad, DENSITIES).norm == pytest.approx(expected.norm, rel=1e-12)


def test_shares_are_ordered() -> None:
    """They grow with the density up to 1, and L1 <= squared <= norm."""
    shares = norm_share(random_gradient(100, 70), DENSITIES)
    for values in (shares.norm, shares.squared, shares.absolute):
        assert values == sorted(values)
        assert values[-1] == 1.0
    for norm, squared, absolute in zip(shares.norm[:-1], shares.squared, shares.absolute, strict=False):
        assert absolute < squared < norm


def test_gaussian_closed_form() -> None:
    """The reference line of the figure, against a million numbers drawn."""
    densities = [0.001, 0.01, 0.1, 0.5, 1.0]
    drawn = norm_share(random_gradient(1000, 1000), densities).norm
    assert [gaussian_norm_share(density) for density in densities] == pytest.approx(drawn, rel=0.01)
    assert gaussian_norm_share(0.01) == pytest.approx(0.2908, abs=1e-3)


def test_float16_squares_do_not_overflow() -> None:
    """300 squared is beyond float16."""
    assert norm_share(torch.full((100,), 300.0, dtype=torch.float16), [0.25]).norm == pytest.approx([0.5])


def test_the_gradient_is_only_read() -> None:
    grad = random_gradient(20, 20)
    before = grad.clone()
    norm_share(grad, [0.1])
    summarise({"a": grad}, densities=[0.1])
    assert torch.equal(grad, before)


# The model.


def test_gradient_is_that_of_the_mean_loss(model: Classifier) -> None:
    """Without dropout, tied weights once, frozen weights too; unreached ones are zero."""
    found = mean_gradient(model, BATCHES, target_modules=[""])
    model.eval().requires_grad_(True)
    sum(model(**batch).loss / 3 for batch in BATCHES).backward()
    assert list(found) == [name for name, _ in model.named_parameters()]
    for name, weight in model.named_parameters():
        expected = torch.zeros_like(weight) if weight.grad is None else weight.grad
        torch.testing.assert_close(found[name], expected, rtol=1e-12, atol=1e-15)
    assert not found["unused.weight"].any()
    assert found["mlp_down.weight"].any()


def test_rows_and_totals(model: Classifier) -> None:
    """Each weight, all of them, and all with the largest of each, against the gradients themselves."""
    densities = [0.05, 0.3, 1.0]
    gradients = mean_gradient(model, BATCHES, target_modules=["mlp_"])
    result = gradient_sparsity(model, BATCHES, target_modules=["mlp_"], densities=densities)
    assert result.densities == densities
    assert [row.name for row in result.weights] == ["mlp_up.weight", "mlp_up.bias", "mlp_down.weight"]
    for row, grad in zip(result.weights, gradients.values(), strict=True):
        assert row.shares == norm_share(grad, densities)
        assert (row.numel, row.norm) == (grad.numel(), pytest.approx(float(grad.norm()), rel=1e-12))
        assert row.absolute_sum == pytest.approx(float(grad.abs().sum()), rel=1e-12)
    assert result.model.shares == norm_share(list(gradients.values()), densities)
    for place, density in enumerate(densities):
        kept = [g.flatten().abs().topk(math.ceil(density * g.numel())).values for g in gradients.values()]
        whole = torch.cat([grad.flatten() for grad in gradients.values()])
        assert result.by_matrix.shares is not None
        expected = float(torch.cat(kept).norm() / whole.norm())
        assert result.by_matrix.shares.norm[place] == pytest.approx(expected, rel=1e-12)
        expected = float(torch.cat(kept).sum() / whole.abs().sum())
        assert result.by_matrix.shares.absolute[place] == pytest.approx(expected, rel=1e-12)
    assert result.by_matrix.norm == pytest.approx(result.model.norm, rel=1e-12)
    assert result.by_matrix.numel == result.model.numel == 130


def test_a_weight_without_gradient_counts_but_shares_nothing(model: Classifier) -> None:
    """Its entries are part of the model, so that the density is that of the whole."""
    result = gradient_sparsity(model, BATCHES, target_modules=["mlp_down", "unused.weight"], densities=[0.1])
    down, unused = result.weights
    assert (unused.norm, unused.shares) == (0.0, None)
    assert result.model.numel == down.numel + 36
    grad = mean_gradient(model, BATCHES, target_modules=["mlp_down"])["mlp_down.weight"]
    assert result.model.shares == norm_share([grad, torch.zeros(6, 6)], [0.1])
    assert result.by_matrix.shares == down.shares


def test_weights_taken_together(model: Classifier) -> None:
    """As all of them where the largest entries of each are kept; and where none has a gradient there is none."""
    result = gradient_sparsity(model, BATCHES, target_modules=["mlp_", "unused"], densities=[0.1, 0.5])
    assert combined("each", result.weights, 2) == result.by_matrix
    unused = [row for row in result.weights if "unused" in row.name]
    assert combined("unused", unused, 2) == Row("unused", 42, 0.0, 0.0, None)


def test_result_is_ready_for_json(model: Classifier) -> None:
    result = dataclasses.asdict(gradient_sparsity(model, BATCHES, target_modules=[""]))
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_a_loss_of_ones_own(model: Classifier) -> None:
    """With batches of any kind; the loss that the model gives is the default."""

    def loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        value = network(*batch).loss
        assert isinstance(value, Tensor)
        return value

    pairs = [(batch["ids"], batch["labels"]) for batch in BATCHES]
    ours = gradient_sparsity(model, pairs, target_modules=["mlp"], loss=loss)
    assert ours == gradient_sparsity(model, BATCHES, target_modules=["mlp"])
    doubled = gradient_sparsity(model, pairs, target_modules=["mlp"], loss=lambda *given: 2 * loss(*given))
    assert doubled.model.norm == pytest.approx(2 * ours.model.norm)


def test_bfloat16_gradients_are_summed_in_float32(model: Classifier) -> None:
    """1,000 equal batches have the gradient of one; a bfloat16 sum would stop growing at 256 times it."""
    model.bfloat16()
    one = mean_gradient(model, BATCHES[:1], target_modules=["mlp_up.weight"])["mlp_up.weight"]
    many = mean_gradient(model, BATCHES[:1] * 1000, target_modules=["mlp_up.weight"])["mlp_up.weight"]
    assert many.dtype == torch.float32
    torch.testing.assert_close(many, one, rtol=1e-5, atol=0)


def state(model: Classifier) -> list[Any]:
    """All that a measurement could change."""
    return [
        [module.training for module in model.modules()],
        [(weight.requires_grad, weight.grad is None, weight._version) for weight in model.parameters()],
        [weight.grad.tolist() for weight in model.parameters() if weight.grad is not None],
        [weight.tolist() for weight in model.parameters()],
    ]


def broken_batches() -> Iterator[dict[str, Tensor]]:
    yield BATCHES[0]
    raise RuntimeError("the data ended badly")


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(model: Classifier, fails: bool) -> None:
    """Gradients, modes of each module, frozen weights: after a measurement and after one that fails."""
    model.train()
    model.unused.eval()
    model(**BATCHES[0]).loss.backward()
    before = state(model)
    calls: list[nn.Parameter] = []
    model.mlp_up.weight.register_post_accumulate_grad_hook(calls.append)
    if fails:
        with pytest.raises(RuntimeError, match="ended badly"):
            gradient_sparsity(model, broken_batches(), target_modules=[""])
    else:
        gradient_sparsity(model, BATCHES, target_modules=[""])
    assert state(model) == before
    assert not calls, "an optimizer that steps in such a hook would have trained the model"


def test_it_measures_under_no_grad(model: Classifier) -> None:
    with torch.no_grad():
        inside = gradient_sparsity(model, BATCHES, target_modules=["mlp"])
    assert inside == gradient_sparsity(model, BATCHES, target_modules=["mlp"])


# Errors.


@pytest.mark.parametrize(
    ("densities", "message"),
    [
        ([], "at least one number, got none"),
        ([0.1, 0.0], "above 0 and at most 1, got 0.0"),
        ([1.5], "above 0 and at most 1, got 1.5"),
        ([-0.1], "above 0 and at most 1, got -0.1"),
        ([float("nan")], "above 0 and at most 1, got nan"),
        ([True], "above 0 and at most 1, got True"),
    ],
)
def test_densities_are_checked(model: Classifier, densities: list[float], message: str) -> None:
    """Before any batch is used."""
    with pytest.raises(ConfigError, match=message):
        norm_share(torch.ones(3), densities)
    with pytest.raises(ConfigError, match=message):
        gradient_sparsity(model, broken_batches(), target_modules=["mlp"], densities=densities)


def test_wrong_calls_are_refused(model: Classifier) -> None:
    with pytest.raises(ConfigError, match="'atn' matches no parameter"):
        gradient_sparsity(model, BATCHES, target_modules=["mlp", "atn"])
    with pytest.raises(ConfigError, match="at least one batch, got none"):
        gradient_sparsity(model, [], target_modules=["mlp"])
    with pytest.raises(ConfigError, match="got tuple"):
        gradient_sparsity(model, [(1, 2)], target_modules=["mlp"])
    with pytest.raises(ConfigError, match="no loss for a batch of ids"):
        gradient_sparsity(model, [{"ids": BATCHES[0]["ids"]}], target_modules=["mlp"])


def test_targets_that_no_gradient_reaches_are_refused(model: Classifier) -> None:
    with pytest.raises(ConfigError, match="no gradient reached any of the 2 target weights"):
        gradient_sparsity(model, BATCHES, target_modules=["unused"])
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="depends on none of the target weights"):
        gradient_sparsity(model, BATCHES, target_modules=["unused"])
    with pytest.raises(ConfigError, match="no gradient reached any of the 1 target weights"):
        gradient_sparsity(
            model, BATCHES, target_modules=["mlp_up.weight"], loss=lambda net, _: 0 * net.mlp_up.weight.sum()
        )
    for nothing in (torch.zeros(2, 2), torch.zeros(0), []):
        with pytest.raises(ConfigError, match="no norm to share"):
            norm_share(nothing, [0.1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_broken_gradients_are_refused(model: Classifier, bad: float) -> None:
    """By weight and batch."""

    def loss(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        value = network(**batch).loss
        return value + bad * network.mlp_up.bias.sum() if batch is BATCHES[1] else value

    with pytest.raises(TrainingError, match=r"mlp_up\.bias is not finite in batch 2"):
        gradient_sparsity(model, BATCHES, target_modules=["mlp"], loss=loss)
    with pytest.raises(TrainingError, match="not finite"):
        norm_share(torch.tensor([1.0, bad]), [0.5])


# The figure.


@pytest.fixture
def measured(model: Classifier) -> GradientSparsity:
    return gradient_sparsity(model, BATCHES, target_modules=["mlp", "unused"])


def lines_by_label(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    """The points of each line that the legend names, and of the others by their place."""
    return {
        str(line.get_label()): (list(map(float, line.get_xdata())), list(map(float, line.get_ydata())))  # type: ignore[arg-type]
        for line in axes.get_lines()
    }


def test_figure_shows_every_line(measured: GradientSparsity) -> None:
    """Each weight that has a gradient, both ways to choose, the references; in percent, by ascending density."""
    figure = make_figure({"one panel": measured})
    (axes,) = figure.axes
    lines = lines_by_label(axes)
    x = [100 * density for density in DENSITIES]
    assert measured.model.shares is not None
    assert measured.by_matrix.shares is not None
    assert lines["all weights, largest of all"] == (x, [100 * share for share in measured.model.shares.norm])
    assert lines["all weights, largest of each"] == (x, [100 * share for share in measured.by_matrix.shares.norm])
    assert lines["entries of a Gaussian"] == (x, [100 * gaussian_norm_share(density / 100) for density in x])
    assert lines["SIFT's paper: 1% hold 99%"] == ([1], [99])
    assert ([1, 1], [0, 1]) in lines.values(), "the line at 1%"
    drawn = [row for row in measured.weights if row.shares]
    assert (len(drawn), len(measured.weights)) == (3, 5)
    thin = [list(line.get_ydata()) for line in axes.get_lines() if line.get_color() == WEIGHT]  # type: ignore[arg-type]
    assert thin == [
        [100 * share for density, share in zip(DENSITIES, row.shares.norm, strict=True) if density * row.numel >= 1]
        for row in drawn
    ], "from a density of one entry on"
    assert [len(points) for points in thin] == [18, 11, 18]
    assert axes.get_xscale() == "log"
    assert axes.get_title() == "one panel"
    assert axes.get_xlabel().endswith("(%)")
    assert axes.get_ylabel().endswith("(%)")
    share = measured.model.shares.norm[DENSITIES.index(0.01)]
    assert [text.get_text() for text in axes.texts] == [f"{100 * share:.0f}%"]
    assert len(figure.legends[0].get_texts()) == 5


def test_figure_does_not_depend_on_the_order_of_densities() -> None:
    gradients = {"a": random_gradient(50, 50), "b": random_gradient(10, 10)}
    forward = make_figure({"title": summarise(gradients)})
    backward = make_figure({"title": summarise(gradients, densities=DENSITIES[::-1])})
    assert lines_by_label(forward.axes[0]) == lines_by_label(backward.axes[0])
    sparse = make_figure({"title": summarise(gradients, densities=[0.1, 1.0])})
    assert not sparse.axes[0].texts, "1% was not measured"


@pytest.mark.parametrize(("num", "labelled"), [(1, [0]), (2, [0, 1]), (3, [1, 2]), (4, [2, 3])])
def test_figure_with_several_panels(measured: GradientSparsity, num: int, labelled: list[int]) -> None:
    """Two in a row; the lowest of each column is labelled, the empty place is not drawn."""
    figure = make_figure({str(place): measured for place in range(num)})
    assert [axes.get_title() for axes in figure.axes] == [str(place) for place in range(num)]
    assert [place for place, axes in enumerate(figure.axes) if axes.get_xlabel()] == labelled
    ticks = [any(tick.label1.get_visible() for tick in axes.xaxis.get_major_ticks()) for axes in figure.axes]
    assert [place for place, shown in enumerate(ticks) if shown] == labelled
    assert len({axes.get_subplotspec().colspan.start for axes in figure.axes}) == min(num, 2)  # type: ignore[union-attr]


def test_drawn_file_is_a_small_png_with_the_lines_in_it(measured: GradientSparsity, tmp_path: Path) -> None:
    path = draw({"one panel": measured}, tmp_path / "figure.png")
    assert path == tmp_path / "figure.png"
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    assert path.stat().st_size < 60_000
    image = imread(path)[..., :3]
    assert image.shape == (440, 583, 3)
    upper = image[: 3 * len(image) // 4]  # without the legend
    for colour in ("#0072B2", "#E69F00", "#D55E00"):
        wanted = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        assert (abs(upper - wanted).max(-1) < 0.03).sum() > 100, colour


def test_figure_needs_a_measurement_and_matplotlib(
    measured: GradientSparsity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="at least one measurement"):
        draw({}, tmp_path / "figure.png")
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'fullrank\[report\]'"):
        draw({"title": measured}, tmp_path / "figure.png")
    assert not list(tmp_path.iterdir())


def test_a_density_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"densities must differ, got 0\.01, 0\.1, 0\.01"):
        norm_share(torch.ones(10), [0.01, 0.1, 0.01])
