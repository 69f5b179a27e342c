"""Names on the network: which ways of writing them count, what an offer covers, where a job finds them."""

import pytest

from pjw.errors import ConfigError, InvalidJobError
from pjw.model import JobSpec
from pjw.network import ALLOW_MAX, NAMED_MAX, Allowed, check_allow, host_of, is_offered, listeners_of
from pjw.worker.network import Network


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("PyPI.org", "pypi.org"),
        ("pypi.org.", "pypi.org"),
        ("db", "db"),
        ("_sip._tcp.example.org", "_sip._tcp.example.org"),
        ("192.0.2.1", "192.0.2.1"),
        ("2001:DB8::1", "2001:db8::1"),
    ],
)
def test_a_host_is_written_in_one_way(text: str, host: str) -> None:
    """Case, and the dot of the root, make no other host."""
    assert host_of(text) == host


@pytest.mark.parametrize(
    "text",
    [
        *("", ".", "..", "a..b", "-a.org", "a-.org", "a b", "a/b", "a@b", "a\0b", "ä.org", "x" * 64),
        *(".".join(["abcdefgh"] * 30), "*", "*.org", "a.*"),
        # what a resolver would take for an address
        *("127.1", "2130706433", "0177.0.0.1", "0x7f.0.0.1", "0x7f000001", "127.0.0.01", "1.2.3.4.5", "a.0x"),
        *("::ffff:127.0.0.1", "::ffff:7f00:1", "0:0:0:0:0:0:0:1", "fe80::1%lo", "::1]", "1.2.3.4%lo"),
    ],
)
def test_what_is_no_host(text: str) -> None:
    """Neither a name nor an address as it is written canonically."""
    assert host_of(text) == ""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("pypi.org", "pypi.org"),
        ("*.Example.org:8443", "*.example.org:8443"),
        ("*", "*"),
        ("db.example.org:5432", "db.example.org:5432"),
        ("[2001:db8::1]:443", "[2001:db8::1]:443"),
        ("2001:db8::1", "[2001:db8::1]"),
    ],
)
def test_what_may_be_allowed(text: str, shown: str) -> None:
    """Names, patterns and addresses, each with a port or without; what is shown is read as the same."""
    assert str(Allowed.of(text)) == shown
    assert Allowed.of(shown) == Allowed.of(text)


@pytest.mark.parametrize(
    "text",
    [
        "a:0",
        "a:65536",
        "a:x",
        "a:",
        "a:080",
        "a:+80",
        "*.",
        "*.1.2.3.4",
        "a*.org",
        "[a]:80",
        "[::1",
        "[::1]80",
        ":80",
    ],
)
def test_what_may_not_be_allowed(text: str) -> None:
    """In words, and of the job itself too."""
    with pytest.raises(InvalidJobError):
        Allowed.of(text)
    with pytest.raises(InvalidJobError):
        JobSpec("true", allow=[text])


@pytest.mark.parametrize(
    ("wanted", "offers", "offered"),
    [
        ("pypi.org", ["pypi.org"], True),
        ("pypi.org:443", ["pypi.org"], True),
        ("pypi.org", ["pypi.org:443"], False),
        ("pypi.org", ["pypi.org:443", "*.org:80"], True),
        ("pypi.org:22", ["pypi.org"], False),
        ("a.b.org", ["*.b.org"], True),
        ("b.org", ["*.b.org"], False),
        ("ab.org", ["*.b.org"], False),
        ("*.a.b.org", ["*.b.org"], True),
        ("*.org", ["*.b.org"], False),
        ("*", ["*"], True),
        ("*", ["*.org"], False),
        ("x.org", ["*"], True),
        ("1.2.3.4", ["*"], False),
        ("1.2.3.4", ["1.2.3.4"], True),
        ("[2001:db8::1]:80", ["*:80"], False),
        ("x.org", [], False),
    ],
)
def test_what_an_offer_covers(wanted: str, offers: list[str], offered: bool) -> None:
    """Each port of it; a pattern covers names below its suffix, and no address."""
    assert is_offered(Allowed.of(wanted), map(Allowed.of, offers)) == offered


def test_the_offers_of_a_client() -> None:
    """Those of all clients and its own; a refusal names what there is."""
    network = Network(["pypi.org"], {"bob": ["db.test:5432"]})
    network.require("bob", ["pypi.org", "db.test:5432"])
    with pytest.raises(
        InvalidJobError, match=r"cannot allow db\.test:5432: this server does not offer it to al"
    ) as e:
        network.require("alice", ["pypi.org", "db.test:5432"])
    assert e.value.hint == "it offers pypi.org; the operator decides ([network] in the configuration)"
    with pytest.raises(InvalidJobError) as e:
        Network().require("alice", ["pypi.org"])
    assert "it offers no name" in str(e.value.hint)
    with pytest.raises(ConfigError):
        Network(["a b"])
    assert network.offered == ("pypi.org", "db.test:5432")


def test_how_many_a_job_may_have() -> None:
    """So many names, and fewer that need a listener of their own; each counts once."""
    assert check_allow(["A.org", "a.org.", "a.org:80"]) == ("a.org", "a.org:80")
    check_allow([f"{number}.org" for number in range(ALLOW_MAX)])
    for number, port in ((ALLOW_MAX, ""), (NAMED_MAX, ":5432")):
        with pytest.raises(InvalidJobError):
            check_allow([f"a{each}.org{port}" for each in range(number + 1)])


def test_where_a_job_finds_them() -> None:
    """The proxy first, then each name with a port, by an address of its own; apart when it is linked."""
    names = ["db.test:5432", "*.x.org:80", "pypi.org", "db.test:22", "1.2.3.4:5", "b.test:5432"]
    alone = listeners_of(7, names, is_linked=False)
    assert list(map(str, alone)) == [
        "127.0.0.1:3128",
        "127.64.1.193:5432/b.test",
        "127.64.1.194:22/db.test",
        "127.64.1.194:5432/db.test",
    ]
    linked = [listeners_of(job_id, names, is_linked=True) for job_id in (7, 8, 65_535)]
    places = [(each.address, each.port) for listeners in linked for each in listeners]
    assert len(set(places)) == len(places)
    assert linked[0][0].address == "127.64.1.192"
