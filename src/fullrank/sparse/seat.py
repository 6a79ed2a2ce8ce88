"""Between a model and its sparse weights: where the values live, and how gradients reach them.

The values of ``layer.weight`` are the parameter ``layer.weight_sparse``, so clipping, ``zero_grad`` and
decay by name see them; a hook keeps them out of the model's ``state_dict``, which stays the plain one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.coded import is_encoded, is_quantized, layer_with_codes, shape_of
from fullrank.errors import ConfigError, UnsupportedError
from fullrank.ops.sliced import SlicedLinear
from fullrank.ops.sparse import Layout
from fullrank.params import match_parameters
from fullrank.sharding import refuse_flattened, split_of
from fullrank.sparse.weight import SparseWeight

SUFFIX = "_sparse"
ANCHOR = "anchor" + SUFFIX

Receiver = Callable[[SparseWeight, Tensor], None]
"""Takes the gradient of a weight that has just been accumulated."""


class Seat:
    """One sparse weight in its module: its values beside it, its hooks, its sliced forward pass."""

    def __init__(self, sparse: SparseWeight, module: nn.Module, attribute: str, receiver: Receiver) -> None:
        self.sparse = sparse
        self.module = module
        self.attribute = attribute
        self.is_sliced = False
        self.was_trainable = sparse.weight.requires_grad
        sparse.leaf.requires_grad_(True)
        module.register_parameter(attribute + SUFFIX, sparse.values)
        self._handles = [
            *_hide(module, attribute + SUFFIX),
            module.register_load_state_dict_post_hook(self._after_load),
        ]
        self.listen(receiver)

    def listen(self, receiver: Receiver) -> None:
        """Hand every accumulated gradient of the weight to the receiver."""
        leaf = self.sparse.leaf
        trains = leaf.requires_grad
        leaf.requires_grad_(True)  # a frozen tensor takes no hook
        self._listening: Any = leaf.register_post_accumulate_grad_hook(_weakly(receiver, self.sparse))
        leaf.requires_grad_(trains)

    def slice(self) -> None:
        """From now on compute the weight gradient of the chosen rows or blocks alone.

        Raises:
            UnsupportedError: If something else has replaced the module's forward pass, as offloading hooks do.
        """
        if "forward" in vars(self.module):
            raise UnsupportedError(
                f"the forward pass of {self.sparse.name} was replaced already (by a device map or offloading?), so its "
                f"{self.sparse.layout.granularity}s cannot be sliced. Use granularity entry."
            )
        self.sparse.weight.requires_grad_(False)
        self.module.forward = partial(_sliced_forward, self.module, self.sparse)
        self.is_sliced = True

    def unslice(self) -> None:
        """Compute the whole weight gradient again."""
        if self.is_sliced:
            del self.module.forward
            self.sparse.weight.requires_grad_(True)
            self.is_sliced = False

    def leave(self, model: nn.Module, device: torch.device | str | None = None) -> None:
        """Take everything out of the module again, one of the model's; the weight keeps its trained entries."""
        self.unslice()
        for handle in (*self._handles, self._listening):
            handle.remove()
        del self.module._parameters[self.attribute + SUFFIX]
        self.sparse.weight.requires_grad_(self.was_trainable)

    def refuse_replaced(self) -> None:
        """Raise UnsupportedError if the module has another weight by now."""
        if getattr(self.module, self.attribute) is not self.sparse.weight:
            raise UnsupportedError(
                f"{self.sparse.name} was replaced (by tying, resizing or load_state_dict(assign=True)), and SIFT "
                "trains the old one. Do that before SIFT is made, or call detach() and make a new one."
            )

    def refuse_cast(self) -> None:
        """Raise UnsupportedError if a cast has rounded the values that train."""
        if self.sparse.index is not None and self.sparse.values.dtype != self.sparse.values_dtype:
            raise UnsupportedError(
                f"the values of {self.sparse.name} were cast to {self.sparse.values.dtype} after training had begun, "
                "which rounds them. Cast the model before SIFT is made, or call detach() first."
            )

    def _after_load(self, module: nn.Module, incompatible_keys: Any) -> None:
        self.refuse_replaced()
        self.sparse.read_again()


class Anchor:
    """A parameter of one number that never changes, for DDP, which needs one to reduce where it has no other.

    Args:
        module: That holds a sparse weight. The model's own would come first of all, where many look for a device.
        like: What the weight's gradient arrives at.
    """

    def __init__(self, module: nn.Module, like: Tensor) -> None:
        self.module = module
        self.parameter = nn.Parameter(torch.zeros((), dtype=like.dtype, device=like.device))
        module.register_parameter(ANCHOR, self.parameter)
        self._handles = _hide(module, ANCHOR)

    def leave(self) -> None:
        """Take it out of the model again."""
        for handle in self._handles:
            handle.remove()
        del self.module._parameters[ANCHOR]


def _hide(module: nn.Module, attribute: str) -> list[Any]:
    """Keep a parameter out of a module's ``state_dict``."""
    return [
        module.register_state_dict_post_hook(partial(_leave_out, attribute)),
        module.register_load_state_dict_pre_hook(partial(_fill_in, attribute)),
    ]


def _weakly(receiver: Receiver, sparse: SparseWeight) -> Callable[[Tensor], None]:
    """A hook that keeps nothing alive: autograd holds hooks where the garbage collector cannot see a cycle."""
    receive, held = weakref.WeakMethod(receiver), weakref.ref(sparse)

    def hook(leaf: Tensor) -> None:
        alive, part = receive(), held()
        if alive is not None and part is not None:
            alive(part, leaf)

    return hook


def find_module(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and the parameter's name in it.

    Raises:
        ConfigError: If the place for its values is taken, as it is in a model that has a SIFT already.
        UnsupportedError: If it is kept as codes and something else has replaced its layer's forward pass.
    """
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    if hasattr(module, attribute + SUFFIX):
        raise ConfigError(
            f"{name}{SUFFIX} exists already: this model has a SIFT. Go on with that one, or call its detach() first."
        )
    if layer_with_codes(model, name) is not None and "forward" in vars(module):
        raise UnsupportedError(
            f"the forward pass of {name} was replaced already (by a device map or offloading?), and SIFT has to "
            "replace it where a weight is kept as codes. Load the model onto one device."
        )
    return module, attribute


def divide(
    model: nn.Module, targets: Sequence[str], exceptions: Sequence[str]
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """The parameters that train sparsely, those that train densely, and the rest, by name."""
    matched, rest = match_parameters(model, targets)
    dense = match_parameters(model, exceptions)[0] if exceptions else {}
    sparse_ones = {name: parameter for name, parameter in matched.items() if name not in dense}
    if coded := [name for name, parameter in dense.items() if is_quantized(parameter)]:
        raise ConfigError(
            f"{coded[0]} is kept as codes, which cannot train densely ({len(coded)} of the exceptions are). Leave them "
            "out of the exceptions, or their layers out of the codes."
        )
    if not sparse_ones:
        raise ConfigError(
            f"every weight that {list(targets)} match is an exception ({list(exceptions)}). Narrow these."
        )
    return sparse_ones, dense, {name: parameter for name, parameter in rest.items() if name not in dense}


def layout_of(
    model: nn.Module, name: str, weight: nn.Parameter, granularity: str, block_size: int, scope: str = "matrix"
) -> Layout:
    """How a matched weight is divided into units; refuses one that cannot be trained so."""
    refuse_flattened(weight, name=name, user="SIFT")
    _refuse_spread(name, weight, scope)
    coded = layer_with_codes(model, name)
    names = [other for other, parameter in model.named_parameters(remove_duplicate=False) if parameter is weight]
    if coded is not None:
        _refuse_codes(name, coded, names)
    elif not weight.is_floating_point() or not weight.numel():
        raise ConfigError(f"SIFT cannot train {name}: {weight.numel()} entries of {weight.dtype}. Leave it out.")
    shape = tuple(weight.shape) if coded is None else shape_of(coded)
    if scope == "row":
        return Layout(shape, per_row=True)
    if granularity == "entry" or len(shape) < 2:
        return Layout(shape)
    owner = model.get_submodule(name.rpartition(".")[0])
    if (type(owner) is not nn.Linear and coded is None) or len(names) > 1:
        shared = f"shared by {' and '.join(names)}" if len(names) > 1 else f"in a {type(owner).__name__}"
        raise ConfigError(
            f"granularity {granularity} needs weights of nn.Linear that no other module shares; {name} is {shared}. "
            "Leave it out of the targets, or use granularity entry."
        )
    if granularity == "row":
        return Layout(shape, "row")
    if shape[0] % block_size or shape[1] % block_size:
        raise ConfigError(
            f"block_size must divide both sides of {name} ({shape[0]} x {shape[1]}), got {block_size}. Change it, or "
            "use granularity row."
        )
    return Layout(shape, "block", block_size)


def _refuse_codes(name: str, layer: Any, names: Sequence[str]) -> None:
    """Raise ConfigError for a weight of codes that cannot be trained beside."""
    if not is_encoded(layer):
        raise ConfigError(
            f"{name} has no codes yet: bitsandbytes makes them when a layer comes to its device. Move the model there "
            "before SIFT is made."
        )
    if len(names) > 1 or name.count(".") == 0:
        where = f"in several places ({' and '.join(names)})" if len(names) > 1 else "the whole model"
        raise ConfigError(
            f"{name} is kept as codes and {where}; SIFT has to put another layer in its place at the end. Leave it out "
            "of the targets, or keep it plain."
        )


def _refuse_spread(name: str, weight: nn.Parameter, scope: str) -> None:
    """Raise UnsupportedError for a weight that is spread over processes in a way that cannot be trained."""
    split = split_of(weight, name=name)
    if split is not None and scope != "row":
        raise UnsupportedError(
            f"{name} is sharded, and a choice over a whole weight gives every part of it another number of entries, "
            "which no DTensor can hold and no other number of processes could take over. Choose the same number in "
            "each row, by scope row and granularity entry, or train under DistributedDataParallel."
        )
    if split is not None and split.dim:
        raise UnsupportedError(
            f"{name} of shape {tuple(weight.shape)} is cut along dimension {split.dim}, and SIFT chooses within rows. "
            "Leave shard_placement_fn out for it, so that fully_shard cuts it along the first one."
        )


def require_inputs_grad(model: nn.Module) -> Any:
    """Let the first module's outputs require a gradient, so that reentrant checkpointing has a graph to go back on."""
    get_embeddings = getattr(model, "get_input_embeddings", None)
    first = get_embeddings() if get_embeddings is not None else None
    if first is None:
        name = next(name for name, _ in model.named_parameters())
        first = model.get_submodule(name.rpartition(".")[0])
    return first.register_forward_hook(_require_grad)


def _require_grad(module: nn.Module, args: Any, output: Any) -> None:
    if isinstance(output, Tensor) and output.is_floating_point() and not output.requires_grad:
        output.requires_grad_(True)


def _leave_out(attribute: str, module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    state_dict.pop(prefix + attribute, None)


def _fill_in(attribute: str, module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    state_dict[prefix + attribute] = module._parameters[attribute]  # nobody misses it, and it stays what it is


def _sliced_forward(module: Any, sparse: SparseWeight, input: Tensor) -> Any:
    if module.weight is not sparse.weight:  # someone lends the module another one, as functional_call does
        return type(module).forward(module, input)
    function: Any = SlicedLinear  # autograd functions carry no types
    return function.apply(input, sparse.weight, module.bias, sparse.values, sparse.index, sparse.layout)
