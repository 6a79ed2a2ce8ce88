"""What the documents say is run: Python blocks, recipes, command lines, links; and every method has its page.

A ```python block runs as it stands, in a namespace and a folder of its own. A ```bash block is not run: its
``fullrank`` commands are parsed and resolved. Blocks of other kinds (```text) are for reading only.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fullrank import METHODS
from fullrank.cli import COMMANDS
from fullrank.cli.analysis import ANALYSES, read_analysis
from fullrank.cli.arguments import read_options, split_arguments
from fullrank.cli.comparing import comparison
from fullrank.cli.planning import read_plan
from fullrank.cli.reporting import read_report
from fullrank.cli.using import export_flags
from fullrank.compare.config import CompareConfig
from fullrank.compare.variants import make_variants
from fullrank.evaluation.config import EvaluateConfig
from fullrank.evaluation.tasks import expand
from fullrank.train.config import GlueConfig, InstructionsConfig
from fullrank.train.generate import GenerateConfig
from fullrank.train.recipes import recipe_names, show_recipe
from fullrank.train.resolve import resolve

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)
SECTIONS = {"model", "data", "method", "trainer"}


@dataclass(frozen=True)
class Block:
    path: Path
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def all_blocks() -> list[Block]:
    found = []
    for path in DOCUMENTS:
        content = path.read_text(encoding="utf-8")
        for match in FENCE.finditer(content):
            found.append(Block(path, content.count("\n", 0, match.start()) + 1, match[1], match[2]))
    return found


BLOCKS = all_blocks()


def of_kind(kind: str) -> list[Block]:
    return [block for block in BLOCKS if block.kind == kind]


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every ``fullrank`` command line: where it stands, and what follows the word ``fullrank``."""
    for block in of_kind("bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "fullrank" in words:
                yield f"{block} {line}", words[words.index("fullrank") + 1 :]


COMMAND_LINES = list(commands())


def test_blocks_are_found() -> None:
    assert {"python", "bash", "yaml", "text"} >= {block.kind for block in BLOCKS}, "a kind that nothing here checks"
    assert len(of_kind("python")) > 10
    assert len(COMMAND_LINES) > 10
    for path in DOCUMENTS:
        assert path.read_text(encoding="utf-8").count("```") == 2 * sum(block.path == path for block in BLOCKS)


@pytest.mark.parametrize("block", of_kind("python"), ids=str)
def test_python_block_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FULLRANK_CACHE", str(tmp_path / "cache"))
    state = torch.get_rng_state()
    torch.manual_seed(0)  # whatever ran before in this process: some blocks make a model up
    try:
        # blank lines before it, so that a traceback names the line of the document
        exec(compile("\n" * block.line + block.text, str(block.path), "exec"), {"__name__": "__main__"})
    finally:
        torch.set_rng_state(state)


@pytest.mark.parametrize("block", of_kind("yaml"), ids=str)
def test_yaml_block_resolves(block: Block) -> None:
    content = yaml.safe_load(block.text)
    if isinstance(content, dict) and SECTIONS & content.keys():
        assert resolve(content)


@pytest.mark.parametrize(("where", "words"), COMMAND_LINES, ids=[where for where, _ in COMMAND_LINES])
def test_command_line_is_valid(where: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command, *arguments = words
    assert command in COMMANDS
    if command in ("pretrain", "finetune"):
        check_run(command, arguments, capsys)
    elif command == "compare":
        check_comparison(arguments)
    elif command == "plan":
        planned = read_plan(arguments)
        assert planned is None or planned[0].config or planned[0].model
    elif command == "report":
        options = read_report(arguments)
        assert options is not None
        assert options.runs
    elif command == "recipes":
        if arguments:
            assert arguments[0] == "show"
            assert show_recipe(arguments[1])
    elif command == "analyze":
        check_analysis(arguments, capsys)
    elif command == "export":
        assert export_flags(arguments)
    elif arguments == ["--help"]:
        assert COMMANDS[command](arguments) == 0
        assert "--model MODEL" in capsys.readouterr().out
    elif command == "generate":
        assert read_options(GenerateConfig, arguments, command=command, usage="")
    else:
        config = read_options(EvaluateConfig, arguments, command=command, usage="")
        assert config is not None
        assert config.model
        assert expand(config.tasks)


def check_comparison(arguments: list[str]) -> None:
    """Resolve the command line of a comparison."""
    options = comparison(arguments)
    assert options is not None
    config, overrides, resumed = options
    assert resumed is not None or make_variants(config, overrides)


def check_analysis(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Read the command line of an analysis, and resolve the configuration that it names; or print its help."""
    if "--help" in arguments:
        assert COMMANDS["analyze"](arguments) == 0
        assert "usage: fullrank analyze" in capsys.readouterr().out
        return
    _, options = read_analysis(arguments)
    recipe, changes = getattr(options, "config", None), getattr(options, "overrides", {})
    if recipe or not options.runs:
        assert resolve(recipe if recipe in recipe_names() else None, changes)


def check_run(command: Any, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Resolve the command line of a training run, or print its help."""
    flags, overrides = split_arguments(arguments)
    if flags.help:
        assert COMMANDS[command](arguments) == 0
        assert "--method.lr" in capsys.readouterr().out
        return
    if flags.resume is not None:
        assert flags.config is None
        assert "output_dir" not in overrides
        if command == "finetune":  # the rest is in the run's own configuration
            overrides = {"model.name": "base", "data.name": "examples"} | overrides
    recipe: Any = flags.config
    if recipe is not None and recipe not in recipe_names():
        assert recipe.endswith(".yaml"), "neither a packaged recipe nor a file of the reader's own"
        recipe = None
        if command == "finetune":
            overrides = {"model.name": "base", "data.name": "examples"} | overrides
    resolve(recipe, overrides, command=command)


def links() -> list[tuple[str, Path, str]]:
    found = []
    for path in DOCUMENTS:
        content = FENCE.sub("", path.read_text(encoding="utf-8"))
        for target in LINK.findall(content):
            if "://" not in target and not target.startswith("mailto:"):
                found.append((f"{path.relative_to(ROOT)} -> {target}", path, target))
    return found


@pytest.mark.parametrize(("path", "target"), [link[1:] for link in links()], ids=[link[0] for link in links()])
def test_link_leads_somewhere(path: Path, target: str) -> None:
    name, _, anchor = target.partition("#")
    there = (path.parent / name).resolve() if name else path
    assert there.exists()
    assert there.is_relative_to(ROOT)
    if anchor:
        headings = HEADING.findall(FENCE.sub("", there.read_text(encoding="utf-8")))
        assert anchor in {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("method", METHODS)
def test_method_has_its_page_and_its_recipe(method: str) -> None:
    """The page names every option and says where the published numbers come from."""
    page = (ROOT / "docs" / "methods" / f"{method}.md").read_text(encoding="utf-8")
    assert METHODS[method].paper in page
    missing = [field.name for field in fields(METHODS[method].config) if f"`{field.name}`" not in page]
    assert not missing
    for heading in ("Algorithm", "Use", "Memory", "Options", "Departures", "Published numbers"):
        assert f"\n## {heading}\n" in page
    assert f"methods/{method}.md" in (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert any(name.endswith(f"-{method}") for name in recipe_names())


def recipe_row(name: str, *, table: int = 0) -> list[str]:
    """The cells of a recipe's row in docs/recipes.md, after its name; in the first of the tables that have one."""
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    rows = re.findall(rf"^\| `{name.partition('/')[2]}` \| (.*) \|$", page, re.MULTILINE)
    assert len(rows) > table, f"{name} has no row"
    return str(rows[table]).split(" | ")


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith("pretrain/")])
def test_pretraining_recipe_is_listed_with_its_values(name: str) -> None:
    """The table of docs/recipes.md agrees with the packaged files."""
    config = resolve(name)
    lr, rank, alpha, gap, steps, published = recipe_row(name)
    assert (float(lr), int(steps.replace(",", ""))) == (config.method.lr, config.trainer["max_steps"])
    method = config.method
    if config.method_name == "full":
        assert rank == alpha == gap == "-"
    elif config.method_name == "sift":
        assert rank == alpha == "-"
        assert int(gap) == method.reselect_every
    elif config.method_name in ("lora", "relora"):
        assert (int(rank), float(alpha)) == (method.rank, method.lora_alpha)
        assert gap == str(getattr(method, "restart_every", "-"))
    else:
        assert (int(rank), float(alpha), int(gap)) == (method.rank, method.alpha, method.update_proj_gap)
    assert published.split(" ")[0] in show_recipe(name)


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.endswith("-relora")])
def test_relora_recipe_is_listed_with_its_batches(name: str) -> None:
    """The second table has what differs between the sizes."""
    config = resolve(name)
    sequences, length, warm_start, rate, reset, rise = recipe_row(name, table=1)
    method = config.method
    assert int(sequences.replace(",", "")) == config.trainer["total_batch_size"]
    assert int(length.replace(",", "")) == config.data.sequence_length
    assert int(rise) == method.restart_warmup_steps
    assert reset == ("zero" if method.reset == "zero" else f"{method.reset} {method.reset_ratio}")
    if config.model.pretrained:
        assert (method.warm_start_steps, rate) == (0, "-")
        assert config.model.revision == f"step{warm_start.split()[-1].replace(',', '')}"
    else:
        assert int(warm_start.split()[0].replace(",", "")) == method.warm_start_steps
        assert float(rate) == method.warm_start_lr


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith("finetune/")])
def test_finetuning_recipe_is_listed_with_its_values(name: str) -> None:
    """The table of docs/recipes.md agrees with the packaged files."""
    config = resolve(name, command="finetune")
    lr, size, epochs, batch, decay, warmup, published = recipe_row(name)
    method, trainer = config.method, config.trainer
    assert (float(lr), float(decay)) == (method.lr, method.weight_decay)
    if config.method_name in ("fira", "galore"):
        assert size == f"{method.rank} of {method.lora_rank}"
    elif config.method_name == "full":
        assert size == "-"
    else:
        assert float(size) == (method.density if config.method_name == "sift" else method.rank)
    assert float(epochs) == trainer["num_train_epochs"]
    per_device = trainer["per_device_train_batch_size"]
    assert int(batch) == (trainer.get("total_batch_size") or per_device * trainer["gradient_accumulation_steps"])
    steps = trainer["warmup_steps"]
    assert warmup == (f"{steps:.0%}" if steps < 1 else f"{steps:g}")
    assert f" {published.split(' ')[0]} " in show_recipe(name)


@pytest.mark.parametrize("config", [EvaluateConfig, GenerateConfig, InstructionsConfig, GlueConfig, CompareConfig])
def test_options_are_explained(config: type[Any]) -> None:
    """Every option of evaluation, generation, comparison and fine-tuning data is on the page about it."""
    page = {EvaluateConfig: "evaluate", CompareConfig: "compare"}.get(config, "finetune")
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    section = "data." if config in (InstructionsConfig, GlueConfig) else ""
    missing = [field.name for field in fields(config) if not re.search(rf"`{section}{field.name}\b", text)]
    assert not missing


@pytest.mark.parametrize("name", list(ANALYSES))
def test_options_of_an_analysis_are_explained(name: str) -> None:
    """On its page, which the page about all of them points to."""
    page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    kind, _ = ANALYSES[name].load()
    named = {field.name for field in fields(kind)} - {ANALYSES[name].words, ANALYSES[name].overrides}
    missing = [option for option in named if not re.search(rf"`(--)?{option}\b", page)]
    assert not missing
    assert f"]({name}.md)" in (ROOT / "docs" / "analysis.md").read_text(encoding="utf-8")


def test_documents_are_short() -> None:
    assert all(len(path.read_text(encoding="utf-8").splitlines()) < 300 for path in DOCUMENTS)


@pytest.mark.parametrize("page", ["README.md", "docs/choose.md"])
def test_comparison_is_that_of_the_result_file(page: str) -> None:
    """The table of the seven methods has the numbers of compare.json, best first."""
    (folder,) = (ROOT / "benchmarks" / "results").glob("compare_4m_*")
    rows = json.loads((folder / "compare.json").read_text(encoding="utf-8"))["rows"]
    text = (ROOT / page).read_text(encoding="utf-8")
    shown = re.findall(r"^\| `(\w+)` \| ([\d.]+) \(([\d, ]+)\) \| ([\d.]+) \| ([\d.]+) \|", text, re.MULTILINE)
    assert [
        (
            row["label"],
            f"{row['score']:.1f}",
            ", ".join(f"{score:.0f}" for score in row["scores"].values()),
            f"{row['lr']:g}",
            f"{row['optimizer_state_bytes'] / 1e6:.1f}",
        )
        for row in rows
    ] == shown
