"""The abilities of an agent, with answers in words for a model; agents.py makes tools of them.

Each answer is bounded in time and in bytes. A call that is cancelled stops the command that it has started.
"""

import asyncio
import codecs
import io
import tarfile
from base64 import b64decode, b64encode
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pjw.cli.exits import why_ended, why_session_ended
from pjw.cli.render import printable
from pjw.cli.units import duration_in_words
from pjw.errors import CopyError, InvalidJobError, OffsetError, PjwError
from pjw.model import LIMIT_MAXIMUM, Job, JobSpec, JobState, Session

if TYPE_CHECKING:
    from pjw.client.aio import AsyncClient

# Seconds to wait for the state of a job when the time of an answer is over already.
_STATE_SECONDS: Final = 5
# Seconds to wait for a stop; pjwd goes on with it by itself.
_STOP_SECONDS: Final = 60
_COMMAND_CHARACTERS: Final = 200
# of a file, in one call
PUT_BYTES_MAX: Final = 1024 * 1024


class Command(NamedTuple):
    """A job, or another command that runs in one; as text `17` or `17/2`."""

    job_id: int
    session: int = 0

    def __str__(self) -> str:
        return f"{self.job_id}/{self.session}" if self.session else str(self.job_id)


class Answer(NamedTuple):
    """Our words, and apart from them a command's output, so that it cannot pass for ours."""

    words: str
    output: str = ""


class AgentJobs:
    """The commands of an agent."""

    def __init__(self, client: "AsyncClient") -> None:
        self._client: Final = client
        # commands whose ids no answer has given yet
        self._untold: Final[set[Command | None]] = set()

    async def run(
        self, asked: Mapping[str, Any], limits: Mapping[str, str | int], *, seconds: float, bytes_max: int
    ) -> Answer:
        """Start a job and follow it to its end, for at most *seconds*; *asked* is of a JobSpec.

        A limit that is empty is the operator's default.
        """
        given = {name: value for name, value in limits.items() if value}
        return await self._run(self._started(JobSpec(limits=given, **asked)), seconds, bytes_max)

    async def run_inside(
        self, name: str, asked: Mapping[str, Any], *, seconds: float, bytes_max: int
    ) -> Answer:
        """Run another shell command in a job, as `run` does a job; *asked* has no more than `exec` takes."""
        job_id = await self._job_id(name)
        # both outputs in one, as a job has them
        spec = JobSpec(**{**asked, "command": f"exec 2>&1\n{asked['command']}"})
        return await self._run(self._started_inside(job_id, spec), seconds, bytes_max)

    async def _run(self, start: Coroutine[Any, Any, Command], seconds: float, bytes_max: int) -> Answer:
        starting = asyncio.ensure_future(start)
        command = None
        try:
            # a start that is under way cannot be taken back: the command may run already
            command = await asyncio.shield(starting)
            return await self._follow(command, 0, seconds, bytes_max)
        except asyncio.CancelledError:
            with suppress(PjwError):
                command = await starting
                await self._stop(command, None)
            raise
        except PjwError as error:
            if command is not None:
                error.add_note(f"{_title(command)} may go on. {_waiting(command, 0)}")
            raise
        finally:
            self._untold.discard(command)

    async def poll(self, name: str, offset: int, seconds: float, bytes_max: int) -> Answer:
        """Return the state, and the output from *offset* on; below 0, so many bytes before the end."""
        command = await self._found(name)
        if offset < 0:
            offset = max(0, await self._size(command) + offset)
        return await self._follow(command, offset, seconds, bytes_max)

    async def stop(self, name: str, grace_seconds: float | None) -> Answer:
        """Have a command end, and wait for that."""
        command = await self._found(name)
        try:
            async with asyncio.timeout(_STOP_SECONDS + (grace_seconds or 0)):
                return Answer(await self._stop(command, grace_seconds))
        except TimeoutError:
            return Answer(
                f"{_title(command)} is being stopped, and has not ended yet. {_waiting(command, 0)}"
            )

    async def stop_untold(self) -> None:
        """Stop the commands of calls that were not answered yet."""
        stops = [self._stop(command, None) for command in self._untold if command]
        await asyncio.gather(*stops, return_exceptions=True)

    async def list(self, limit: int, *, running: bool) -> Answer:
        """Return the newest jobs, a line for each."""
        states = [JobState.QUEUED, JobState.STARTING, JobState.RUNNING, JobState.STOPPING] if running else []
        jobs = self._client.list(states=states, newest_first=True, limit=limit)
        lines = [_line(job) async for job in jobs]
        what = "jobs that have not ended" if running else "jobs"
        if not lines:
            return Answer(f"There are no {what}.")
        head = f"The {limit} newest {what}; there may be more" if len(lines) == limit else f"All {what}"
        return Answer(f"{head}, newest first:", "\n".join(lines))

    async def put(self, name: str, path: str, content: str, *, base64: bool, executable: bool) -> Answer:
        """Make a file of a running job, or replace it."""
        job_id = await self._job_id(name)
        try:
            data = b64decode(content, validate=True) if base64 else content.encode()
        except ValueError as error:
            raise InvalidJobError(f"cannot put {path}: the content is not base64: {error}") from None
        if len(data) > PUT_BYTES_MAX:
            raise InvalidJobError(
                f"cannot put {path}: {len(data)} bytes; at most {PUT_BYTES_MAX} go at once",
                hint="put it in parts, and join them with cat in the job",
            )
        await put(self._client, job_id, path, data, executable=executable)
        return Answer(f"Put {path} into job {job_id}: {len(data)} bytes.")

    async def get(self, name: str, path: str, offset: int, bytes_max: int, *, base64: bool) -> Answer:
        """Return a part of a file of a running job."""
        job_id = await self._job_id(name)
        data, size = await get(self._client, job_id, path, offset, bytes_max)
        if base64:
            text, length = b64encode(data).decode(), len(data)
        else:
            try:
                text, length = _decoded(data, whole=offset + len(data) >= size, errors="strict")
            except UnicodeDecodeError:
                raise InvalidJobError(
                    f"cannot get {path} as text: it is not UTF-8", hint="get it with base64=true"
                ) from None
        end = offset + length
        words = f"{path} of job {job_id} has {size} bytes; bytes {offset} to {end} are what follows."
        if end < size:
            words += f" offset={end} goes on."
        return Answer(words, text)

    async def _job_id(self, name: str) -> int:
        command = await self._found(name)
        if command.session:
            raise InvalidJobError(f"{command} is a command in a job: give the job, {command.job_id}")
        return command.job_id

    async def _found(self, text: str) -> Command:
        name, slash, number = text.strip().partition("/")
        session = int(number) if number.isascii() and number.isdecimal() and len(number) < 10 else 0
        if not name or (slash and not session):
            raise InvalidJobError(
                f"{text[:40]!r} is no job",
                hint='a job is given by its id, "17", or its name; list shows both',
            )
        if name.isascii() and name.isdecimal() and len(name) < 20:
            return Command(int(name), session)
        return Command((await self._client.find(name)).id, session)

    async def _started(self, spec: JobSpec) -> Command:
        command = Command((await self._client.start(spec)).id)
        self._untold.add(command)
        return command

    async def _started_inside(self, job_id: int, spec: JobSpec) -> Command:
        # a model may take long between two calls: it is not hung up for that
        session = await self._client.exec(job_id, spec, detach=True)
        command = Command(job_id, session.number)
        self._untold.add(command)
        return command

    async def _follow(self, command: Command, offset: int, seconds: float, bytes_max: int) -> Answer:
        """Return the output from *offset* until it ends, the time is over, or the answer is full."""
        data = bytearray()
        ended = False
        output = self._client.logs(command.job_id, offset, session=command.session)
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds), aclosing(output):
                async for piece in output:
                    data += piece
                    if len(data) >= bytes_max:
                        break
                else:
                    ended = True
        full = len(data) >= bytes_max
        text, length = _decoded(bytes(data[:bytes_max]), whole=ended and not full)
        end = offset + length
        if ended and not full:
            state = await self._ended(command)
        else:
            state = f"{await self._state(command)} {_waiting(command, end, full=full)}"
        if not length:
            return Answer(f"{state}\nNo {'further ' if offset else ''}output.")
        return Answer(f"{state}\nIts output, bytes {offset} to {end}, is what follows.", text)

    async def _size(self, command: Command) -> int:
        """Return the length of the output: the server tells it for an offset that no output reaches."""
        output = self._client.logs(command.job_id, LIMIT_MAXIMUM, follow=False, session=command.session)
        try:
            async with aclosing(output):
                async for _ in output:
                    pass
        except OffsetError as error:
            return error.size or 0
        return 0

    async def _ended(self, command: Command) -> str:
        if command.session:
            return _session_in_words(await self._client.wait_session(command.job_id, command.session))
        job = await self._client.get(command.job_id)
        return _job_in_words(job if job.state.final else await self._client.wait(job.id))

    async def _state(self, command: Command) -> str:
        """Describe the state of a command whose output has not ended."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_STATE_SECONDS):
                if not command.session:
                    return _job_in_words(await self._client.get(command.job_id))
        return f"{_title(command)} has more output, or has not ended."

    async def _stop(self, command: Command, grace_seconds: float | None) -> str:
        if command.session:
            return _session_in_words(await self._client.stop_session(command.job_id, command.session))
        return _job_in_words(await self._client.stop(command.job_id, grace=grace_seconds))


def words_of(error: PjwError) -> str:
    """Return an error in words, with its hint."""
    notes = getattr(error, "__notes__", ())
    return "\n".join([f"error: {error}", *([f"hint: {error.hint}"] if error.hint else []), *notes])


def _decoded(data: bytes, *, whole: bool, errors: str = "replace") -> tuple[str, int]:
    """Return text, and the number of its bytes: a partial character is left for the next answer."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    text = decoder.decode(data, final=whole)
    return text, len(data) - len(decoder.getstate()[0])


def _title(command: Command) -> str:
    return f"Command {command}" if command.session else f"Job {command}"


def _waiting(command: Command, end: int, *, full: bool = False) -> str:
    on = f'poll(job="{command}", offset={end})'
    if full:
        return f'There is more output: {on} goes on, poll(job="{command}", offset=-4000) shows the end.'
    return f'{on} waits for more, stop(job="{command}") stops it.'


def _job_in_words(job: Job) -> str:
    named = f"Job {job.id}{f' ({job.name})' if job.name else ''}"
    detail = f" ({printable(job.detail)})" if job.detail else ""
    if not job.state.final:
        return f"{named} has not ended: {job.state}{detail}."
    if job.exit_status is None:
        return f"{named} has no exit code: {job.reason or job.state}{detail}."
    after = duration_in_words(((job.end or job.start) - job.start).total_seconds())
    why = why_ended(job)
    return f"{named} ended after {after}: exit code {job.exit_status.code}{f', {why}' if why else ''}."


def _session_in_words(session: Session) -> str:
    named = _title(Command(session.job_id, session.number))
    if session.exit_status is None:
        return f"{named} has no exit code: nobody knows how it ended."
    why = why_session_ended(session)
    return f"{named} ended: exit code {session.exit_status.code}{f', {why}' if why else ''}."


def _line(job: Job) -> str:
    command = printable(job.command)
    if len(command) > _COMMAND_CHARACTERS:
        command = command[: _COMMAND_CHARACTERS - 1] + "…"
    return f"{_job_in_words(job)} Command: {command}"


# Files of a running job, for agents: a part of one, and one that is put whole.
#
# agents.py knows of files no more than `put` and `get`. Files travel as archives, like those of `pjw cp`, so
# the job needs no program for them.

# The bytes before a file in an archive: its header, and before that one for a name of up to 4095 bytes.
_HEADERS_BYTES: Final = 16 * 1024


async def put(client: "AsyncClient", job_id: int, path: str, data: bytes, *, executable: bool) -> None:
    """Make a file of a running job, or replace it, with the directories above it. Raises PjwError."""
    words = f"cannot put {path} into job {job_id}"
    there = await _entry(client, job_id, path)
    if there is not None and there.isdir():
        raise PjwError(f"{words}: it is a directory")
    # one that is replaced keeps its permissions
    mode = 0o644 if there is None else there.mode & 0o777
    info = tarfile.TarInfo(path.lstrip("/"))
    info.size, info.mode = len(data), mode | (0o111 if executable else 0)
    archive = info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape") + data
    archive += bytes(-len(data) % tarfile.BLOCKSIZE) + bytes(2 * tarfile.BLOCKSIZE)
    try:
        await client.write_archive(job_id, _whole(archive), "/" if path.startswith("/") else ".")
    except CopyError as error:
        raise PjwError(f"{words}: {_why(error)}") from None


async def _whole(data: bytes) -> AsyncGenerator[bytes, None]:
    yield data


async def _entry(client: "AsyncClient", job_id: int, path: str) -> tarfile.TarInfo | None:
    """Return the entry at that path; None where it cannot be read."""
    with suppress(CopyError):
        async with aclosing(client.read_archive(job_id, path)) as pieces:
            return _first_entry(await _headers(pieces))
    return None


async def get(
    client: "AsyncClient", job_id: int, path: str, offset: int, bytes_max: int
) -> tuple[bytes, int]:
    """Return a part of a running job's file, and the size of the file in bytes. Raises PjwError."""
    words = f"cannot get {path} from job {job_id}"
    found = bytearray()
    try:
        async with aclosing(client.read_archive(job_id, path)) as pieces:
            held = await _headers(pieces)
            entry = _first_entry(held)
            if entry is None or not entry.isreg():
                kind = "a directory" if entry is not None and entry.isdir() else "no plain file"
                raise PjwError(f"{words}: it is {kind}")
            first = entry.offset_data + min(offset, entry.size)
            last = min(first + bytes_max, entry.offset_data + entry.size)
            position = 0
            while held:
                found += held[max(0, first - position) : max(0, last - position)]
                position += len(held)
                # the bytes behind the part are not fetched
                held = await anext(pieces, b"") if position < last else b""
    except CopyError as error:
        raise PjwError(f"{words}: {_why(error)}") from None
    return bytes(found), entry.size


async def _headers(pieces: AsyncGenerator[bytes, None]) -> bytes:
    held = b""
    while len(held) < _HEADERS_BYTES and (piece := await anext(pieces, b"")):
        held += piece
    return held


def _first_entry(held: bytes) -> tarfile.TarInfo | None:
    """Return the first entry of an archive's beginning; None for none. The job may have sent anything."""
    try:
        with tarfile.open(fileobj=io.BytesIO(held), mode="r:") as archive:
            return archive.next()
    except (tarfile.TarError, ValueError, OverflowError):
        return None


def _why(error: CopyError) -> str:
    """Return the reason given by the program in the job, without the request it repeats."""
    _, _, why = str(error).rpartition(": cannot ")
    if why.endswith(": no such file or directory"):
        return "there is no such file"
    return f"cannot {why}" if why else str(error)
