"""The Triton kernels: right in Triton's interpreter, compilable for the GPUs that they are for, out of the way here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fullrank.ops.kernels import gpu

INTERPRETED = Path(__file__).with_name("interpreted_kernels.py")
ROOT = Path(__file__).parents[2]
SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Shared memory that a program may have, by compute capability (A100, RTX 40, H100)."""


def test_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", str(INTERPRETED)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def compiled(kernel: Any, options: dict[str, Any], capability: int, *, num_warps: int, num_stages: int) -> Any:
    """A kernel as a launch in bfloat16 compiles it, without a GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    pointers = {name: "*bf16" for name in kernel.arg_names if name.endswith("_ptr")}
    pointers |= {f"{name}_ptr": "*fp32" for name in ("norms", "factor") if f"{name}_ptr" in pointers}
    if "stride_row" in kernel.arg_names:
        pointers["low_ptr"] = "*fp32"
    names = kernel.arg_names
    floats = dict.fromkeys(("keep", "scale"), "fp32")
    types = dict.fromkeys(names, "i32") | {n: t for n, t in floats.items() if n in names} | pointers
    types |= dict.fromkeys(options, "constexpr")
    aligned = [["tt.divisibility", 16]]
    attributes = {(i,): aligned for i, n in enumerate(names) if types[n][0] in "*i" and n != "factor_row"}
    constants = {(names.index(name),): value for name, value in options.items()}
    source = ASTSource(kernel, types, constants, attributes)
    launch = {"num_warps": num_warps, "num_stages": num_stages}
    return compile(source, target=GPUTarget("cuda", capability, 32), options=launch)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_they_compile_for_gpus(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To machine code with tensor cores, within the shared memory of the device."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton.language as tl

    from fullrank.ops.kernels import triton_source as source

    product = {"DOT": tl.bfloat16, "PRECISION": "ieee"}
    tile = {"HAS_REST": True, "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_R": 32, **product}
    tile |= {"weight_column": 1, "rest_column": 1}
    made = [compiled(source.update_kernel, tile, capability, num_warps=8, num_stages=3)]
    for rank, num_warps, num_stages in ((128, 4, 3), (256, 8, 2)):
        tile = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_R": rank, "stride_row": 1, **product}
        made.append(compiled(source.project_kernel, tile, capability, num_warps=num_warps, num_stages=num_stages))
    for kernel in made:
        assert "mma" in kernel.asm["ptx"]
        assert kernel.asm["cubin"]
        assert kernel.metadata.shared <= SHARED_BYTES[capability]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_other_tensors_are_left_to_torch(device: str) -> None:
    if gpu.is_interpreted():
        pytest.skip("this process is the interpreter's")
    assert not gpu.is_reachable(torch.ones(1, device=device))
