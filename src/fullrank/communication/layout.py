"""Processes, the matrices that they train, and collectives between them, as numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from fullrank.errors import ConfigError
from fullrank.ops.subspace import projects_rows

Kind = Literal["all_reduce", "reduce_scatter", "all_gather", "broadcast"]


@dataclass(frozen=True, slots=True)
class Collective:
    """Collectives of one kind in one group of processes, taken together."""

    kind: Kind
    numbers: int
    """Payload, padding included."""
    itemsize: int
    """Bytes of a number."""
    processes: int
    """Of the group."""
    calls: int = 1
    """Buffers, sent one after another."""
    among: Literal["all", "shards", "copies"] = "shards"
    """Which processes: all, those that hold one copy of the model, or those that hold the same part of every copy."""

    @property
    def payload_bytes(self) -> int:
        """Bytes of the tensors that it is about."""
        return self.numbers * self.itemsize

    @property
    def sent_bytes(self) -> float:
        """Bytes that one process sends, by the ring algorithm; a group of one sends nothing."""
        share = (self.processes - 1) / self.processes
        if self.kind == "broadcast":
            return float(self.payload_bytes) if self.processes > 1 else 0.0
        return self.payload_bytes * share * (2 if self.kind == "all_reduce" else 1)


@dataclass(frozen=True, slots=True)
class Layout:
    """How training is spread over processes.

    Raises:
        ConfigError: For numbers that do not fit together.
    """

    world: int
    """Processes."""
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    shard_size: int | None = None
    """fsdp2: processes that one copy of the model is spread over (fewer than all: HSDP); None: all."""
    partition_states: bool = False
    """ddp: each process keeps the state of its share of the parameters."""

    def __post_init__(self) -> None:
        if self.world < 1:
            raise ConfigError(f"world must be at least 1 process, got {self.world}.")
        if self.shard_size is not None and (self.shard_size < 1 or self.world % self.shard_size):
            raise ConfigError(f"shard_size must divide the {self.world} processes, got {self.shard_size}.")
        if self.strategy == "ddp" and self.shard_size is not None:
            raise ConfigError("shard_size is for fsdp2: ddp keeps whole parameters. Leave it out.")
        if self.strategy == "fsdp2" and self.partition_states:
            raise ConfigError("partition_states is for ddp: fsdp2 divides the states already. Leave it out.")

    @property
    def shards(self) -> int:
        """Processes that hold one copy of the model together."""
        return 1 if self.strategy == "ddp" else self.shard_size or self.world

    @property
    def replicas(self) -> int:
        """Copies of the model."""
        return self.world // self.shards


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight that a method projects: rows x columns as ``torch.nn.Linear`` has it, and the rank."""

    rows: int
    columns: int
    rank: int
    proj_type: Literal["std", "reverse_std", "left", "right"] = "std"

    @property
    def is_wide(self) -> bool:
        """Whether FSDP2 cuts it along its projected side."""
        return projects_rows((self.rows, self.columns), self.proj_type)

    @property
    def m(self) -> int:
        """The side that is not projected."""
        return self.columns if self.is_wide else self.rows

    @property
    def n(self) -> int:
        """The projected side."""
        return self.rows if self.is_wide else self.columns

    @property
    def numel(self) -> int:
        """Entries."""
        return self.rows * self.columns


def padded(rows: int, parts: int) -> int:
    """Rows as a collective over so many parts sends them: parts of equal length."""
    return -(-rows // parts) * parts


def payload(traffic: Iterable[Collective]) -> dict[str, int]:
    """Kind -> numbers, of groups of more than one process."""
    found: dict[str, int] = {}
    for one in traffic:
        if one.processes > 1 and one.numbers:
            found[one.kind] = found.get(one.kind, 0) + one.numbers
    return found


def sent_bytes(traffic: Iterable[Collective]) -> float:
    """Bytes that one process sends."""
    return sum(one.sent_bytes for one in traffic)


def filled(sizes: Sequence[int], bound: int) -> list[list[int]]:
    """Positions of things of these sizes, filled in their order into lots up to a bound; a larger one is a lot."""
    lots: list[list[int]] = []
    held = 0
    for number, size in enumerate(sizes):
        if not lots or held + size > bound:
            lots.append([])
            held = 0
        lots[-1].append(number)
        held += size
    return lots
