"""How much memory a worker believes there is, on a machine and in containers."""

from pathlib import Path

import pytest

from common.device import cpu_memory

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One with 8 GiB available, and no control groups but its own. Returns the folder with its `proc` and `cgroup`."""
    monkeypatch.setattr(cpu_memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(cpu_memory, "CGROUPS", tmp_path / "cgroup")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "cgroup").mkdir()
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 9 kB\nMemFree: 1 kB\nMemAvailable: {8 * GIB // KIB} kB\n")
    in_group(tmp_path, "/")
    return tmp_path


def in_group(machine: Path, name: str) -> None:
    (machine / "proc/self/cgroup").write_text(f"4:memory:/elsewhere\n0::{name}\n")


def limit(machine: Path, group: str, most: str, used: int = 0, files: tuple[int, int] = (0, 0)) -> None:
    folder = machine / "cgroup" / group
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{most}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\nfile 9\nshmem 4\ninactive_file {files[0]}\nactive_file {files[1]}\n")


def test_without_limits_it_is_the_machines(machine: Path) -> None:
    """After hours nearly nothing is free, and much of what caches files can be had."""
    assert cpu_memory.available_bytes() == 8 * GIB
    limit(machine, "", "max")
    assert cpu_memory.available_bytes() == 8 * GIB


def test_in_a_container_it_is_what_the_limit_leaves(machine: Path) -> None:
    limit(machine, "", str(4 * GIB), used=3 * GIB, files=(512 * MIB, 256 * MIB))
    assert cpu_memory.available_bytes() == GIB + 768 * MIB


def test_the_tightest_of_the_groups_around_it_counts(machine: Path) -> None:
    in_group(machine, "/pods/one/worker")
    limit(machine, "pods/one/worker", "max")
    limit(machine, "pods/one", str(2 * GIB), used=GIB)
    limit(machine, "pods", str(6 * GIB), used=GIB)
    assert cpu_memory.available_bytes() == GIB


def test_a_limit_that_is_passed_leaves_nothing(machine: Path) -> None:
    limit(machine, "", str(GIB), used=2 * GIB)
    assert cpu_memory.available_bytes() == 0


def test_a_group_that_is_not_mounted_here_does_not_matter(machine: Path) -> None:
    in_group(machine, "/docker/0123")
    limit(machine, "", str(3 * GIB), used=GIB)
    assert cpu_memory.available_bytes() == 2 * GIB


def test_this_machine_has_some() -> None:
    assert 0 < cpu_memory.available_bytes() < 1 << 60
