from __future__ import annotations

from farpage.kernel import registers_x86_64 as registers

NAMES = registers.REGISTER_NAMES


def value(array: registers.RegisterArray, name: str) -> int:
    return int(array[NAMES.index(name)])


def test_a_call_sets_number_arguments_and_instruction_and_nothing_else() -> None:
    saved = registers.Registers(*range(len(NAMES)))
    changed = registers.for_syscall(saved, 0x1000, 323, [7, -1])
    assert value(changed, "rip") == 0x1000
    assert value(changed, "rax") == 323
    assert value(changed, "rdi") == 7
    assert value(changed, "rsi") == 2**64 - 1
    assert value(changed, "orig_rax") == 2**64 - 1
    touched = {"rip", "rax", "rdi", "rsi", "orig_rax"}
    assert all(value(changed, name) == value(saved, name) for name in NAMES if name not in touched)
    assert list(saved) == list(range(len(NAMES)))


def test_results_are_signed() -> None:
    array = registers.Registers()
    array[NAMES.index("rax")] = 2**64 - 9
    assert registers.syscall_result(array) == -9


def test_code_segments_tell_64_bit_from_32_bit_code() -> None:
    array = registers.Registers()
    array[NAMES.index("cs")] = 0x33
    assert registers.runs_native_code(array)
    array[NAMES.index("cs")] = 0x23
    assert not registers.runs_native_code(array)
