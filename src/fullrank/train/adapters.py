"""PEFT's LoRA layers on a model, and off it again: the only file that imports PEFT.

The layers are put inside the model, which stays the class that it is. So a checkpoint holds all its weights,
those that a restart merged into and the embeddings among them, and resumes like that of any other model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import PreTrainedModel

from fullrank.adapter import fingerprint
from fullrank.coded import plain_layer
from fullrank.errors import ConfigError, first_line
from fullrank.factors import AdapterRequest, LowRankPair, find_pairs, target_layers, train_scaling
from fullrank.factors.quantize import Quantization, dequantize_
from fullrank.factors.quantized import QuantizedPair
from fullrank.ops.seeded import seeded
from fullrank.params import class_head, is_classifier
from fullrank.sharding import is_sharded, process_number, whole
from fullrank.train.coded import heads
from fullrank.train.report import write_whole
from fullrank.train.sharded import whole_weights
from fullrank.weights import plain_names

ADAPTER = "default"
BASE = "base.json"
"""File beside an adapter that knows the weights of its base."""


class Adapters:
    """The LoRA layers of one model.

    They are put on the plain model. It may be sharded afterwards (FSDP2): ``save``, ``save_plain`` and ``remove`` are
    collectives then, which all processes call, and process 0 alone writes.

    Args:
        model: Gets the layers; its other parameters freeze.
        request: What a method asks for.
        quantization: Keep the linear layers as codes, but for heads; None: as they are.

    Raises:
        ConfigError: If a pattern matches no linear layer, or the rank is above a short side.
    """

    def __init__(
        self, model: PreTrainedModel, request: AdapterRequest, quantization: Quantization | None = None
    ) -> None:
        fresh = class_head(model)
        self.base = fingerprint({name: p.detach() for name, p in model.named_parameters() if name not in fresh})
        """A short hash of each weight that training started from, but for those of a head."""
        self.dtype = next(model.parameters()).dtype
        self.is_quantized = quantization is not None
        if quantization is not None:
            quantization.apply_(model, keep=heads(model))
        self.peft: PeftModel = add_factors(model, request)
        if quantization is not None:
            quantization.unmark_(model)
        self.request = request
        for number, pair in enumerate(self.pairs()):
            pair.reinit_(seeded(request.seed, number))

    def pairs(self) -> list[LowRankPair]:
        """Every weight with its factors."""
        return list(find_pairs(self.peft, adapter=ADAPTER))

    def save(self, folder: Path) -> int:
        """Write a PEFT adapter, with whole what trained beside the factors.

        ``PeftModel.from_pretrained(base, folder)`` loads it. A trained scale is folded into B. A collective if the
        model is sharded: factors and what trained beside them are gathered.

        Returns:
            Its bytes; 0 in any process but the first, which alone writes.
        """
        config: Any = self.peft.peft_config[ADAPTER]
        tensors: dict[str, torch.Tensor] = {}
        pairs = self.pairs()
        for pair in pairs:
            b = whole(pair.b.detach()) * (pair.trained_scale() / (config.lora_alpha / config.r))
            tensors |= {f"{pair.name}.lora_A.weight": pair.a.detach(), f"{pair.name}.lora_B.weight": b}
        taken = {parameter for pair in pairs for parameter in (pair.weight, *pair.parameters())}
        # Under every name of a tied weight: PEFT unties what it keeps whole.
        named = self.peft.named_parameters(remove_duplicate=False)
        beside = {name: p.detach() for name, p in named if p.requires_grad and p not in taken}
        modules = {name.rpartition(".")[0] for name in beside}
        kept = {_outermost(module, beside, self.peft) for module in modules if not module.endswith(".base_layer")}
        endings = sorted({_ending(module, kept, self.peft) for module in kept})
        # With what of it is frozen: PEFT puts modules back, not parameters. Sorted, so that processes gather alike.
        for module in sorted(kept):
            own = self.peft.get_submodule(module).named_parameters(remove_duplicate=False)
            beside |= {f"{module}.{name}": parameter.detach() for name, parameter in own}
        has_bias = any(module.endswith(".base_layer") for module in modules)
        writes, saved = process_number() == 0, {}
        for name, tensor in (tensors | beside).items():
            gathered = whole(tensor)
            if writes:
                saved[name] = gathered.cpu().contiguous().clone()
        if not writes:
            return 0
        folder.mkdir(parents=True, exist_ok=True)
        save_file(saved, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        changes = {
            "modules_to_save": endings or None,
            "bias": "lora_only" if has_bias else "none",
            "task_type": "SEQ_CLS" if is_classifier(self.peft.get_base_model()) else "CAUSAL_LM",
        }
        replace(config, inference_mode=True, **changes).save_pretrained(str(folder))
        write_whole(folder / BASE, json.dumps({"base": self.base}, indent=1))
        return sum(path.stat().st_size for path in folder.iterdir())

    def save_plain(self, folder: Path) -> None:
        """Write the model without its factors, as ``from_pretrained`` loads it; a collective if it is sharded."""
        model: PreTrainedModel = self.peft.get_base_model()  # type: ignore[assignment]
        writes = process_number() == 0
        is_spread = any(is_sharded(parameter) for parameter in model.parameters())
        tensors = whole_weights(model, keep=writes) if is_spread else model.state_dict()
        if writes:
            state = {name: tensors[place] for name, place in plain_names(tensors).items()}
            type(model).save_pretrained(model, folder, state_dict=state)

    @torch.no_grad()
    def remove(self) -> None:
        """Merge the factors into their weights, rounded to nearest, and leave the plain model behind.

        A collective if it is sharded, which it stays. Codes are decoded first, so that nothing of the factors is lost
        to them, and the model lies on the host then, which has held it whole before.
        """
        for pair in self.pairs():
            if isinstance(pair, QuantizedPair):
                merged = pair.read() + pair.update()
                pair.layer.base_layer = plain_layer(pair.layer.get_base_layer(), merged, self.dtype)
            else:
                pair.merge_(stochastic=False)
        self.peft.unload()
        if self.is_quantized:
            plain = self.peft.get_base_model()
            dequantize_(plain, self.dtype)
            plain.to("cpu")


def add_factors(model: PreTrainedModel, request: AdapterRequest) -> PeftModel:
    """Put PEFT's layers with factors on a model, whose other parameters freeze; A's numbers are yet to be drawn.

    Works on the meta device too.

    Raises:
        ConfigError: If a pattern matches no linear layer, or the rank is above a short side.
    """
    layers = target_layers(model, request.target_modules, rank=request.rank)
    config = LoraConfig(
        r=request.rank,
        lora_alpha=cast(int, request.alpha),  # PEFT only divides it: any number will do
        lora_dropout=request.dropout,
        target_modules=list(layers),
        fan_in_fan_out=any(type(layer).__name__ == "Conv1D" for layer in layers.values()),
    )
    with torch.random.fork_rng(devices=[]):  # PEFT draws factors, which are drawn again
        with_factors: PeftModel = get_peft_model(model, config, autocast_adapter_dtype=False)
    for pair in find_pairs(with_factors, adapter=ADAPTER):
        dtype = request.dtype or pair.weight.dtype
        for factor in pair.parameters():
            factor.data = factor.data.to(dtype)
    if request.trainable_scaling:
        train_scaling(model, ADAPTER)
    return with_factors


def merge_saved(model: PreTrainedModel, folder: str) -> PreTrainedModel:
    """Merge a PEFT adapter from a folder into its base; the plain model comes back.

    Raises:
        ConfigError: If PEFT cannot put the adapter on this model.
    """
    if (Path(folder) / BASE).is_file():
        saved = json.loads((Path(folder) / BASE).read_text(encoding="utf-8"))["base"]
        found = fingerprint({name: p.detach() for name, p in model.named_parameters() if name in saved})
        if other := sorted(name for name in saved if saved[name] != found.get(name)):
            raise ConfigError(
                f"the adapter in {folder} was trained from another base: {len(other)} of its {len(saved)} weights are "
                f"not this model's, first {other[0]}. Name the base that it was trained from."
            )
    try:
        with_adapter: Any = PeftModel.from_pretrained(model, folder)
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        reason = first_line(error).rstrip(".")
        raise ConfigError(
            f"the adapter in {folder} does not fit the model ({type(model).__name__}): {reason}. Name the base that it "
            "was trained from."
        ) from error
    merged: PreTrainedModel = with_adapter.merge_and_unload()
    return merged


def _outermost(module: str, beside: Mapping[str, torch.Tensor], model: torch.nn.Module) -> str:
    """The largest module around this one of which all is kept whole: PEFT takes a head so, and none within another."""
    while outer := module.rpartition(".")[0]:
        names = (f"{outer}.{name}" for name, _ in model.get_submodule(outer).named_parameters(remove_duplicate=False))
        if not all(name in beside for name in names):
            break
        module = outer
    return module


def _ending(module: str, kept: set[str], model: torch.nn.Module) -> str:
    """How PEFT finds a module to keep whole: by the end of its name, here the shortest that no other module has.

    Args:
        module: Name of the module in the PEFT model.
        kept: Names of all modules to keep whole: they may share an end.
        model: The PEFT model.
    """
    parts = module.removeprefix("base_model.model.").split(".")
    others = [name for name, _ in model.named_modules() if name not in kept]
    endings = (".".join(parts[-count:]) for count in range(1, len(parts)) if not parts[-count].isdigit())
    return next((end for end in endings if not any(name.endswith(end) for name in others)), ".".join(parts))
