"""What programs hand to the library that is not quite right: it is taken, or refused in words (U9)."""

from collections.abc import Callable
from typing import Any, Final

import pytest

from pjw.client import requests
from pjw.errors import InvalidJobError, JobNotFoundError
from pjw.model import JobSpec, JobState, Limits
from pjw.rpc.convert import spec_to_message
from pjw.v1 import job_worker_pb2 as pb

ASKS: Final[dict[str, Callable[[Any], Any]]] = {
    "get": lambda job_id: requests.get(job_id, all_clients=False),
    "wait": lambda job_id: requests.wait(job_id, or_stuck=False, all_clients=False),
    "stop": lambda job_id: requests.stop(job_id, None, 0, all_clients=False),
    "delete": lambda job_id: requests.delete(job_id, all_clients=False),
    "usage": lambda job_id: requests.usage_history(job_id, all_clients=False),
    "logs": lambda job_id: requests.LogsPosition(
        job_id, 0, None, None, follow=True, stderr=False, all_clients=False
    ),
}


def listed(**how: Any) -> pb.ListRequest:
    """What is asked of the server for a list."""
    options = {"states": (), "labels": None, "name": "", "limit": None, **how}
    call = requests.Pages(**options, newest_first=False, all_clients=False).next
    assert call is not None
    assert isinstance(call.request, pb.ListRequest)
    return call.request


@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS)
def test_an_id_may_be_the_text_that_json_has(ask: Callable[[Any], Any]) -> None:
    """And what is no id is told what one is."""
    asked = ask("17")
    assert (asked.request.id, asked.job_id) == (17, 17)
    for odd in ("web", "1__0", "", 1.5, None, True, b"1"):
        with pytest.raises(InvalidJobError, match="a job's id is a whole number, such as 7 or '7', not"):
            ask(odd)
    with pytest.raises(JobNotFoundError):
        ask(str(2**64))


def test_states_may_be_text() -> None:
    """One, several, or none; a wrong one is told which there are."""
    running = [pb.JOB_STATE_RUNNING]
    for states in (["running"], "running", (JobState.RUNNING,), JobState.RUNNING, {"running"}):
        assert list(listed(states=states).states) == running
    with pytest.raises(InvalidJobError, match="no state of a job is called 'dead'; there are starting, run"):
        listed(states=["dead"])
    with pytest.raises(InvalidJobError, match="labels are names with values"):
        listed(labels=["team=x"])


@pytest.mark.parametrize("command", ["true", ["ls", "-l"], ("ls", "-l")])
def test_a_command_is_a_job(command: Any) -> None:
    """As in JobSpec: one text for the shell, several for a program."""
    asked = requests.start(command)
    expected = spec_to_message(JobSpec(command))
    asked.request.ClearField("request_id")
    assert asked.request == expected


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (lambda: JobSpec(["sleep", 5]), "a command is text, or a list of a program and its arguments"),  # type: ignore[list-item]
        (lambda: JobSpec(None), "a command is text, or a list"),  # type: ignore[arg-type]
        (lambda: JobSpec(b"true"), "a command is text, or a list"),  # type: ignore[arg-type]
        (lambda: JobSpec("true", labels=["a=b"]), "the labels of a job are names with values"),  # type: ignore[arg-type]
        (lambda: JobSpec("true", env={"A": 1}), "the env of a job are text, not 'A': 1"),  # type: ignore[dict-item]
        (lambda: JobSpec("true", "64M"), "the limits of a job are names with values"),  # type: ignore[arg-type]
        (lambda: JobSpec("true", name=7), "the name of a job is text, not 7"),  # type: ignore[arg-type]
        (lambda: requests.start(7), "a command is text, or a list"),  # type: ignore[arg-type]
    ],
    ids=map(str, range(8)),
)
def test_what_is_no_job_is_told_what_one_is(spec: Callable[[], object], words: str) -> None:
    """Never an AttributeError from deep within."""
    with pytest.raises(InvalidJobError, match=words):
        spec()


def test_limits_may_be_text_as_at_the_command_line() -> None:
    """Sizes and times; the others are numbers, since 2 might be two processors."""
    limits: dict[str, int | str] = {
        "memory_max_bytes": "64M",
        "io_wbps_max": "1.5M",
        "time_max_seconds": "1h30m",
        "pids_max": 9,
    }
    numbers = {**limits, "memory_max_bytes": 2**26, "io_wbps_max": 3 * 2**19, "time_max_seconds": 5400}
    message = spec_to_message(JobSpec("true", limits)).limits
    assert message == pb.Limits(**numbers)  # type: ignore[arg-type]
    assert Limits().with_overrides(limits) == Limits(**numbers)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"memory_max_bytes": "64X"}, "limit memory_max_bytes: '64X' is not a size, such as 256M"),
        ({"time_max_seconds": "0.5s"}, "limit time_max_seconds: '0.5s' is not a whole number of seconds"),
        ({"cpu_max_millicores": "2"}, "limit cpu_max_millicores must be a whole number, not '2'"),
        ({"memory": 1}, "no limit is called 'memory'"),
    ],
)
def test_wrong_limits_are_refused_in_words(limits: dict[str, Any], words: str) -> None:
    """By a client before it asks, and by a worker in the same words."""
    for use in (lambda: spec_to_message(JobSpec("true", limits)), lambda: Limits().with_overrides(limits)):
        with pytest.raises(InvalidJobError, match=words) as caught:
            use()
        assert "memory" not in limits or "memory_max_bytes" in str(caught.value.hint)
