"""A weight that is kept as bitsandbytes' codes and never changes: its trained entries stand beside the codes.

The weight is what the codes stand for, with the values in the places of the chosen entries. It is put together for
each product and gone after it (``ops.coded_linear``), and so is the dense gradient when it has been gathered. So the
values are the only place of what was learned, and a state dict of the model holds them with their places.

Memory for K chosen entries: that of a plain weight's, and for M x N as long as a product lasts.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from fullrank.adapter import fingerprint
from fullrank.coded import (
    ORIGIN,
    dtype_beside,
    layer_with_codes,
    layers_with_codes,
    plain_layer,
    read_codes,
    replace_layer,
)
from fullrank.errors import CheckpointError
from fullrank.ops import sparse
from fullrank.ops.coded_linear import CodedLinear
from fullrank.ops.codes import ENTRY_LAYOUT, ENTRY_PARTS, has_all_entries, pack_entries, unpack_entries
from fullrank.ops.sparse import Layout
from fullrank.sparse.seat import Receiver, Seat
from fullrank.sparse.weight import SparseWeight, is_values


class CodedWeight(SparseWeight):
    """The weight of a layer with codes, the units of it that train, and their values.

    Args:
        name: Of the weight.
        layer: Of bitsandbytes.
        layout: How the decoded weight is divided into units.
        num_units: How many units train; of each row, where all rows have the same number.
        dtype: What the weight is decoded to where it is no product that says so: the type of the model.
        keep_base: Keep what the entries were before they trained.
    """

    def __init__(
        self, name: str, layer: Any, layout: Layout, num_units: int, *, dtype: torch.dtype, keep_base: bool = True
    ) -> None:
        self.layer = layer
        self._dtype = dtype
        self._gate = torch.zeros((), dtype=dtype, device=layer.weight.device).expand(layout.shape).requires_grad_()
        super().__init__(name, layer.weight, layout, num_units, keep_base=keep_base)
        self.own_layout = layout  # not of the shape that codes have

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the decoded weight."""
        return self._dtype

    @property
    def leaf(self) -> Tensor:
        """A tensor of the weight's shape and type without content, on its device, at which its gradient arrives."""
        if self._gate.device != self.weight.device:
            self._gate.data = torch.zeros((), dtype=self._dtype, device=self.weight.device).expand(self.layout.shape)
        return self._gate

    def here(self) -> Tensor:
        """What the codes stand for, in a new tensor; without the values."""
        return read_codes(self.layer, self._dtype)

    @torch.no_grad()
    def whole_weight(self) -> Tensor:
        """What the layer computes with, in the type of the model: the values are in it."""
        weight = self.here()
        if self.index is not None:
            sparse.put_(weight, self._units(), self.values.detach().view(-1), self.layout)
        return weight

    def linear(self, x: Tensor, bias: Tensor | None, *, is_sliced: bool) -> Tensor:
        """The product of the layer."""
        chosen = self.index is not None
        values = self.values if is_sliced else self.values.detach()
        function: Any = CodedLinear  # autograd functions carry no types
        product: Tensor = function.apply(
            x,
            None if is_sliced else self.leaf,
            bias,
            values if chosen else None,
            self.index_here() if chosen else None,
            partial(read_codes, self.layer),
            self.layout,
        )
        return product

    def catch_up(self) -> None:
        """Nothing: the next product takes the values as they are."""

    def write_back(self) -> None:
        """Nothing, for the same reason; products of before a step refuse their backward pass after it."""
        increment_version(self.values)  # fused kernels do not

    def read_again(self) -> None:
        """Nothing: codes that were loaded say nothing of the values; ``take_over`` is told those."""

    def stored(self) -> dict[str, Tensor]:
        """Places and values of the trained entries, for a state dict of the model."""
        return pack_entries(self.index, self.values.detach(), self.layout)

    @torch.no_grad()
    def take_over(self, tensors: dict[str, Tensor]) -> None:
        """Go on with what ``stored`` gave: its values, and its choice, if there is none yet.

        Raises:
            CheckpointError: If other entries train already.
        """
        kept, values, layout = unpack_entries(tensors)
        if layout != self.layout:
            raise CheckpointError(
                f"this state has entries of {self.name} by {_words(layout)}, this SIFT has them by "
                f"{_words(self.layout)}. Make it with the settings that the state was saved with."
            )
        if kept is None or values is None:  # saved before the choice
            if self.index is not None:
                self.values.data.view(-1).copy_(sparse.take(self.here(), self._units(), self.layout))
            return
        if self.index is None:
            self.choose(kept)
        elif not torch.equal(self.index_here(), kept.to(self.index)):
            raise CheckpointError(
                f"this state was trained at other entries of {self.name} than those that train here, and codes cannot "
                "hold them. Load it where nothing has been chosen yet: into a new SIFT, before the first backward pass."
            )
        self.values.data.view(-1).copy_(values.view(-1))


class CodedSeat(Seat):
    """One such weight in its layer, whose forward pass is ours from now on."""

    sparse: CodedWeight

    def __init__(self, sparse: CodedWeight, module: nn.Module, attribute: str, receiver: Receiver) -> None:
        super().__init__(sparse, module, attribute, receiver)
        self.unslice()
        self._handles += [
            module.register_state_dict_post_hook(partial(_add_entries, sparse)),
            module.register_load_state_dict_pre_hook(self._take_entries),
        ]
        self._waiting: dict[str, Tensor] = {}
        """Parts of a state that came without the others, as from one of several files."""

    def slice(self) -> None:
        """From now on compute the weight gradient of the chosen rows or blocks alone."""
        self._compute(is_sliced=True)

    def unslice(self) -> None:
        """Compute the whole weight gradient again."""
        self._compute(is_sliced=False)

    def _compute(self, *, is_sliced: bool) -> None:
        forward: Any = partial(_forward, self.module, self.sparse, is_sliced)
        self.module.forward = forward
        self.is_sliced = is_sliced

    def leave(self, model: nn.Module, device: torch.device | str | None = None) -> None:
        """Put a plain linear layer in the place of this one, with what it computed with, in the type of the model."""
        weights = (parameter for parameter in model.parameters() if not is_values(parameter))
        dtype = dtype_beside(weights, self.sparse.dtype)  # the model may have been cast
        super().leave(model)
        del self.module.forward
        plain = plain_layer(self.module, self.sparse.whole_weight(), dtype, device=device)
        replace_layer(model, self.sparse.name.rpartition(".")[0], plain)

    def _take_entries(
        self,
        module: nn.Module,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        *rest: Any,
    ) -> None:
        """Take entries out of a state dict; of several files, once all are there."""
        found = {name: state_dict.pop(prefix + name) for name in ENTRY_PARTS if prefix + name in state_dict}
        if not found and self.sparse.index is not None and f"{prefix}weight" in state_dict:
            missing_keys.append(prefix + ENTRY_LAYOUT)  # codes of another place, under the values of this one
        self._waiting |= found
        if ENTRY_LAYOUT in found and not found[ENTRY_LAYOUT][0]:
            self._waiting = found  # nothing was chosen: whatever waits is of another state
        if has_all_entries(self._waiting):
            entries, self._waiting = self._waiting, {}
            self.sparse.take_over(entries)


def weight_of(
    model: nn.Module, name: str, weight: nn.Parameter, layout: Layout, num_units: int, *, keep_base: bool
) -> SparseWeight:
    """A sparse weight of the kind that the layer asks for."""
    layer = layer_with_codes(model, name)
    if layer is None:
        return SparseWeight(name, weight, layout, num_units, keep_base=keep_base)
    return CodedWeight(name, layer, layout, num_units, dtype=dtype_beside(model.parameters()), keep_base=keep_base)


def seat_of(part: SparseWeight, module: nn.Module, attribute: str, receiver: Receiver) -> Seat:
    """The seat of a sparse weight of either kind."""
    return (CodedSeat if isinstance(part, CodedWeight) else Seat)(part, module, attribute, receiver)  # type: ignore[arg-type]


def marks_of(model: nn.Module) -> dict[str, int]:
    """A number for each weight that is kept as codes, which tells these, with what decodes them, from others."""
    layers = layers_with_codes(model)
    return {name: int(fingerprint({"": read_codes(layer)})[""][:15], 16) for name, layer in layers.items()}


def is_coded(part: SparseWeight) -> bool:
    """Whether a sparse weight is kept as codes."""
    return isinstance(part, CodedWeight)


def origins(model: nn.Module) -> dict[str, str]:
    """Fingerprints of what is kept as codes: of the weights as they were before; where that is not known, decoded."""
    found: dict[str, str] = {}
    for name, layer in layers_with_codes(model).items():
        known = getattr(layer, ORIGIN, None)
        found |= {name: known} if known else fingerprint({name: read_codes(layer)})
    return found


def _add_entries(
    sparse: CodedWeight, module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any
) -> None:
    state_dict.update({prefix + name: tensor for name, tensor in sparse.stored().items()})


def _words(layout: Layout) -> str:
    of_block = f" of {layout.block_size}" if layout.granularity == "block" else ""
    return f"{layout.granularity}{of_block}{' in each row' if layout.per_row else ''} of {layout.shape}"


def _forward(module: Any, sparse: CodedWeight, is_sliced: bool, input: Tensor) -> Tensor:
    return sparse.linear(input, module.bias, is_sliced=is_sliced)
