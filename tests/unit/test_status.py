"""The table of errors and gRPC codes: whole, and the same in both directions."""

import errno
from collections.abc import Iterator

import grpc
import pytest

from pjw import errors
from pjw.cli.exits import exit_code_of
from pjw.rpc.status import (
    ERRNO_KEY,
    ERROR_KEY,
    HINT_KEY,
    INTERNAL_TEXT,
    NARROWER,
    TABLE,
    error_of,
    status_of,
)

CODES = {row.kind: row.code for row in TABLE}
BASES: dict[type[errors.PjwError], type[errors.PjwError]] = {
    kind: row.kind for kind in NARROWER for row in TABLE if row.kind in kind.__bases__
}
CODES |= {kind: CODES[base] for kind, base in BASES.items()}


def kinds(of: type[errors.PjwError] = errors.PjwError) -> Iterator[type[errors.PjwError]]:
    """Every class below *of* that errors.py defines."""
    for each in of.__subclasses__():
        if each.__module__ == "pjw.errors":
            yield each
            yield from kinds(each)


def made(kind: type[errors.PjwError]) -> errors.PjwError:
    """An error of that kind with a path in its words, and all of its facts."""
    if kind is errors.JobNotFoundError:
        return errors.JobNotFoundError(7)
    if kind is errors.SessionNotFoundError:
        return errors.SessionNotFoundError(7, 1)
    if kind is errors.LaunchError:
        return errors.LaunchError("/secret/x", errno.ENOENT)
    if kind is errors.WorkdirError:
        return errors.WorkdirError("/secret/x", errno.EACCES)
    if kind is errors.KernelError:
        return errors.KernelError("mount", "/secret/x", errno.EPERM, hint="mount /secret")
    if kind is errors.JobTableError:
        return errors.JobTableError("use", "/secret/x", ValueError("it is damaged"))
    if kind is errors.LimitRangeError:
        return errors.LimitRangeError("too many", limit="pids_max", value=9, most=8)
    if kind is errors.LimitReachedError:
        return errors.LimitReachedError("full", hint="wait – a moment", limit="running_max", most=8)
    if kind is errors.NameTakenError:
        return errors.NameTakenError("taken", hint="pjw stop 3", holder=3)
    if kind is errors.OffsetError:
        return errors.OffsetError("beyond", size=3)
    if kind is errors.WorkspaceNotFoundError:
        return errors.WorkspaceNotFoundError("work")
    if kind is errors.NodeNotFoundError:
        return errors.NodeNotFoundError("n3")
    if kind is errors.ImageNotFoundError:
        return errors.ImageNotFoundError("thing")
    if kind is errors.MountNotFoundError:
        return errors.MountNotFoundError("data")
    if kind is errors.MountError:
        return errors.MountError.of_source("data", errno.ENOENT)
    if kind is errors.GpuError:
        return errors.GpuError.of_edit("/dev/nvidia0", errno.ENOENT)
    if kind is errors.WorkspaceBusyError:
        return errors.WorkspaceBusyError("used", hint="pjw stop 3", workspace="work", holder=3)
    return kind("cannot use /secret/x", hint="look there")


def there_and_back(error: errors.PjwError, **asked: object) -> errors.PjwError:
    """What a client raises that asked for this, when the server has raised *error*."""
    code, text, metadata = status_of(error)
    return error_of(code, text, dict(metadata), asked)


def facts(error: errors.PjwError) -> dict[str, object]:
    """What it says beside its words."""
    return {name: getattr(error, name) for name in error.FACTS}


def test_every_error_has_a_code() -> None:
    """A new error must be given its code here, and none that is gone may stay; no two have one reason."""
    assert sorted(map(repr, CODES)) == sorted(map(repr, kinds()))
    assert len({row.reason for row in TABLE}) == len(TABLE) == len(CODES) - len(NARROWER)


@pytest.mark.parametrize("kind", list(kinds()))
def test_what_a_client_is_told(kind: type[errors.PjwError]) -> None:
    """Errors of the caller keep their words; those of the inside become one fixed text without metadata."""
    code, text, metadata = status_of(made(kind))
    assert code is CODES[kind]
    if code is grpc.StatusCode.INTERNAL:
        assert (text, metadata) == (INTERNAL_TEXT, ())
    else:
        assert text == str(made(kind))
        # HTTP/2 header values are ASCII: a hint beyond it has its place in the other key alone
        hint = made(kind).hint
        assert dict(metadata).get(HINT_KEY) == (hint if hint and hint.isascii() else None)
        assert all(value.isascii() and value.isprintable() for _, value in metadata)


def test_a_step_of_a_start_that_failed_is_told() -> None:
    """Which step, on what and why: a job sees such paths too (R2)."""
    error = errors.KernelError("hide /x for", "job 7", errno.ELOOP, for_client=True)
    assert str(error).startswith("cannot hide /x for job 7: ")
    assert status_of(error)[:2] == (grpc.StatusCode.INTERNAL, str(error))
    back = there_and_back(error)
    assert (type(back), str(back), facts(back)) == (errors.KernelError, str(error), facts(error))


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


@pytest.mark.parametrize("kind", [row.kind for row in TABLE if row.code is not grpc.StatusCode.INTERNAL])
def test_client_and_worker_raise_the_same(kind: type[errors.PjwError]) -> None:
    """R5: what a Worker raises, a Client raises: the class, the words, the hint and every fact."""
    error = made(kind)
    known = (
        {"job_id": 7}
        if kind in (errors.JobNotFoundError, errors.SessionNotFoundError)
        else {"program": "/secret/x", "workdir": "/secret/x"}
    )
    back = there_and_back(error, **known)
    assert (type(back), str(back), back.hint) == (kind, str(error), error.hint)
    assert facts(back) == facts(error)


@pytest.mark.parametrize("kind", NARROWER)
def test_a_narrower_error_travels_as_its_base(kind: type[errors.PjwError]) -> None:
    """The wire knows the base alone, as a client of before does; who catches the base catches both."""
    error = made(kind)
    code, text, metadata = status_of(error)
    base = BASES[kind].restored(str(error), error.hint, facts(error))
    assert status_of(base) == (code, text, metadata)
    assert exit_code_of(error) == exit_code_of(base)
    if code is not grpc.StatusCode.INTERNAL:
        assert type(there_and_back(error)) is type(base)


def test_what_is_asked_for_comes_back_whole() -> None:
    """A header is small: what is long in a fact is cut, but not for who has asked for it."""
    long = "/" + "x" * 4000
    code, text, metadata = status_of(errors.WorkdirError(long, errno.EACCES))
    assert sum(len(value) for _, value in metadata) < 1000
    back = error_of(code, text, dict(metadata), {"workdir": long})
    assert isinstance(back, errors.WorkdirError)
    assert (back.workdir, back.errno) == (long, errno.EACCES)


@pytest.mark.parametrize("code", grpc.StatusCode)
def test_every_code_is_an_error_of_ours(code: grpc.StatusCode) -> None:
    """Whatever gRPC or a server of before says, a client of pjw sees a PjwError in words."""
    assert str(error_of(code, "words", {}, {}))


OLD_SERVER: list[tuple[errors.PjwError, type[errors.PjwError]]] = [
    (errors.InvalidJobError("limit pids_max must be at most 8", hint="less"), errors.InvalidJobError),
    (errors.LaunchError("x", errno.EACCES), errors.LaunchError),
    (errors.WorkdirError("/x", errno.EACCES), errors.JobStateError),
    (errors.JobNotFoundError(7), errors.JobNotFoundError),
    (errors.LauncherGoneError("drains"), errors.ServerUnreachableError),
    (errors.KernelError("hide", "/x", 1, for_client=True), errors.ServerFailedError),
]


@pytest.mark.parametrize(("error", "seen"), OLD_SERVER)
def test_a_server_of_before(error: errors.PjwError, seen: type[errors.PjwError]) -> None:
    """It sends a code, a hint and an errno; that is what its errors are told by."""
    code, text, metadata = status_of(error)
    old = {key: value for key, value in metadata if key != ERROR_KEY}
    back = error_of(code, text, old, {"program": "x", "job_id": 7})
    assert (type(back), back.hint) == (seen, error.hint)
    assert getattr(back, "errno", errno.EACCES) == errno.EACCES


def test_a_client_of_before() -> None:
    """It reads the hint as text, and tells 126 from 127 by a number."""
    _, _, metadata = status_of(errors.LaunchError("x", errno.EACCES))
    assert dict(metadata)[ERRNO_KEY] == str(errno.EACCES)
    _, _, metadata = status_of(errors.InvalidJobError("x", hint="look there"))
    assert dict(metadata)[HINT_KEY] == "look there"


@pytest.mark.parametrize(
    "told",
    [
        "",
        "no JSON",
        "[" * 100_000,
        "[]",
        '{"reason": "OF_A_LATER_VERSION", "limit": "pids_max"}',
        # of another code than this one
        '{"reason": "OFFSET"}',
        '{"reason": ["LIMIT_RANGE"]}',
        '{"reason": "LIMIT_RANGE", "limit": 7, "value": true, "most": "8", "hint": 3}',
    ],
)
def test_nonsense_of_a_server(told: str) -> None:
    """What cannot be, or comes from a later version, leaves the code: no exception, no wrong fact."""
    back = error_of(grpc.StatusCode.INVALID_ARGUMENT, "words", {ERROR_KEY: told}, {})
    assert isinstance(back, errors.InvalidJobError)
    assert (str(back), back.hint) == ("words", None)
    assert set(facts(back).values()) <= {None}
