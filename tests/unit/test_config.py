"""The configuration file: every key works and is documented, everything else is refused by name."""

import re
import tomllib
from dataclasses import fields, replace
from pathlib import Path

import msgspec
import pytest

from pjw.errors import ConfigError
from pjw.model import Limits, Share, Sums
from pjw.server.authz import Roles
from pjw.server.config import (
    REMOVED,
    Gateway,
    JobUsers,
    KeptJobs,
    Metrics,
    ServerConfig,
    load_config,
    read_values,
    removed_keys,
)
from pjw.server.quota import ClientLimits
from pjw.worker.host import default_ceiling, default_sums, resources
from pjw.worker.settings import FLOOR, NO_LIMIT_ONLY, QueueSlots, Quotas, Retention, Shares, WorkerSettings

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
client_name_in_cn = true
allowed_clients = ["alice"]
stop_grace_seconds = 2.5
waiting_inits = 7
memory_overcommit = 1.5
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
workspace_age_seconds = 6
image_age_seconds = 7
[clients]
running_max = 6
running_total_max = 7
stored_bytes_max = 8
stored_bytes_total_max = 9
input_bytes_max = 10
queued_max = 11
queued_total_max = 12
queued_bytes_max = 13
queued_bytes_total_max = 14
workspaces_max = 15
workspace_bytes_max = 16
images_max = 17
starts_per_second = 0.5
calls_max = 2
followers_max = 3
followers_total_max = 4
weight = 50
memory_max_bytes = 1_073_741_824
cpu_max_millicores = 500
[clients.by_name.alice]
weight = 300
cpu_max_millicores = 0
[clients.by_name."key-0123456789abcdef"]
pids_max = 100
[metrics]
listen = "localhost:9464"
[host]
memory_max_bytes = 4_294_967_296
pids_max = 0
[queue]
running_max = 4
cpu_max_millicores = 8000
memory_max_bytes = 8_589_934_592
client_running_max = 2
client_cpu_max_millicores = 4000
client_memory_max_bytes = 4_294_967_296
[limits]
memory_max_bytes = 1_073_741_824
[ceilings]
memory_max_bytes = 2_147_483_648
[floors]
io_rbps_max = 5000
"""


def written(directory: Path, text: str) -> str:
    """The path of a configuration file with that text."""
    path = directory / "pjwd.toml"
    path.write_text(text)
    return str(path)


def test_no_file_is_all_defaults() -> None:
    """pjwd needs no configuration. Unlike the library it keeps, and lets run, a finite number of jobs."""
    settings = load_config(None).worker_settings(())
    assert settings == WorkerSettings(
        retention=settings.retention,
        quotas=settings.quotas,
        sums=settings.sums,
        ceiling=default_ceiling(settings.sums, Limits()),
    )
    assert settings.sums == default_sums()
    assert all(
        0 < value < whole
        for (_, value), (_, whole) in zip(settings.sums.items(), resources().items(), strict=True)
    )
    assert settings.retention == Retention(2_592_000, 100_000, 107_374_182_400)
    assert settings.quotas == Quotas(
        running_max=1_000,
        running_total_max=10_000,
        input_bytes_max=10 * 1024**3,
        queued_max=100_000,
        queued_total_max=1_000_000,
        queued_bytes_max=256 * 1024**2,
        queued_bytes_total_max=1024**3,
        workspaces_max=100,
        images_max=20,
    )


def test_ceilings_are_what_the_host_can_give(tmp_path: Path) -> None:
    """Of memory and processes the sum, of processor time all there is; not less than a job gets unasked."""

    def ceiling(text: str) -> Limits:
        return load_config(written(tmp_path, text)).worker_settings(()).ceiling

    host, sums = resources(), default_sums()
    three = {"memory_max_bytes", "pids_max", "cpu_max_millicores"}
    small = "[limits]\nmemory_max_bytes = 2097152\npids_max = 2\ncpu_max_millicores = 10\n"
    assert dict(ceiling(small).items()) == {
        **dict.fromkeys((field.name for field in fields(Limits)), 0),
        "memory_max_bytes": sums.memory_max_bytes,
        "pids_max": sums.pids_max,
        "cpu_max_millicores": host.cpu_max_millicores,
    }
    found = ceiling(f"{small}[host]\nmemory_max_bytes = 0\npids_max = 100")
    assert (found.memory_max_bytes, found.pids_max) == (host.memory_max_bytes, 100)
    for value in (2**50, 0):
        found = ceiling("[limits]\n" + "".join(f"{name} = {value}\n" for name in three))
        assert {getattr(found, name) for name in three} == {value}
    assert ceiling("[ceilings]\nmemory_max_bytes = 0").memory_max_bytes == 0


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    """No key is required; certificates are looked for beside the file."""
    nowhere = {"ca_crt": None, "server_crt": None, "server_key": None}
    assert msgspec.structs.replace(load_config(written(tmp_path, "")), **nowhere) == ServerConfig()


def test_every_key_is_taken(tmp_path: Path) -> None:
    """What the file says is what the worker gets."""
    config = load_config(written(tmp_path, WHOLE))
    assert (config.user, config.client_name_oid) == ("pjw", "1.2.3.4")
    assert (config.client_name_in_cn, config.allowed_clients) == (True, frozenset({"alice"}))
    assert config.revoked == "/etc/pjw/revoked"
    assert (config.listen, config.ca_crt, config.server_crt) == ("[::1]:7", "/a", "/b")
    assert (config.server_key, config.state_dir) == ("/c", "/d")
    assert (config.log_level, config.log_format) == ("debug", "json")
    assert config.metrics == Metrics("localhost:9464")
    assert config.roles == Roles(frozenset({"alice", "key-0123456789abcdef"}), frozenset({"bob"}))
    assert config.audit_log == "/var/log/pjw/audit.jsonl"
    rates = ("starts_per_second", "calls_max", "followers_max", "followers_total_max")
    assert [getattr(config.clients, name) for name in rates] == [0.5, 2, 3, 4]
    settings = config.worker_settings(("/key",))
    assert settings.default_limits == Limits(memory_max_bytes=2**30)
    assert settings.ceiling.memory_max_bytes == 2**31
    assert settings.shares == Shares(
        Share(50, Sums(2**30, 0, 500)),
        {
            "alice": Share(300, Sums(2**30)),
            "key-0123456789abcdef": Share(50, Sums(2**30, 100, 500)),
        },
    )
    assert settings.shares.of("alice").weight == 300
    assert settings.shares.of("bob") == settings.shares.default
    assert settings.memory_overcommit == 1.5
    assert settings.floor == FLOOR.with_overrides({"io_rbps_max": 5000})
    assert (settings.uid_first, settings.uid_count, settings.stop_grace_seconds) == (3_000_000, 10, 2.5)
    assert settings.waiting_inits == 7
    assert settings.sums == replace(default_sums(), memory_max_bytes=2**32, pids_max=0)
    assert settings.hidden_paths == ("/etc/shadow", "/key")
    assert settings.retention == Retention(1, 2, 3, 4, 5, 6, 7)
    assert settings.quotas == Quotas(6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17)
    assert settings.queue == QueueSlots(4, 8000, 2**33, 2, 4000, 2**32)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("colour = 1", "unknown field `colour`"),
        ("[job_users]\nlast = 1", "unknown field `last` - at `$.job_users`"),
        ("user = 1", "Expected `str | null`, got `int` - at `$.user`"),
        ("hidden_paths = 'x'", "Expected `array`, got `str`"),
        ("revoked = 'revoked'", "at `$.revoked`"),
        ("[limits]\npids_max = 1.5", "Expected `int`, got `float`"),
        ("[limits]\npids_max = true", "Expected `int`, got `bool`"),
        ("[roles]\nadmins = ['key-x']", "only names made of a key begin with key-) - at `$.roles`"),
        ("[roles]\nowners = ['x']", "unknown field `owners` - at `$.roles`"),
        ("[roles]\nviewers = 'x'", "Expected `array`, got `str` - at `$.roles.viewers`"),
        ("audit_log = 'audit.jsonl'", "at `$.audit_log`"),
        ("clients.by_name.'a b'.weight = 1", "'a b' is no client name"),
        ("clients.by_name.key-x.weight = 1", "only names made of a key begin with key-) - at `$.clients`"),
        ("clients.by_name.alice.weight = 0", "Expected `int` >= 1"),
        ("clients.weight = 10_001", "Expected `int` <= 10000 - at `$.clients.weight`"),
        ("clients.by_name.alice.running_max = 1", "unknown field `running_max`"),
        ("memory_overcommit = -0.1", "Expected `float` >= 0.0 - at `$.memory_overcommit`"),
        ("memory_overcommit = nan", "at `$.memory_overcommit`"),
        ("memory_overcommit = inf", "at `$.memory_overcommit`"),
        ("waiting_inits = 1001", "Expected `int` <= 1000 - at `$.waiting_inits`"),
        ("retention.age_seconds = -1", "Expected `int` >= 0 - at `$.retention.age_seconds`"),
        ("metrics.port = 1", "unknown field `port` - at `$.metrics`"),
        ("log_format = 'xml'", "Invalid enum value 'xml' - at `$.log_format`"),
        ("server_key = 'server.key'", "at `$.server_key`"),
        ("limits = 5", "Expected `object`, got `int`"),
        ("allowed_clients = ['john', 'a b']", "'a b' is no client name"),
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
    ("text", "hint"),
    [
        ("runing_max = 1", "perhaps clients.running_max"),
        ("running_max = 1", "perhaps clients.running_max"),
        ("[client]\nrunning_max = 1", "perhaps [clients]"),
        ("[clients]\nrunnin_max = 1", "perhaps clients.running_max"),
        ("[clients]\nlisten = 'x'", "perhaps listen or metrics.listen"),
        ("servercrt = '/x'", "perhaps server_crt"),
        ("colour = 1", "`pjwd config show` prints every key"),
        ("[limits]\npids_max = true", None),
    ],
)
def test_an_unknown_key_is_answered_with_one_that_is_known(tmp_path: Path, text: str, hint: str) -> None:
    """By its name in another table, or by one that resembles it."""
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, text))
    assert str(caught.value.hint).startswith(hint) if hint else caught.value.hint is None


def test_a_removed_key_is_warned_of_and_ignored(tmp_path: Path) -> None:
    """Whatever its value is: pjwd starts with the file of before an upgrade."""
    text = (
        '[clients]\nstarts_burst = 0\ncalls_burst = "x"\nrunning_max = 7\n'
        '[metrics]\nallow_remote = ""\nclients_max = []\n[traces]\nendpoint = "http://127.0.0.1:4317"\n'
    )
    path = written(tmp_path, text)
    assert load_config(path).clients.running_max == 7
    words = removed_keys(read_values(path))
    assert sorted(each.partition(" was removed in ")[0] for each in words) == sorted(REMOVED)
    assert all("; delete it: " in each for each in words)
    assert removed_keys(read_values(written(tmp_path, WHOLE))) == []


@pytest.mark.parametrize("text", ["metrics = 5", "[clients]\nstarts_bust = 1", "[clients.traces]\nx = 1"])
def test_what_was_never_a_key_is_refused_still(tmp_path: Path, text: str) -> None:
    """A removed key excuses no other mistake."""
    with pytest.raises(ConfigError):
        load_config(written(tmp_path, text))


def test_certificates_lie_beside_the_configuration(tmp_path: Path) -> None:
    """V2: where nobody says where they are. As for a file of before, whose unit said it."""
    config = load_config(written(tmp_path, "server_crt = '/other'"), {"server_key": "/option"})
    found = (config.ca_crt, config.server_crt, config.server_key)
    assert found == (f"{tmp_path}/ca.crt", "/other", "/option")


def test_the_packaged_file_says_what_the_service_needs() -> None:
    """V2: `pjwd check` is told no more than the unit tells."""
    [command] = re.findall(r"^ExecStart=(.*)$", (ROOT / "packaging/pjwd.service").read_text(), re.MULTILINE)
    assert command == "/opt/pjw/bin/pjwd serve --config /etc/pjw/pjwd.toml"
    said = tomllib.loads((ROOT / "packaging/pjwd.toml").read_text())
    assert [said[key] for key in ("listen", "ca_crt", "server_crt", "server_key", "state_dir")] == [
        "localhost:50051",
        "/etc/pjw/ca.crt",
        "/etc/pjw/server.crt",
        "/etc/pjw/server.key",
        "/var/lib/pjw",
    ]


def test_the_packaged_gateway_is_one() -> None:
    """Its unit waits for each file that packaging/gateway.toml names, and has directories of its own."""
    unit = (ROOT / "packaging/pjw-gateway.service").read_text()
    config = load_config(str(ROOT / "packaging/gateway.toml"))
    assert "ExecStart=/opt/pjw/bin/pjwd gateway --config /etc/pjw-gateway/gateway.toml\n" in unit
    named = {config.ca_crt, config.server_crt, config.server_key, config.gateway.crt, config.gateway.key}
    assert named == set(re.findall(r"^ConditionPathExists=(.*)$", unit, re.MULTILINE))
    assert config.state_dir == "/var/lib/pjw-gateway"
    assert config.audit_log == "/var/log/pjw-gateway/audit.jsonl"
    own = {"StateDirectory=pjw-gateway", "LogsDirectory=pjw-gateway", "User=pjw-gateway"}
    assert own <= set(unit.splitlines())
    # the keys of one machine have one place to be read about; those that differ are all that is here
    defaults = Gateway(crt=config.gateway.crt, key=config.gateway.key)
    assert config.gateway == defaults


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
        "[clients]\npids_max = 15",
        "[clients.by_name.alice]\nmemory_max_bytes = 1",
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


def test_a_ceiling_is_the_default_where_that_would_be_no_limit(tmp_path: Path) -> None:
    """Only where the file says nothing of the default; and a client may ask for what it gets unasked."""
    path = written(tmp_path, "[ceilings]\nio_rbps_max = 5000000\ntime_max_seconds = 60\nio_riops_max = 0\n")
    settings = load_config(path).worker_settings(())
    assert settings.default_limits == Limits(io_rbps_max=5_000_000, time_max_seconds=60)
    assert (settings.floor.io_rbps_max, settings.floor.io_riops_max) == (5_000_000, NO_LIMIT_ONLY)
    path = written(tmp_path, "[limits]\ntime_max_seconds = 0\n[ceilings]\ntime_max_seconds = 60\n")
    with pytest.raises(ConfigError):
        load_config(path).worker_settings(())


def test_every_key_and_default_is_documented() -> None:
    """docs/configuration.md has each key, and each limit with its default."""
    text = (ROOT / "docs/configuration.md").read_text()
    for field in msgspec.structs.fields(ServerConfig):
        assert re.search(rf"`{field.name}[`.]", text), field.name
    for table, struct in (
        ("job_users", JobUsers),
        ("roles", Roles),
        ("metrics", Metrics),
    ):
        for field in msgspec.structs.fields(struct):
            assert f"`{table}.{field.name}`" in text
    for table, counts in (("retention", KeptJobs), ("clients", ClientLimits)):
        for field in msgspec.structs.fields(counts):
            if field.name != "by_name":
                assert f"| `{table}.{field.name}` | {field.default} |" in text
    for name, value in Limits().items():
        assert re.search(rf"`{name}`.*\| {value} \|", text), name


def test_the_example_is_a_configuration_with_every_limit() -> None:
    """packaging/pjwd.toml, which the documentation names, loads, has every limit, and our own defaults."""
    path = ROOT / "packaging/pjwd.toml"
    settings = load_config(str(path)).worker_settings(())
    assert settings.default_limits == Limits()
    values = tomllib.loads(path.read_text())
    defaults = msgspec.to_builtins(ClientLimits())
    assert values["clients"] == {key: value for key, value in defaults.items() if key != "by_name"}
    for table in ("limits", "ceilings"):
        assert set(values[table]) == {field.name for field in fields(Limits)}
    assert FLOOR.with_overrides(values["floors"]) == settings.floor == FLOOR


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ('listen = ""', "listen"),
        ('state_dir = ""', "state_dir"),
        ('hidden_paths = ["/a", ""]', r"hidden_paths\[1\]"),
        ('[metrics]\nlisten = ""', r"metrics\.listen"),
        ('client_name_oid = ""', "client_name_oid"),
        ("revoked = ''", "revoked"),
    ],
)
def test_an_empty_value_is_refused(tmp_path: Path, content: str, what: str) -> None:
    """In words, with the key (B9)."""
    path = tmp_path / "pjwd.toml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=f"^the configuration {path}: {what} is empty$"):
        load_config(str(path))
