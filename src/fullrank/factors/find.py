"""Which weights of a model have LoRA factors, read off PEFT's layers without importing PEFT.

A PEFT layer is a module with ``lora_A``, ``lora_B``, ``scaling`` and ``get_base_layer()``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.coded import is_quantized
from fullrank.errors import ConfigError, UnsupportedError
from fullrank.factors.pair import LayerPair, LowRankPair
from fullrank.factors.quantized import QuantizedPair
from fullrank.params import match_parameters, rank_problems
from fullrank.sharding import is_sharded, refuse_flattened, reshard, split_of


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of every PEFT LoRA layer."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "lora_B") and hasattr(module, "get_base_layer"):
            yield name, module


def adapter_names(model: nn.Module) -> list[str]:
    """The adapters that a model's LoRA layers hold, in the order of their first layer."""
    names = {n: None for _, layer in lora_layers(model) for n in (*layer.lora_A, *layer.lora_embedding_A)}
    return list(names)


def find_pairs(model: nn.Module, *, adapter: str | None = None, training: bool = False) -> list[LayerPair]:
    """Every weight of a PEFT LoRA model with its factors.

    Args:
        model: A PeftModel, or a model with PEFT's layers in it; wrapped by DDP, sharded by FSDP2, or neither.
        adapter: Name of the adapter; None if there is one only.
        training: Refuse an adapter that is not active.

    Raises:
        ConfigError: If there is none, or several and none was named; if a weight is merged or shared.
        UnsupportedError: For a kind of layer or adapter whose update is not a plain product.
    """
    names = adapter_names(model)
    if not names:
        raise ConfigError(
            "this model has no LoRA layers. Add them first: peft.get_peft_model(model, peft.LoraConfig(r=..., "
            "target_modules=...)); or give a list of LowRankPair for layers of your own."
        )
    if adapter is None and len(names) > 1:
        raise ConfigError(f"this model has several adapters: {', '.join(names)}. Say which one: adapter={names[0]!r}.")
    if adapter is not None and adapter not in names:
        raise ConfigError(f"this model has no adapter {adapter!r}, only {', '.join(names)}.")
    chosen = adapter or names[0]
    reshard(model)  # the last forward pass may have put gathered weights in the place of sharded ones
    holders = Counter(p for module in model.modules() for p in module.parameters(recurse=False))
    pairs = []
    for name, layer in lora_layers(model):
        if chosen in layer.lora_A or chosen in layer.lora_embedding_A:
            if training and chosen not in layer.active_adapters:
                raise ConfigError(
                    f"the adapter {chosen!r} of {name} is not active, so it does not train. Call "
                    f"model.set_adapter({chosen!r}) first."
                )
            pair = _pair(name, layer, chosen)
            if isinstance(pair.weight, nn.Parameter) and holders[pair.weight] > 1:
                raise ConfigError(
                    f"the weight of {name} is shared with another module (tied embeddings?): a merge would change "
                    "both. Leave it out of the adapter's target_modules, or untie it."
                )
            pairs.append(pair)
    return pairs


def _pair(name: str, layer: Any, adapter: str) -> LayerPair:
    """The pair of one PEFT layer."""
    base, kind = layer.get_base_layer(), type(layer).__name__
    if not isinstance(layer.lora_A, nn.ModuleDict):
        raise UnsupportedError(f"{name} is a {kind} of another method than LoRA, whose factors cannot be restarted.")
    if layer.merged:
        raise ConfigError(f"the adapter of {name} is merged already. Call model.unmerge_adapter() first.")
    if adapter in layer.lora_variant or layer.lora_bias.get(adapter) or getattr(base, "groups", 1) != 1:
        raise UnsupportedError(
            f"the adapter of {name} is not a plain product B A (DoRA or another variant, lora_bias, or a grouped "
            "convolution), so it cannot be merged and started again. Use plain LoRA, or leave that layer out."
        )
    weight = getattr(base, "weight", None)
    if not torch.is_tensor(weight) or kind in ("ParamWrapper", "MultiheadAttention"):
        raise UnsupportedError(
            f"{name} is a {kind} over a {type(base).__name__}, whose weight cannot be merged into. Leave it out of "
            "the adapter's target_modules; linear layers, convolutions, embeddings and bitsandbytes layers work."
        )
    refuse_flattened(weight, name=f"the weight of {name}", user="a merge")
    scale = layer.lora_scaling[adapter] if adapter in getattr(layer, "lora_scaling", {}) else layer.scaling[adapter]
    is_embedding = adapter in layer.lora_embedding_A
    options: dict[str, Any] = {
        "a": layer.lora_embedding_A[adapter] if is_embedding else layer.lora_A[adapter].weight,
        "b": layer.lora_embedding_B[adapter] if is_embedding else layer.lora_B[adapter].weight,
        "scale": scale,
        "name": name,
        "transposed": is_embedding or bool(getattr(layer, "fan_in_fan_out", False)),
        "zero_a": is_embedding,
        "layer": layer,
    }
    for tensor in (weight, options["a"], options["b"]):
        split_of(tensor, name=f"a parameter of {name}")
    if is_quantized(weight):
        return QuantizedPair(weight=weight, **options)
    if not weight.is_floating_point() and is_sharded(weight):
        raise UnsupportedError(
            f"{name} is quantized ({weight.dtype}) and sharded by FSDP2: a process has a part of its codes, and cannot "
            "merge into them. Train it under DDP, or shard a base in bfloat16 or float32."
        )
    if not weight.is_floating_point():
        raise UnsupportedError(
            f"{name} has a weight of type {weight.dtype}, which this version cannot merge into. Use a base in "
            "bfloat16, float16 or float32, or bitsandbytes' 4-bit or 8-bit layers."
        )
    return LayerPair(weight=weight, **options)


def refuse_left_behind(pairs: Iterable[LowRankPair]) -> None:
    """Check that the weights of pairs are those that the model computes with.

    Raises:
        ConfigError: If the model was sharded after the pairs were found.
    """
    for pair in pairs:
        if is_sharded(pair.current()) and not is_sharded(pair.weight):
            raise ConfigError(
                f"{pair.name} was sharded after its factors were found, so a merge would go into a weight that the "
                "model has left behind. Call fully_shard first, then make the optimizer and ReLoRA; or train under DDP."
            )


def named_factors(model: nn.Module, patterns: Sequence[str], *, rank: int) -> dict[str, nn.Parameter]:
    """A and B of every LoRA layer by name; of a model without such layers, stand-ins on the meta device."""
    if next(lora_layers(model), None) is not None:
        pairs = find_pairs(model)
        found = {f"{pair.name}.lora_A": pair.a for pair in pairs} | {f"{pair.name}.lora_B": pair.b for pair in pairs}
        return {name: factor for name, factor in found.items() if isinstance(factor, nn.Parameter)}
    factors: dict[str, nn.Parameter] = {}
    for name, layer in target_layers(model, patterns, rank=rank).items():
        rows, columns = layer.weight.shape  # or the other way round, for Conv1D: the sizes alone count
        factors[f"{name}.lora_A"] = nn.Parameter(torch.empty(rank, columns, device="meta"))
        factors[f"{name}.lora_B"] = nn.Parameter(torch.empty(rows, rank, device="meta"))
    return factors


class TanhScaling(dict[str, Any]):
    """What a PEFT layer reads its scale from at every forward pass: here tanh of a trained number."""

    def __init__(self, numbers: nn.ParameterDict) -> None:
        super().__init__()
        self.numbers = numbers

    def __getitem__(self, adapter: str) -> Tensor:
        """The scale of an adapter, with its gradient."""
        scale: Tensor = self.numbers[adapter].reshape(()).tanh()
        return scale


def train_scaling(model: nn.Module, adapter: str = "default") -> list[nn.Parameter]:
    """Let every LoRA layer train its scale, tanh(s) with s = 1 at first, in place of lora_alpha / r.

    Call it before the optimizer is made. As in the authors' code (``--train_scaling``).
    """
    numbers = []
    for _, layer in lora_layers(model):
        if adapter in layer.lora_A or adapter in layer.lora_embedding_A:
            device = layer.get_base_layer().weight.device
            # Of one entry, not of none: FSDP2 shards no scalars.
            layer.lora_scaling = nn.ParameterDict({adapter: nn.Parameter(torch.ones(1, device=device))})
            layer.scaling = TanhScaling(layer.lora_scaling)
            numbers.append(layer.lora_scaling[adapter])
    return numbers


def target_layers(model: nn.Module, patterns: Sequence[str], *, rank: int) -> dict[str, Any]:
    """The linear layers (and transformers' Conv1D) whose weight's name contains one of the patterns.

    Raises:
        ConfigError: If a pattern matches no such layer, or the rank is above the short side of one.
    """
    linear: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }
    match_parameters(model, patterns, min_ndim=2)
    found = {name: layer for name, layer in linear.items() if any(pattern in f"{name}.weight" for pattern in patterns)}
    for pattern in patterns:
        if not any(pattern in f"{name}.weight" for name in found):
            raise ConfigError(
                f"target pattern {pattern!r} matches weights of this model, but none of a linear layer, and LoRA's "
                "factors are put beside these. Leave it out."
            )
    problems = [p for name, layer in found.items() for p in rank_problems(rank, _sizes(layer), name)]
    if problems:
        raise ConfigError(problems[0])
    return found


def _sizes(layer: Any) -> tuple[int, ...]:
    """Rows and columns of a layer, whose weight may be kept as codes of another shape."""
    return (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else tuple(layer.weight.shape)
