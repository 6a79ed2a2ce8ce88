"""Where real data for tests marked ``shared_data`` lies: ``FULLRANK_SHARED_DATA``, or beside the checkout."""

from __future__ import annotations

import os
from pathlib import Path

SHARED = Path(os.environ.get("FULLRANK_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
