"""SIFT: train x% of the entries of a model's weights, those with the largest first gradients (arXiv:2312.11875).

The gradient of a pre-trained model is quasi-sparse: a few entries of each matrix hold most of its norm. So
choose the top x% by |gradient| of the first batch, and keep gradients and optimizer states for those alone.

Memory for K chosen entries: gradient 4 K, values 4 K, two moments 8 K, index 4 K bytes; full AdamW in
bfloat16 has 6 bytes for every entry. Saved, 6 K bytes.

Departures from the paper: none by default. From the authors' code: the first batch's gradient is used,
not thrown away; the update is in the weight before the next forward pass, the last one too; the trained
values are the weight's entries, so weight decay acts on them; values and moments are float32 under
bfloat16 weights; exceptions win over sparse modules; the state says which entries it belongs to, so a run
resumes; each gradient costs its own work, not a scan over all parameters.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fullrank.adamw import AdamWConfig, config_problems, make_adamw, state_bytes_of
from fullrank.adapter import Change, save_adapter
from fullrank.coded import accept_states, num_entries
from fullrank.errors import ConfigError
from fullrank.methods.base import Built, Method
from fullrank.ops import sparse
from fullrank.ops.seeded import seeded
from fullrank.sharding import process_number, whole
from fullrank.sparse.coded import is_coded, weight_of
from fullrank.sparse.given import parse_units
from fullrank.sparse.planned import planned_values
from fullrank.sparse.seat import SUFFIX, divide, layout_of
from fullrank.sparse.settings import num_chosen, refuse_for_codes, refuse_for_spread, setting_problems
from fullrank.sparse.training import SparseTraining
from fullrank.sparse.weight import SparseWeight

logger = logging.getLogger(__name__)

Chooser = Callable[[str, Tensor, Tensor, int], Any]
"""Name, weight, gradient and number of units -> the chosen units."""


class SIFT(SparseTraining):
    """Trains chosen entries of a model's weights, through any torch optimizer.

    ``sparse_mapping[name]`` is the parameter that an optimizer steps in place of the weight ``name``: its K
    chosen entries, in float32. Gradients are gathered into it during the backward pass; after each step of
    the optimizer its entries are written into the weight. Its ``idx`` holds the chosen places (flat,
    sorted); assigning them before the first backward pass (flat, or stacked per dimension) chooses by hand.

    In several processes it is made on the plain model, which DistributedDataParallel wraps afterwards, or on the model
    that ``fully_shard`` has sharded.

    Args:
        model: The model, with the weights that training starts from. What no pattern matches is frozen.
        sparse_rate: Share of the units of each matched weight that trains, above 0, at most 1.
        sparse_module: Substrings of the names of the parameters to train sparsely.
        exception: Substrings of the names of the parameters to train densely; they win over sparse_module.
        grad_acc: Accepted so that the authors' calls run: the number of accumulated batches does not matter here.
        gradient_checkpointing: Let the embeddings' output require a gradient, which reentrant checkpointing needs
            where the embeddings are frozen.
        selection: What is chosen: the largest by ``gradient`` (the paper) or ``magnitude``, at ``random``, or
            what a function returns for (name, weight, gradient, number of units).
        selection_batches: Backward passes whose summed gradient decides; it is held, dense, for so long.
        scope: Choose in each ``matrix`` (the paper), as many in each ``row``, or where the whole ``model`` has its
            largest scores; then all dense gradients of the deciding batches are held at once. A sharded model needs
            ``row``, in which every entry of a vector is a row and trains.
        granularity: Unit of choice: ``entry`` (the paper), or ``row`` or ``block`` of linear layers, for which
            the backward pass computes only the chosen part of the weight gradient. Biases go by entry.
        block_size: Side of a block (entries); divides both sides of each matched matrix.
        reselect_every: Choose again every so many optimizer steps; what stays keeps its moments. None: never.
        seed: Seed of a random choice.
        keep_base: Keep what every entry was before it trained (in host memory), which ``save_adapter`` needs.

    Raises:
        ConfigError: A pattern without a match, a value out of bounds, a weight that cannot be trained so.
        UnsupportedError: For weights that are sharded in a way, or with settings, that cannot be trained.
    """

    def __init__(
        self,
        model: nn.Module,
        sparse_rate: float,
        sparse_module: Sequence[str],
        exception: Sequence[str] = (),
        grad_acc: int = 1,
        gradient_checkpointing: bool = False,
        *,
        selection: str | Chooser = "gradient",
        selection_batches: int = 1,
        scope: str = "matrix",
        granularity: str = "entry",
        block_size: int = 32,
        reselect_every: int | None = None,
        seed: int = 0,
        keep_base: bool = True,
    ) -> None:
        self.chooser = selection if callable(selection) else None
        settings = {
            "density": sparse_rate,
            "selection": "function" if callable(selection) else selection,
            "selection_batches": selection_batches,
            "scope": scope,
            "granularity": granularity,
            "block_size": block_size,
            "reselect_every": reselect_every,
            "seed": seed,
            "keep_base": keep_base,
        }
        if problems := setting_problems(settings):
            raise ConfigError(" ".join(problems))
        targets, dense, frozen = divide(model, sparse_module, exception)
        layouts = {name: layout_of(model, name, w, granularity, block_size, scope) for name, w in targets.items()}
        weights = [
            weight_of(model, name, w, layouts[name], num_chosen(sparse_rate, layouts[name]), keep_base=keep_base)
            for name, w in targets.items()
        ]
        if any(part.split is not None for part in weights):
            refuse_for_spread(settings)
        if any(is_coded(part) for part in weights):
            refuse_for_codes(settings)
            accept_states(model)
        super().__init__(
            model,
            weights,
            dense,
            frozen,
            settings=settings,
            reselect_every=reselect_every,
            inputs_grad=gradient_checkpointing,
        )
        self.sparse_mapping: dict[str, Any] = {part.name: part.values for part in weights}
        self.total_num = sum(num_entries(parameter) for _, parameter in self.model_parameters())
        logger.info("%s", self.describe())

    # What trains.

    def named_trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and parameter of every weight of the model that training changes, sparsely or densely."""
        yield from ((part.name, part.weight) for part in self.weights)
        yield from self.dense.items()

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The weights of the model that training changes."""
        return (parameter for _, parameter in self.named_trainable_parameters())

    def named_parameters_in_optimizer(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What to give to an optimizer: the values, named after their weight + ``_sparse``, and the exceptions."""
        yield from ((part.name + SUFFIX, part.values) for part in self.weights)
        yield from self.dense.items()

    def parameters_in_optimizer(self) -> Iterator[nn.Parameter]:
        """What to give to an optimizer, without names."""
        return (parameter for _, parameter in self.named_parameters_in_optimizer())

    def get_trainable_num(self) -> int:
        """Numbers that train: chosen entries and exceptions."""
        return sum(parameter.numel() for parameter in self.parameters_in_optimizer())

    def print_trainable_parameters(self) -> None:
        """Print how many numbers train, of how many."""
        trained, total = self.get_trainable_num(), self.total_num
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")  # noqa: T201

    def set_trainer(self, trainer: Any) -> None:
        """Accepted so that the authors' scripts run: nothing here depends on a trainer."""

    def describe(self) -> str:
        """One line: what trains sparsely, densely, and not at all."""
        sparsely = sum(part.values.numel() for part in self.weights)
        of = sum(part.layout.rows * part.layout.columns for part in self.weights)
        return (
            f"SIFT: {sparsely:,} of {of:,} entries ({sparsely / of:.2%}) of {len(self.weights)} weights train (first "
            f"{self.weights[0].name}), chosen by {self.settings['selection']}; {len(self.dense)} train densely, "
            f"{len(self.frozen)} are frozen"
        )

    def choose_open(self) -> None:
        """Choose for every weight that has seen enough: the units with the highest scores."""
        open_parts = self._open_parts()
        ready = [part for part in open_parts if part.num_pending >= self.settings["selection_batches"]]
        if not ready or (self.settings["scope"] == "model" and len(ready) < len(open_parts)):
            return
        if self.chooser is not None:
            chosen = {part: self._ask(part) for part in ready}
        elif self.settings["scope"] == "matrix":
            chosen = {part: sparse.top_units(self._scores(part), part.num_units) for part in ready}
        elif self.settings["scope"] == "row":
            chosen = {part: sparse.top_of_rows(self._scores(part), part.num_units, part.own_layout) for part in ready}
        else:
            numbers = sparse.top_of_all([self._scores(part) for part in ready], sum(part.num_units for part in ready))
            chosen = dict(zip(ready, numbers, strict=True))
        self.settle(chosen)

    def _open_parts(self) -> list[SparseWeight]:
        """The weights whose choice is open; not those chosen by hand that wait for their first gradient."""
        return [part for part in self.weights if part.choosing and part.values.idx is part.index]

    def _ask(self, part: SparseWeight) -> Tensor:
        """What the caller's function chooses."""
        assert self.chooser is not None
        assert part.pending is not None
        chosen = self.chooser(part.name, part.here(), part.pending, part.num_units)
        return parse_units(chosen, part.own_layout, name=part.name)

    def refuse_stuck(self) -> None:
        """Raise ConfigError if the choice waits for weights that took no part in the batches that decide."""
        open_parts = self._open_parts()
        late = [part.name for part in open_parts if part.pending is None]
        decided = any(part.num_pending >= self.settings["selection_batches"] for part in open_parts)
        if self.settings["scope"] == "model" and late and decided:
            raise ConfigError(
                f"scope model compares the gradients of all targets, and {len(late)} had none, first {late[0]}. "
                "Leave them out of the targets, or use scope matrix."
            )

    @torch.no_grad()
    def _scores(self, part: SparseWeight) -> Tensor:
        """The score of every unit of what this process holds of a weight (flat)."""
        if self.settings["selection"] == "random":
            generator = seeded(self.settings["seed"], self.weights.index(part), part.steps)
            scores = torch.rand(part.layout.num_units, generator=generator)
            if part.split is not None:
                scores = part.own_rows(scores.view(part.layout.rows, -1)).reshape(-1)
            return scores.to(part.weight.device)
        by = part.here() if self.settings["selection"] == "magnitude" else part.pending
        assert by is not None
        return sparse.unit_scores(by.abs(), part.own_layout)

    def save_adapter(self, folder: str | Path, *, dtype: str = "bfloat16") -> int:
        """Write what training changed as a small file (4 + 2 bytes an entry in bfloat16); returns its bytes.

        The first of several processes writes it, the others return 0. All must call it where weights are sharded.

        Raises:
            ConfigError: If nothing has trained yet, ``keep_base`` is off, or dtype is neither bfloat16 nor float32.
        """
        if not self.settings["keep_base"]:
            raise ConfigError("an adapter needs what the entries were before training. Make SIFT with keep_base=True.")
        if not self.base:
            raise ConfigError("there is nothing to save: no gradient has been seen yet. Train first.")
        writes = process_number() == 0
        changes: dict[str, Change] = {}
        for part in self.weights:
            if part.index is not None:
                change = Change(*part.delta(), part.layout)
                changes |= {part.name: change} if writes else {}
        dense = {name: whole(weight.detach()) for name, weight in self.dense.items()}
        if not writes:
            return 0
        return save_adapter(
            folder, changes, dense, base=self.base, settings=self.settings, model=self.model, dtype=dtype
        )


@dataclass(frozen=True, kw_only=True)
class SiftConfig(AdamWConfig):
    """Options of SIFT with AdamW."""

    lr: float = 2e-4
    """Peak learning rate."""
    density: float = 0.01
    """Share of the units of each target weight that trains (the paper's sparse rate)."""
    target_modules: list[str] = field(default_factory=lambda: ["attn", "mlp"])
    """Substrings of the names of the weights to train sparsely; all others are frozen."""
    exception: list[str] = field(default_factory=list)
    """Substrings of the names of the weights to train densely, such as a classifier; they win over target_modules."""
    selection: Literal["gradient", "magnitude", "random"] = "gradient"
    """What is chosen: the largest by |gradient| (the paper's) or by |weight|, or at random."""
    selection_batches: int = 1
    """Backward passes whose summed gradient decides (micro-batches)."""
    scope: Literal["matrix", "model", "row"] = "matrix"
    """Choose in each matrix (the paper's), where the whole model has its largest scores, or as many in each row."""
    granularity: Literal["entry", "row", "block"] = "entry"
    """Unit of choice: single entries (the paper's), or rows or blocks, whose backward pass is cheaper."""
    block_size: int = 32
    """Side of a block (entries); divides both sides of each target."""
    reselect_every: int | None = None
    """Optimizer steps after which the choice is made anew; null: never (the paper's)."""
    seed: int = 0
    """Seed of a random choice."""
    keep_base: bool = True
    """Keep what every entry was before it trained (in host memory), which the run's adapter is made from."""


def build(model: nn.Module, config: SiftConfig) -> Built:
    """SIFT on the model and AdamW, torch's fused one by default, on what it trains."""
    problems = config_problems(config, model.parameters())
    if problems := problems + setting_problems(dataclasses.asdict(config)):
        raise ConfigError(" ".join(problems))
    sift = SIFT(
        model,
        config.density,
        config.target_modules,
        config.exception,
        selection=config.selection,
        selection_batches=config.selection_batches,
        scope=config.scope,
        granularity=config.granularity,
        block_size=config.block_size,
        reselect_every=config.reselect_every,
        seed=config.seed,
        keep_base=config.keep_base,
        gradient_checkpointing=True,
    )
    groups: list[dict[str, Any]] = [{"params": list(sift.parameters_in_optimizer())}]
    if config.state_dtype is not None:  # chosen entries are a vector, of which no process has a part: of flat blocks
        groups = [{"params": list(sift.sparse_mapping.values()), "blocks": _blocks(config)}]
        groups += [{"params": list(sift.dense.values())}] if sift.dense else []
    optimizer = make_adamw(groups, config, seed=config.seed)
    return Built(optimizer, save_adapter=sift.save_adapter if config.keep_base else None, detach=sift.detach)


def state_bytes(model: nn.Module, config: SiftConfig) -> int:
    """Two moments, values, index and record of the chosen entries; AdamW's two moments of the exceptions.

    With ``reselect_every`` and ``keep_base`` the record grows in host memory by every entry that trains for a time.
    """
    planned, dense = planned_values(model, config)
    total = sum(state_bytes_of(p.shape, p.dtype, config) for p in dense)
    for values in planned:
        total += state_bytes_of(values.shape, values.dtype, config, blocks=_blocks(config))
        total += values.numel * (values.dtype.itemsize + (values.kept.itemsize if config.keep_base else 0))
        total += values.numel // values.layout.unit_numel * values.layout.index_dtype.itemsize
    return total


def _blocks(config: SiftConfig) -> Literal["rows", "flat"]:
    """Where blocks of 8-bit moments lie: under scope row a process may have some rows of the values."""
    return "rows" if config.scope == "row" else "flat"


def dense_layers(model: nn.Module, config: SiftConfig) -> set[str]:
    """The layers of the exceptions, which train whole and so cannot be kept as codes."""
    return {name.rpartition(".")[0] for name in divide(model, config.target_modules, config.exception)[1]}


METHOD = Method("sift", "2312.11875", SiftConfig, build, state_bytes, beside_codes=dense_layers, finetune_lr=2e-4)
