"""What a graph costs is counted, not guessed; what fits is kept."""

from pathlib import Path

import psutil
import pytest
import torch

from gigamil.memory.budget import chunks_to_keep, free_memory, memory_budget


def test_a_budget_is_bytes_or_a_share_of_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Free:
        available = 1000

    monkeypatch.setattr(psutil, "virtual_memory", Free)
    cpu = torch.device("cpu")
    assert memory_budget(5e9, cpu, 2) == 5_000_000_000
    assert memory_budget(None, cpu, 2) == 250
    assert memory_budget(0.2, cpu, 2) == 100
    assert memory_budget(1, cpu, 1) == 1000  # everything, not one byte


GIB = 2**30


def group(folder: Path, **files: object) -> None:
    """A control group; `memory_max=1` is a file memory.max."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("memory_", "memory.", 1)).write_text(f"{content}\n")


@pytest.fixture
def free_32_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    class Free:
        available = 32 * GIB

    monkeypatch.setattr(psutil, "virtual_memory", Free)


@pytest.mark.usefixtures("free_32_gib")
def test_the_limit_of_a_job_or_a_group_above_it_counts(tmp_path: Path) -> None:
    membership, root = tmp_path / "membership", tmp_path / "cgroup"
    membership.write_text("0::/slurm/job_7/step_0\n")
    job = root / "slurm" / "job_7"
    group(job / "step_0", memory_max="max", memory_current=1 * GIB, memory_stat="anon 5\ninactive_file 0")
    assert free_memory(root, membership) == 32 * GIB
    group(job, memory_max=8 * GIB, memory_current=3 * GIB, memory_stat=f"anon 5\ninactive_file {GIB}")
    assert free_memory(root, membership) == 6 * GIB  # a GiB of cached pages is given back before the job is killed
    group(root / "slurm", memory_max=100 * GIB, memory_current=98 * GIB, memory_stat="inactive_file 0")
    assert free_memory(root, membership) == 2 * GIB
    group(job / "step_0", memory_max=4 * GIB, memory_current=5 * GIB)
    assert free_memory(root, membership) == 0


@pytest.mark.usefixtures("free_32_gib")
def test_the_limit_of_a_container_and_of_version_1(tmp_path: Path) -> None:
    membership, root = tmp_path / "membership", tmp_path / "cgroup"
    # The container sees its own group as the root, whatever the kernel calls it.
    membership.write_text("9:name=systemd:/\n4:cpu,memory:/docker/abc\n0::/\n")
    files = {"memory_usage_in_bytes": GIB, "memory_stat": f"inactive_file 7\ntotal_inactive_file {GIB // 2}"}
    group(root / "memory", memory_limit_in_bytes=2**63 - 4096, **files)
    assert free_memory(root, membership) == 32 * GIB
    group(root / "memory", memory_limit_in_bytes=4 * GIB, **files)
    assert free_memory(root, membership) == 3.5 * GIB
    group(root, memory_max=3 * GIB, memory_current=GIB, memory_stat="inactive_file 0")
    assert free_memory(root, membership) == 2 * GIB


@pytest.mark.usefixtures("free_32_gib")
def test_without_groups_the_machine_counts(tmp_path: Path) -> None:
    assert free_memory(tmp_path, tmp_path / "membership") == 32 * GIB
    (tmp_path / "membership").write_text("0::/\n")
    assert free_memory(tmp_path / "nowhere", tmp_path / "membership") == 32 * GIB


@pytest.mark.parametrize(
    ("strategy", "chunk_bytes", "budget", "kept"),
    [
        ("replay", 10, 100, 0),
        ("keep", 10, 0, 2**31 - 1),
        ("auto", 10, 100, 10),
        ("auto", 10, 99, 9),
        ("auto", 10, 9, 0),
        ("auto", 0, 100, 100),
    ],
)
def test_chunks_to_keep(strategy: str, chunk_bytes: int, budget: int, kept: int) -> None:
    assert chunks_to_keep(strategy, chunk_bytes, budget) == kept
