"""Second program of a sandbox: runs an untrusted program and tells whether it came to its end.

Run as a script, by `sandbox_confine.py`, with the standard library alone. Standard input holds a secret token, then
the untrusted source; standard output leads to `sandbox.py`. The program runs in a thread whose steps are all of C: no
frame of this file is its caller, and the token is in no variable that it can reach. What follows the program's
last line is the write of the token, so to leave earlier, by any door, is not to pass.

The audit hook must hold no name that the program can change: no global, no built-in looked up when an event comes, no
method of an object of the program. That is why it takes all it uses as defaults, and asks for exact types.
"""

from __future__ import annotations

import _thread
import itertools
import os
import sys
from collections import deque
from functools import partial
from io import FileIO
from operator import call
from time import sleep
from typing import Any

STACK_BYTES = 64 << 20
MAX_WRITES = 256
"""Files and folders that a program may make, rename or remove, all together: what is to be cleared up has an end."""
MAX_REASON = 200

REFUSED_EVENTS = (
    "code.__new__",  # made bytecode can break the interpreter
    "cpython.",
    "ctypes.",
    "gc.get_",
    "os.chdir",
    "os.chflags",
    "os.chmod",
    "os.chown",
    "os.exec",
    "os.fchdir",
    "os.fork",
    "os.kill",
    "os.link",
    "os.posix_spawn",
    "os.removexattr",
    "os.setxattr",
    "os.spawn",
    "os.startfile",
    "os.symlink",
    "os.system",
    "pty.spawn",
    "resource.prlimit",
    "resource.setrlimit",
    "socket.",
    "sqlite3.",
    "subprocess.",
    "sys._current_",
    "sys.addaudithook",
    "sys.monitoring.",
    "sys.remote_exec",
    "sys.setprofile",
    "sys.settrace",
)
"""Audit events, by how they begin; those of files are judged by their paths."""

REFUSED_MODULES = frozenset(
    {"ctypes", "_ctypes", "_curses", "_dbm", "_gdbm", "_interpreters", "_multiprocessing", "_posixshmem", "_sqlite3"}
    | {"_ssl", "_testcapi", "_testinternalcapi", "_testlimitedcapi", "_tkinter", "_xxsubinterpreters", "readline"}
)
"""Modules that reach memory or files without an audit event."""

READING = frozenset({"os.listdir", "os.scandir"})
CHANGING = frozenset({"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "os.utime"})
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
DEVICES = frozenset({"/dev/null", "/dev/urandom"})


class Forbidden(PermissionError):  # noqa: N818 - the program sees its name
    """Something that the sandbox refuses."""


class ForbiddenImport(ImportError):  # noqa: N818
    """A module that the sandbox refuses; the standard library takes an ImportError as an absent option."""


def install_hook(folder: str, readable: tuple[str, ...]) -> None:
    """Refuse network, processes, and files outside a folder from here on; a hook cannot be removed.

    Args:
        folder: The absolute path, without links, of the only folder to write in.
        readable: Further folders to read from.
    """
    writes = itertools.count()

    def hook(
        event: str,
        args: tuple[Any, ...],
        folder: str = f"{folder}/",
        readable: tuple[str, ...] = tuple(f"{path}/" for path in readable),
        writes: Any = writes,
        names: Any = (REFUSED_EVENTS, REFUSED_MODULES, READING, CHANGING, DEVICES),
        constants: Any = (MAX_WRITES, WRITE_FLAGS),
        errors: Any = (Forbidden, ForbiddenImport),
        builtins: Any = (type, str, bytes, int, next),
    ) -> None:
        refused, modules, reading, changing, devices = names
        max_writes, write_flags = constants
        forbidden, forbidden_import = errors
        type_, str_, bytes_, int_, next_ = builtins
        if event.startswith(refused):
            raise forbidden(event)
        if event == "import" and (type_(args[0]) is not str_ or args[0] in modules):
            raise forbidden_import("this module cannot be imported here")
        if event == "object.__setattr__" and args[1] == "__code__":
            raise forbidden("a function cannot be given another body")
        opened = event == "open"
        if not (opened or event in reading or event in changing):
            return
        changes = event in changing or (opened and args[2] & write_flags != 0)
        if changes and next_(writes) >= max_writes:
            raise forbidden(f"{event}: more than {max_writes} changes of files")
        for path in args[:2] if event == "os.rename" else args[:1]:
            if path is None or type_(path) is int_:
                continue
            name = path.decode("utf-8", "surrogateescape") if type_(path) is bytes_ else path
            if type_(name) is not str_ or ".." in name.split("/"):
                raise forbidden(f"{event}: a path that is not plain")
            # os.open (no mode) could give a folder's descriptor, relative to which paths mean other files
            reads_only = not changes and not (opened and args[1] is None)
            roots = (folder, *readable) if reads_only else folder
            device = opened and name in devices
            if name[:1] == "/" and not device and not f"{name}/".startswith(roots):
                raise forbidden(f"{event}: a path outside the folder")

    sys.addaudithook(hook)


def note_into(reason: list[bytes]) -> None:
    """Have the error that ends a thread written into ``reason``, which has one entry."""

    def note(unraisable: Any) -> None:
        kind = unraisable.exc_type
        if issubclass(kind, MemoryError):
            reason[0] = b"out of memory"  # this makes no new object
            return
        word = "forbidden" if issubclass(kind, Forbidden | ForbiddenImport) else f"failed: {kind.__name__}"
        text = str(unraisable.exc_value).strip()[:MAX_REASON]
        reason[0] = (f"{word}: {text}" if text else word).encode("utf-8", "replace")

    sys.unraisablehook = note


def start_program(report: int, started: list[None]) -> None:
    """Start the program in its thread: run it, then write the token, then leave."""
    with FileIO(0, closefd=False) as stdin:  # sys.stdin would keep what it read
        token, _, source = stdin.readall().partition(b"\n")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)
    os.write(report, b"ready\n")
    # as in the authors' harness, the namespace has no __name__: a main block does not run
    program = partial(exec, source.decode("utf-8", "surrogatepass"), {})
    steps: list[Any] = [partial(started.append, None), program, partial(os.write, report, token), partial(os._exit, 0)]
    _thread.stack_size(STACK_BYTES)
    _thread.start_new_thread(deque, (map(call, steps), 0))


def main() -> None:
    """Run the program on standard input and report how it ended."""
    report = os.dup(1)
    write, leave, rest, running = os.write, os._exit, sleep, _thread._count
    started: list[None] = []
    reason = [b"exited: the program ended before its tests did"]
    note_into(reason)
    install_hook(sys.argv[1], tuple(sys.path))
    sys.argv = ["program"]
    sys.modules["__main__"] = type(sys)("__main__")
    start_program(report, started)
    while not started or running():
        rest(0.002)
    write(report, reason[0])
    leave(1)


if __name__ == "__main__":
    main()
