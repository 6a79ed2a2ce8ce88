"""Names of tasks and groups."""

from __future__ import annotations

import pytest

from fullrank.errors import ConfigError
from fullrank.evaluation.tasks import COMMONSENSE, KINDS, MMLU, expand, kind_of


def test_groups_expand_once_and_in_order() -> None:
    assert expand(["commonsense"]) == COMMONSENSE
    assert len(expand(["mmlu"])) == len(MMLU) == 57
    assert expand(["mmlu_anatomy", "piqa", "mmlu_stem", "perplexity", "piqa"])[:2] == ("perplexity", "piqa")
    assert len(expand(["mmlu_anatomy", "mmlu_stem"])) == 19


def test_every_task_has_one_kind() -> None:
    tasks = [task for members in KINDS.values() for task in members]
    assert len(tasks) == len(set(tasks)) == 1 + 8 + 57 + 1 + 8
    assert all(task in KINDS[kind_of(task)] for task in tasks)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "tasks is empty"),
        (["bolq"], "no 'bolq'. Did you mean boolq"),
        (["social_iqa"], "social_i_qa"),
        (["mmlu_anatom", "piqaa"], "mmlu_anatomy.*no 'piqaa'. Did you mean piqa"),
        (["zzzzzz"], "There are: perplexity"),
    ],
)
def test_unknown_names(names: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        expand(names)
