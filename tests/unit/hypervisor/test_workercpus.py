"""Where data workers run, by what `--worker-cpus` says."""

from __future__ import annotations

import pytest

from farpage.errors import InvalidInput
from farpage.hypervisor.workercpus import client_cpus, parse_worker_cpus

ALLOWED = frozenset(range(8))


def cpus(*numbers: int) -> frozenset[int]:
    return frozenset(numbers)


def test_any_leaves_workers_all_cpus_wherever_their_clients_are() -> None:
    setting = parse_worker_cpus("any", ALLOWED)
    assert setting.wanted([cpus(1)]) == setting.wanted([]) == ALLOWED


def test_clients_is_where_any_of_the_clients_may_run() -> None:
    setting = parse_worker_cpus("clients", ALLOWED)
    assert setting.wanted([cpus(1), cpus(2, 3)]) == cpus(1, 2, 3)
    assert setting.wanted([cpus(1), ALLOWED]) == ALLOWED
    assert setting.wanted([cpus(7, 8, 9)]) == cpus(7)


def test_clients_is_everywhere_without_a_client_and_with_clients_that_are_elsewhere() -> None:
    setting = parse_worker_cpus("clients", ALLOWED)
    assert setting.wanted([]) == setting.wanted([cpus()]) == setting.wanted([cpus(9)]) == ALLOWED


def test_a_list_holds_for_all_workers_as_far_as_it_may_be_used() -> None:
    setting = parse_worker_cpus("6-9", ALLOWED)
    assert setting.listed == setting.wanted([]) == setting.wanted([cpus(1)]) == cpus(6, 7)


@pytest.mark.parametrize("text", ["", "all", "Any", "clients,1", "3-1"])
def test_anything_else_is_refused_with_what_there_is(text: str) -> None:
    with pytest.raises(InvalidInput, match=r"^--worker-cpus: .*0-3,8, or 'any' or 'clients'$"):
        parse_worker_cpus(text, ALLOWED)


def test_a_list_without_a_cpu_that_may_be_used_is_refused_with_those_that_may() -> None:
    with pytest.raises(InvalidInput, match=r"^--worker-cpus: .*none of the CPUs 8-9; .*0-7$"):
        parse_worker_cpus("8-9", ALLOWED)


def never_asked(thread: int) -> str:
    raise AssertionError(thread)


def test_a_process_whose_threads_are_all_pinned_alike_is_there() -> None:
    assert client_cpus({10: cpus(2), 11: cpus(2)}, never_asked) == cpus(2)
    assert client_cpus({}, never_asked) == cpus()


def test_threads_that_are_pinned_apart_count_together() -> None:
    assert client_cpus({10: cpus(2), 11: cpus(4)}, lambda thread: f"work-{thread}") == cpus(2, 4)
    assert client_cpus({10: cpus(2), 11: ALLOWED}, lambda thread: f"work-{thread}") == ALLOWED


@pytest.mark.parametrize("vcpu", ["CPU {}/KVM", "CPU {}/TCG", "fc_vcpu {}", "vcpu{}", "crosvm_vcpu{}"])
def test_of_a_guest_the_vcpus_count(vcpu: str) -> None:
    threads = {10: ALLOWED, 11: cpus(2), 12: cpus(3), 13: cpus(5)}
    names = {10: "qemu-system-x86", 11: vcpu.format(0), 12: vcpu.format(11), 13: "IO iothread1"}
    assert client_cpus(threads, names.__getitem__) == cpus(2, 3)


def test_threads_that_the_kernel_has_added_do_not_count() -> None:
    threads = {10: cpus(2), 11: ALLOWED}
    assert client_cpus(threads, {10: "job", 11: "iou-wrk-10"}.__getitem__) == cpus(2)
