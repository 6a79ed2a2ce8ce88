"""The sandbox of generated programs: what counts as passed, what is refused, and that nothing is left behind.

Programs that attack it do so with the means at hand: what they must not do is checked from outside. The kernel's layers
are tested without the audit hook, by a runner that has ctypes.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from fullrank.errors import ConfigError, UnsupportedError
from fullrank.evaluation import sandbox, sandbox_confine
from fullrank.evaluation.sandbox import Outcome, _remove

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's filter is Linux's")
EARLY = "exited: the program ended before its tests did"
run_program = functools.partial(sandbox.run_program, timeout_s=100.0)
"""With time enough for a program that ends by itself, however busy the machine is."""


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After every test the programs' folders and processes are gone."""
    folders = tmp_path / "folders"
    folders.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folders))
    others = psutil.Process().children(recursive=True)
    yield
    assert list(folders.iterdir()) == []
    assert [child for child in psutil.Process().children(recursive=True) if child not in others] == []


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A file that no program may change."""
    path = tmp_path / "outside" / "file"
    path.parent.mkdir()
    path.write_text("untouched")
    return path


def assert_untouched(outside: Path) -> None:
    assert [path.name for path in outside.parent.iterdir()] == ["file"]
    assert outside.read_text() == "untouched"
    assert outside.stat().st_mode & 0o777 == 0o644


def test_passed_and_failed() -> None:
    assert run_program("assert 1 + 1 == 2") == Outcome(passed=True, reason="passed")
    assert run_program("assert 1 + 1 == 3") == Outcome(passed=False, reason="failed: AssertionError")
    assert run_program("assert False, 'two\\nlines'").reason == "failed: AssertionError: two lines"
    assert run_program("x = [1][2]").reason == "failed: IndexError: list index out of range"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("def f(:", "failed: SyntaxError"),
        ("x = '''unclosed", "failed: SyntaxError"),
        ("\0", "failed: SyntaxError"),
        ("x = '\ud800'", "failed: UnicodeEncodeError"),
        ("class E(Exception):\n    def __str__(self): raise ValueError\nraise E", ""),
        ("def f(): f()\nf()", "failed: RecursionError"),
        ("raise KeyboardInterrupt", "failed: KeyboardInterrupt"),
        ("raise type('passed', (Exception,), {})('passed')", "failed: passed: passed"),
        ("input()", "failed: EOFError"),
    ],
)
def test_reasons(source: str, reason: str) -> None:
    outcome = run_program(source)
    assert not outcome.passed
    assert outcome.reason.startswith(reason)


@pytest.mark.parametrize(
    "source",
    [
        "import sys; sys.exit(0)",
        "raise SystemExit",
        "import os; os._exit(0)",
        "import threading, os\nthreading.Thread(target=lambda: os._exit(0)).start()\nwhile True: pass",
        "import atexit, os\natexit.register(os._exit, 0)\natexit._run_exitfuncs()",
    ],
)
def test_leaving_before_the_end_is_not_passing(source: str) -> None:
    assert run_program(f"{source}\nassert False") == Outcome(passed=False, reason=EARLY)
    assert run_program(source) == Outcome(passed=False, reason=EARLY)


def test_an_exit_that_is_caught_is_no_exit() -> None:
    assert run_program("import sys\ntry: sys.exit(1)\nexcept BaseException: pass").passed


FORGERIES = {
    "print": "print('passed'); import sys; sys.stdout.flush(); sys.exit(0)",
    "every descriptor": """
import os
for descriptor in range(64):
    for text in (b"passed", b"ready\\n", b"failed: passed"):
        try: os.write(descriptor, text)
        except OSError: pass
os._exit(0)
""",
    "standard input again": """
import os, sys
for read in (lambda: os.pread(0, 99, 0), lambda: sys.stdin.seek(0) or sys.stdin.read().encode(), lambda: b"x"):
    for descriptor in range(3, 20):
        try: os.write(descriptor, read().partition(b"\\n")[0])
        except (OSError, ValueError): pass
os._exit(0)
""",
    "frames": """
import os, sys
frame = sys._getframe()
assert frame.f_back is None, "FORGED"
os._exit(0)
""",
    "frames of other threads": "import sys; frames = sys._current_frames()",
    "objects": """
import gc, os
from functools import partial
for item in gc.get_objects():
    if type(item) is partial: item()
""",
    "collection callbacks": """
import gc, os, sys, time
def seen(phase, info):
    frame = sys._getframe(1)
    while frame:
        for value in list(frame.f_locals.values()):
            if type(value) is bytes and len(value) == 32:
                for descriptor in range(3, 20):
                    try: os.write(descriptor, value)
                    except OSError: pass
        frame = frame.f_back
gc.callbacks.append(seen)
gc.set_threshold(1)
time.sleep(0.2)
os._exit(0)
""",
    "the runner's own names": """
import __main__, os, sys, _thread, collections, builtins
for module in (__main__, sys, _thread, collections, builtins, os):
    for name in ("main", "start_program", "exec", "deque", "call", "partial", "_exit", "write", "sleep", "_count"):
        if hasattr(module, name): setattr(module, name, lambda *a, **k: 0)
assert False
""",
    "patched built-ins": """
import builtins, sys
builtins.AssertionError = type("Never", (Exception,), {})
builtins.exit = builtins.quit = builtins.isinstance = builtins.issubclass = lambda *a: True
sys.unraisablehook = sys.excepthook = print
assert False
""",
    "trace": "import sys; sys.settrace(lambda *a: None)",
    "another hook": "import sys; sys.addaudithook(lambda *a: None); assert False",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_success_cannot_be_forged(name: str) -> None:
    outcome = run_program(FORGERIES[name])
    assert not outcome.passed
    assert "FORGED" not in outcome.reason


def test_time() -> None:
    for source in ("while True: pass", "import time; time.sleep(999)", "import threading; threading.Event().wait()"):
        start = time.monotonic()
        assert run_program(source, timeout_s=0.3) == Outcome(passed=False, reason="timed out")
        assert time.monotonic() - start < 100
    assert run_program("import time; time.sleep(0.4)").passed


def test_a_program_that_hides_from_the_clock() -> None:
    """It closes the pipe, so that its end could not be told, and goes on."""
    outcome = run_program("import os\nos.closerange(0, 60)\nwhile True: pass", timeout_s=0.5)
    assert not outcome.passed


def test_signals_do_not_hold_off_the_end() -> None:
    source = "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass"
    assert run_program(source, timeout_s=0.3).reason == "timed out"


@LINUX
@pytest.mark.parametrize(
    "source",
    [
        "x = [0] * 10**9",
        "x = []\nwhile True: x.append(bytearray(1 << 20))",
        "import mmap; mmap.mmap(-1, 2 << 30)",
    ],
)
def test_memory(source: str) -> None:
    outcome = run_program(source)
    assert not outcome.passed
    assert outcome.reason == "out of memory" or "Cannot allocate memory" in outcome.reason


def test_memory_is_what_was_given() -> None:
    source = "x = bytearray(400 << 20)"
    assert run_program(source).passed
    if sys.platform == "linux":
        assert run_program(source, memory_bytes=300 << 20).reason == "out of memory"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import os\nwhile True: os.fork()", "forbidden: os.fork"),
        ("import os; os.system('true')", "forbidden: os.system"),
        ("import os; os.execv('/bin/true', ['true'])", "forbidden: os.exec"),
        ("import os; os.posix_spawn('/bin/true', ['true'], {})", "forbidden: os.posix_spawn"),
        ("import subprocess; subprocess.run(['true'])", "forbidden: subprocess.Popen"),
        ("import multiprocessing as m; m.Process(target=print).start()", "forbidden: os.fork"),
        ("import os; os.kill(os.getppid(), 9)", "forbidden: os.kill"),
        ("import os; os.killpg(0, 9)", "forbidden: os.killpg"),
        ("import socket; socket.socket()", "forbidden: socket."),
        ("import socket; socket.create_connection(('127.0.0.1', 9))", "forbidden: socket."),
        ("import urllib.request as u; u.urlopen('http://127.0.0.1:9')", "failed: URLError: <urlopen error socket."),
        ("import ctypes", "forbidden: "),
        ("import _ctypes", "forbidden: "),
        ("import sqlite3", "forbidden: "),
        ("import resource as r; r.setrlimit(r.RLIMIT_CORE, (1, 1))", "forbidden: resource.setrlimit"),
        ("(lambda: 0).__code__.replace(co_consts=())", "forbidden: code.__new__"),
        ("import os; os.symlink('/', 'root')", "forbidden: os.symlink"),
        ("import os; os.chdir('/')", "forbidden: os.chdir"),
        ("open('/etc/passwd')", "forbidden: open"),
        ("open('/proc/self/mem', 'rb')", "forbidden: open"),
        ("open('../x')", "forbidden: open"),
        ("import os; os.listdir('/')", "forbidden: os.listdir"),
        ("import os; os.open('/usr', os.O_RDONLY)", "forbidden: open"),
    ],
)
def test_forbidden(source: str, reason: str) -> None:
    outcome = run_program(source)
    assert not outcome.passed
    assert outcome.reason.startswith(reason)


DYNLOAD = Path(os.__file__).parent / "lib-dynload"
LOAD = """
import sys, os, _imp
from importlib.machinery import ModuleSpec
library = next(path for path in sys.path if path.endswith("lib-dynload"))
def find(name): return next(f"{library}/{file}" for file in os.listdir(library) if file.startswith(name + "."))
"""
EXTENSIONS = {  # what to load, and whether it is refused
    "another name": ("_imp.create_dynamic(ModuleSpec('x._ctypes', None, origin=find('_ctypes')))", True),
    "another name, whole": ("_imp.create_dynamic(ModuleSpec('x', None, origin=find('_ctypes')))", True),
    "another path": ("_imp.create_dynamic(ModuleSpec('x', None, origin=library + '/./' + find('_ctypes')[1:]))", True),
    "a zero": ("_imp.create_dynamic(ModuleSpec('x._bz2', None, origin=find('_ctypes') + chr(0) + find('_bz2')))", True),
    "a copy": (
        "import shutil; shutil.copyfile(find('_bz2'), '_bz2.so')\n"
        "_imp.create_dynamic(ModuleSpec('_bz2', None, origin=os.getcwd() + '/_bz2.so'))",
        True,
    ),
    "the library's": ("_imp.create_dynamic(ModuleSpec('_bz2', None, origin=find('_bz2'))); import bz2", False),
}


@pytest.mark.skipif(not DYNLOAD.is_dir(), reason="extensions are built into this Python")
@pytest.mark.parametrize("name", EXTENSIONS)
def test_extension_modules(name: str) -> None:
    source, refused = EXTENSIONS[name]
    found = sorted(path.name for path in DYNLOAD.glob("_bz2.*"))
    if not found:
        pytest.skip("this Python has no _bz2")
    outcome = run_program(LOAD + source)
    assert outcome.reason.startswith("forbidden: this ") if refused else outcome.passed, outcome.reason


@pytest.mark.parametrize("name", ["__code__", "__defaults__", "__kwdefaults__"])
def test_the_functions_of_the_hook_cannot_be_changed(name: str) -> None:
    """Those that a refusal's traceback shows; the program's own may get other defaults."""
    source = f"""
try: open("/etc/passwd")
except OSError as error: trace = error.__traceback__
while trace.tb_next: trace = trace.tb_next
values = [value for frame in (trace.tb_frame, trace.tb_frame.f_back) for value in frame.f_locals.values()]
functions = [f for value in values if type(value) is tuple for f in value if type(f) is type(lambda: 0)]
assert functions, "NONE"
def own(x=1): return x
own.__defaults__ = (2,)
assert own() == 2
setattr(functions[-1], {name!r}, own.__code__ if {name!r} == "__code__" else None)
"""
    assert run_program(source).reason.startswith("forbidden: "), run_program(source).reason


@pytest.mark.parametrize(
    "source",
    [
        "import marshal; marshal.loads(marshal.dumps(compile('', '', 'exec')))",
        "import marshal; open('x', 'wb').write(marshal.dumps(1)); marshal.load(open('x', 'rb'))",
        "import marshal, os, sys; sys.path.insert(0, os.getcwd()); from importlib.util import MAGIC_NUMBER as m\n"
        "open('own.pyc', 'wb').write(m + bytes(12) + marshal.dumps(compile('', '', 'exec'))); import own",
    ],
)
def test_no_bytecode(source: str) -> None:
    assert run_program(source).reason.startswith("forbidden: marshal.load")


def test_no_bytecode_as_a_frozen_module() -> None:
    source = "import marshal, _imp; _imp.get_frozen_object('x', marshal.dumps(compile('', '', 'exec')))"
    assert not run_program(source).passed  # by an error of the interpreter, which hides ours


def test_built_in_modules() -> None:
    assert run_program("import sys\nfor name in ('math', '_io', 'time', 'faulthandler'): __import__(name)").passed
    source = "import _imp; from importlib.machinery import ModuleSpec as S; _imp.create_builtin(S('_io', None))"
    assert run_program(source).reason.startswith("failed: AttributeError: module '_imp' has no attribute")


def test_installed_packages_are_not_for_programs() -> None:
    folder = sysconfig.get_path("purelib")
    base = sysconfig.get_path("purelib", vars={"base": sys.base_prefix, "platbase": sys.base_prefix})
    for path in (folder, base):
        outcome = run_program(f"import sys; sys.path.append({path!r}); import numpy")
        assert outcome.reason == "failed: ModuleNotFoundError: No module named 'numpy'"
        assert run_program(f"import os; os.listdir({path!r})").reason.startswith("forbidden: os.listdir")
        assert run_program(f"open({path + '/numpy/version.py'!r})").reason.startswith("forbidden: open")


def test_paths_with_dots() -> None:
    source = (
        "import os\nos.mkdir('a'); open('a/../b', 'w').close(); open(os.getcwd() + '/a/../b').close(); open('a/./../b')"
    )
    assert run_program(source) == Outcome(passed=True, reason="passed")
    for path in ("a/../../x", "../x", "./../x", "{here}/a/../../x", "{library}/../../x"):
        source = (
            f"import os\nos.mkdir('a')\nopen({path!r}.format(here=os.getcwd(), library=os.path.dirname(os.__file__)))"
        )
        assert run_program(source).reason.startswith("forbidden: open"), path


def test_a_path_that_only_looks_like_a_device() -> None:
    source = "class S(str):\n    __hash__ = lambda self: hash('/dev/null')\n    __eq__ = lambda self, other: True\n"
    assert run_program(source + "open(S('/etc/passwd'))").reason.startswith("forbidden: open")


def test_a_pool_of_threads() -> None:
    source = "from concurrent.futures import ThreadPoolExecutor\nfrom time import sleep\n"
    source += "with ThreadPoolExecutor(8) as pool: assert len(list(pool.map(lambda n: sleep(0.01), range(32)))) == 32"
    assert run_program(source) == Outcome(passed=True, reason="passed")


def test_a_refusal_that_is_caught_stays_a_refusal() -> None:
    """No process comes of a fork bomb, however it is wrapped."""
    source = """
import os, subprocess
for attempt in (os.fork, os.forkpty, lambda: os.system("true"), lambda: subprocess.Popen("true")):
    for _ in range(50):
        try: attempt()
        except PermissionError: continue
        raise RuntimeError("a process came of it")
"""
    assert run_program(source) == Outcome(passed=True, reason="passed")


HARMS = (
    "open({path!r}, 'w').write('x')",
    "open({path!r}, 'a').write('x')",
    "open({path!r}, 'r+').write('x')",
    "open({path!r}.encode(), 'wb').write(b'x')",
    "import pathlib; pathlib.Path({path!r}).write_text('x')",
    "import os; os.open({path!r}, os.O_WRONLY | os.O_TRUNC)",
    "import os; os.open('file', os.O_WRONLY | os.O_TRUNC, dir_fd=os.open({folder!r}, os.O_RDONLY))",
    "import os; os.remove({path!r})",
    "import os; os.unlink({path!r}.encode())",
    "import os; os.truncate({path!r}, 0)",
    "import os; os.chmod({path!r}, 0)",
    "import os; os.rename({path!r}, 'mine')",
    "import os; open('mine', 'w').close(); os.replace('mine', {path!r})",
    "import os; open('mine', 'w').close(); os.link('mine', {folder!r} + '/new')",
    "import os; os.symlink({path!r}, 'link'); open('link', 'w')",
    "import os; os.mkdir({folder!r} + '/new')",
    "import os; os.mkfifo({folder!r} + '/new')",
    "import shutil; shutil.rmtree({folder!r})",
    "import os; os.chdir({folder!r}); os.remove('file')",
    "import tempfile; tempfile.NamedTemporaryFile(dir={folder!r}, delete=False)",
    "import dbm.dumb as d; d.open({folder!r} + '/new', 'n')",
    "import ssl; ssl.create_default_context().keylog_filename = {folder!r} + '/new'",
    "import io, os; io.FileIO(os.path.relpath({path!r}), 'w')",
    # attempts to blind the hook
    "import builtins\nfor n in ('type', 'str', 'bytes', 'int', 'next'): setattr(builtins, n, lambda *a: 0)\n"
    "open({path!r}, 'w')",
    "class S(str):\n    def startswith(self, *a): return True\n    def split(self, *a): return []\n"
    "    __eq__ = lambda self, other: True\n    __hash__ = str.__hash__\nopen(S({path!r}), 'w').write('x')",
    "class P:\n    def __fspath__(self): return {path!r}\nopen(P(), 'w').write('x')",
    "try: open({path!r}, 'w')\nexcept OSError as e:\n    f = e.__traceback__\n    while f.tb_next: f = f.tb_next\n"
    "    for name in ('folder', 'names', 'refused'): f.tb_frame.f_locals[name] = '/'\n"
    "    f.tb_frame.f_globals.clear()\nopen({path!r}, 'w').write('x')",
    "def away(*a): pass\nimport sys\nfor name in ('audit', 'addaudithook'): setattr(sys, name, away)\n"
    "open({path!r}, 'w').write('x')",
    "import _io; _io.open({path!r}, 'w').write('x')",
    "import posix; posix.unlink({path!r})",
    "import _thread\ndone = _thread.allocate_lock()\ndone.acquire()\ndef harm():\n    try: open({path!r}, 'w')\n"
    "    finally: done.release()\n_thread.start_new_thread(harm, ())\ndone.acquire()\nassert False",
)


@pytest.mark.parametrize("harm", HARMS)
def test_nothing_outside_the_folder_is_changed(harm: str, outside: Path) -> None:
    outcome = run_program(harm.format(path=str(outside), folder=str(outside.parent)))
    assert_untouched(outside)
    assert not outcome.passed


@pytest.mark.parametrize("harm", HARMS)
def test_without_the_sandbox_it_is(harm: str, outside: Path, tmp_path: Path) -> None:
    """The programs above do what they try, so that the test above means something."""
    source = harm.format(path=str(outside), folder=str(outside.parent))
    (tmp_path / "own").mkdir()
    subprocess.run([sys.executable, "-c", source], cwd=tmp_path / "own", capture_output=True, check=False)
    with pytest.raises((AssertionError, OSError)):
        assert_untouched(outside)


def test_what_programs_may_do() -> None:
    source = """
import collections, dataclasses, decimal, enum, functools, hashlib, io, itertools, json, math, os, random, re, string
import tempfile, threading, typing, unittest, doctest
assert os.listdir() == [] and dict(os.environ) == {"PYTHONHASHSEED": "0"} or dict(os.environ).keys() <= {
    "PYTHONHASHSEED", "LC_CTYPE"}
with open("own", "w") as file: file.write("text")
with open("own") as file: assert file.read() == "text"
os.mkdir("folder"); os.rename("own", "folder/own"); os.remove("folder/own"); os.rmdir("folder")
with tempfile.TemporaryDirectory() as folder:
    with open(os.path.join(folder, "x"), "w") as file: file.write("y")
with open(os.devnull, "w") as file: file.write("gone")
point = collections.namedtuple("point", "x y", defaults=(0,))(1)
@dataclasses.dataclass
class Own: x: int = 1
assert Own() == Own(1) and point == (1, 0)
seen = []
threads = [threading.Thread(target=seen.append, args=(n,)) for n in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert sorted(seen) == list(range(8))
def deep(n): return n and 1 + deep(n - 1)
import sys; sys.setrecursionlimit(30000); assert deep(20000) == 20000
"""
    assert run_program(source) == Outcome(passed=True, reason="passed")


def test_a_main_block_does_not_run() -> None:
    assert run_program("if __name__ == '__main__': raise ValueError").passed


def test_hashes_do_not_change_from_run_to_run() -> None:
    assert run_program(f"assert hash('text') == {_hash_of_text()}").passed


def _hash_of_text() -> int:
    code = [sys.executable, "-c", "print(hash('text'))"]
    return int(subprocess.run(code, env={"PYTHONHASHSEED": "0"}, capture_output=True, check=True).stdout)


def test_output_goes_nowhere(capfd: pytest.CaptureFixture[str]) -> None:
    source = "import os, sys\nfor _ in range(200):\n    os.write(1, b'x' * 10**6); sys.stderr.write('y' * 10**6)"
    assert run_program(source).passed
    assert capfd.readouterr() == ("", "")


def test_a_flooded_pipe_ends_the_program() -> None:
    """A program that finds the pipe cannot fill this process's memory with it."""
    source = "import os\nwhile True:\n    for n in range(3, 9):\n        try: os.write(n, b'x' * 10**6)\n"
    source += "        except OSError: pass"
    outcome = run_program(source, timeout_s=5)
    assert not outcome.passed
    assert len(outcome.reason) < 200


def test_what_a_program_writes_is_bounded() -> None:
    assert "File too large" in run_program("open('a', 'wb').write(bytes(8 << 20))").reason
    assert run_program("for n in range(999): open(str(n), 'w').close()").reason.startswith("forbidden: open: more than")
    assert "Too many open files" in run_program("files = [open('a', 'w') for _ in range(99)]").reason


def test_folders_with_paths_longer_than_the_system_takes_are_removed() -> None:
    source = "import os\nat = os.open('.', os.O_RDONLY)\nfor n in range(30):\n    os.mkdir('x' * 250, dir_fd=at)\n"
    source += "    new = os.open('x' * 250, os.O_RDONLY, dir_fd=at); os.close(at); at = new\n"
    assert run_program(source) == Outcome(passed=True, reason="passed")


def test_an_outcome_is_told_even_where_its_folder_cannot_be_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _remove(tmp_path / "absent")
    assert "cannot be removed" in caplog.text


def test_folders_are_removed_whatever_their_modes() -> None:
    source = "import os\nos.mkdir('d', 0o300); open('d/f', 'w').close(); os.mkdir('d/e', 0o300)\n"
    source += "open('d/e/f', 'w').close(); os.mkdir('none', 0)\nfor n in range(100): os.mkdir('x' + '/x' * n)"
    assert run_program(source) == Outcome(passed=True, reason="passed")


@pytest.mark.parametrize(
    ("name", "value"), [("timeout_s", 0.0), ("timeout_s", float("nan")), ("memory_bytes", 1 << 20)]
)
def test_bounds(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        run_program("", **{name: value})  # type: ignore[arg-type]


def test_no_sandbox_no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(UnsupportedError, match="cannot run generated programs"):
        run_program("")


@LINUX
def test_a_machine_without_the_filter_is_refused() -> None:
    settings = {"folder": "/tmp", "memory_bytes": 1 << 30, "cpu_s": 5, "runner": "/none"}
    code = (
        "import platform, sys\nsys.path.insert(0, sys.argv[1])\nimport sandbox_confine as c\n"
        "platform.machine = lambda: 'riscv64'\n"
        "try: c.confine(**__import__('json').loads(sys.argv[2]))\nexcept c.Unavailable as e: print(e)"
    )
    folder = str(Path(sandbox_confine.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", code, folder, json.dumps(settings)], capture_output=True, text=True, check=True
    )
    assert "x86_64 and aarch64, not riscv64" in done.stdout


@LINUX
def test_programs_end_with_who_started_them(tmp_path: Path) -> None:
    """A killed evaluation leaves no program behind, not even one that sleeps."""
    code = (
        "import tempfile, sys\nfrom fullrank.evaluation.sandbox import run_program\n"
        "tempfile.tempdir = sys.argv[1]\nrun_program('import time; time.sleep(500)', timeout_s=500)"
    )
    (tmp_path / "killed").mkdir()
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "killed")])
    try:
        child = _wait_for(lambda: _program_of(parent.pid))
    finally:
        parent.kill()
        parent.wait()
    _wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def _program_of(pid: int) -> psutil.Process | None:
    """The program that a process has started, once it is confined."""
    for child in psutil.Process(pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # another child, which came and went
            if "sandbox_runner.py" in " ".join(child.cmdline()):
                return child
    return None


def _wait_for(condition: Any, seconds: float = 300.0) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError("it did not happen")


# the kernel's layers alone

ATTACK = """
import ctypes, json, os, resource, signal, socket, subprocess, sys, threading
folder, spec = sys.argv[1], json.load(sys.stdin)
libc = ctypes.CDLL(None, use_errno=True)
results = {}
def attempt(name, action):
    try: action(); results[name] = 0
    except OSError as error: results[name] = error.errno
def raw(number):
    if libc.syscall(number, *[ctypes.c_long(-1)] * 6) != -1: return 0
    return ctypes.get_errno()
results["raw"] = {name: raw(number) for name, number in spec["numbers"].items()}
attempt("fork", lambda: os.fork() or os._exit(0))
attempt("run", lambda: subprocess.run([sys.executable, "-c", ""]))
attempt("spawn", lambda: os.posix_spawn("/bin/true", ["true"], {}))
attempt("execv", lambda: os.execv("/bin/true", ["true"]))
attempt("execv itself", lambda: os.execv(sys.executable, [sys.executable, "-c", ""]))
attempt("socket", socket.socket)
attempt("kill parent", lambda: os.kill(os.getppid(), 0))
attempt("kill all", lambda: os.kill(-1, 0))
attempt("kill itself", lambda: os.kill(os.getpid(), 0))
attempt("limits read", lambda: resource.prlimit(0, resource.RLIMIT_CORE))
attempt("limits set", lambda: resource.prlimit(0, resource.RLIMIT_CORE, (0, 0)))
attempt("thread", lambda: threading.Thread(target=int).start())
for name, path in (("inside", "own"), ("outside", spec["outside"]), ("null", "/dev/null")):
    attempt("write " + name, lambda: open(path, "w").close())
for name in ("read outside", "read shadow", "environment"):
    attempt(name, lambda: open(spec[name], "rb").close())
attempt("list", lambda: os.listdir(os.path.dirname(spec["outside"])))
attempt("read inside", lambda: open("own").close())
attempt("library", lambda: __import__("fractions"))
attempt("random", lambda: open("/dev/urandom", "rb").read(1))
attempt("utime", lambda: os.utime(spec["outside"], (0, 0)))
attempt("nice", lambda: os.setpriority(os.PRIO_PROCESS, os.getppid(), 1))
attempt("affinity", lambda: os.sched_setaffinity(os.getppid(), {0}))
attempt("remove outside", lambda: os.remove(spec["outside"]))
attempt("truncate outside", lambda: os.truncate(spec["outside"], 0))
attempt("make outside", lambda: os.mkdir(spec["outside"] + "d"))
attempt("chmod outside", lambda: os.chmod(spec["outside"], 0))
attempt("remove inside", lambda: os.remove("own"))
results["limits"] = [resource.getrlimit(getattr(resource, "RLIMIT_" + n)) for n in spec["limits"]]
print(json.dumps(results))
"""
EPERM, ENOSYS, EACCES = 1, 38, 13


@pytest.fixture
def attacked(tmp_path: Path, outside: Path) -> dict[str, Any]:
    """What a runner with ctypes and without a hook can do."""
    folder = tmp_path / "own"
    folder.mkdir()
    (tmp_path / "attack.py").write_text(ATTACK)
    settings = {"folder": str(folder), "memory_bytes": 1 << 30, "cpu_s": 20, "runner": str(tmp_path / "attack.py")}
    machine = platform.machine()
    calls = {**sandbox_confine.REFUSED, "clone3": sandbox_confine.CLONE3, "execve": sandbox_confine.EXECVE}
    numbers = {name: call._asdict()[machine] for name, call in calls.items()}
    spec = {
        "numbers": {name: number for name, number in numbers.items() if number is not None},
        "outside": str(outside),
        "read outside": str(outside),
        "read shadow": "/etc/shadow",
        "environment": f"/proc/{os.getpid()}/environ",
        "limits": ["CPU", "AS", "FSIZE", "NOFILE", "NPROC", "CORE"],
    }
    done = subprocess.run(
        [sys.executable, "-I", "-S", sandbox_confine.__file__, json.dumps(settings)],
        input=json.dumps(spec),
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout)
    return results


@LINUX
def test_the_kernel_refuses(attacked: dict[str, Any], outside: Path) -> None:
    assert len(attacked["raw"]) > 60
    assert {name: code for name, code in attacked["raw"].items() if code != EPERM} == {"clone3": ENOSYS}
    refused = ("fork", "run", "spawn", "execv", "execv itself", "socket", "kill parent", "kill all", "limits set")
    refused += ("utime", "nice", "affinity")
    assert {name: attacked[name] for name in refused} == dict.fromkeys(refused, EPERM)
    allowed = ("kill itself", "limits read", "thread", "write inside", "write null", "remove inside")
    allowed += ("read inside", "library", "random")
    assert {name: attacked[name] for name in allowed} == dict.fromkeys(allowed, 0)
    assert attacked["chmod outside"] == EPERM
    wanted = [20, 1 << 30, sandbox_confine.MAX_FILE_BYTES, sandbox_confine.MAX_OPEN_FILES]
    assert attacked["limits"][:4] == [[value, value] for value in wanted]
    assert attacked["limits"][4][1] <= sandbox_confine.MAX_TASKS
    assert attacked["limits"][5] == [0, 0]


@LINUX
def test_landlock_refuses(attacked: dict[str, Any], outside: Path) -> None:
    if ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1) < 3:
        pytest.skip("this kernel has no Landlock that knows truncation")
    refused = ("write outside", "remove outside", "truncate outside", "make outside")
    refused += ("read outside", "read shadow", "environment", "list")
    assert {name: attacked[name] for name in refused} == dict.fromkeys(refused, EACCES)
    assert_untouched(outside)


# the filter as a program: the machine that this test does not run on is tested too


def decide(code: list[sandbox_confine.Instruction], machine: str, number: int, *arguments: int) -> int:
    """What the kernel's interpreter of classic BPF answers."""
    words = {0: number, 4: sandbox_confine.AUDIT_MACHINES[machine]}
    for index, value in enumerate((*arguments, *[0] * 6)[:6]):
        words |= {16 + 8 * index: value & 0xFFFFFFFF, 20 + 8 * index: value >> 32 & 0xFFFFFFFF}
    value, at = 0, 0
    while True:
        operation, true, false, operand = code[at]
        at += 1
        if operation == sandbox_confine.RETURN:
            return operand
        if operation == sandbox_confine.LOAD:
            value = words[operand]
            continue
        holds = {
            sandbox_confine.EQUAL: value == operand,
            sandbox_confine.AT_LEAST: value >= operand,
            sandbox_confine.ANY_BIT: value & operand != 0,
        }[operation]
        at += true if holds else false


NUMBERS = {  # written down from the kernel's tables, not taken from the code that is tested
    "x86_64": {"read": 0, "openat": 257, "mmap": 9, "futex": 202, "socket": 41, "fork": 57, "vfork": 58, "ptrace": 101}
    | {"clone": 56, "clone3": 435, "execve": 59, "execveat": 322, "kill": 62, "tgkill": 234, "prlimit64": 302}
    | {"connect": 42, "socketpair": 53, "io_uring_setup": 425, "exit_group": 231, "getrandom": 318},
    "aarch64": {"read": 63, "openat": 56, "mmap": 222, "futex": 98, "socket": 198, "ptrace": 117, "clone": 220}
    | {"clone3": 435, "execve": 221, "execveat": 281, "kill": 129, "tgkill": 131, "prlimit64": 261}
    | {"connect": 203, "socketpair": 199, "io_uring_setup": 425, "exit_group": 94, "getrandom": 278},
}
PID, ADDRESS = 4321, 0x7F12_3456_7890
THREAD, SIGCHLD = 0x3D0F00, signal.SIGCHLD


@pytest.mark.parametrize("machine", NUMBERS)
def test_decisions_of_the_filter(machine: str) -> None:
    code = sandbox_confine.syscall_filter(machine, pid=PID, program_address=ADDRESS)
    names = NUMBERS[machine]
    allow, refuse = 0x7FFF0000, 0x00050001

    def answer(name: str, *arguments: int) -> int:
        return decide(code, machine, names[name], *arguments)

    for name in ("read", "openat", "mmap", "futex", "exit_group", "getrandom"):
        assert answer(name) == allow, name
    for name in ("socket", "connect", "socketpair", "ptrace", "execveat", "io_uring_setup"):
        assert answer(name) == refuse, name
    for name in {"fork", "vfork"} & names.keys():
        assert answer(name) == refuse, name
    assert [answer("clone", flags) for flags in (SIGCHLD, THREAD, 0x4111)] == [refuse, allow, refuse]
    assert answer("clone3") == 0x00050000 | ENOSYS
    addresses = (ADDRESS, ADDRESS + 1, ADDRESS + (1 << 32), ADDRESS & 0xFFFFFFFF)
    assert [answer("execve", address) for address in addresses] == [allow, refuse, refuse, refuse]
    for name in ("kill", "tgkill"):
        assert [answer(name, pid) for pid in (PID, 1, 0, -1)] == [allow, refuse, refuse, refuse]
    assert [answer("prlimit64", 0, 7, new) for new in (0, 8, 1 << 40)] == [allow, refuse, refuse]


def test_another_way_of_calling_is_refused() -> None:
    code = sandbox_confine.syscall_filter("x86_64", pid=PID, program_address=ADDRESS)
    assert decide(code, "x86_64", 0x40000000 + 41) == 0x00050001
    assert decide(code, "aarch64", 0) == 0x80000000


@pytest.mark.slow
def test_many_at_once() -> None:
    sources = ["x = 1", "assert False", "import os; os._exit(0)", "while True: pass"] * 10
    limits = [100.0, 100.0, 100.0, 1.0] * 10
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda source, limit: run_program(source, timeout_s=limit), sources, limits)
        reasons = [outcome.reason for outcome in found]
    assert reasons == ["passed", "failed: AssertionError", EARLY, "timed out"] * 10
