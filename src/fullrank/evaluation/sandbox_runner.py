"""Second program of a sandbox: runs an untrusted program and tells whether it came to its end.

Run as a script, by `sandbox_confine.py`, with the standard library alone. Standard input holds a secret token, then
the untrusted source; standard output leads to `sandbox.py`. The program runs in a thread whose steps are all of C: no
frame of this file is its caller, and the token is in no variable that it can reach. What follows the program's
last line is the write of the token, so to leave earlier, by any door, is not to pass.

The audit hook must hold no name that the program can change: no global, no built-in looked up when an event comes, no
method of an object of the program. That is why it and what it calls take all they use as defaults, and ask for exact
types. Bytecode can break the interpreter: it is not read from `marshal` either, so modules that are not loaded before
the program are compiled from their sources.
"""

from __future__ import annotations

import _imp
import _thread
import itertools
import os
import sys
from collections import deque
from contextlib import suppress
from functools import partial
from io import FileIO
from operator import call
from time import sleep
from typing import Any
from warnings import catch_warnings

STACK_BYTES = 64 << 20
MAX_WRITES = 256
"""Files and folders that a program may make, rename or remove, all together: what is to be cleared up has an end."""
MAX_REASON = 200

REFUSED_EVENTS = (
    "code.__new__",  # made bytecode can break the interpreter
    "cpython.",
    "ctypes.",
    "gc.get_",
    "marshal.load",
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
    "os.utime",
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
    {
        "ctypes",
        "_ctypes",
        "_curses",
        "_dbm",
        "_gdbm",
        "_multiprocessing",
        "_posixshmem",
        "_remote_debugging",
        "_sqlite3",
    }
    | {"_ssl", "_testcapi", "_testinternalcapi", "_testlimitedcapi", "_tkinter", "readline"}
    | {"_interpchannels", "_interpqueues", "_interpreters", "_xxinterpchannels", "_xxsubinterpreters"}
)
"""Modules that reach memory or files without an audit event."""
REFUSED_EXTENSIONS = ("_ctypes", "_test", "_xx", "xx")
"""Files of further ones, by how they begin."""

LOADED_BEFORE = (
    *("bisect", "collections", "copy", "dataclasses", "datetime", "decimal", "enum", "fractions", "functools"),
    *("hashlib", "heapq", "importlib.machinery", "importlib.util", "itertools", "json", "math", "operator", "random"),
    *("re", "statistics", "string", "typing"),
)
"""What programs import often, loaded while `marshal` may still be used."""

READING = frozenset({"os.listdir", "os.scandir"})
CHANGING = frozenset({"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate"})
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
DEVICES = frozenset({"/dev/null", "/dev/urandom"})


class Forbidden(PermissionError):  # noqa: N818 - the program sees its name
    """Something that the sandbox refuses."""


class ForbiddenImport(ImportError):  # noqa: N818
    """A module that the sandbox refuses; the standard library takes an ImportError as an absent option."""


def refuse_import(
    name: Any,
    filename: Any,
    extensions: frozenset[str],
    modules: frozenset[str] = REFUSED_MODULES,
    error: type[Exception] = ForbiddenImport,
    exact: Any = (type, str),
) -> None:
    """Raise for a module that is refused, under whatever name, and for an extension that is not the library's.

    Args:
        name: The module's; its last part tells which of a file's functions makes the module.
        filename: The extension's file; None for other modules.
        extensions: The files that may be loaded.
        modules: Last parts of names that are refused.
        error: What to raise.
        exact: Built-ins.
    """
    type_, str_ = exact
    if type_(name) is not str_ or name.rpartition(".")[2] in modules:
        raise error("this module cannot be imported here")
    if filename is not None and (type_(filename) is not str_ or filename not in extensions):
        raise error("this extension module cannot be imported here")


def refuse_attribute(item: Any, name: str, here: str = __file__, error: type[Exception] = Forbidden) -> None:
    """Raise for a change of a function's body, and of what this file's functions take as defaults."""
    if name == "__code__":
        raise error("a function cannot be given another body")
    # others may get other defaults: named tuples are made so
    if name in ("__defaults__", "__kwdefaults__") and item.__code__.co_filename == here:
        raise error("the sandbox's functions cannot be changed")


def refuse_path(
    event: str,
    path: Any,
    roots: tuple[str, ...],
    error: type[Exception] = Forbidden,
    devices: frozenset[str] = DEVICES,
    packages: frozenset[str] = frozenset({"site-packages", "dist-packages"}),
    exact: Any = (type, str, bytes, int),
) -> None:
    """Raise for a path outside some folders, or of an installed package.

    Args:
        event: The audit event.
        path: What the program gave; a relative one is within the program's folder, which it cannot leave.
        roots: The folders, each with a slash at its end; the program's own is first. It has no links.
        error: What to raise.
        devices: Files outside that may be opened.
        packages: Names of folders to refuse.
        exact: Built-ins.
    """
    type_, str_, bytes_, int_ = exact
    if path is None or type_(path) is int_:
        return
    name = path.decode("utf-8", "surrogateescape") if type_(path) is bytes_ else path
    if type_(name) is not str_:
        raise error(f"{event}: a path that is not plain")
    if event == "open" and name in devices:
        return
    if name[:1] == "/" and not f"{name}/".startswith(roots):
        raise error(f"{event}: a path outside the folder")
    own, depth = name.removeprefix(roots[0]), 0
    for part in own.split("/"):
        if part == "..":
            if depth == 0 or own[:1] == "/":
                raise error(f"{event}: a path that may lead outside the folder")
            depth -= 1
        depth += part not in ("", ".", "..")
        if part.lower() in packages:
            raise error(f"{event}: installed packages are not for programs")


def library_extensions(folders: tuple[str, ...]) -> frozenset[str]:
    """The files of the standard library's extension modules that a program may load."""
    extensions = set()
    for folder in folders:
        if os.path.basename(folder) == "lib-dynload" and os.path.isdir(folder):
            names = [name for name in os.listdir(folder) if not name.startswith(REFUSED_EXTENSIONS)]
            extensions |= {f"{folder}/{name}" for name in names if name.partition(".")[0] not in REFUSED_MODULES}
    return frozenset(extensions)


def install_hook(folder: str, readable: tuple[str, ...]) -> None:
    """Refuse network, processes, and files outside a folder from here on; a hook cannot be removed.

    Args:
        folder: The absolute path, without links, of the only folder to write in.
        readable: Further folders to read from.
    """

    def hook(
        event: str,
        args: tuple[Any, ...],
        folder: tuple[str, ...] = (f"{folder}/",),
        readable: tuple[str, ...] = tuple(f"{path}/" for path in (folder, *readable)),
        extensions: frozenset[str] = library_extensions(readable),
        writes: Any = itertools.count(),  # noqa: B008 - one for all events
        names: Any = (REFUSED_EVENTS, READING, CHANGING, MAX_WRITES, WRITE_FLAGS),
        does: Any = (Forbidden, refuse_import, refuse_attribute, refuse_path, next),
    ) -> None:
        refused, reading, changing, max_writes, write_flags = names
        forbidden, judge_import, judge_attribute, judge_path, next_ = does
        if event.startswith(refused):
            raise forbidden(event)
        if event == "import":
            judge_import(args[0], args[1], extensions)
        if event in ("object.__setattr__", "object.__delattr__"):
            judge_attribute(args[0], args[1])
        opened = event == "open"
        if not (opened or event in reading or event in changing):
            return
        changes = event in changing or (opened and args[2] & write_flags != 0)
        if changes and next_(writes) >= max_writes:
            raise forbidden(f"{event}: more than {max_writes} changes of files")
        # os.open (no mode) could give a folder's descriptor, relative to which paths mean other files
        roots = folder if changes or (opened and args[1] is None) else readable
        for path in args[:2] if event == "os.rename" else args[:1]:
            judge_path(event, path, roots)

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
    leave = [partial(os.write, report, token), partial(os._exit, 0)]
    # the program's own threads have the usual stack, or a few of them would fill the address space
    steps: list[Any] = [partial(started.append, None), partial(_thread.stack_size, 0), program, *leave]
    _thread.stack_size(STACK_BYTES)
    _thread.start_new_thread(deque, (map(call, steps), 0))


def load_modules() -> None:
    """Load what a program may use, and take away the only way to load a built-in module without an audit event."""
    with catch_warnings(action="ignore"):  # of deprecated modules; they would be taken for a report
        for name in (*LOADED_BEFORE, *sys.builtin_module_names):
            if name not in REFUSED_MODULES:
                with suppress(ImportError):
                    __import__(name)
    del _imp.create_builtin


def main() -> None:
    """Run the program on standard input and report how it ended."""
    report = os.dup(1)
    write, leave, rest, running = os.write, os._exit, sleep, _thread._count
    started: list[None] = []
    reason = [b"exited: the program ended before its tests did"]
    note_into(reason)
    load_modules()
    sys.pycache_prefix = f"{sys.argv[1]}/no-bytecode"  # so that imports do without marshal, which is refused
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
