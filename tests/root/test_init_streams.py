"""pjw-init and what a job writes: stderr kept apart, the limit of both, and when it was written."""

import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.init_harness import (
    Harness,
    Inotify,
    Running,
    small_tmpfs,
)
from tests.support.service import wait_for

INTERVAL_NS = 4_000_000


# --- a file that somebody cuts short


def test_an_output_that_is_cut_short_has_no_hole(init: Harness) -> None:
    """What comes next follows what is left; the mode says that bytes are gone, and the times begin anew."""
    path = init.directory / "cut"
    output = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    watch = Inotify(path)
    script = "trap 'echo after; exit 0' TERM; echo before; sleep 1000 & wait"
    job = init.start("/bin/sh", "-c", script, output_fd=output)
    watch.wait_until(lambda: path.read_bytes() == b"before\n")
    watch.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    os.ftruncate(output, 3)
    os.close(output)
    job.send(signal.SIGTERM)
    assert job.wait().end == "exited 0 stopped"
    assert path.read_bytes() == b"befafter\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert [end for _, end in job.times] == [9]


def test_an_output_that_is_cut_short_at_its_end(init: Harness) -> None:
    """The job writes nothing more, and its end says that bytes are gone."""
    path = init.directory / "cut"
    output = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    watch = Inotify(path)
    job = init.start("/bin/sh", "-c", "echo before; sleep 1000", output_fd=output)
    watch.wait_until(lambda: path.read_bytes() == b"before\n")
    watch.close()
    os.ftruncate(output, 0)
    os.close(output)
    job.send(signal.SIGQUIT)
    assert job.wait().end == "signaled 9 stopped"
    assert stat.S_IMODE(path.stat().st_mode) == 0o700


# --- stderr


def test_stderr_goes_to_a_file_of_its_own(init: Harness) -> None:
    """Each stream is whole, to the byte, with more than a pipe holds on both."""
    job = init.sh("seq 300000 >&2 & seq 300001 400000; wait", split_stderr=True)
    assert job.end == "exited 0 none"
    assert job.text == "".join(f"{n}\n" for n in range(300_001, 400_001))
    assert job.stderr_path.read_text() == "".join(f"{n}\n" for n in range(1, 300_001))


def test_without_a_split_there_is_one_pipe(init: Harness) -> None:
    """Both go to one file, in their order, and init holds no further descriptor."""
    job = init.sh("echo one; echo two >&2; echo three")
    assert job.text == "one\ntwo\nthree\n"
    apart, together = (init.start("sleep", "1000", split_stderr=split) for split in (True, False))
    counts = [len(os.listdir(f"/proc/{job.pid}/fd")) for job in (apart, together)]
    assert counts[0] - counts[1] == 2


@pytest.mark.parametrize(("most", "reason"), [(299_999, "output_limit"), (300_000, "none")])
def test_the_limit_counts_both_streams(init: Harness, most: int, reason: str) -> None:
    """To the byte, whoever writes the last one."""
    script = "head -c 200000 /dev/zero; head -c 100000 /dev/zero >&2"
    job = init.sh(script, split_stderr=True, options=("--output-max", str(most)))
    assert job.end.split()[-1] == reason
    assert len(job.output) + job.stderr_path.stat().st_size == min(most, 300_000)


def test_a_closed_stderr_leaves_the_other(init: Harness) -> None:
    """The end of one stream is not the end of the job's output."""
    job = init.sh("exec 2>&-; echo words", split_stderr=True)
    assert (job.end, job.text, job.stderr_path.read_bytes()) == ("exited 0 none", "words\n", b"")


def test_a_full_disk_under_one_stream_does_not_hold_the_other(init: Harness) -> None:
    """stdout waits for space, whole; what goes to stderr meanwhile is written, and so is the rest later."""
    size, root = 200_000, small_tmpfs(262_144)
    filler, output = (os.open(name, os.O_RDWR | os.O_CREAT, dir_fd=root) for name in ("filler", "output"))
    try:
        os.write(filler, bytes(131_072))
        script = f"seq 1000000 | head -c {size} & seq 50000 >&2; wait; exit 4"
        job = init.start("/bin/sh", "-c", script, output_fd=output, split_stderr=True)
        full = Inotify(Path(f"/proc/self/fd/{output}"))
        full.wait_until(lambda: os.fstat(output).st_size == 131_072)
        full.close()
        expected = "".join(f"{n}\n" for n in range(1, 50_001))
        other = Inotify(job.stderr_path)
        other.wait_until(lambda: job.stderr_path.stat().st_size == len(expected))
        other.close()
        assert os.fstat(output).st_size == 131_072
        os.ftruncate(filler, 0)
        assert job.wait().end == "exited 4 none"
        truth = subprocess.run(["seq", "1000000"], capture_output=True, check=True).stdout[:size]
        assert os.pread(output, size + 1, 0) == truth
        assert job.stderr_path.read_text() == expected
    finally:
        for descriptor in (filler, output, root):
            os.close(descriptor)


# --- times


def check_times(job: Running, before: int) -> None:
    """Records lie between the start and now, ascend, and the last one ends where the output does."""
    times = job.times
    assert all(before <= ns <= time.time_ns() for ns, _ in times)
    assert times == sorted(times)
    ends = [end for _, end in times]
    assert ends == sorted(set(ends))
    assert ends[-1:] == [len(job.output)][: len(ends)]


def test_each_line_after_a_pause_has_its_time(init: Harness, visible: Path) -> None:
    """What is written with pauses between has a record for each, made before the next is written."""
    go = visible / "go"
    os.mkfifo(go)
    go.chmod(0o644)
    script = (
        "import os, time\n"
        "for line in open('go'):\n"
        "    os.write(1, b'%d\\n' % time.clock_gettime_ns(time.CLOCK_REALTIME))\n"
    )
    before = time.time_ns()
    job = init.start("/usr/bin/python3", "-I", "-S", "-c", script, options=("--scratch", str(visible)))
    watch, recorded = Inotify(job.times_path), []
    with go.open("w") as asked:
        for number in range(1, 6):
            print(file=asked, flush=True)
            watch.wait_until(lambda number=number: len(job.times) == number)  # type: ignore[misc]
            recorded.append(time.time_ns())
    watch.close()
    assert job.wait().end == "exited 0 none"
    check_times(job, before)
    said = [int(line) for line in job.text.split()]
    for written, (ns, _), latest in zip(said, job.times, recorded, strict=True):
        assert written <= ns <= latest


def test_a_burst_has_few_records(init: Harness) -> None:
    """At most one for each 4 ms, whatever is written: 64 MiB, and 200,000 lines one by one."""
    for script in (
        "head -c 67108864 /dev/zero",
        "/usr/bin/python3 -c 'import os\nfor n in range(200000): os.write(1, b\"x\\n\")'",
    ):
        before = time.time_ns()
        job = init.sh(script)
        check_times(job, before)
        took = int(job.status[1][1]) - int(job.status[0][1])
        assert 1 <= len(job.times) <= took / INTERVAL_NS + 3


def test_the_last_write_is_recorded_while_the_job_goes_on(init: Harness) -> None:
    """What comes right behind a record is recorded soon, without waiting for more output or the end."""
    script = (
        "import os, time\nfor n in range(30): os.write(1, b'word\\n'); time.sleep(0.0005)\ntime.sleep(1000)\n"
    )
    before = time.time_ns()
    job = init.start("/usr/bin/python3", "-I", "-S", "-c", script)
    watch = Inotify(job.times_path)
    watch.wait_until(lambda: [end for _, end in job.times[-1:]] == [150])
    watch.close()
    assert len(job.times) > 1
    check_times(job, before)


def test_records_go_on_behind_what_was_there(init: Harness) -> None:
    """Offsets are those of the file."""
    job = init.sh("echo more", before=b"12345\n")
    assert [end for _, end in job.times] == [len("12345\nmore\n")]


def test_times_of_both_streams(init: Harness, tmp_path: Path) -> None:
    """Where stderr is kept apart it has records of its own."""
    descriptor = os.open(tmp_path / "stderr-times", os.O_RDWR | os.O_CREAT)
    options = ("--stderr-times-fd", str(descriptor))
    job = init.sh("echo one; echo three >&2", split_stderr=True, options=options, pass_fds=[descriptor])
    os.close(descriptor)
    assert [end for _, end in job.times] == [4]
    assert (tmp_path / "stderr-times").stat().st_size == 16


def test_times_that_cannot_be_written_hold_up_nobody(init: Harness) -> None:
    """A descriptor that takes nothing costs the times, and no byte of the output."""
    full = os.open("/dev/full", os.O_RDWR)
    job = init.sh("seq 100000", options=("--times-fd", str(full)), pass_fds=[full])
    os.close(full)
    assert job.end == "exited 0 none"
    assert job.text == "".join(f"{n}\n" for n in range(1, 100_001))


@pytest.mark.skipif("PJW_VM_GUEST" in os.environ, reason="its kernel does not tell in what a process waits")
def test_nothing_is_held_once_all_is_recorded(init: Harness) -> None:
    """A silent job's init sleeps for good: one line, then nothing, and it is woken by nothing."""
    job = init.start("/bin/sh", "-c", "echo words; exec sleep 1000")
    watch = Inotify(job.times_path)
    watch.wait_until(lambda: len(job.times) == 1)
    watch.close()
    wait_for(lambda: "poll" in Path(f"/proc/{job.pid}/wchan").read_text())
    # poll(2) with a timeout has a third argument that is not -1: as 32 bits of the system call's arguments
    words = Path(f"/proc/{job.pid}/syscall").read_text().split()
    assert int(words[3], 16) & 0xFFFFFFFF == 0xFFFFFFFF
