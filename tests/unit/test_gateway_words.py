"""Errors of nodes at the gateway: the same type, facts and words, with the gateway's id of the job."""

from pjw.errors import (
    JobNotFoundError,
    JobStateError,
    KernelError,
    LaunchError,
    LimitReachedError,
    OffsetError,
    SessionNotFoundError,
    WorkdirError,
)
from pjw.gateway.answers import in_our_words
from pjw.rpc.status import error_of, status_of

NODE_JOB_ID, JOB_ID = 3, 70


def told(error: Exception) -> Exception:
    """What becomes of an error of a node at the gateway: it has crossed the wire."""
    code, text, metadata = status_of(error)
    return in_our_words(error_of(code, text, dict(metadata), {}), "n1", NODE_JOB_ID, JOB_ID)


def test_the_id_is_the_gateway_s_and_no_other_is_changed() -> None:
    """In the words, in the hint, in the facts; not a longer number, nor what a client has made up."""
    state = told(JobStateError("session 3 of job 3 has no terminal, as job 33 has", hint="pjw wait job 3"))
    assert (type(state), str(state)) == (JobStateError, "session 3 of job 70 has no terminal, as job 33 has")
    assert isinstance(state, JobStateError) and state.hint == "pjw wait job 70"
    session = told(SessionNotFoundError(3, 3))
    assert isinstance(session, SessionNotFoundError)
    assert (str(session), session.job_id, session.session) == ("no session 3 of job 70", 70, 3)
    offset = told(OffsetError("cannot write input of job 3 from byte 9: it has 3 bytes", size=3))
    assert isinstance(offset, OffsetError) and (offset.size, str(offset)[:29]) == (
        3,
        "cannot write input of job 70 ",
    )
    limit = told(LimitReachedError("job 3 has 16 sessions", limit="x", most=3))
    assert isinstance(limit, LimitReachedError) and (limit.most, str(limit)) == (3, "job 70 has 16 sessions")
    for error in (LaunchError("/job 3", 2), WorkdirError("/job 3", 2)):
        assert str(told(error)) == str(error)


def test_what_the_node_does_not_know_any_more() -> None:
    """The client knows the job, so it does not hear that there is none."""
    assert str(told(JobNotFoundError(3))) == "node n1 knows nothing of job 70 any more"


def test_what_a_node_tells_of_its_kernel_goes_on_to_the_client() -> None:
    """It is nothing of the node's inside."""
    error = told(KernelError("connect to", "job 3", 111, for_client=True))
    assert isinstance(error, KernelError) and error.for_client
    assert (error.subject, status_of(error)[1]) == ("job 70", str(error))
