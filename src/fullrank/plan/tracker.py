"""Steps without memory: tensors that have a shape, a type and a device but no content, and a count of their bytes.

``stand_in`` is torch's own FakeTensorMode with a mode of ours on top, which sees every operation: an untyped storage
counts from the operation that makes it to its end, in the category that it was given. torch's own
``torch.distributed._tools.mem_tracker.MemTracker`` counts the same; it takes 22 s for a pass of a 7B model
where this one takes 1.5 s, and it cannot follow a second step.

What decides by content is settled here: a number that is asked for is 1, what is asked of all entries holds (they are
finite), and of any entry it does not. Of marks set at some places as many hold as there were places; a part of them
has its share, and what is taken by marks is so long.
Numbers that no fake tensor had a part in, such as counters of steps, are real.

The private parts of torch and transformers are imported here and nowhere else. Where one is missing an
``UntraceableError`` is raised, and whoever asked falls back to formulas.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fullrank.errors import ConfigError, UnsupportedError, first_line
from fullrank.ops import blockwise
from fullrank.sharding import alone

try:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
    from torch.utils._python_dispatch import TorchDispatchMode
except ImportError:  # private, so another version of torch may lack them
    FakeTensorMode = None  # type: ignore[assignment, misc]
    TorchDispatchMode = object  # type: ignore[assignment, misc]

FAKE_TENSORS = "torch._subclasses.fake_tensor"
"""Name of the logger of tensors without content."""
CATEGORIES = WEIGHTS, GRADIENTS, STATES, OTHER, HOST = tuple(range(5))
"""Of bytes: OTHER are activations and temporaries; HOST is what a run keeps in the memory of the host."""
PLACE = torch.device("cpu")
"""Where all tensors are, as far as they know."""
FLASH = 1
"""torch's number of the attention kernel that keeps its output and a number for each row."""
HOLDS = "_fullrank_holds"
"""Attribute of a condition without content: whether it is taken to hold."""
MARKED = "_fullrank_marked"
"""Attribute of marks without content (boolean): how many are set."""
SETTLED: Mapping[str, Callable[[bool], bool]] = {
    "all": lambda _: True,
    "any": lambda _: False,
    "bitwise_not": lambda holds: not holds,
    "logical_not": lambda holds: not holds,
}
"""Operation -> what it says, given what its argument says: all gradients are finite, none is anything else."""
MAKERS = ("zeros", "ones", "full", "empty")

Region = tuple[str, ...]
"""A stretch of a step: pass, direction, and place in the model."""


class UntraceableError(Exception):
    """A step cannot be traced with this version of torch, or for this model."""


class Tracker(TorchDispatchMode):
    """Counts the bytes of all storages that live, by category, and keeps what there was at every moment.

    A moment is right after something was allocated: between two of them the sum only falls.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = [0] * len(CATEGORIES)
        """Bytes that live, by category."""
        self.moments: dict[Region, list[tuple[int, ...]]] = {}
        """Region -> the bytes at each of its moments, in their order."""
        self.region: Region | None = None
        """Where the step is."""
        self.is_accumulating = False
        """Whether the pass under way is one before the last of a step."""
        self._known: dict[int, tuple[int, int]] = {}
        self._ends: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Make an operation, and count what it has allocated."""
        name = func.overloadpacket.__name__
        if name == "device":  # a property, which is asked for at every turn
            return PLACE
        kwargs = kwargs or {}
        given = list(_tensors(args)) + (list(_tensors(kwargs.values())) if kwargs else [])
        fake = [tensor for tensor in given if type(tensor) is FakeTensor]
        if name == "_local_scalar_dense" and fake:
            asked = fake[0]
            return getattr(asked, HOLDS, True) if asked.dtype == torch.bool else 1.0 if asked.is_floating_point() else 1
        if name == "_fused_sdp_choice":
            return FLASH
        if (given and not fake) or (not given and name in MAKERS and list(args[0]) == []):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if len(fake) < len(given):
            args, kwargs = tree_map(_without_content, (args, dict(kwargs)))
        if name == "index":
            args = (args[0], [self._places(index) for index in args[1]])
        made = func(*args, **kwargs)
        if given and given[0].dtype == torch.bool:
            _know_marked(name, args, made)
        if name in SETTLED and fake:
            setattr(made, HOLDS, SETTLED[name](getattr(fake[0], HOLDS, True)))
        self.see(tensor for tensor in _tensors((made,)) if type(tensor) is FakeTensor)
        return made

    def _places(self, index: Any) -> Any:
        """Where marks are set, which kernels find out before they take what is there; any other index as it is."""
        if not isinstance(index, Tensor) or not hasattr(index, MARKED):
            return index
        places = torch.empty(getattr(index, MARKED), dtype=torch.int64)
        self.see([places])
        return places

    def see(self, tensors: Iterable[Tensor], category: int | None = None) -> None:
        """Count tensors that are new; with a category, put them there, also those that are known."""
        grown = False
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            known = self._known.get(key)
            if known is None:
                size = storage.nbytes()
                self._ends[key] = weakref.ref(storage, partial(self._free, key))
                grown = True
            elif category is None or known[0] == category:
                continue
            else:
                size = known[1]
                self.now[known[0]] -= size
            place = OTHER if category is None else category
            self._known[key] = (place, size)
            self.now[place] += size
        if grown and self.region is not None:
            self.moments[self.region].append(tuple(self.now))

    def enter(self, *region: str) -> None:
        """What is allocated from here on belongs to this region; without a name, to none."""
        self.region = region or None
        if region:
            here = self.moments.setdefault(region, [])
            here.append(tuple(self.now))

    def _free(self, key: int, _: Any) -> None:
        category, size = self._known.pop(key)
        self._ends.pop(key, None)
        self.now[category] -= size


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among values and in the lists among them: no operation takes anything deeper."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _know_marked(name: str, args: Any, made: Any) -> None:
    """Keep how many marks are set: at how many places they were, and of the parts of a vector the share."""
    if name == "index_put_":
        setattr(made, MARKED, math.prod(torch.broadcast_shapes(*(index.shape for index in args[1]))))
    elif name == "split_with_sizes" and hasattr(args[0], MARKED):
        num, ends = getattr(args[0], MARKED), [0, *accumulate(args[1])]
        shares = [num * end // max(ends[-1], 1) for end in ends]
        for part, (before, until) in zip(made, pairwise(shares), strict=True):
            setattr(part, MARKED, until - before)


def _without_content(value: Any) -> Any:
    """A real number among tensors without content becomes one of them."""
    if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
        return value
    return torch.empty(value.shape, dtype=value.dtype)


@contextmanager
def stand_in() -> Iterator[Tracker]:
    """Within this block tensors have no content, and the tracker counts them.

    Raises:
        UntraceableError: If torch lacks what this needs, or an operation has no shape without content.
    """
    if FakeTensorMode is None:
        raise UntraceableError(f"torch {torch.__version__} has no FakeTensorMode")
    tracker = Tracker()
    with alone(), _seen_as_real(), _codes_by_shape(), FakeTensorMode(allow_fallback_kernels=False), tracker:
        try:
            yield tracker
        except (ConfigError, UnsupportedError):
            raise
        except (RuntimeError, NotImplementedError, TypeError, AttributeError, AssertionError) as error:
            raise UntraceableError(f"{type(error).__name__}: {first_line(error)}") from error


class _Shapes:
    """bitsandbytes' operators on tensors without content: what they return, and nothing else."""

    quantize_blockwise = SimpleNamespace(
        default=lambda values, _, block: (
            torch.empty_like(values, dtype=torch.uint8),
            torch.empty(-(-values.numel() // block)),
        )
    )
    dequantize_blockwise = SimpleNamespace(
        default=lambda codes, scales, table, block, dtype: torch.empty_like(codes, dtype=dtype)
    )


@contextmanager
def _codes_by_shape() -> Iterator[None]:
    """Let 8-bit moments be planned where bitsandbytes is not installed: bytes follow from shapes."""
    library: Any = blockwise
    names = {"_kernels": _Shapes, "_table": lambda *_, **__: None, "library_problems": list}
    kept = {name: getattr(library, name) for name in names}
    for name, stand_in_of_it in names.items():
        setattr(library, name, stand_in_of_it)
    try:
        yield
    finally:
        for name, own in kept.items():
            setattr(library, name, own)


@contextmanager
def _seen_as_real() -> Iterator[None]:
    """Let transformers leave out a mask that masks nothing, as it does for real tensors: it asks whether it is traced.

    Raises:
        UntraceableError: If transformers asks in another way by now.
    """
    from transformers import masking_utils

    masks: Any = masking_utils
    asked = getattr(masks, "is_tracing", None)
    if asked is None:
        raise UntraceableError("this version of transformers decides on attention masks in another way")
    masks.is_tracing = lambda *_: False
    try:
        yield
    finally:
        masks.is_tracing = asked
