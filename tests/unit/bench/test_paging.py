"""What `bench.paging` is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.paging import Settings
from farpage.errors import InvalidInput
from farpage.kernel.affinity import CPU_COUNT_MAX, format_cpus, own_cpus


def test_a_cpu_that_may_not_be_used_is_refused_with_those_that_may(tmp_path: Path) -> None:
    with pytest.raises(
        InvalidInput, match=f"^--cpu: CPU {CPU_COUNT_MAX} .*; name one of {format_cpus(own_cpus())}$"
    ):
        Settings(32 << 20, 16 << 20, 1, 0.1, tmp_path, cpu=CPU_COUNT_MAX)
