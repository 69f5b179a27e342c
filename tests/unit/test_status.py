"""The table of errors and gRPC codes: whole, and the same in both directions."""

import errno
from collections.abc import Iterator

import grpc
import pytest

from pjw import errors
from pjw.rpc.status import CODES, ERRNO_KEY, HINT_KEY, INTERNAL_TEXT, error_of, status_of


def leaves(kind: type[errors.PjwError] = errors.PjwError) -> Iterator[type[errors.PjwError]]:
    """Every class below *kind* that has none below itself, of those that errors.py defines."""
    below = [each for each in kind.__subclasses__() if each.__module__ == "pjw.errors"]
    for each in below:
        yield from leaves(each)
    if not below:
        yield kind


def made(kind: type[errors.PjwError]) -> errors.PjwError:
    """An error of that kind with a path in its words."""
    if kind is errors.JobNotFoundError:
        return errors.JobNotFoundError(7)
    if kind is errors.LaunchError:
        return errors.LaunchError("/secret/x", errno.ENOENT)
    if kind is errors.WorkdirError:
        return errors.WorkdirError("/secret/x", errno.EACCES)
    if kind is errors.KernelError:
        return errors.KernelError("mount", "/secret/x", errno.EPERM, hint="mount /secret")
    return kind("cannot use /secret/x", hint="look there")


def test_every_leaf_has_a_code() -> None:
    """A new error must be given its code here, and none that is gone may stay."""
    assert set(CODES) == set(leaves())


@pytest.mark.parametrize("kind", list(leaves()))
def test_what_a_client_is_told(kind: type[errors.PjwError]) -> None:
    """Errors of the caller keep their words; those of the inside become one fixed text without metadata."""
    code, text, metadata = status_of(made(kind))
    assert code is CODES[kind]
    if code is grpc.StatusCode.INTERNAL:
        assert (text, metadata) == (INTERNAL_TEXT, ())
    else:
        assert text == str(made(kind))
        assert dict(metadata).get(HINT_KEY) == made(kind).hint


@pytest.mark.parametrize(
    "error", [ValueError("secret"), OSError(13, "secret"), KeyError("secret"), Exception()]
)
def test_nothing_of_a_bug_is_told(error: Exception) -> None:
    """An exception that nobody meant is INTERNAL, in words that say nothing of it."""
    assert status_of(error) == (grpc.StatusCode.INTERNAL, INTERNAL_TEXT, ())


def test_a_subclass_without_a_code_of_its_own_is_internal() -> None:
    """A class that was forgotten in the table tells nothing, rather than something wrong."""

    class NewError(errors.InvalidJobError):
        pass

    # not among the leaves of errors.py, so not in the table
    assert status_of(NewError("secret")) == (grpc.StatusCode.INTERNAL, INTERNAL_TEXT, ())


@pytest.mark.parametrize(
    "kind",
    [
        errors.InvalidJobError,
        errors.JobStateError,
        errors.OffsetError,
        errors.LimitReachedError,
        errors.NotAuthenticatedError,
        errors.NotAllowedError,
        errors.JobNotFoundError,
    ],
)
def test_the_way_back_gives_the_same_error(kind: type[errors.PjwError]) -> None:
    """What was raised in the server is raised in the client, with its words and its hint."""
    error = made(kind)
    code, text, metadata = status_of(error)
    back = error_of(code, text, dict(metadata).get(HINT_KEY), 7)
    assert (type(back), str(back), back.hint) == (kind, str(error), error.hint)


@pytest.mark.parametrize("code", grpc.StatusCode)
def test_every_code_is_an_error_of_ours(code: grpc.StatusCode) -> None:
    """Whatever gRPC makes up, a client of pjw sees a PjwError in words."""
    assert str(error_of(code, "words", None, 7))


def test_exec_errno_travels_as_metadata() -> None:
    """The command line tells 126 from 127 by a number, not by text."""
    _, _, metadata = status_of(errors.LaunchError("x", errno.EACCES))
    assert dict(metadata)[ERRNO_KEY] == str(errno.EACCES)


def test_a_hint_that_no_header_can_hold_is_left_out() -> None:
    """HTTP/2 header values are ASCII: a hint beyond it, or of several lines, must not break the answer."""
    assert status_of(errors.InvalidJobError("x", hint="grüße"))[2] == ()
