"""Which of pytest-xdist's processes gets which tests: those of a file go together, long files first.

What the tests of a file share (a trained run, the site, a browser) is then made once, not once a process; and no long
file is left for the end, when the other processes have nothing to do.
"""

from __future__ import annotations

import pytest
from xdist.scheduler import LoadScopeScheduling

LAUNCHES = "tests/distributed"
"""The files there share one launch for each number of processes."""
APART = "tests/distributed/test_command.py"
LONG = (
    LAUNCHES,
    "tests/compare/test_compare.py",
    APART,
    "tests/train/test_relora.py",
    "tests/train/test_cli.py",
    "tests/train/test_relora_ddp.py",
    "tests/plan/test_measured.py",
    "tests/plan/test_advice.py",
    "tests/test_examples.py",
    "tests/evaluation/test_humaneval.py",
    "tests/report/test_page_browser.py",
    "tests/test_site.py",
    "tests/plan/test_trainer.py",
    "tests/train/test_run.py",
    "tests/train/test_finetune.py",
    "tests/train/test_finetune_attacks.py",
    "tests/train/test_relora_networks.py",
    "tests/train/test_quantized.py",
    "tests/train/test_precision.py",
    "tests/train/test_fused_run.py",
    "tests/analysis/test_similarity_run.py",
    "tests/analysis/test_limiter.py",
    "tests/train/data/test_instructions.py",
    "tests/train/test_recipes.py",
)
"""The longest first; another order would only take longer."""


def together(nodeid: str) -> str:
    """What a test goes with: its file, or the files that share launches."""
    file = nodeid.partition("::")[0]
    return LAUNCHES if file.startswith(f"{LAUNCHES}/") and file != APART else file


def sort_long_first(items: list[pytest.Item]) -> None:
    """Put the tests of long files before all others, otherwise in the order of pytest."""
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(together(item.nodeid), len(places)))


class LongFirst(LoadScopeScheduling):  # type: ignore[misc]
    """Hands out whole files in the order of the collection, to whichever process has next to nothing left."""

    def _split_scope(self, nodeid: str) -> str:
        return together(nodeid)
