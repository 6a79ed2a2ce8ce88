"""Local examples put to a model exactly as lm-evaluation-harness puts the hub's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

pytest.importorskip("lm_eval")

from fullrank.evaluation import harness
from fullrank.evaluation.commonsense import parse
from fullrank.evaluation.mmlu import open_csv
from fullrank.evaluation.tasks import CATEGORIES, COMMONSENSE, MMLU
from fullrank.evaluation.unit import Evaluated
from tests.evaluation.made import (
    HUB,
    local_row,
    make_model,
    make_tokenizer,
    mmlu_rows,
    write_mmlu,
)
from tests.shared_data import SHARED

OWN_NAMES = {"social_i_qa": "social_iqa"}
OWN_FOLDERS = {"boolq": "super_glue/boolq", "social_i_qa": "siqa", "arc_easy": "arc", "arc_challenge": "arc"}


def own_manager(folder: str) -> Any:
    import lm_eval
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(Path(lm_eval.__file__).parent / "tasks" / folder), include_defaults=False)


def own_task(task: str, splits: DatasetDict) -> Any:
    """The harness's task as it stands, fed with rows of the hub's layout."""
    name = OWN_NAMES.get(task, task)
    folder = "mmlu/default" if task.startswith("mmlu") else OWN_FOLDERS.get(task, task)
    spec = {"task": name, "custom_dataset": lambda **_: splits}
    return own_manager(folder).load([{"group": "own", "task": [spec]}])["tasks"][name]


def requests(task: Any) -> list[tuple[str, str]]:
    task.build_all_requests()
    return [instance.args for instance in task.instances]


def hub_splits(task: str) -> DatasetDict:
    rows = Dataset.from_list([HUB[task]])
    return DatasetDict({"train": rows, "validation": rows, "test": rows})


@pytest.mark.parametrize("task", COMMONSENSE)
def test_requests_equal_the_harnesss(task: str) -> None:
    docs = parse([local_row(task)], task, source=Path("test.json"))
    prompt = harness.WITHOUT_PASSAGE if task == "boolq" else None
    ours = harness.local_task(task, docs, prompt=prompt)
    theirs = own_task(task, hub_splits(task))
    expected = requests(theirs)
    if task == "boolq":  # an empty passage leaves a line break before the question
        expected = [(context.removeprefix("\n"), answer) for context, answer in expected]
    assert requests(ours) == expected
    assert ours.doc_to_target(ours.eval_docs[0]) == theirs.doc_to_target(theirs.eval_docs[0])
    assert ours.aggregation().keys() == theirs.aggregation().keys()
    assert ours.VERSION == theirs.VERSION


def test_prompts_in_words() -> None:
    """What the harness asks, written down: a change of its definitions must be seen."""
    asked = {}
    for task in COMMONSENSE:
        prompt = harness.WITHOUT_PASSAGE if task == "boolq" else None
        docs = parse([local_row(task)], task, source=Path("test.json"))
        asked[task] = requests(harness.local_task(task, docs, prompt=prompt))[0]
    assert asked == {
        "boolq": ("Question: is the sun hot?\nAnswer:", " no"),
        "piqa": ("Question: open a jar\nAnswer:", " turn the lid "),
        "social_i_qa": ("Q: Kim fell. Kim cried. How would you describe Kim?\nA:", " sad"),
        "hellaswag": ("Roof repair: A man sits on a roof. He", " wraps skis."),
        "winogrande": ("The cup fell off the table because the cup", " was wet."),
        "arc_easy": ("Question: Which is hot?\nAnswer:", " ice"),
        "arc_challenge": ("Question: Which is hot?\nAnswer:", " ice"),
        "openbookqa": ("Which is hot?", " ice"),
    }


@pytest.mark.parametrize("num_fewshot", [0, 5])
@pytest.mark.parametrize("as_zip", [False, True])
def test_mmlu_requests_equal_the_harnesss(num_fewshot: int, as_zip: bool, tmp_path: Path) -> None:
    files = open_csv(str(write_mmlu(tmp_path / "mmlu.zip", ("anatomy",), as_zip=as_zip)))
    ours = harness.local_task(
        "mmlu_anatomy", files.read("anatomy", "test"), dev=files.read("anatomy", "dev"), num_fewshot=num_fewshot
    )

    def hub(split: str, count: int) -> Dataset:
        return Dataset.from_list(
            [
                {"question": row[0], "subject": "anatomy", "choices": row[1:5], "answer": "ABCD".index(row[5])}
                for row in mmlu_rows("anatomy", split, count)
            ]
        )

    theirs = own_task("mmlu_anatomy", DatasetDict({"test": hub("test", 3), "dev": hub("dev", 5)}))
    theirs.set_config(key="num_fewshot", value=num_fewshot)
    found = requests(ours)
    assert found == requests(theirs)
    assert [answer for _, answer in found[:4]] == [" A", " B", " C", " D"]
    assert found[0][0].startswith("The following are multiple choice questions (with answers) about anatomy.\n\nWhich")
    assert found[0][0].count("\nAnswer:") == num_fewshot + 1


def test_subjects_and_categories_are_the_harnesss() -> None:
    manager = own_manager("mmlu/default")
    for category, subjects in CATEGORIES.items():
        assert manager.task_index[f"{category}_tasks"].tags == set(subjects), category
    assert set(MMLU) == {name for name in manager.all_subtasks if name.startswith("mmlu_")}


def test_scores_are_those_of_the_likelihoods() -> None:
    """acc and acc_norm from log-likelihoods that are computed here."""
    import torch

    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    task = harness.local_task("piqa", parse([local_row("piqa")], "piqa", source=Path("test.json")))
    outcome = harness.rank(task, Evaluated(model, tokenizer, batch_size=2), limit=None)
    scores = []
    for context, answer in requests(task):
        tokens = tokenizer(context + answer, return_tensors="pt")["input_ids"]
        start = len(tokenizer(context)["input_ids"])
        with torch.no_grad():
            logs = model(tokens).logits.log_softmax(-1)[0, start - 1 : -1]
        scores.append(logs.gather(1, tokens[0, start:, None]).sum().item())
    lengths = [len(HUB["piqa"][key]) for key in ("sol1", "sol2")]
    right = HUB["piqa"]["label"]
    assert outcome.metrics == {
        "acc": float(scores[right] == max(scores)),
        "acc_norm": float(scores[right] / lengths[right] == max(s / n for s, n in zip(scores, lengths, strict=True))),
    }
    assert (outcome.metric, outcome.num_examples) == ("acc_norm", 1)


def test_prompts_that_are_cut_are_counted() -> None:
    """The model takes 512 tokens; the second question is longer."""
    rows = [local_row("arc_easy"), local_row("arc_easy")]
    rows[1]["instruction"] = rows[1]["instruction"].replace("Which is hot?", "Which is hot? " * 600)
    task = harness.local_task("arc_easy", parse(rows, "arc_easy", source=Path("test.json")))
    tokenizer = make_tokenizer()
    outcome = harness.rank(task, Evaluated(make_model(tokenizer), tokenizer, batch_size=4), limit=None)
    assert outcome.details["truncated"] == 1
    assert outcome.num_examples == 2


@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs MMLU's files")
def test_real_mmlu() -> None:
    files = open_csv(str(SHARED / "instruct" / "mmlu" / "mmlu.zip"))
    counts = {split: sum(len(files.read(task[5:], split)) for task in MMLU) for split in ("dev", "test")}
    assert counts == {"dev": 285, "test": 14042}
