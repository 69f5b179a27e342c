"""What an init that waits for a job takes from its order, and what it refuses (R3)."""

import errno
import re

import pytest

from tests.support.init_harness import JOB_UID, SOURCES, Harness

USER = ("--uid", str(JOB_UID), "--gid", str(JOB_UID))
# what is known only with the job, or may have changed by a reload since init began to wait
ORDERED = {"uid", "gid", "tmp-bytes", "output-max", "time-max", "grace", "split-stderr", "input"}
ROWS = re.findall(r'{"([a-z-]+)", (required|no)_argument', (SOURCES / "options.c").read_text())
VALUES = {"hostname": "x", "scratch": "/etc", "hide": "/etc", "report-fd": "0"}
REFUSED = [f"failed options {errno.EINVAL}"]


def test_the_words_of_an_order_start_a_job(init: Harness) -> None:
    """An order with all that every order has."""
    job = init.order(
        *USER, "--tmp-bytes", "65536", "--output-max", "1000", "--time-max", "60", "--grace", "5"
    ).wait()
    assert (job.reports[0], job.reports[1].split()[0], job.end) == ("cloned", "execed", "exited 0 none")


@pytest.mark.parametrize(("name", "value"), [row for row in ROWS if row[0] not in ORDERED])
def test_what_an_order_may_not_say(init: Harness, name: str, value: str) -> None:
    """Every option but those of an order is refused in one: none makes another host name, or root."""
    words = (f"--{name}", *([VALUES.get(name, "1")] if value == "required" else []))
    assert init.order(*USER, *words).reports[1:] == REFUSED


def test_what_only_an_order_may_say(init: Harness) -> None:
    """A command line has a descriptor of its own for the input; the word is for an order."""
    assert init.start("true", options=["--input"]).reports[0] == REFUSED[0]


def test_an_order_brings_descriptors_and_nothing_else(init: Harness) -> None:
    """Credentials, which a socket may bring as well, are not read as the numbers of descriptors."""
    assert init.order(*USER, with_credentials=True).reports[1:] == [f"failed order {errno.EBADMSG}"]
