from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from farpage.guest import image as image_module
from farpage.guest.image import ImageNotBuilt, PackagesMissing, build_image, missing_packages


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache that has a kernel, so that nothing is downloaded."""
    (tmp_path / "vmlinux-6.1").write_bytes(b"kernel")
    return tmp_path


def test_two_builders_at_once_get_the_same_image(cache: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda _: build_image(cache), range(2))
    assert one == two
    assert one.kernel == cache / "vmlinux-6.1"
    assert sorted(path.name for path in cache.iterdir()) == [one.initramfs.name, "lock", "vmlinux-6.1"]


def test_an_image_is_the_same_wherever_it_is_built(
    cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other")
    (other / "vmlinux-6.1").write_bytes(b"kernel")
    one, two = build_image(cache), build_image(other)
    assert one.initramfs.name == two.initramfs.name
    assert one.initramfs.read_bytes() == two.initramfs.read_bytes()


def test_a_built_image_is_not_built_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build_image(cache)
    written = first.initramfs.stat().st_mtime_ns
    monkeypatch.setattr(image_module, "_compile", None)
    assert build_image(cache) == first
    assert first.initramfs.stat().st_mtime_ns == written


def test_further_programs_come_with_their_libraries(cache: Path) -> None:
    plain, more = build_image(cache), build_image(cache, ["memtester"])
    assert plain != more
    data = more.initramfs.read_bytes()
    assert b"bin/memtester\0" in data
    assert b"libc.so.6\0" in data


def test_all_missing_packages_are_named_in_one_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_module, "_SEARCH_PATH", "/nonexistent")
    expected = "apt busybox-static dpkg gcc memtester qemu-system-x86"
    assert " ".join(missing_packages(["memtester"])) == expected
    with pytest.raises(PackagesMissing) as caught:
        build_image(cache, ["memtester"])
    assert caught.value.advice == f"run 'apt-get install {expected}' as root"


def test_without_apt_lists_the_error_says_to_update_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_module, "KERNEL_PACKAGE", "linux-image-of-no-debian")
    with pytest.raises(ImageNotBuilt, match="apt-get update"):
        build_image(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ImageNotBuilt, match=str(blocked)):
        build_image(blocked / "cache")
