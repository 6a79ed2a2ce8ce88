"""LoRA and ReLoRA on a model that FSDP2 has spread over a group of one: what is refused, and when."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from fullrank import METHODS, ConfigError, ReLoRA, UnsupportedError
from fullrank.factors import find_pairs, refuse_mixed_types
from fullrank.sharding import gathered_together, is_sharded, local, reshard
from tests.cases.lora import SIZES, TinyLayers, with_layers
from tests.cases.tiny import TARGETS
from tests.restarting import inputs, output, peft_model, train, trainable

pytestmark = pytest.mark.usefixtures("one_process")


def spread_model(**options: Any) -> Any:
    """Two linear layers with factors; a group of parameters for each, and one around them."""
    model = peft_model("linear", **options)
    inner = model.base_model.model
    fully_shard(inner.up)
    fully_shard(inner.down)
    fully_shard(model)
    return model


def relora_of(model: Any, **options: Any) -> ReLoRA:
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    return ReLoRA(model, optimizer, **{"restart_every": 2, "restart_warmup_steps": 1} | options)


# What the modules hold.


def test_pairs_hold_the_parameters_that_the_optimizer_steps() -> None:
    """Also after an evaluation, which leaves gathered weights in the root's modules."""
    model = peft_model("linear")
    fully_shard(model)
    spread_before = dict(model.named_parameters())
    with torch.no_grad():
        model(inputs(model, 0))
    assert not any(is_sharded(parameter) for parameter in model.parameters())
    pairs = find_pairs(model)
    assert {p for pair in pairs for p in (pair.weight, *pair.parameters())} <= set(spread_before.values())
    assert dict(model.named_parameters()) == spread_before


def test_a_merge_reaches_what_an_evaluation_has_gathered() -> None:
    """The function of the model stays over a restart, whatever was called before it."""
    model = peft_model("linear")
    fully_shard(model)
    relora = relora_of(model)
    train(model, relora.optimizer, range(1), relora)
    with torch.no_grad():
        for pair in relora.pairs:
            local(pair.b).normal_(generator=torch.Generator().manual_seed(0))
        reshard(model)
        before = output(model)
        relora.restart()
        assert not any(local(pair.b).any() for pair in relora.pairs)
        torch.testing.assert_close(output(model), before, rtol=1e-5, atol=1e-6)


def test_groups_are_what_is_gathered_at_once() -> None:
    model = spread_model()
    groups = gathered_together(model)
    names = {parameter: name.rpartition("model.")[2] for name, parameter in model.named_parameters()}
    found = sorted(sorted(names[parameter] for parameter in group) for group in groups)
    assert [len(group) for group in found] == [4, 2, 4]
    assert found[1] == ["norm.bias", "norm.weight"]
    assert gathered_together(peft_model("linear")) == []


def test_modules_that_are_sharded_together_are_one_group() -> None:
    model: Any = peft_model("linear")
    inner = model.base_model.model
    fully_shard([inner.up, inner.down])
    assert [len(group) for group in gathered_together(model)] == [8]


def test_resharding_a_plain_model_changes_nothing() -> None:
    model = peft_model("linear")
    before = list(model.parameters())
    reshard(model)
    assert all(one is other for one, other in zip(model.parameters(), before, strict=True))
    assert not any(isinstance(module, FSDPModule) for module in model.modules())


# Data types.


def mixed(**changes: Any) -> Any:
    return {"rank": 2, "target_modules": TARGETS, "restart_warmup_steps": 1} | changes


@pytest.mark.parametrize(
    ("options", "works"),
    [
        ({}, False),
        ({"train_norms": False}, True),
        ({"train_norms": False, "warm_start_steps": 4}, False),
        ({"factor_dtype": None}, True),
        ({"factor_dtype": "bfloat16"}, True),
        ({"factor_dtype": None, "warm_start_steps": 4}, True),
        ({"factor_dtype": None, "trainable_scaling": True}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["lora", "relora"])
def test_types_of_what_trains_together(method: str, options: dict[str, Any], works: bool) -> None:
    """A bfloat16 model: FSDP2 itself would raise an AssertionError in the first forward pass, and only then."""
    own = {"restart_every": 4} if method == "relora" else {}
    config = METHODS[method].config(**mixed(**own, **options))
    model = with_layers(method, config, torch.bfloat16)
    for name in SIZES:
        fully_shard(model.get_submodule(name))
    fully_shard(model.norm)  # type: ignore[arg-type]
    fully_shard(model)
    if not works:
        with pytest.raises(UnsupportedError, match=r"several data types, .*bfloat16.*method\.factor_dtype null"):
            METHODS[method].build(model, config)
        return
    METHODS[method].build(model, config)
    first: Any = model.get_submodule("attn_tall")
    first(torch.randn(3, 10, dtype=torch.bfloat16)).sum().backward()


def test_frozen_weights_of_another_type_are_no_matter() -> None:
    """As under PEFT by itself: a bfloat16 base, float32 factors, an optimizer over all of them."""
    model = spread_model(dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    relora = ReLoRA(model, optimizer, restart_every=2, restart_warmup_steps=1)
    train(model, optimizer, range(3), relora)
    assert relora.last_restart is not None
    with pytest.raises(UnsupportedError, match=r"several data types, float32 \(.*lora_A.*\), bfloat16 \(.*base"):
        ReLoRA(model, optimizer, restart_every=2, restart_warmup_steps=1, warm_start_steps=4)


def test_a_plain_model_may_have_any_types() -> None:
    refuse_mixed_types(peft_model("linear", torch.bfloat16))


# The order of things.


def test_a_model_that_is_sharded_afterwards() -> None:
    """Its parameters are other objects then; the optimizer may have been given them, as accelerate does."""
    model = peft_model("linear")
    relora = relora_of(model)
    fully_shard(model)
    relora.optimizer.param_groups[0]["params"] = trainable(model)
    with pytest.raises(ConfigError, match=r"base_model\.model\.up was sharded after .*Call fully_shard first"):
        train(model, relora.optimizer, range(1), relora)


def test_an_optimizer_of_the_time_before() -> None:
    model = peft_model("linear")
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    fully_shard(model)
    with pytest.raises(ConfigError, match="the optimizer does not hold the factors of 2 weights"):
        ReLoRA(model, optimizer, restart_every=2, restart_warmup_steps=1)


# What cannot work.


def test_a_weight_that_is_cut_twice_in_a_group_of_one() -> None:
    """Is not cut at all."""
    model: Any = peft_model("linear")
    base = model.base_model.model.up.base_layer
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "tensor"))
    weight = distribute_tensor(base.weight.detach(), mesh, [Shard(0), Shard(0)])
    base.weight = nn.Parameter(weight, requires_grad=False)
    (up, _) = find_pairs(model)
    nn.init.ones_(up.b)
    expected = up.read() + up.update()
    up.merge_()
    torch.testing.assert_close(local(base.weight), expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
def test_quantized_weights_on_shards(dtype: torch.dtype) -> None:
    model: Any = peft_model("linear")
    base = model.base_model.model.up.base_layer
    codes = distribute_tensor(torch.zeros(10, 6, dtype=dtype), init_device_mesh("cpu", (1,)), [Shard(0)])
    base.weight = nn.Parameter(codes, requires_grad=False)
    with pytest.raises(UnsupportedError, match=r"up is quantized \(torch\.u?int8\) and sharded by FSDP2.*under DDP"):
        find_pairs(model)


def test_a_weight_of_another_engine() -> None:
    """DeepSpeed marks its parameters by an attribute."""
    model: Any = peft_model("linear")
    model.base_model.model.down.base_layer.weight.ds_id = 3
    with pytest.raises(UnsupportedError, match=r"weight of base_model\.model\.down belongs to DeepSpeed ZeRO"):
        find_pairs(model)


def test_a_model_of_fsdp1() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(peft_model("linear"), use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(UnsupportedError, match=r"FSDP1 \(FullyShardedDataParallel\).*fully_shard"):
        find_pairs(model)


def test_the_callback_of_a_trainer(tmp_path: Any) -> None:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from fullrank.train.restarts import ReLoRACallback

    model = spread_model()
    callback = ReLoRACallback(relora_of(model))
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(UnsupportedError, match=r"sharded model \(FSDP2\).*--trainer\.strategy fsdp2"):
        callback.on_train_begin(args, TrainerState(), TrainerControl(), model=model)


def test_the_trained_scale_can_be_sharded() -> None:
    """FSDP2 refuses scalars; so it has one entry."""
    from fullrank.factors import train_scaling

    model = peft_model("linear")
    numbers = train_scaling(model)
    assert all(number.shape == (1,) for number in numbers)
    fully_shard(model)
    relora = relora_of(model, restart_every=3)
    train(model, relora.optimizer, range(2), relora)
    assert all(local(pair.scale).item() != 1.0 for pair in relora.pairs)  # type: ignore[arg-type]
    train(model, relora.optimizer, range(2, 3), relora)
    assert all(local(pair.scale).item() == 1.0 for pair in relora.pairs)  # type: ignore[arg-type]


def test_the_methods_find_their_layers() -> None:
    """Of a model that is sharded whole, what trains beside the factors too."""
    config = METHODS["lora"].config(**mixed())
    model: Any = with_layers("lora", config)
    assert isinstance(model, TinyLayers)
    fully_shard(model)
    built = METHODS["lora"].build(model, config)
    held = {parameter for group in built.optimizer.param_groups for parameter in group["params"]}
    assert held == set(trainable(model))
    assert all(is_sharded(parameter) for parameter in held)
