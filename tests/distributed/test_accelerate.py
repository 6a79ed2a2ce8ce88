"""A Trainer of one's own, sharded by accelerate's FSDP2: the losses of one process, and a resume on more of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.launch import torchrun
from tests.distributed.trainer_worker import train


@pytest.mark.slow
def test_fira_in_a_trainer(tmp_path: Path) -> None:
    expected = train(tmp_path / "one", 10, None, 1, resume=False)
    folder, log = tmp_path / "sharded", tmp_path / "log"
    for world, steps, more in ((2, 5, []), (3, 10, ["resume"])):
        with log.open("ab") as output:
            status = torchrun(
                world,
                "-m",
                "tests.distributed.trainer_worker",
                folder,
                steps,
                "SHARDED_STATE_DICT",
                *more,
                output=output,
            )
        assert status == 0, log.read_text(encoding="utf-8")[-3000:]
    assert json.loads((folder / "losses.json").read_text()) == pytest.approx(expected, rel=1e-4)
