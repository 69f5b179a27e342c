"""Lives of jobs in any order of events."""

from hypothesis import given
from hypothesis import strategies as st

from pjw.errors import JobStateError
from pjw.model import JobState
from pjw.worker.states import JobEvent, transition


@given(st.lists(st.sampled_from(JobEvent), max_size=20))
def test_any_order_of_events(events: list[JobEvent]) -> None:
    """A refused event changes nothing, an end is for ever, and what was executed is not started again."""
    state = JobState.QUEUED
    seen = [state]
    for event in events:
        try:
            after = transition(state, event)
        except JobStateError:
            continue
        assert not state.final
        state = after
        seen.append(state)
    begun = seen.index(JobState.RUNNING) if JobState.RUNNING in seen else len(seen)
    assert {JobState.QUEUED, JobState.STARTING}.isdisjoint(seen[begun:])
    assert sum(state.final for state in seen) <= 1
    if JobState.LOST in seen:
        assert JobState.STARTING in seen
    if JobState.STOPPING in seen:
        assert seen.index(JobState.STOPPING) > seen.index(JobState.RUNNING)
