"""Files of jobs for `pjw submit`: what they say, and what is wrong with them, by line and key."""

from pathlib import Path

import pytest

from pjw.cli import parser
from pjw.cli.batch import KEYS, read_jobs
from pjw.errors import ConfigError
from pjw.model import After, Condition, JobSpec, QueueSpec, Retry

LINES = """\
{"command": "make", "name": "build", "memory": "1G", "cpus": 0.5, "iops": 200, "timeout": "10m"}

{"command": ["./test", "-v"], "name": "test", "after": "build", "env": {"A": "b"}, "labels": {"k": "v"}}
{"command": "true", "after": ["build:any", "test:failed", 17, "17_5:any", "test_3"], \
"priority": -5, "hold": true, "split_stderr": true, "outputs": ["dist/"], "output_required": true}
"""
TOML = """
[[job]]
command = "make"
name = "build"
memory = "1G"
cpus = 0.5
iops = 200
timeout = "10m"

[[job]]
command = ["./test", "-v"]
name = "test"
after = "build"
env = {A = "b"}
labels = {k = "v"}

[[job]]
command = "true"
after = ["build:any", "test:failed", 17, "17_5:any", "test_3"]
priority = -5
hold = true
split_stderr = true
outputs = ["dist/"]
output_required = true
"""
SPECS = [
    JobSpec(
        "make",
        {
            "cpu_max_millicores": 500,
            "memory_max_bytes": 1024**3,
            "io_riops_max": 200,
            "io_wiops_max": 200,
            "time_max_seconds": 600,
        },
        name="build",
        queue=QueueSpec(),
    ),
    JobSpec(
        ["./test", "-v"],
        name="test",
        labels={"k": "v"},
        env={"A": "b"},
        queue=QueueSpec(after=[After(earlier=0)]),
    ),
    JobSpec(
        "true",
        split_stderr=True,
        outputs=["dist"],
        output_required=True,
        queue=QueueSpec(
            -5,
            held=True,
            after=[
                After(condition=Condition.ANY, earlier=0),
                After(condition=Condition.FAILED, earlier=1),
                After(17),
                After(17, Condition.ANY, element=5),
                After(earlier=1, element=3),
            ],
        ),
    ),
]


def written(directory: Path, name: str, text: str) -> str:
    """The path of a file with that text."""
    path = directory / name
    path.write_text(text)
    return str(path)


def test_both_forms_say_the_same(tmp_path: Path) -> None:
    """Lines of JSON, and TOML; an empty line is none."""
    assert read_jobs(written(tmp_path, "jobs", LINES)) == SPECS
    assert read_jobs(written(tmp_path, "jobs.toml", TOML)) == SPECS


def test_retries(tmp_path: Path) -> None:
    """With ends as a list or as they are typed."""
    for ends in ('[75, "oom"]', '"75,oom"'):
        text = f'{{"command": "x", "retry": 3, "retry_on": {ends}, "backoff": "2m", "rerun_if_lost": true}}'
        [spec] = read_jobs(written(tmp_path, "jobs", text))
        assert spec.queue == QueueSpec(
            retry=Retry(3, frozenset({75}), oom=True, backoff_seconds=120, if_lost=True)
        )


def test_times(tmp_path: Path) -> None:
    """As they are typed, and as TOML has them."""
    for name, text in (
        ("a", '{"command": "x", "not_before": "2030-01-02T03:04:05Z"}'),
        ("a.toml", '[[job]]\ncommand = "x"\nnot_before = 2030-01-02T03:04:05Z'),
    ):
        [spec] = read_jobs(written(tmp_path, name, text))
        assert spec.queue is not None
        assert spec.queue.not_before is not None
        assert spec.queue.not_before.isoformat() == "2030-01-02T03:04:05+00:00"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no jobs"),
        ("\n[1", "line 2: it is not JSON"),
        ("[1]", "line 1: a job is an object"),
        ("{}", "line 1: a job needs a command"),
        ('{"command": ""}', "line 1: the command is empty"),
        ('{"command": 7}', "line 1: a command is text, or a list"),
        ('{"command": "x", "colour": 1}', "line 1: no key of a job is called 'colour'; there are command, "),
        ('{"command": "x"}\n{"command": "x", "memory": "lots"}', "line 2: memory: 'lots' is not a size"),
        ('{"command": "x", "memory": true}', "memory is a number or text, not True"),
        ('{"command": "x", "retry_on": 75}', "--retry-on and --backoff need --retry"),
        ('{"command": "x", "retry": 1, "retry_on": "fire"}', "retry_on: 'fire' is not a list of ends"),
        ('{"command": "x", "hold": 1}', "hold is true or false, not 1"),
        ('{"command": "x", "env": {"A": 1}}', "the env of a job are text"),
        ('{"command": "x", "priority": "high"}', "a priority must be a whole number"),
        ('{"command": "x", "not_before": "soon"}', "'soon' is not a time"),
        ('{"command": "x", "name": "a", "after": "a"}', "no job above it is called 'a'"),
        (
            '{"command": "x", "after": "b"}\n{"command": "x", "name": "b"}',
            "line 1: no job above it is called 'b'",
        ),
        ('{"command": "x", "after": "7:well"}', "ok, failed, any, not 'well'"),
        ('{"command": "x", "after": [7, "7:any"]}', "by one condition, not by several"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, words: str) -> None:
    """With the file and the line."""
    path = written(tmp_path, "jobs", text)
    with pytest.raises(ConfigError) as refused:
        read_jobs(path)
    assert str(refused.value).startswith(path)
    assert words in str(refused.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    """Missing, too long, no text, other tables."""
    for path, words in (
        (str(tmp_path / "none"), "cannot read .*none: no such file or directory"),
        ("/dev/zero", "cannot read /dev/zero: it is longer than 4194304 bytes"),
        (written(tmp_path, "a.toml", "[[job]"), "a.toml is not TOML"),
        (written(tmp_path, "b.toml", "[job]\ncommand = 'x'"), r"only tables \[\[job\]\] are known"),
        (
            written(tmp_path, "c.toml", "[[job]]\ncommand = 'x'\n[other]"),
            r"only tables \[\[job\]\] are known",
        ),
    ):
        with pytest.raises(ConfigError, match=words):
            read_jobs(path)


def test_every_limit_of_start_is_a_key() -> None:
    """By the name of its option."""
    arguments = parser.build_parser().parse_args(["start", "x"])
    options = set(vars(arguments))
    # of which `start` takes one by one what a file has as a table
    assert set(KEYS) - options == {"labels"}
