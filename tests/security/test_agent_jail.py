"""One run of a hostile agent that tries everything, by a service that is root and by one that is an ordinary user."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from typing import Any

import pytest

from pokestrator.store.embedded import EmbeddedPostgres
from tests.security.agent_attacks import CANARY, as_ordinary_user, attack_all
from tests.security.attacks import attack
from tests.security.inside import TRIES

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="inside.py has x86_64's system calls")

Attacked = dict[str, Any]
OPEN = {  # what the jail is there to let through, and what does nothing by itself
    "dial_the_relay",
    "dial_it_as_ipv6_writes_it",
    "dial_it_without_waiting",
    "dial_while_another_thread_changes_the_address",
    "connect_a_file",
}
NO_ACCESS, NO_PERMISSION = "EACCES", "EPERM"


@pytest.fixture(scope="module", params=["root", "ordinary user"] if os.geteuid() == 0 else ["ordinary user"])
def attacked(request: pytest.FixtureRequest, postgres: EmbeddedPostgres) -> Iterator[Attacked]:
    database = postgres.url.rpartition("host=")[2].replace("%2F", "/")
    is_other = request.param == "ordinary user" and os.geteuid() == 0
    found = as_ordinary_user("attack_all", database) if is_other else attack_all(database)
    if "relay only" not in found["confinement"]:
        pytest.skip(found["confinement"])
    yield found


def came(attacked: Attacked, *tries: str) -> dict[str, str]:
    return {name: attacked["tries"].get(name, "not tried") for name in tries}


def all_are(expected: str, *tries: str) -> dict[str, str]:
    return dict.fromkeys(tries, expected)


def test_everything_was_tried_and_nothing_but_the_relay_was_open(attacked: Attacked) -> None:
    assert attacked["tries"].keys() == TRIES.keys()
    assert {name for name, what in attacked["tries"].items() if what == "done"} == OPEN


@attack("a process of the service's user reads its environment or memory in /proc", "only root may")
def test_the_services_processes_hide_their_memory() -> None:
    if os.geteuid() != 0:
        pytest.skip("whose the files are is seen only where we can be another user")
    assert as_ordinary_user("readers_of_environs") == {"master": 0, "worker": 0, "slot": 0}


# files -----------------------------------------------------------------------------------------------------------


@attack("an agent reads a file of the service: by its path, through a link, a hard link, dots", "no access")
def test_no_file_outside_is_read(attacked: Attacked) -> None:
    read = ("read_the_services_file", "read_it_through_a_link", "read_it_through_dots")
    assert came(attacked, *read) == all_are(NO_ACCESS, *read)
    assert came(attacked, "link_it_into_the_folder")["link_it_into_the_folder"] in (NO_ACCESS, NO_PERMISSION, "EXDEV")


@attack("an agent reads the program's files, or the database's data folder", "no access")
def test_neither_the_program_nor_the_database_is_read(attacked: Attacked) -> None:
    tries = ("read_the_program", "list_the_program", "list_the_database")
    assert came(attacked, *tries) == all_are(NO_ACCESS, *tries)


@attack("an agent reads the folder of another run that goes on", "no access")
def test_no_other_run_is_read(attacked: Attacked) -> None:
    tries = ("read_the_other_run", "list_the_other_run", "list_all_runs")
    assert came(attacked, *tries) == all_are(NO_ACCESS, *tries)


@attack("an agent reads `environ` and `cmdline` of the service, or anything in /proc", "no access")
def test_nothing_of_proc_is_read(attacked: Attacked) -> None:
    tries = ("read_an_environment", "read_a_command_line", "list_proc", "read_ones_own_proc")
    assert came(attacked, *tries) == all_are(NO_ACCESS, *tries)


@attack("an agent writes, truncates, removes or renames outside its folder", "no access, nothing is changed")
def test_nothing_outside_is_written(attacked: Attacked) -> None:
    tries = ("write_into_the_services_file", "write_a_file_beside_it", "truncate_it", "write_to_tmp")
    tries += ("write_to_shared_memory", "replace_the_launcher", "remove_it", "open_a_terminal")
    assert came(attacked, *tries) == all_are(NO_ACCESS, *tries)
    assert came(attacked, "rename_it")["rename_it"] in (NO_ACCESS, "EXDEV")
    assert attacked["intact"]


@attack("the same through the tools Read, Write, Edit, Grep and Glob, which the CLI itself carries out", "refused")
def test_the_file_tools_reach_nothing_outside(attacked: Attacked) -> None:
    assert len(attacked["tools"]) == 8
    for answer in attacked["tools"]:
        assert CANARY not in answer
        assert "EACCES" in answer or "does not read" in answer, answer
    assert attacked["intact"]


# processes and the kernel ----------------------------------------------------------------------------------------


@attack("an agent signals, traces or reads the service's process, or takes a descriptor from it", "not permitted")
def test_other_processes_are_out_of_reach(attacked: Attacked) -> None:
    tries = ("signal_the_service", "trace_the_service", "read_its_memory", "take_its_descriptor")
    assert came(attacked, *tries) == all_are(NO_PERMISSION, *tries)


@attack(
    "an agent sets the service's limits, priority or processors, which one user may do to all its own", "not permitted"
)
def test_the_services_limits_are_its_own(attacked: Attacked) -> None:
    tries = ("limit_the_service", "slow_the_service", "pin_the_service")
    assert came(attacked, *tries) == all_are(NO_PERMISSION, *tries)


@attack("an agent opens shared memory or a message queue, as a way to processes of its user", "not permitted")
def test_no_memory_is_shared(attacked: Attacked) -> None:
    tries = ("share_memory", "open_a_message_queue")
    assert came(attacked, *tries) == all_are(NO_PERMISSION, *tries)


@attack("an agent calls unshare, clone into a namespace, mount, io_uring, bpf, add_key, seccomp", "not permitted")
@attack("an agent makes system calls by the x32 numbers, past the filter", "its process is killed")
def test_the_kernels_corners_are_closed(attacked: Attacked) -> None:
    tries = ("make_a_user_namespace", "clone_into_a_namespace", "mount_something", "set_up_io_uring", "load_bpf")
    tries += ("add_a_key", "listen_to_system_calls", "call_by_the_x32_numbers")
    assert came(attacked, *tries) == all_are(NO_PERMISSION, *tries)


@attack("an agent runs set-uid programs", "they give nothing")
def test_set_uid_programs_give_nothing(attacked: Attacked) -> None:
    tries = ("gain_privileges", "run_su")
    assert came(attacked, *tries) == all_are(NO_PERMISSION, *tries)


@attack(
    "an agent takes 3 GB of memory, writes a file of 10 GB, opens 5,000 files, raises its limits",
    "an error, at the limit",
)
def test_limits_hold(attacked: Attacked) -> None:
    assert came(attacked, "take_three_gigabytes") == {"take_three_gigabytes": "ENOMEM"}
    assert came(attacked, "make_a_huge_file") == {"make_a_huge_file": "EFBIG"}
    assert came(attacked, "open_many_files") == {"open_many_files": "EMFILE"}
    raises = came(attacked, "raise_the_limit_on_memory", "dump_a_core")
    assert set(raises.values()) == {"ValueError('not allowed to raise maximum limit')"}


# the network -----------------------------------------------------------------------------------------------------


@attack("an agent connects to another port of this machine, such as a database's", "no access")
@attack("an agent connects to the relay's port on 127.0.0.2, on ::1 and on the machine's own address", "no access")
@attack("an agent connects to 169.254.169.254", "no access")
def test_only_the_relay_is_reached(attacked: Attacked) -> None:
    tries = ("dial_another_port", "dial_the_relays_port_elsewhere_on_loopback", "dial_the_clouds_metadata")
    tries += ("dial_the_relays_port_on_the_machines_address", "dial_the_relays_port_on_ipv6_loopback")
    assert came(attacked, *tries) == all_are(NO_ACCESS, *tries)


@attack("an agent changes the address in memory while the supervisor is asked about it", "only the relay is reached")
@attack("an agent sends within the opening (TCP Fast Open)", "not permitted")
def test_nothing_has_come_to_where_nothing_may_come(attacked: Attacked) -> None:
    assert came(attacked, "send_within_the_opening") == {"send_within_the_opening": NO_PERMISSION}
    assert attacked["decoys"] == []


@attack("an agent connects to the database's Unix socket, or sends to one from a socket pair", "not permitted")
def test_unix_sockets_are_out_of_reach(attacked: Attacked) -> None:
    tries = ("dial_by_unix_socket", "send_to_a_unix_socket_from_a_pair")
    assert came(attacked, *tries) == all_are(NO_PERMISSION, *tries)


@attack("an agent opens UDP, multipath TCP, raw, ping, netlink, packet and VM sockets", "not permitted")
def test_there_is_no_other_socket(attacked: Attacked) -> None:
    tries = ("send_by_udp", "open_a_multipath_socket", "open_a_raw_socket", "open_a_ping_socket")
    tries += ("open_a_netlink_socket", "open_a_packet_socket", "open_a_vsock")
    assert came(attacked, *tries) == all_are(NO_PERMISSION, *tries)


@attack("an agent listens on a port, with bind or without", "refused")
def test_an_agent_cannot_be_reached(attacked: Attacked) -> None:
    assert came(attacked, "listen_on_a_port", "listen_without_a_name") == {
        "listen_on_a_port": NO_ACCESS,
        "listen_without_a_name": NO_PERMISSION,
    }
