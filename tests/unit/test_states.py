"""The table of a job's life."""

import itertools

import pytest

from pjw.errors import JobStateError
from pjw.model import KNOWN_STATES, JobState
from pjw.worker.states import TRANSITIONS, JobEvent, transition

PAIRS = list(itertools.product(JobState, JobEvent))


@pytest.mark.parametrize(("state", "event"), PAIRS)
def test_every_pair_is_a_transition_or_an_error(state: JobState, event: JobEvent) -> None:
    """All pairs: what is in the table happens, what is not raises and names both."""
    if (state, event) in TRANSITIONS:
        assert transition(state, event) is TRANSITIONS[state, event]
    else:
        with pytest.raises(JobStateError, match=f"a job that is {state} cannot see {event}"):
            transition(state, event)


def test_nothing_follows_a_final_state() -> None:
    """What has ended stays ended, whatever comes late."""
    assert [state for state, _ in TRANSITIONS if state.final] == []


def test_every_state_can_be_reached_and_left() -> None:
    """From QUEUED every state can come to be, and from each that is not final an end can."""
    reached = {JobState.QUEUED}
    for _ in KNOWN_STATES:
        reached |= {after for (before, _), after in TRANSITIONS.items() if before in reached}
    assert reached == set(KNOWN_STATES)
    for state in KNOWN_STATES:
        if not state.final:
            assert any(after.final for (before, _), after in TRANSITIONS.items() if before is state)


def test_a_job_may_be_lost_from_every_living_state() -> None:
    """A host may go down at any moment. One that waits for its turn waits on."""
    for state in KNOWN_STATES:
        lives = not state.final and state is not JobState.QUEUED
        assert ((state, JobEvent.END_UNKNOWN) in TRANSITIONS) is lives


def test_no_end_without_a_start() -> None:
    """An exit status is known only of what was seen to be executed."""
    assert (JobState.STARTING, JobEvent.END_SEEN) not in TRANSITIONS
