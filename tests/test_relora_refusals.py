"""What ReLoRA refuses, and what it warns of: each message names the thing, the value and the remedy."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fullrank import CheckpointError, ConfigError, LowRankPair, ReLoRA, UnsupportedError
from fullrank.factors import find_pairs
from tests.restarting import Bare, output, peft_model, plain_model, train, train_bare, trainable


def relora_of(model: Bare, **options: Any) -> ReLoRA:
    optimizer = torch.optim.AdamW([model.a, model.b], lr=1e-2)
    return ReLoRA([model.pair()], optimizer, **{"restart_every": 10, "restart_warmup_steps": 2} | options)


# Options.


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        ({"reset": "half"}, ["reset must be one of zero, magnitude, random, keep, got 'half'."]),
        ({"merge_rounding": "up"}, ["merge_rounding must be one of stochastic, nearest, got 'up'."]),
        ({"reset_ratio": 0.0}, ["reset_ratio must be above 0 and at most 1, got 0.0. 0.9 drops 90%."]),
        ({"reset_ratio": 1.01}, ["reset_ratio must be above 0 and at most 1, got 1.01."]),
        ({"reset_ratio": "0.9"}, ["reset_ratio must be above 0 and at most 1, got '0.9'."]),
        ({"reset_ratio": float("nan")}, ["reset_ratio must be above 0 and at most 1, got nan."]),
        ({"restart_every": 0}, ["restart_every must be a whole number of optimizer steps, at least 1, got 0."]),
        ({"restart_every": 5, "restart_warmup_steps": 5}, ["restart_warmup_steps must be below restart_every (5)"]),
        ({"reset": "x", "restart_every": 2, "reset_ratio": 2}, ["must be below restart_every", "reset must", "got 2."]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_options_out_of_bounds(options: dict[str, Any], messages: list[str]) -> None:
    """All at once."""
    with pytest.raises(ConfigError) as error:
        relora_of(Bare(), **options)
    for message in messages:
        assert message in str(error.value)


def test_the_default_rise_must_fit_the_cycle() -> None:
    """100 steps by default, so a cycle of 50 needs a number of its own."""
    model = Bare()
    with pytest.raises(ConfigError, match=r"restart_warmup_steps must be below restart_every \(50\), got 100"):
        ReLoRA([model.pair()], torch.optim.AdamW([model.a, model.b]), restart_every=50)


@pytest.mark.parametrize("ratio", [-0.1, 1.1])
def test_a_schedule_that_ends_out_of_bounds(ratio: float) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"min_lr_ratio must be between 0 and 1, got {ratio}.")):
        relora_of(Bare()).scheduler(num_training_steps=50, min_lr_ratio=ratio)


def test_a_warm_up_longer_than_the_first_cycle() -> None:
    with pytest.raises(ConfigError, match=r"warmup_steps must be at least 0 and at most 10.*got 11\. Shorten it"):
        relora_of(Bare()).scheduler(num_training_steps=50, warmup_steps=11)


@pytest.mark.parametrize("state", [{}, {"steps": 3}, {"num_steps": 3, "state": {}, "param_groups": []}], ids=str)
def test_a_state_of_something_else(state: dict[str, Any]) -> None:
    relora = relora_of(Bare())
    relora.after_step(4)
    holds = re.escape(str(sorted(state)))
    with pytest.raises(CheckpointError, match=rf"not the state of a ReLoRA: it holds {holds}.*relora.state_dict\(\)"):
        relora.load_state_dict(state)
    assert relora.num_steps == 4


# The optimizer.


def test_an_optimizer_without_the_factors() -> None:
    """Made before the adapter was added, say; with a part of the factors it is refused too."""
    model = peft_model("linear")
    options = {"restart_every": 10, "restart_warmup_steps": 2}
    before = torch.optim.AdamW(plain_model("linear").parameters())
    message = r"does not hold the factors of 2 weights, first base_model\.model\.up\. .*after the adapter is added"
    with pytest.raises(ConfigError, match=message):
        ReLoRA(model, before, **options)
    part = torch.optim.AdamW([p for name, p in model.named_parameters() if "lora_A" in name or "up.lora_B" in name])
    with pytest.raises(ConfigError, match=r"of 1 weights, first base_model\.model\.down"):
        ReLoRA(model, part, **options)


def test_an_optimizer_without_the_trained_scale() -> None:
    model = Bare(scale=None)
    with pytest.raises(ConfigError, match=r"does not hold the factors of 1 weights, first bare"):
        ReLoRA([model.pair()], torch.optim.AdamW([model.a, model.b]), restart_every=10, restart_warmup_steps=2)


@pytest.mark.parametrize("reset", ["zero", "magnitude", "random"])
def test_no_state_to_reset_is_worth_a_warning(reset: str) -> None:
    """SGD without momentum has none; with reset keep nobody asked for one."""
    model = Bare()
    optimizer = torch.optim.SGD([model.a, model.b], lr=1e-2)
    pairs = [model.pair()]
    train_bare(model, optimizer, 2)
    with pytest.warns(
        UserWarning, match=r"restart after step 3 found no optimizer state .* Is the SGD given to ReLoRA"
    ):
        ReLoRA(pairs, optimizer, restart_every=3, restart_warmup_steps=1, reset=reset).after_step(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ReLoRA(pairs, optimizer, restart_every=3, restart_warmup_steps=1, reset="keep").after_step(3)


def test_the_wrong_optimizer_is_worth_a_warning() -> None:
    """One that holds the factors, and is not the one that steps."""
    model = peft_model("linear")
    stepping, given = (torch.optim.AdamW(trainable(model), lr=1e-2) for _ in range(2))
    relora = ReLoRA(model, given, restart_every=3, restart_warmup_steps=1)
    with pytest.warns(UserWarning, match="AdamW has not stepped between 100 calls of ReLoRA"):
        train(model, stepping, range(100), relora)
    with pytest.warns(UserWarning, match="Is the AdamW given to ReLoRA the optimizer that steps"):
        relora.after_step(3)


def test_calls_while_gradients_accumulate() -> None:
    """Only steps of the optimizer count, however often the loop asks."""
    model = peft_model("linear")
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    relora = ReLoRA(model, optimizer, restart_every=2, restart_warmup_steps=1)
    restarts = []
    for call in range(12):
        if call % 3 == 2:
            train(model, optimizer, range(call, call + 1))
        restarts.append(relora.step())
    assert relora.num_steps == 4
    assert [call for call, restart in enumerate(restarts) if restart] == [5, 11]


def test_a_list_of_nothing() -> None:
    with pytest.raises(ConfigError):
        ReLoRA([], torch.optim.AdamW([nn.Parameter(torch.zeros(1))]), restart_every=3, restart_warmup_steps=1)


# What a merge loses.


@pytest.mark.parametrize(("share", "warns"), [(0.3, True), (3.0, False)])
def test_a_merge_that_mostly_rounds_away_is_worth_a_warning(share: float, warns: bool) -> None:
    """An update of so many half steps of a bfloat16 weight's grid, to nearest."""
    model = Bare(dtype=torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(0.03)
        model.a.fill_(1.0)
        model.b.fill_(share * 2.0**-14 / (1.5 * 2))
    relora = relora_of(model, merge_rounding="nearest", reset="keep")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        restart = relora.restart()
    assert (restart.merge.relative_error > 0.5) == warns
    texts = [str(warning.message) for warning in seen]
    assert any("100% of the update merged after step 0 is lost to the weights' type" in text for text in texts) == warns
    assert len(texts) == int(warns)


# Models.


class Layers(nn.Module):
    """Layers of kinds whose update is no plain product, or whose weight is out of reach."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(4, 4, 3, groups=2)
        self.attention = nn.MultiheadAttention(8, 2)
        self.linear = nn.Linear(4, 4)
        self.experts = nn.Module()
        self.experts.weights = nn.Parameter(torch.zeros(3, 4, 4))


def with_factors(**options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(Layers(), LoraConfig(r=2, **options))


def test_no_layers() -> None:
    with pytest.raises(ConfigError, match=r"no LoRA layers\. Add them first: peft.get_peft_model.*list of LowRankPair"):
        find_pairs(plain_model("linear"))


def test_several_adapters() -> None:
    from peft import LoraConfig

    model = peft_model("linear")
    model.add_adapter("other", LoraConfig(r=1, target_modules=["up"]))
    with pytest.raises(ConfigError, match=r"several adapters: default, other\. Say which one: adapter='default'"):
        find_pairs(model)
    with pytest.raises(ConfigError, match=r"no adapter 'third', only default, other\."):
        find_pairs(model, adapter="third")
    assert [pair.name for pair in find_pairs(model, adapter="other")] == ["base_model.model.up"]


def test_an_adapter_that_is_not_active() -> None:
    """Its restarts would merge what no forward pass has seen."""
    from peft import LoraConfig

    model = peft_model("linear")
    model.add_adapter("other", LoraConfig(r=1, target_modules=["up"]))
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ConfigError, match=r"adapter 'other' of base_model\.model\.up is not active.*set_adapter"):
        ReLoRA(model, optimizer, restart_every=3, restart_warmup_steps=1, adapter="other")


def test_a_merged_adapter() -> None:
    """A second merge would add the factors twice."""
    model = peft_model("linear")
    model.merge_adapter()
    with pytest.raises(ConfigError, match=r"adapter of base_model\.model\.up is merged already.*unmerge_adapter\(\)"):
        find_pairs(model)
    model.unmerge_adapter()
    assert len(find_pairs(model)) == 2


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
@pytest.mark.parametrize(
    "make",
    [
        lambda: peft_model("linear", use_dora=True),
        lambda: peft_model("linear", lora_bias=True),
        lambda: with_factors(target_modules=["grouped"]),
    ],
    ids=["DoRA", "lora_bias", "grouped"],
)
def test_what_is_no_plain_product(make: Callable[[], Any]) -> None:
    with pytest.raises(
        UnsupportedError, match=r"adapter of base_model\.model\.\w+ is not a plain product B A.*Use plain"
    ):
        find_pairs(make())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"target_modules": ["attention"]}, "MultiheadAttention over a MultiheadAttention"),
        ({"target_modules": [], "target_parameters": ["experts.weights"]}, "ParamWrapper over a Module"),
    ],
    ids=["attention", "experts"],
)
def test_kinds_without_a_weight(options: dict[str, Any], kind: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"is a {kind}, whose weight cannot be merged into\. Leave it out"):
        find_pairs(with_factors(**options))


def test_a_weight_of_whole_numbers() -> None:
    model = with_factors(target_modules=["linear"])
    codes = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    model.base_model.model.linear.base_layer.weight = codes
    with pytest.raises(UnsupportedError, match=r"weight of type torch\.int8, which this version cannot merge into"):
        find_pairs(model)


def test_an_8_bit_layer_with_weights_of_its_own() -> None:
    """bitsandbytes' default (has_fp16_weights) keeps the weight as it is: merged into as such, or refused."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from peft import LoraConfig, get_peft_model

    layers = Layers()
    layers.linear = bitsandbytes.nn.Linear8bitLt(4, 4)
    layers.is_loaded_in_8bit = True
    (pair,) = find_pairs(get_peft_model(layers, LoraConfig(r=2, target_modules=["linear"])))
    nn.init.ones_(pair.b)
    expected = pair.weight.float() + pair.update()
    pair.merge_()
    torch.testing.assert_close(pair.weight.float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_a_tied_weight() -> None:
    """The embedding and the head of GPT-2 are one weight: a merge for the one would change the other."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(plain_model("gpt2"), LoraConfig(r=2, target_modules=["wte"]))
    with pytest.raises(ConfigError, match=r"weight of base_model\.model\.transformer\.wte is shared.*target_modules"):
        find_pairs(model)


def test_a_layer_that_is_used_twice_is_one_layer() -> None:
    """Its weight is shared with nobody: the same module under two names."""
    from peft import LoraConfig, get_peft_model

    model: Any = plain_model("linear")
    model.again = model.up
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["up", "down"]))
    assert len(find_pairs(model)) == 2
    assert output(model).isfinite().all()


# Pairs of one's own.


@pytest.mark.parametrize(
    ("shapes", "transposed", "message"),
    [
        (
            ((4, 6), (2, 4), (6, 2)),
            False,
            "A (2, 4) and B (6, 2) do not fit a weight of 4 x 6. A must be r x 6, B 4 x r.",
        ),
        (((4, 6), (2, 6), (4, 3)), False, "A (2, 6) and B (4, 3) do not fit a weight of 4 x 6."),
        (((4, 6), (2, 5), (4, 2)), False, "A must be r x 6, B 4 x r."),
        (((4, 6), (2, 6), (5, 2)), False, "A must be r x 6, B 4 x r."),
        (
            ((4, 6), (2, 6), (4, 2)),
            True,
            "weight of 6 x 4. A must be r x 4, B 6 x r (the weight is stored transposed).",
        ),
        (((4, 3, 2, 2), (2, 3), (4, 2)), False, "do not fit a weight of 4 x 12."),
    ],
    ids=["swapped", "ranks", "columns", "rows", "transposed", "convolution"],
)
def test_factors_that_do_not_fit(shapes: tuple[tuple[int, ...], ...], transposed: bool, message: str) -> None:
    weight, a, b = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ConfigError, match=r"^up: factors " + ".*" + re.escape(message)):
        LowRankPair(weight=weight, a=a, b=b, name="up", transposed=transposed)


def test_factors_that_fit() -> None:
    """In any of the forms that layers have."""
    plain = LowRankPair(weight=torch.zeros(4, 6), a=torch.zeros(2, 6), b=torch.zeros(4, 2))
    turned = LowRankPair(weight=torch.zeros(4, 6), a=torch.zeros(2, 4), b=torch.zeros(6, 2), transposed=True)
    kernel = LowRankPair(weight=torch.zeros(4, 3, 2, 2), a=torch.zeros(5, 3, 2, 2), b=torch.zeros(4, 5, 1, 1))
    assert [pair.shape for pair in (plain, turned, kernel)] == [(4, 6), (6, 4), (4, 12)]
    assert all(pair.update().shape == pair.shape for pair in (plain, turned, kernel))
