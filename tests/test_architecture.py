"""The rules of the layout that import-linter cannot express.

import-linter (see pyproject.toml) checks who imports whom inside the package. It knows other
packages by their top-level name only, and it knows nothing of file names, sizes or import time.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "fullrank"
APPLICATION = {"cli", "compare", "report", "evaluation", "train", "analysis", "plan"}
"""The parts that may need more than the core's packages."""
KERNELS = Path("ops/kernels/triton_source.py")
"""What Triton compiles; imported where a kernel is launched, never with the package."""
CORE_PACKAGES = {*sys.stdlib_module_names, "torch", "safetensors", "fullrank"}
HEAVY_PACKAGES = {"transformers", "peft", "accelerate", "datasets", "yaml", "jsonargparse", "matplotlib"}
VAGUE_NAMES = {"util", "utils", "helper", "helpers", "common", "misc"}
MAX_LINES = 350


def source_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def syntax(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_names(node: ast.AST) -> list[str]:
    """Return the full names that an import statement brings in; no name for any other node."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def uses_distributed(node: ast.AST) -> bool:
    """Tell whether the node imports torch.distributed or reaches it as an attribute of torch."""
    if isinstance(node, ast.Attribute):
        return node.attr == "distributed" and isinstance(node.value, ast.Name) and node.value.id == "torch"
    return any(is_in(name, "torch.distributed") for name in imported_names(node))


def imports_at_module_level(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and full name of each import outside the bodies of functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield from ((child.lineno, name) for name in imported_names(child))
        elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports_at_module_level(child)


def test_sources_are_found() -> None:
    assert "errors.py" in {relative(path) for path in source_files()}


def test_only_sharding_knows_torch_distributed() -> None:
    found = [
        f"{relative(path)}:{node.lineno}"
        for path in source_files()
        if not relative(path).startswith("sharding/")
        for node in ast.walk(syntax(path))
        if isinstance(node, ast.stmt | ast.expr) and uses_distributed(node)
    ]
    assert not found, f"move the use of torch.distributed to sharding: {found}"


def test_distributed_is_recognised_in_every_spelling() -> None:
    spellings = [
        "import torch.distributed",
        "import torch.distributed.tensor as dt",
        "from torch import distributed as dist",
        "from torch.distributed import all_reduce",
        "from torch.distributed.tensor import DTensor",
        "rank = torch.distributed.get_rank()",
    ]
    for spelling in spellings:
        assert any(uses_distributed(node) for node in ast.walk(ast.parse(spelling))), spelling
    for harmless in ("import torch", "from torch import nn", "import torch.distributions"):
        assert not any(uses_distributed(node) for node in ast.walk(ast.parse(harmless))), harmless


def test_core_modules_import_only_torch_and_safetensors() -> None:
    found = [
        f"{relative(path)}:{line} {name}"
        for path in source_files()
        if path.relative_to(PACKAGE).parts[0] not in APPLICATION and path.relative_to(PACKAGE) != KERNELS
        for line, name in imports_at_module_level(syntax(path))
        if name.split(".")[0] not in CORE_PACKAGES
    ]
    assert not found, f"the core needs torch and safetensors alone; import inside the function: {found}"


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import json, sys, fullrank; print(json.dumps([name.split('.')[0] for name in sys.modules]))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(json.loads(run.stdout.splitlines()[-1]))
    assert "fullrank" in imported
    assert not imported & HEAVY_PACKAGES


def test_no_file_has_a_vague_name() -> None:
    found = [relative(path) for path in PACKAGE.rglob("*") if path.stem.strip("_") in VAGUE_NAMES]
    assert not found, f"name the thing: {found}"


def test_no_source_file_is_too_long() -> None:
    lengths = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in source_files()}
    found = {name: length for name, length in lengths.items() if length > MAX_LINES}
    assert not found, f"a file has at most {MAX_LINES} lines: {found}"
