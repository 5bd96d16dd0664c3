import sys

import pytest

from m2m_bids.cli.cgroups import memory_limit

V2 = "31 23 0:28 {group} /sys/fs/cgroup rw,relatime shared:9 - cgroup2 cgroup2 rw"
V1 = "35 31 0:32 {group} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
CPU = "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu"
UNIFIED = "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw"
TEMPORARY = "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755"
UNLIMITED = 9223372036854771712


@pytest.fixture
def machine(tmp_path):
    """Write what a kernel tells: groups of the process, mounts, and limits by file."""

    def write(groups, mounts, files):
        for name, lines in {"cgroup": groups, "mountinfo": mounts}.items():
            file = tmp_path / "proc/self" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(f"{line}\n" for line in lines))
        for name, text in files.items():
            file = tmp_path / "sys/fs/cgroup" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{text}\n")
        return memory_limit(tmp_path)

    return write


JOB = "system.slice/slurmstepd.scope/job_7"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({f"{JOB}/step_0/memory.max": "max", f"{JOB}/memory.max": 4000}, 4000),
        ({f"{JOB}/step_0/memory.max": 3000, f"{JOB}/memory.max": 4000}, 3000),
        ({f"{JOB}/step_0/memory.max": 5000, "system.slice/memory.max": 2000}, 2000),
        ({f"{JOB}/step_0/memory.max": "max"}, None),
        ({f"{JOB}/step_0/memory.max": "max", "user.slice/memory.max": 10}, None),
        ({}, None),
    ],
    ids=["of the parent", "its own", "of the slice", "none", "of others", "no files"],
)
def test_nested_groups_of_version_2(machine, files, expected):
    assert machine([f"0::/{JOB}/step_0"], [V2.format(group="/")], files) == expected


def test_a_container_of_version_2_sees_its_own_group_as_the_first(machine):
    assert machine(["0::/"], [V2.format(group="/")], {"memory.max": 700}) == 700


@pytest.mark.parametrize(
    ("path", "group"),
    [("/docker/abc", "/docker/abc"), ("/", "/"), ("/../x", "/"), ("/kube/pod", "/other")],
)
def test_a_container_whose_mount_begins_at_its_group(machine, path, group):
    mounts = [TEMPORARY, CPU, V1.format(group=group)]
    groups = ["9:cpu:/elsewhere", f"4:memory:{path}"]
    assert machine(groups, mounts, {"memory/memory.limit_in_bytes": 600}) == 600


def test_nested_groups_of_version_1(machine):
    mounts, groups = [TEMPORARY, V1.format(group="/")], ["4:memory,hugetlb:/slurm/uid_1/job_7"]
    files = {
        "memory/memory.limit_in_bytes": UNLIMITED,
        "memory/slurm/uid_1/memory.limit_in_bytes": 5000,
        "memory/slurm/uid_1/job_7/memory.limit_in_bytes": UNLIMITED,
    }
    assert machine(groups, mounts, files) == 5000
    # What the kernel says of groups that this process cannot see.
    stat = "cache 5\nrss 6\nhierarchical_memory_limit 4000\nhierarchical_memsw_limit 100"
    files["memory/slurm/uid_1/job_7/memory.stat"] = stat
    assert machine(groups, mounts, files) == 4000


def test_both_versions_are_mounted(machine):
    """As systemd does in its hybrid layout: memory is controlled by version 1."""
    mounts = [TEMPORARY, UNIFIED, V1.format(group="/")]
    files = {"memory/a/memory.limit_in_bytes": 800, "cpu/a/memory.limit_in_bytes": 1}
    assert machine(["4:memory:/a", "1:cpu:/a", "0::/a"], mounts, files) == 800


def test_a_machine_without_groups(tmp_path):
    assert memory_limit(tmp_path) is None


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
def test_this_machine():
    limit = memory_limit()
    assert limit is None or limit > 10**7
