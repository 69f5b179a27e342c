"""The configuration file: every key works and is documented, everything else is refused by name."""

import re
import tomllib
from dataclasses import fields
from pathlib import Path

import msgspec
import pytest

from pjw.errors import ConfigError
from pjw.model import Limits
from pjw.server.authz import Roles
from pjw.server.config import JobUsers, KeptJobs, Metrics, ServerConfig, Traces, load_config
from pjw.server.quota import ClientLimits
from pjw.worker.settings import Quotas, Retention, WorkerSettings

ROOT = Path(__file__).parents[2]
WHOLE = """\
listen = "[::1]:7"
ca_crt = "/a"
server_crt = "/b"
server_key = "/c"
state_dir = "/d"
log_level = "debug"
log_format = "json"
user = "pjw"
client_name_oid = "1.2.3.4"
stop_grace_seconds = 2.5
waiting_inits = 7
hidden_paths = ["/etc/shadow"]
revoked = "/etc/pjw/revoked"
audit_log = "/var/log/pjw/audit.jsonl"
[job_users]
uid_first = 3_000_000
uid_count = 10
[roles]
admins = ["alice", "key-0123456789abcdef"]
viewers = ["bob"]
[retention]
age_seconds = 1
jobs_per_client = 2
bytes_per_client = 3
jobs_total = 4
bytes_total = 5
[clients]
running_max = 6
running_total_max = 7
stored_bytes_max = 8
stored_bytes_total_max = 9
input_bytes_max = 10
starts_per_second = 0.5
starts_burst = 1
calls_max = 2
followers_max = 3
followers_total_max = 4
[metrics]
listen = "localhost:9464"
allow_remote = true
clients_max = 3
[traces]
endpoint = "http://[::1]:4317"
[limits]
memory_max_bytes = 1_073_741_824
[ceilings]
memory_max_bytes = 2_147_483_648
"""


def written(directory: Path, text: str) -> str:
    """The path of a configuration file with that text."""
    path = directory / "pjwd.toml"
    path.write_text(text)
    return str(path)


def test_no_file_is_all_defaults() -> None:
    """pjwd needs no configuration. Unlike the library it keeps, and lets run, a finite number of jobs."""
    settings = load_config(None).worker_settings(())
    assert settings == WorkerSettings(retention=settings.retention, quotas=settings.quotas)
    assert settings.retention == Retention(2_592_000, 100_000, 107_374_182_400)
    assert settings.quotas == Quotas(1_000, 10_000, input_bytes_max=10 * 1024**3)


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    """No key is required."""
    assert load_config(written(tmp_path, "")) == ServerConfig()


def test_every_key_is_taken(tmp_path: Path) -> None:
    """What the file says is what the worker gets."""
    config = load_config(written(tmp_path, WHOLE))
    assert (config.user, config.client_name_oid) == ("pjw", "1.2.3.4")
    assert config.revoked == "/etc/pjw/revoked"
    assert (config.listen, config.ca_crt, config.server_crt) == ("[::1]:7", "/a", "/b")
    assert (config.server_key, config.state_dir) == ("/c", "/d")
    assert (config.log_level, config.log_format) == ("debug", "json")
    assert config.metrics == Metrics("localhost:9464", True, 3)
    assert config.traces == Traces("http://[::1]:4317")
    assert config.roles == Roles(frozenset({"alice", "key-0123456789abcdef"}), frozenset({"bob"}))
    assert config.audit_log == "/var/log/pjw/audit.jsonl"
    assert config.clients == ClientLimits(0.5, 1, 2, 3, 4, 6, 7, 8, 9, 10)
    settings = config.worker_settings(("/key",))
    assert settings.default_limits == Limits(memory_max_bytes=2**30)
    assert settings.ceiling.memory_max_bytes == 2**31
    assert all(value == 0 for name, value in settings.ceiling.items() if name != "memory_max_bytes")
    assert (settings.uid_first, settings.uid_count, settings.stop_grace_seconds) == (3_000_000, 10, 2.5)
    assert settings.waiting_inits == 7
    assert settings.hidden_paths == ("/etc/shadow", "/key")
    assert settings.retention == Retention(1, 2, 3, 4, 5)
    assert settings.quotas == Quotas(6, 7, 8, 9, 10)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("colour = 1", "unknown field `colour`"),
        ("[job_users]\nlast = 1", "unknown field `last` - at `$.job_users`"),
        ("user = 1", "Expected `str | null`, got `int` - at `$.user`"),
        ("hidden_paths = 'x'", "Expected `array`, got `str`"),
        ("revoked = 'revoked'", "at `$.revoked`"),
        ("revoked = ''", "at `$.revoked`"),
        ("[limits]\npids_max = 1.5", "Expected `int`, got `float`"),
        ("[limits]\npids_max = true", "Expected `int`, got `bool`"),
        ("[roles]\nadmins = ['key-x']", "only names made of a key begin with key-) - at `$.roles`"),
        ("[roles]\nowners = ['x']", "unknown field `owners` - at `$.roles`"),
        ("[roles]\nviewers = 'x'", "Expected `array`, got `str` - at `$.roles.viewers`"),
        ("audit_log = 'audit.jsonl'", "at `$.audit_log`"),
        ("waiting_inits = 1001", "Expected `int` <= 1000 - at `$.waiting_inits`"),
        ("retention.age_seconds = -1", "Expected `int` >= 0 - at `$.retention.age_seconds`"),
        ("metrics.port = 1", "unknown field `port` - at `$.metrics`"),
        ("log_format = 'xml'", "Invalid enum value 'xml' - at `$.log_format`"),
        ("server_key = 'server.key'", "at `$.server_key`"),
        ("limits = 5", "Expected `object`, got `int`"),
        ("a = ", "it is not TOML"),
        ("a = 1\na = 2", "it is not TOML"),
    ],
)
def test_what_is_not_a_configuration_is_named(tmp_path: Path, text: str, words: str) -> None:
    """The error has the file's path and the key."""
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert path in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "stop_grace_seconds = nan",
        "client_name_oid = 'carol'",
        "stop_grace_seconds = inf",
        "stop_grace_seconds = -0.1",
        "stop_grace_seconds = 86401",
        "[limits]\nnosuch = 1",
        "[ceilings]\nnosuch = 1",
        "[limits]\npids_max = -1",
        "[limits]\npids_max = 1",
        "[ceilings]\nmemory_max_bytes = 3_000_000",
        "[limits]\nmemory_max_bytes = 0\n[ceilings]\nmemory_max_bytes = 3_000_000",
    ],
)
def test_a_value_that_cannot_be_is_refused(tmp_path: Path, text: str) -> None:
    """Numbers out of range, names of no limit, defaults above their ceilings."""
    config = load_config(written(tmp_path, text))
    with pytest.raises(ConfigError):
        config.worker_settings(())


@pytest.mark.parametrize("name", [field.name for field in fields(Limits)])
def test_every_limit_can_be_configured(tmp_path: Path, name: str) -> None:
    """Each limit as a default and as its own ceiling."""
    path = written(tmp_path, f"[limits]\n{name} = 5_000_000\n[ceilings]\n{name} = 5_000_000\n")
    settings = load_config(path).worker_settings(())
    assert getattr(settings.default_limits, name) == getattr(settings.ceiling, name) == 5_000_000


def test_every_key_and_default_is_documented() -> None:
    """docs/configuration.md has each key, and each limit with its default."""
    text = (ROOT / "docs/configuration.md").read_text()
    for field in msgspec.structs.fields(ServerConfig):
        assert re.search(rf"`{field.name}[`.]", text), field.name
    for table, struct in (
        ("job_users", JobUsers),
        ("roles", Roles),
        ("metrics", Metrics),
        ("traces", Traces),
    ):
        for field in msgspec.structs.fields(struct):
            assert f"`{table}.{field.name}`" in text
    for table, counts in (("retention", KeptJobs), ("clients", ClientLimits)):
        for field in msgspec.structs.fields(counts):
            assert f"| `{table}.{field.name}` | {field.default} |" in text
    for name, value in Limits().items():
        assert re.search(rf"`{name}`.*\| {value} \|", text), name


def test_the_example_is_a_configuration_with_every_limit() -> None:
    """packaging/pjwd.toml, which the documentation names, loads, has every limit, and our own defaults."""
    path = ROOT / "packaging/pjwd.toml"
    settings = load_config(str(path)).worker_settings(())
    assert settings.default_limits == Limits()
    values = tomllib.loads(path.read_text())
    assert values["clients"] == msgspec.structs.asdict(ClientLimits())
    for table in ("limits", "ceilings"):
        assert set(values[table]) == {field.name for field in fields(Limits)}
