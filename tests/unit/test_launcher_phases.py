"""The table of what the worker may ask for in each phase of an init."""

from itertools import product
from typing import get_args

import pytest

from pjw.errors import JobStateError
from pjw.launcher.phases import PERMITTED, InitPhase, require_permitted
from pjw.launcher.protocol import REQUESTS, AboutJob


def test_each_request_about_a_job_has_its_phases() -> None:
    """Whatever names one job is in the table, and nothing else."""
    about_job = {request for request in REQUESTS.values() if "job_id" in request.__dataclass_fields__}
    assert about_job == set(get_args(AboutJob))
    assert set(PERMITTED) == {request.op for request in about_job}


@pytest.mark.parametrize(("op", "phase"), list(product(PERMITTED, InitPhase)))
def test_what_is_not_permitted_is_refused(op: str, phase: InitPhase) -> None:
    """With the request, the job and the phase."""
    if phase in PERMITTED[op]:
        require_permitted(op, 7, phase)
    else:
        with pytest.raises(JobStateError, match=f"request {op}: the init of job 7 is {phase}"):
            require_permitted(op, 7, phase)


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
