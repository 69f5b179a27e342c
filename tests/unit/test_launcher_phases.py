"""The phases of an init: their changes, and the permitted requests in each."""

from itertools import product
from typing import get_args

import pytest

from pjw.errors import JobStateError
from pjw.launcher.phases import PERMITTED, TRANSITIONS, InitPhase, Phases
from pjw.launcher.protocol import REQUESTS, AboutJob


def in_phase(phase: InitPhase) -> Phases:
    """Bring the init of job 7 into a phase, by the changes of the table."""
    ways: dict[InitPhase, list[InitPhase]] = {InitPhase.ABSENT: []}
    new = [InitPhase.ABSENT]
    while new:
        former = new.pop()
        for each in TRANSITIONS[former] - ways.keys():
            ways[each] = [*ways[former], each]
            new.append(each)
    phases = Phases()
    for step in ways[phase]:
        phases.move(7, step)
    assert phases.of(7) is phase
    return phases


@pytest.mark.parametrize(("former", "to"), list(product(InitPhase, InitPhase)))
def test_no_phase_changes_but_by_the_table(former: InitPhase, to: InitPhase) -> None:
    """Each phase can be reached and left; a change that the table lacks is a bug, and changes nothing."""
    phases = in_phase(former)
    if to in TRANSITIONS[former]:
        phases.move(7, to)
        assert phases.of(7) is to
    else:
        with pytest.raises(AssertionError, match=f"cannot become {to}: it is {former}"):
            phases.move(7, to)
        assert phases.of(7) is former
    assert phases.of(8) is InitPhase.ABSENT


def test_each_request_about_a_job_has_its_phases() -> None:
    """Whatever names one job is in the table, and nothing else."""
    about_job = {request for request in REQUESTS.values() if "job_id" in request.__dataclass_fields__}
    assert about_job == set(get_args(AboutJob))
    assert set(PERMITTED) == {request.op for request in about_job}


@pytest.mark.parametrize(("op", "phase"), list(product(PERMITTED, InitPhase)))
def test_what_is_not_permitted_is_refused(op: str, phase: InitPhase) -> None:
    """With the request, the job and the phase."""
    phases = in_phase(phase)
    if phase in PERMITTED[op]:
        phases.require_permitted(op, 7)
    else:
        with pytest.raises(JobStateError, match=f"request {op}: the init of job 7 is {phase}"):
            phases.require_permitted(op, 7)


def test_no_launch_under_way_looks_like_an_end() -> None:
    """While an init is being made, ordered or taken back, nobody removes, accounts or adopts its job."""
    under_way = {
        InitPhase.WAITING,
        InitPhase.DISCARDED,
        InitPhase.LAUNCHING,
        InitPhase.REFUSED,
        InitPhase.LEFT,
    }
    for op in ("adopt", "account", "remove"):
        assert not PERMITTED[op] & under_way
