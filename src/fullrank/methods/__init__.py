"""The methods, one paper a file. ``METHODS`` is the table: a new method is its file and a line here."""

from fullrank.methods import apollo, fira, full, galore, lora, relora, sift
from fullrank.methods.base import Built, Method

METHODS: dict[str, Method] = {
    "full": full.METHOD,
    "galore": galore.METHOD,
    "fira": fira.METHOD,
    "apollo": apollo.METHOD,
    "sift": sift.METHOD,
    "relora": relora.METHOD,
    "lora": lora.METHOD,
}
"""Name -> method."""

__all__ = ["METHODS", "Built", "Method"]
