"""A model whose linear layers keep their weights as bitsandbytes' codes, and the plain model again (arXiv:2305.14314).

Memory for an m x n weight: int8 m n bytes and 4 m; 4-bit m n / 2 bytes and 4 for each 64 entries (nf4-double: 1 for
each 64 and 4 for each 16384). What is decoded is what the model computes with, so nothing but the rounding to the
code is lost, at once and for good.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from fullrank.adapter import fingerprint
from fullrank.coded import (
    ORIGIN,
    accept_states,
    codes_of,
    layers_with_codes,
    plain_layer,
    read_codes,
    replace_layer,
)
from fullrank.errors import ConfigError, UnsupportedError
from fullrank.sharding import own_bytes

Kind = Literal["int8", "nf4", "nf4-double"]
PEFT_MARKS = {"int8": "is_loaded_in_8bit", "nf4": "is_loaded_in_4bit", "nf4-double": "is_loaded_in_4bit"}
"""Attribute of a model by which PEFT knows to put its own kind of layer on codes."""

MODEL_MARKS = ("hf_quantizer", "quantization_method", *sorted(set(PEFT_MARKS.values())))
CONFIG_MARKS = ("quantization_config", "_is_quantized")
"""What transformers and PEFT know a model of codes by: attributes of the model, and of its configuration."""

BLOCK = 64
"""Entries that share a scale in 4-bit weights."""


@dataclass(frozen=True)
class Quantization:
    """How the linear layers of a base are kept."""

    kind: Kind
    device: torch.device
    """Where the codes are to be."""

    def apply_(self, model: nn.Module, *, keep: Collection[str] = ()) -> list[str]:
        """Replace linear layers by ones with codes, on the device, and mark the model for PEFT until ``unmark_``.

        A state dict holds the codes with what decodes them, and loading one brings both back.

        Args:
            model: Its other parameters stay where they are and as they are.
            keep: Names of layers that stay plain: those that train.

        Returns:
            The names of the replaced layers.

        Raises:
            ConfigError: If the model has no other linear layer.
            UnsupportedError: If bitsandbytes is not installed, or would compute with other weights.
        """
        names = list(plain_linears(model, keep))
        if not names:
            raise ConfigError(
                f"model.quantization {self.kind} takes linear layers, and {type(model).__name__} has none but what "
                "trains. Set it to null."
            )
        for name in names:
            self._refuse_width(name, model.get_submodule(name))
        for name in names:
            replace_layer(model, name, self._coded(model.get_submodule(name)))
        setattr(model, PEFT_MARKS[self.kind], True)
        return names

    def _refuse_width(self, name: str, layer: Any) -> None:
        """Refuse what bitsandbytes 0.50 decodes wrongly in a forward pass on a CPU, without a word."""
        width = layer.in_features
        if self.kind != "int8" and self.device.type == "cpu" and width % BLOCK and width % 2 == 0:
            raise UnsupportedError(
                f"on a CPU bitsandbytes decodes 4-bit weights wrongly where a layer's inputs are no multiple of {BLOCK}"
                f", and {name} has {width}. Set model.quantization int8 or null, or train on a GPU."
            )

    def unmark_(self, model: nn.Module) -> None:
        """Take back PEFT's mark: a Trainer that sees it would not move the rest of the model."""
        vars(model).pop(PEFT_MARKS[self.kind], None)  # dequantize_ has done so too

    def _coded(self, plain: Any) -> nn.Module:
        """A layer with the codes of another one's weight."""
        try:
            import bitsandbytes
        except ImportError as error:
            raise UnsupportedError(
                f"model.quantization {self.kind} is done by bitsandbytes, which is not installed. Install it: pip "
                "install 'fullrank[quant]'."
            ) from error
        coded: Any = bitsandbytes.nn
        sizes = (plain.in_features, plain.out_features)
        if self.kind == "int8":
            layer: Any = coded.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False, device="meta")
            layer.weight = coded.Int8Params(plain.weight.detach().cpu(), requires_grad=False)
        else:
            options: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": self.kind == "nf4-double"}
            layer = coded.Linear4bit(*sizes, bias=False, compute_dtype=plain.weight.dtype, device="meta", **options)
            layer.weight = coded.Params4bit(plain.weight.detach(), requires_grad=False, module=layer, **options)
            # It would lay the codes out anew for inference, and compute a little otherwise there than in training.
            layer.support_avx512bf16_for_cpu = False
        layer.to(self.device)
        layer.bias = plain.bias
        setattr(layer, ORIGIN, fingerprint({"weight": plain.weight.detach()}).get("weight"))
        accept_states(layer)
        layer.train(plain.training)
        return layer  # type: ignore[no-any-return]


def dequantize_(model: nn.Module, dtype: torch.dtype) -> None:
    """Turn every layer with codes into a plain linear one on the host, with what its codes stand for.

    Nothing says of the model then that it is quantized, which transformers would write into its ``config.json``.
    """
    for name, layer in layers_with_codes(model).items():
        replace_layer(model, name.removesuffix(".weight"), plain_layer(layer, read_codes(layer), dtype))
    for module in model.modules():
        _unmark(module)


def _unmark(module: nn.Module) -> None:
    config = getattr(module, "config", None)
    about = getattr(config, "quantization_config", None)
    method = about.get("quant_method") if isinstance(about, dict) else getattr(about, "quant_method", "bitsandbytes")
    if method == "bitsandbytes":  # of others there may be layers left, which are not ours to judge
        for holder, marks in ((module, MODEL_MARKS), (config, CONFIG_MARKS)):
            for mark in marks:
                getattr(holder, "__dict__", {}).pop(mark, None)


def plain_linears(model: nn.Module, keep: Collection[str] = ()) -> dict[str, nn.Linear]:
    """Name -> layer of what codes take the place of: plain linear layers, but for those that stay so."""
    return {name: layer for name, layer in model.named_modules() if type(layer) is nn.Linear and name not in keep}


def statistic_bytes(model: nn.Module) -> int:
    """Bytes of what decodes a model's codes: no parameters, but as long as these held."""
    layers = layers_with_codes(model).values()
    return sum(own_bytes(t) for layer in layers for name, t in codes_of(layer).items() if name != "weight")
