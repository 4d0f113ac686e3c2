"""Linux's system calls, by number: the C library has functions for few of those that the jail makes or refuses."""

from __future__ import annotations

import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)

# uname's name: linux/audit.h's number, and which column of the tables below. aarch64's has not been run by us.
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}

# Calls that are looked at, with their numbers.
CALLS = {
    "clone": (56, 220),
    "clone3": (435, 435),
    "connect": (42, 203),
    "landlock_add_rule": (445, 445),
    "landlock_create_ruleset": (444, 444),
    "landlock_restrict_self": (446, 446),
    "prlimit64": (302, 261),
    "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "seccomp": (317, 277),
    "sendmmsg": (307, 269),
    "sendmsg": (46, 211),
    "sendto": (44, 206),
    "setpriority": (141, 140),
    "socket": (41, 198),
    "socketpair": (53, 199),
}

# Calls that lead into other processes of the same user, out past Landlock, or into corners of the kernel that no agent
# needs. Each is refused with EPERM.
REFUSED = {
    # other processes
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "ioprio_set": (251, 30),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # memory and messages that a user's processes share, PostgreSQL's among them
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    "msgctl": (71, 187),
    "msgget": (68, 186),
    "msgrcv": (70, 188),
    "msgsnd": (69, 189),
    "semctl": (66, 191),
    "semget": (64, 190),
    "semop": (65, 193),
    "semtimedop": (220, 192),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "shmget": (29, 194),
    # the network: to listen on a port of the kernel's choice takes no bind(), which is all that Landlock sees
    "listen": (50, 201),
    # other worlds
    "chroot": (161, 51),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "pivot_root": (155, 41),
    "setns": (308, 268),
    "umount2": (166, 39),
    "unshare": (272, 97),
    # the kernel
    "add_key": (248, 217),
    "bpf": (321, 280),
    "fanotify_init": (300, 262),
    "finit_module": (313, 273),
    "init_module": (175, 105),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "perf_event_open": (298, 241),
    "quotactl": (179, 60),
    "request_key": (249, 218),
    "seccomp": CALLS["seccomp"],  # a listener of the agent's own would be asked in the place of ours
    "syslog": (103, 116),
    "userfaultfd": (323, 282),
}

FLAGS_OF_SENDING = {"sendto": 3, "sendmsg": 2, "sendmmsg": 3}  # which argument
OF_ONESELF = {  # calls that name a process: which arguments must be 0, for oneself
    "prlimit64": (0,),
    "sched_setaffinity": (0,),
    "sched_setattr": (0,),
    "sched_setparam": (0,),
    "sched_setscheduler": (0,),
    "setpriority": (0, 1),
}


class Failed(Exception):
    """What could not be done; nothing may be run."""


def machine() -> tuple[int, int]:
    name = os.uname().machine
    if name not in MACHINES:
        raise Failed(f"no system calls are known for {name}")
    return MACHINES[name]


def number_of(call: str) -> int:
    return (REFUSED.get(call) or CALLS[call])[machine()[1]]


def call(name: str, *arguments: object) -> int:
    """The call's answer; below 0 it has failed, and ctypes.get_errno() says why. Whole numbers are C's ints."""
    return int(libc.syscall(number_of(name), *arguments))


def checked(answer: int, what: str) -> int:
    if answer < 0:
        raise Failed(f"{what}: {os.strerror(ctypes.get_errno())}")
    return answer
