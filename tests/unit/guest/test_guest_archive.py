from __future__ import annotations

import lzma
import stat
import struct
import subprocess
from pathlib import Path

from farpage.guest.cpio import archive, file_entry, link_entry
from farpage.guest.image import commands_archive, uncompressed_kernel


def test_cpio_unpacks_what_was_packed(tmp_path: Path) -> None:
    data = archive(
        [file_entry("bin/tool", b"odd", 0o755), link_entry("bin/sh", "tool"), file_entry("a", b"", 0o640)]
    )
    subprocess.run(["cpio", "-idm", "--quiet"], input=data, cwd=tmp_path, check=True)
    assert (tmp_path / "bin" / "tool").read_bytes() == b"odd"
    assert stat.S_IMODE((tmp_path / "bin" / "tool").stat().st_mode) == 0o755
    assert (tmp_path / "bin" / "sh").readlink() == Path("tool")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_equal_entries_make_equal_archives_in_any_order() -> None:
    one, two = file_entry("one", b"1"), file_entry("x/two", b"2")
    assert archive([one, two]) == archive([two, one])


def test_an_archive_is_a_multiple_of_four_so_that_another_may_follow() -> None:
    assert len(commands_archive(["echo"])) % 4 == 0


def kernel(image: bytes) -> bytes:
    return b"MZ boot sector" + lzma.compress(image) + b"trailer"


def test_a_kernel_with_a_pvh_entry_is_unpacked_and_others_are_not() -> None:
    note = struct.pack("<III", 4, 8, 18) + b"Xen\0" + bytes(8)
    image = b"\x7fELF" + bytes(100) + note
    assert uncompressed_kernel(kernel(image)) == image
    assert uncompressed_kernel(kernel(b"\x7fELF" + bytes(100))) is None
    assert uncompressed_kernel(kernel(b"raw" + note)) is None
    assert uncompressed_kernel(b"MZ compressed otherwise") is None
    assert uncompressed_kernel(kernel(image)[:60]) is None
