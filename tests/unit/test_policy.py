"""The launcher's policy by itself: what it lets pass."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pjw.errors import InvalidJobError
from pjw.launcher.policy import JOB_ENVIRONMENT, JOB_ID_MAX, Policy, check_job_id, instance_name
from pjw.launcher.protocol import Hello, Launch
from pjw.model import Limits

NO_LIMITS = Limits(**dict.fromkeys((name for name, _ in Limits().items()), 0))
HELLO = Hello(
    "/state",
    1000,
    10,
    NO_LIMITS,
    floor=NO_LIMITS,
    waiting_inits=4,
    hidden_paths=("/key",),
    visible_paths=("/data",),
    operator_files=("/crt",),
)
LAUNCH = Launch(1, 1000, NO_LIMITS)


@pytest.fixture
def descriptors(tmp_path: Path) -> Any:
    """Six plain files, open for reading and writing."""
    opened = [os.open(tmp_path / str(number), os.O_RDWR | os.O_CREAT) for number in range(6)]
    yield opened
    for descriptor in opened:
        os.close(descriptor)


def test_the_state_is_hidden_first() -> None:
    """The state directory is among the hidden paths without being asked for."""
    assert Policy.from_hello(HELLO).hidden_paths == ("/state", "/key")


@pytest.mark.parametrize(("first", "count"), [(1, 1), (1000, 65_536), (2**32 - 2, 1), (1, 2**32 - 2)])
def test_ranges_of_users(first: int, count: int) -> None:
    """Everything from 1 to 2^32-2, both included."""
    policy = Policy.from_hello(replace(HELLO, uid_first=first, uid_count=count))
    assert (policy.uid_first, policy.uid_count) == (first, count)


@pytest.mark.parametrize(
    ("first", "count"),
    [(1, 0), (0, 0), (2**32 - 1, 1), (2**32 - 2, 2), (1, 2**32 - 1), (2**32, 1), (2**62, 2**62)],
)
def test_ranges_with_root_or_nobody(first: int, count: int) -> None:
    """0 is root, and 2^32-1 is "no change" to setresuid(2), which would leave root."""
    with pytest.raises(InvalidJobError):
        Policy.from_hello(replace(HELLO, uid_first=first, uid_count=count))


def test_users_of_a_launch(descriptors: list[int]) -> None:
    """The first and the last of the range, none beside it."""
    policy = Policy.from_hello(HELLO)
    for uid in (1000, 1009):
        policy.check_launch(replace(LAUNCH, uid=uid), descriptors[:4])
    for uid in (0, 999, 1010, 2**32 + 1000):
        with pytest.raises(InvalidJobError, match=f"user id {uid} is not one for jobs"):
            policy.check_launch(replace(LAUNCH, uid=uid), descriptors[:4])


def test_grace_periods_of_a_launch(descriptors: list[int]) -> None:
    """What init takes, which refuses anything else."""
    policy = Policy.from_hello(HELLO)
    for seconds in (1, 2**31 - 1):
        policy.check_launch(replace(LAUNCH, grace_seconds=seconds), descriptors[:4])
    for seconds in (0, -1, 2**31):
        with pytest.raises(InvalidJobError, match="the grace period must be"):
            policy.check_launch(replace(LAUNCH, grace_seconds=seconds), descriptors[:4])


def test_limits_of_a_launch(descriptors: list[int]) -> None:
    """Up to the ceiling."""
    policy = Policy.from_hello(replace(HELLO, ceiling=NO_LIMITS.with_overrides({"pids_max": 10})))
    policy.check_launch(replace(LAUNCH, limits=NO_LIMITS.with_overrides({"pids_max": 10})), descriptors[:4])
    for value in (11, 0):
        with pytest.raises(InvalidJobError, match="limit pids_max is above its ceiling"):
            policy.check_launch(
                replace(LAUNCH, limits=NO_LIMITS.with_overrides({"pids_max": value})), descriptors[:4]
            )


def test_the_number_of_descriptors(descriptors: list[int]) -> None:
    """Four, two more where stderr is kept apart, one more for input."""
    policy = Policy.from_hello(HELLO)
    for split_stderr, takes_input, right in ((False, False, 4), (True, False, 6), (False, True, 5)):
        launch = replace(LAUNCH, split_stderr=split_stderr, input=takes_input)
        policy.check_launch(launch, descriptors[:right])
        for count in set(range(7)) - {right}:
            with pytest.raises(InvalidJobError, match=f"needs {right} descriptors"):
                policy.check_launch(launch, [*descriptors, *descriptors][:count])


def test_descriptors_that_only_read(descriptors: list[int], tmp_path: Path) -> None:
    """The command may be read-only; the others, which init writes, may not."""
    policy = Policy.from_hello(HELLO)
    reading = os.open(tmp_path / "0", os.O_RDONLY)
    try:
        launch = replace(LAUNCH, split_stderr=True)
        policy.check_launch(launch, [reading, *descriptors[1:]])
        for place in range(1, 6):
            changed = [*descriptors]
            changed[place] = reading
            with pytest.raises(InvalidJobError, match="not writable"):
                policy.check_launch(launch, changed)
        policy.check_launch(replace(LAUNCH, input=True), [reading, *descriptors[1:4], reading])
    finally:
        os.close(reading)


def test_descriptors_that_only_write(descriptors: list[int], tmp_path: Path) -> None:
    """What init reads, the sender must be able to read."""
    policy = Policy.from_hello(HELLO)
    launch = replace(LAUNCH, input=True)
    writing = os.open(tmp_path / "0", os.O_WRONLY)
    try:
        for changed in ([writing, *descriptors[1:5]], [*descriptors[:4], writing]):
            with pytest.raises(InvalidJobError, match="not readable"):
                policy.check_launch(launch, changed)
        policy.check_launch(launch, [descriptors[0], *[writing] * 3, descriptors[4]])
    finally:
        os.close(writing)


@pytest.mark.parametrize("job_id", [1, 2, JOB_ID_MAX])
def test_job_ids(job_id: int) -> None:
    """From 1 to 2^53."""
    check_job_id(job_id)


@pytest.mark.parametrize("job_id", [0, -1, JOB_ID_MAX + 1, 2**63])
def test_ids_that_are_none(job_id: int) -> None:
    """Everything else."""
    with pytest.raises(InvalidJobError):
        check_job_id(job_id)


def test_instances_are_told_apart() -> None:
    """One name for one directory, always the same, and a plain name for a cgroup."""
    names = {instance_name(path) for path in ("/a", "/b", "/a/", "/a\n", "/ü", "/\udcff")}
    assert len(names) == 6
    assert instance_name("/var/lib/pjw") == "i-" + instance_name("/var/lib/pjw")[2:]
    assert all(len(name) == 14 and name[2:].isalnum() for name in names)


def test_the_environment_of_a_job() -> None:
    """Five variables (PJW_JOB_ID is the sixth), none of which comes from anybody's environment."""
    assert JOB_ENVIRONMENT.keys() == {"PATH", "HOME", "TMPDIR", "SHELL", "LANG"}
