"""First program of a sandbox: asks the kernel for limits that outlive `exec`, then becomes the second.

Run as a script by `sandbox.py`, in a process of its own, with the standard library alone. The second program
(`sandbox_runner.py`) replaces this one, so that the process that runs untrusted code has never loaded `ctypes`.

On Linux: resource limits, Landlock where the kernel has it (outside the folder no writing, and no reading but of the
interpreter and the libraries), and a seccomp filter (no network, no processes, no changes to the system). Elsewhere:
resource limits alone. The syscall numbers are those of Linux's unistd.h; a name without a number does not exist on that
machine.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import signal
import sys
from typing import NamedTuple

MAX_FILE_BYTES = 4 << 20
MAX_OPEN_FILES = 64
MAX_TASKS = 4096
"""Processes and threads of this user, all programs together; the kernel exempts root."""

Instruction = tuple[int, int, int, int]
"""Of classic BPF: code, jump if true, jump if false, operand."""

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
EPERM, ENOSYS = 1, 38
NUMBER_OFFSET, MACHINE_OFFSET, ARGUMENTS_OFFSET = 0, 4, 16
CLONE_THREAD = 0x10000


class Numbers(NamedTuple):
    """Numbers of one system call; None where the machine lacks it."""

    x86_64: int | None
    aarch64: int | None


AUDIT_MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32_NUMBERS = 0x40000000
"""From here on are the second names that x86_64 has for its system calls."""

CLONE, CLONE3, EXECVE = Numbers(56, 220), Numbers(435, 435), Numbers(59, 221)
KILLS = {"kill": Numbers(62, 129), "tgkill": Numbers(234, 131)}
"""Allowed to the process itself, for `abort`."""

REFUSED = {
    # network, and what could do the same without a system call for each step
    "socket": Numbers(41, 198),
    "socketpair": Numbers(53, 199),
    "connect": Numbers(42, 203),
    "bind": Numbers(49, 200),
    "listen": Numbers(50, 201),
    "accept": Numbers(43, 202),
    "accept4": Numbers(288, 242),
    "sendto": Numbers(44, 206),
    "sendmsg": Numbers(46, 211),
    "sendmmsg": Numbers(307, 269),
    "io_uring_setup": Numbers(425, 425),
    "io_uring_enter": Numbers(426, 426),
    "io_uring_register": Numbers(427, 427),
    # processes, this one's children and others
    "fork": Numbers(57, None),
    "vfork": Numbers(58, None),
    "execveat": Numbers(322, 281),
    "ptrace": Numbers(101, 117),
    "tkill": Numbers(200, 130),
    "rt_sigqueueinfo": Numbers(129, 138),
    "rt_tgsigqueueinfo": Numbers(297, 240),
    "pidfd_open": Numbers(434, 434),
    "pidfd_send_signal": Numbers(424, 424),
    "pidfd_getfd": Numbers(438, 438),
    "process_vm_readv": Numbers(310, 270),
    "process_vm_writev": Numbers(311, 271),
    "setrlimit": Numbers(160, 164),
    # files that a check of opened paths does not see
    "mknod": Numbers(133, None),
    "mknodat": Numbers(259, 33),
    "symlink": Numbers(88, None),
    "symlinkat": Numbers(266, 36),
    "link": Numbers(86, None),
    "linkat": Numbers(265, 37),
    "chmod": Numbers(90, None),
    "fchmod": Numbers(91, 52),
    "fchmodat": Numbers(268, 53),
    "fchmodat2": Numbers(452, 452),
    "chown": Numbers(92, None),
    "lchown": Numbers(94, None),
    "fchown": Numbers(93, 55),
    "fchownat": Numbers(260, 54),
    "setxattr": Numbers(188, 5),
    "lsetxattr": Numbers(189, 6),
    "fsetxattr": Numbers(190, 7),
    "removexattr": Numbers(197, 14),
    "lremovexattr": Numbers(198, 15),
    "fremovexattr": Numbers(199, 16),
    "open_by_handle_at": Numbers(304, 265),
    "utime": Numbers(132, None),
    "utimes": Numbers(235, None),
    "futimesat": Numbers(261, None),
    "utimensat": Numbers(280, 88),
    # other processes' share of the machine
    "setpriority": Numbers(141, 140),
    "sched_setparam": Numbers(142, 118),
    "sched_setscheduler": Numbers(144, 119),
    "sched_setaffinity": Numbers(203, 122),
    "sched_setattr": Numbers(314, 274),
    "ioprio_set": Numbers(251, 30),
    # memory that outlives the process or escapes its limit
    "memfd_create": Numbers(319, 279),
    "memfd_secret": Numbers(447, 447),
    "shmget": Numbers(29, 194),
    "msgget": Numbers(68, 186),
    "semget": Numbers(64, 190),
    "mq_open": Numbers(240, 180),
    "add_key": Numbers(248, 217),
    "request_key": Numbers(249, 218),
    "keyctl": Numbers(250, 219),
    # the system, for a sandbox that root starts
    "mount": Numbers(165, 40),
    "umount2": Numbers(166, 39),
    "pivot_root": Numbers(155, 41),
    "chroot": Numbers(161, 51),
    "open_tree": Numbers(428, 428),
    "move_mount": Numbers(429, 429),
    "fsopen": Numbers(430, 430),
    "fsmount": Numbers(432, 432),
    "mount_setattr": Numbers(442, 442),
    "setns": Numbers(308, 268),
    "unshare": Numbers(272, 97),
    "bpf": Numbers(321, 280),
    "perf_event_open": Numbers(298, 241),
    "userfaultfd": Numbers(323, 282),
    "fanotify_init": Numbers(300, 262),
    "init_module": Numbers(175, 105),
    "finit_module": Numbers(313, 273),
    "delete_module": Numbers(176, 106),
    "kexec_load": Numbers(246, 104),
    "kexec_file_load": Numbers(320, 294),
    "reboot": Numbers(169, 142),
    "swapon": Numbers(167, 224),
    "swapoff": Numbers(168, 225),
    "settimeofday": Numbers(164, 170),
    "clock_settime": Numbers(227, 112),
    "adjtimex": Numbers(159, 171),
    "clock_adjtime": Numbers(305, 266),
    "sethostname": Numbers(170, 161),
    "setdomainname": Numbers(171, 162),
    "quotactl": Numbers(179, 60),
    "acct": Numbers(163, 89),
    "personality": Numbers(135, 92),
}
PRLIMIT = Numbers(302, 261)
"""Reading limits is allowed, changing them is not."""


class Unavailable(Exception):  # noqa: N818 - a state of the machine, reported as a line
    """The kernel does not give what the sandbox rests on."""


def syscall_filter(machine: str, *, pid: int, program_address: int) -> list[Instruction]:
    """The seccomp filter as BPF instructions.

    Args:
        machine: ``x86_64`` or ``aarch64``, as `platform.machine` says.
        pid: The process, which may send signals to itself.
        program_address: Where the path of the second program lies in memory. `execve` of this address alone is
            allowed; no later program can know it.
    """

    def when(call: Numbers, then: list[Instruction]) -> list[Instruction]:
        value = call._asdict()[machine]
        return [] if value is None else [(EQUAL, 0, len(then), value), *then]

    def argument(index: int) -> tuple[Instruction, Instruction]:
        low = ARGUMENTS_OFFSET + 8 * index
        return (LOAD, 0, 0, low), (LOAD, 0, 0, low + 4)

    allow, refuse = (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, ERRNO | EPERM)
    low, high = argument(0)
    program = [
        (LOAD, 0, 0, MACHINE_OFFSET),
        (EQUAL, 1, 0, AUDIT_MACHINES[machine]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER_OFFSET),
        *([(AT_LEAST, 0, 1, X32_NUMBERS), refuse] if machine == "x86_64" else []),
    ]
    program += when(CLONE, [low, (ANY_BIT, 0, 1, CLONE_THREAD), allow, refuse])
    program += when(CLONE3, [(RETURN, 0, 0, ERRNO | ENOSYS)])  # its flags lie in memory: libc then takes clone
    at_address = [(EQUAL, 0, 3, program_address & 0xFFFFFFFF), high, (EQUAL, 0, 1, program_address >> 32), allow]
    program += when(EXECVE, [low, *at_address, refuse])
    for call in KILLS.values():
        program += when(call, [low, (EQUAL, 0, 1, pid), allow, refuse])
    new_low, new_high = argument(2)
    nothing_new = [new_low, (EQUAL, 0, 3, 0), new_high, (EQUAL, 0, 1, 0), allow, refuse]
    program += when(PRLIMIT, nothing_new)
    for call in REFUSED.values():
        program += when(call, [refuse])
    return [*program, allow]


def _libc() -> ctypes.CDLL:
    """The C library of this process, with error numbers."""
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    """The result of a call of the C library, or the reason why it failed."""
    if result < 0:
        raise Unavailable(f"{what} failed: {os.strerror(ctypes.get_errno())}")
    return result


class _Instruction(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint16), ("true", ctypes.c_uint8), ("false", ctypes.c_uint8), ("k", ctypes.c_uint32)]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(_Instruction))]


def install_filter(program_address: int) -> None:
    """Install the seccomp filter for this process and all it becomes.

    Raises:
        Unavailable: If the machine is unknown or the kernel refuses, or if a socket can still be made.
    """
    libc, machine = _libc(), platform.machine()
    if machine not in AUDIT_MACHINES or sys.maxsize < 2**32:
        raise Unavailable(f"the filter of system calls is written for {' and '.join(AUDIT_MACHINES)}, not {machine}")
    code = syscall_filter(machine, pid=os.getpid(), program_address=program_address)
    instructions = (_Instruction * len(code))(*(_Instruction(*line) for line in code))
    program = _Program(len(code), instructions)
    set_no_new_privileges, set_seccomp, mode_filter = 38, 22, 2
    zero = ctypes.c_ulong(0)
    _check(libc.prctl(set_no_new_privileges, ctypes.c_ulong(1), zero, zero, zero), "PR_SET_NO_NEW_PRIVS")
    _check(libc.prctl(set_seccomp, ctypes.c_ulong(mode_filter), ctypes.byref(program), zero, zero), "PR_SET_SECCOMP")
    if libc.socket(1, 1, 0) != -1 or ctypes.get_errno() != EPERM:
        raise Unavailable("the filter of system calls has no effect")


class _PathRule(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("descriptor", ctypes.c_int32)]


def readable_paths(runner: str) -> set[str]:
    """What the interpreter needs to start and to import: itself, its library and the system's libraries."""
    prefixes = {sys.base_prefix, sys.base_exec_prefix}
    paths = {"/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", runner}
    paths |= {f"{prefix}/{lib}" for prefix in prefixes for lib in (sys.platlibdir, "lib")}
    paths |= {sys.executable, f"{sys.prefix}/pyvenv.cfg", f"{os.path.dirname(sys.executable)}/pyvenv.cfg"}
    with open("/proc/self/maps") as maps:  # what it has loaded from elsewhere, the linker among it
        paths |= {line.split(maxsplit=5)[5].strip() for line in maps if "/" in line}
    return {path for path in paths if os.path.exists(path)}


def confine_files(folder: str, runner: str) -> bool:
    """Refuse, by Landlock, to use files outside a folder, but to read the interpreter's and to write to /dev/null.

    Returns:
        Whether this kernel has Landlock; before Linux 5.13, or where it is switched off, it has not.

    Raises:
        Unavailable: If it has, and a step fails.
    """
    create_ruleset, add_rule, restrict_self = 444, 445, 446
    execute, write, read, read_dir, remove_dir, remove_file, make_dir, make_file = (1 << n for n in (*range(6), 7, 8))
    refer, truncate, other_kinds = 1 << 13, 1 << 14, 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 12
    libc = _libc()
    version = libc.syscall(create_ruleset, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    of_files = write | read | execute | (truncate if version >= 3 else 0)
    own = (of_files & ~execute) | read_dir | remove_dir | remove_file | make_dir | make_file
    own |= refer if version >= 2 else 0
    handled = ctypes.c_uint64(own | execute | other_kinds)
    rules = _check(libc.syscall(create_ruleset, ctypes.byref(handled), ctypes.c_size_t(8), 0), "Landlock's rule set")
    allowed = dict.fromkeys(readable_paths(runner), execute | read | read_dir)
    for path, rights in (allowed | {folder: own, os.devnull: own}).items():
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = _PathRule(rights if os.path.isdir(path) else rights & of_files, descriptor)
        _check(libc.syscall(add_rule, rules, 1, ctypes.byref(rule), 0), f"Landlock's rule for {path}")
        os.close(descriptor)
    no_new_privileges = 38
    one, zero = ctypes.c_ulong(1), ctypes.c_ulong(0)
    _check(libc.prctl(no_new_privileges, one, zero, zero, zero), "PR_SET_NO_NEW_PRIVS")
    _check(libc.syscall(restrict_self, rules, 0), "Landlock")
    os.close(rules)
    return True


def limit_resources(*, memory_bytes: int, cpu_s: int) -> None:
    """Lower the limits of this process; nobody below root can raise them again."""
    limits = {
        resource.RLIMIT_CPU: cpu_s,
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: MAX_FILE_BYTES,
        resource.RLIMIT_NOFILE: MAX_OPEN_FILES,
        resource.RLIMIT_NPROC: MAX_TASKS,
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
        if sys.platform == "darwin" and kind == resource.RLIMIT_AS:
            continue  # macOS does not enforce this one, and refuses some values
        resource.setrlimit(kind, (bound, bound))


def confine(*, folder: str, memory_bytes: int, cpu_s: int, runner: str) -> None:
    """Limit this process and become the runner; returns only by an error.

    Raises:
        Unavailable: If this is Linux and the kernel does not filter system calls.
    """
    command = [sys.executable, "-s", "-P", "-S", "-B", runner, folder]
    environment = {"PYTHONHASHSEED": "0"}  # the order of sets must not change from one run to the next
    limit_resources(memory_bytes=memory_bytes, cpu_s=cpu_s)
    if sys.platform != "linux":
        os.execve(sys.executable, command, environment)
    libc = _libc()
    die_with_parent = 1
    _check(libc.prctl(die_with_parent, ctypes.c_ulong(signal.SIGKILL)), "PR_SET_PDEATHSIG")
    confine_files(folder, runner)
    path = ctypes.create_string_buffer(os.fsencode(sys.executable))
    arguments = (ctypes.c_char_p * (len(command) + 1))(*map(os.fsencode, command), None)
    variables = (ctypes.c_char_p * 2)(*(f"{k}={v}".encode() for k, v in environment.items()), None)
    install_filter(ctypes.addressof(path))
    _check(libc.execve(path, arguments, variables), "execve")


if __name__ == "__main__":
    try:
        confine(**json.loads(sys.argv[1]))
    except (Unavailable, OSError, ValueError) as error:
        sys.stdout.write(f"{error}\n")
        sys.exit(1)
