from __future__ import annotations

from farpage.kernel.process import join_adjacent, parse_maps

MAPS = """\
55d000000000-55d000001000 r--p 00000000 fe:00 1234                       /usr/bin/qemu system
7f0000000000-7f0000200000 rw-s 00000000 00:01 77                         /memfd:memory-backend-memfd (deleted)
7f0000200000-7f0000400000 rw-s 00200000 00:01 77                         /memfd:memory-backend-memfd (deleted)
7f0000400000-7f0000500000 rw-s 00000000 00:01 78                         /memfd:other (deleted)
7f0000600000-7f0000700000 rw-p 00000000 00:00 0
7f0000700000-7f0000800000 rw-p 00000000 00:00 0
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0                          [stack]
nonsense
"""


def test_lines_are_parsed_and_foreign_ones_left_out() -> None:
    mappings = parse_maps(MAPS)
    assert len(mappings) == 7
    assert mappings[0].path == "/usr/bin/qemu system"
    assert mappings[0].start == 0x55D000000000
    assert mappings[2].offset == 0x200000
    assert mappings[4].path == ""


def test_names_of_memfds_are_told() -> None:
    assert [mapping.memfd_name for mapping in parse_maps(MAPS)][:4] == [
        None,
        "memory-backend-memfd",
        "memory-backend-memfd",
        "other",
    ]


def test_pieces_of_one_mapping_of_a_file_are_joined_and_nothing_else() -> None:
    joined = join_adjacent(parse_maps(MAPS))
    assert [(mapping.inode, mapping.length) for mapping in joined if mapping.inode in (77, 78)] == [
        (77, 0x400000),
        (78, 0x100000),
    ]
    assert sum(mapping.path == "" for mapping in joined) == 2


def test_neighbours_that_do_not_continue_the_file_stay_apart() -> None:
    swapped = MAPS.replace("00200000 00:01 77", "00400000 00:01 77")
    assert sum(mapping.inode == 77 for mapping in join_adjacent(parse_maps(swapped))) == 2
