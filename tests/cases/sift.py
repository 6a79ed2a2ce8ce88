"""SIFT: no optimizer class of its own; it steps through torch's AdamW."""

from fullrank.methods.sift import SiftConfig
from tests.cases.base import MethodCase
from tests.cases.tiny import TARGETS

CASE = MethodCase(
    "sift", lambda: SiftConfig(density=0.3, target_modules=TARGETS, exception=["head"]), (), decides_what_trains=True
)
