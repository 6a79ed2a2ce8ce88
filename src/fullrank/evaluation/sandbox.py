"""Running generated programs to score them.

`run_program` starts a process for one program and tells how it ended. What the process cannot do, by layers:

1. **Its own process** in its own session, with an empty environment, no inherited files, output that goes
   nowhere, and a new empty folder that is removed afterwards. When its time is over, its whole group is killed.
2. **Resource limits**: CPU time, address space, file size, open files, tasks, no core files.
3. **A seccomp filter** (Linux on x86_64 and aarch64): no sockets, no io_uring, no new processes or programs, no
   signals to other processes and no reading of their memory, no links, modes, owners or times of files, no
   priorities, no mounts and the like. Without the filter, Linux refuses to run programs.
4. **Landlock** (Linux 5.13 or newer, where it is switched on): nothing is written, made or removed outside the folder,
   and nothing is read there but the interpreter and the system's libraries.
5. **An audit hook** of Python, everywhere: no network, no processes, no `ctypes`, no bytecode but the compiler's, no
   file outside the folder but the standard library's for reading, no installed packages. The hook cannot be removed,
   but what breaks the interpreter itself escapes it.

This is made for the mistakes and the odd ideas of a language model. It is **not a virtual machine**: a flaw of the
kernel is not held off. Without Landlock, what breaks out of the interpreter can read and write what this user can.
Where there is no seccomp (macOS), it can also use the network, and the memory limit has no effect. Run models that
you do not trust in a container or a virtual machine.

A program passes only if it comes to its end: then, and not before, a random token is written to a pipe, by a step that
the program cannot call. To exit early, by `sys.exit` or `os._exit`, is not to pass, nor is anything printed.

Programs see the standard library alone, without `asyncio` (it needs sockets), `ctypes`, `marshal` and what changes the
modes and times of files (`shutil.copy`; `shutil.copyfile` works). They see the same order of hashes in every run, and
no ``__name__``, so that a main block does not run: as in the authors' harness.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import selectors
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fullrank.errors import ConfigError, UnsupportedError

logger = logging.getLogger(__name__)

MIN_MEMORY_BYTES = 256 << 20
"""The interpreter and the program's stack need some of it."""
START_S = 60.0
"""Seconds for the interpreter to start, which are not the program's: the disk may be slow."""
MAX_REPORT_BYTES = 4096
READY = b"ready\n"
REASONS = ("failed", "forbidden", "out of memory", "exited")
"""How a reason that the process reports begins; the rest is seen from outside."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    passed: bool
    reason: str
    """``passed``, ``failed: <error>``, ``timed out``, ``out of memory``, ``forbidden: <what>`` or ``exited: ...``."""


def run_program(source: str, *, timeout_s: float = 3.0, memory_bytes: int = 1 << 30) -> Outcome:
    """Run a Python program in a sandbox; see the head of this file for what that is and is not.

    Args:
        source: The program, tests included. It passes if it comes to its end.
        timeout_s: Seconds of wall-clock time from the program's first line. CPU time has about the same bound.
        memory_bytes: Bound on the address space.

    Raises:
        ConfigError: If a bound is too low to run anything.
        UnsupportedError: If this machine cannot confine the program. Nothing has run then.
    """
    if not timeout_s > 0:
        raise ConfigError(f"timeout_s must be greater than 0, got {timeout_s}. The usual time is 3 seconds.")
    if memory_bytes < MIN_MEMORY_BYTES:
        raise ConfigError(f"memory_bytes must be at least {MIN_MEMORY_BYTES} (Python itself), got {memory_bytes}.")
    token = secrets.token_hex(16).encode()
    folder = Path(tempfile.mkdtemp(prefix="fullrank-program-")).resolve()
    try:
        with tempfile.TemporaryFile() as stdin:
            stdin.write(token + b"\n" + source.encode("utf-8", "surrogatepass"))
            stdin.seek(0)
            process = _start(stdin, folder, timeout_s=timeout_s, memory_bytes=memory_bytes)
        try:
            report, in_time = _listen(process, timeout_s=timeout_s)
        finally:
            _kill_group(process)
    finally:
        _remove(folder)
    return _judge(report, token=token, in_time=in_time, status=process.returncode)


def _start(stdin: IO[bytes], folder: Path, *, timeout_s: float, memory_bytes: int) -> subprocess.Popen[bytes]:
    """The process that confines itself and then runs what ``stdin`` holds."""
    here = Path(__file__).resolve().parent
    limits = {
        "folder": str(folder),
        "memory_bytes": memory_bytes,
        "cpu_s": math.ceil(timeout_s) + 2,  # the interpreter's start takes some of it
        "runner": str(here / "sandbox_runner.py"),
    }
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", str(here / "sandbox_confine.py"), json.dumps(limits)],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=folder,
        env={},
        start_new_session=True,
    )


def _listen(process: subprocess.Popen[bytes], *, timeout_s: float) -> tuple[bytes, bool]:
    """What the process reports until it ends, and whether it ended in time.

    Raises:
        UnsupportedError: If it does not get so far as to run the program.
    """
    report = _read(process, end=READY, deadline=time.monotonic() + START_S)
    if not report.startswith(READY):
        text = report.decode("utf-8", "replace").strip() or f"no answer within {START_S:g} s"
        raise UnsupportedError(
            f"This machine cannot run generated programs in a sandbox: {text[-500:]}. Score them on "
            "Linux (x86_64 or aarch64) with seccomp, or on macOS; a container may need seccomp to be allowed."
        )
    deadline = time.monotonic() + timeout_s
    report = report.removeprefix(READY) + _read(process, end=None, deadline=deadline)
    return report, time.monotonic() < deadline


def _read(process: subprocess.Popen[bytes], *, end: bytes | None, deadline: float) -> bytes:
    """Read what the process reports until ``end``, its exit, the deadline, or more than a report can be."""
    assert process.stdout is not None
    data, descriptor = b"", process.stdout.fileno()
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while len(data) < MAX_REPORT_BYTES and selector.select(max(0.0, deadline - time.monotonic())):
            chunk = os.read(descriptor, MAX_REPORT_BYTES)
            data += chunk
            if not chunk or (end is not None and end in data):
                break
    return data


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End the process and all it may have started, before its number can be given to another."""
    assert process.stdout is not None
    process.stdout.close()
    # macOS answers EPERM for a group whose members have all ended
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _remove(folder: Path) -> None:
    """Remove a program's folder, whatever modes it gave to folders within and however long their paths are."""
    try:
        for _, folders, _, descriptor in os.fwalk(folder):
            for name in folders:
                if stat.S_ISDIR(os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_mode):
                    os.chmod(name, 0o700, dir_fd=descriptor)
        shutil.rmtree(folder)
    except (OSError, RecursionError) as error:
        logger.warning("a program's folder cannot be removed (%s): %s", folder, str(error)[:200])


def _judge(report: bytes, *, token: bytes, in_time: bool, status: int) -> Outcome:
    """The outcome, by what was reported, else by how the process ended."""
    if secrets.compare_digest(report, token):
        return Outcome(passed=True, reason="passed")
    if not in_time or status == -signal.SIGXCPU:
        return Outcome(passed=False, reason="timed out")
    reason = "".join(c if c.isprintable() else " " for c in report.decode("utf-8", "replace"))
    if reason.startswith(REASONS):
        return Outcome(passed=False, reason=reason)
    if status < 0:
        return Outcome(passed=False, reason=f"failed: ended by {signal.Signals(-status).name}")
    return Outcome(passed=False, reason="exited: the program ended before its tests did")
