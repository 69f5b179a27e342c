"""A certificate gives its owner's name: the three rules, what is refused, and whose a name can be."""

import base64
import hashlib
import re
import subprocess
from pathlib import Path
from typing import Final

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtensionOID, NameOID
from hypothesis import example, given
from hypothesis import strategies as st

from pjw.certs.credentials import check_leaf
from pjw.certs.identity import OUR_RULES, NameRules, check_client_name_oid, identity_of
from pjw.certs.profile import CLIENT_NAME_OID, QUOTED_MAX_CHARACTERS, is_short_key_name, name_fault, quoted
from pjw.errors import ConfigError, NotAuthenticatedError
from pjw.model import Identity
from tests.support import certs_factory
from tests.support.certs_factory import CN, ODD_SUBJECTS, OID, Made, Subject, issue, make_ca

# cryptography says so of a CN that is empty or longer than 64; we refuse it ourselves
pytestmark = pytest.mark.filterwarnings("ignore:Attribute's length must be:UserWarning")

CA: Final = make_ca()


TAILS: Final = NameRules(in_common_name=True)


def named(subject: Subject, *sans: str, rules: NameRules = OUR_RULES) -> str:
    """The client name that a subject gives."""
    return identity_of(issue(CA, subject, sans=sans).crt_pem, rules).client_name


def key_name(made: Made) -> str:
    """The name that is made of a key."""
    spki = made.key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return "key-" + hashlib.sha256(spki).hexdigest()[:32]


@pytest.mark.parametrize(
    ("subject", "config"),
    [
        ("/CN=localhost/clientName=john", f"oid_section=o\n[o]\nclientName={CLIENT_NAME_OID}\n"),
        (r"/CN=localhost\/clientName=john", ""),
    ],
    ids=["attribute", "tail"],
)
def test_openssl_can_say_the_name(tmp_path: Path, subject: str, config: str) -> None:
    """With one section of configuration, or an escaped slash, the seed's clientName arrives."""
    (tmp_path / "cnf").write_text(f"{config}[req]\ndistinguished_name=d\n[d]\n")
    command = "openssl req -config cnf -x509 -newkey rsa:2048 -nodes -keyout key -out crt"
    extra = ["-subj", subject, "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*command.split(), *extra], cwd=tmp_path, check=True, capture_output=True)
    assert identity_of((tmp_path / "crt").read_bytes(), TAILS).client_name == "john"


@pytest.mark.parametrize(
    ("subject", "sans", "name"),
    [
        ([(CN, "localhost"), (OID, "john")], ["localhost"], "john"),
        ([(CN, "mary"), (OID, "john")], [], "john"),
        ([(OID, "john")], [], "john"),
        ([(CN, "localhost/clientName=john")], ["localhost"], "john"),
        ([(CN, "/clientName=john")], [], "john"),
        ([(CN, "john")], [], "john"),
        ([(CN, "john")], ["localhost", "127.0.0.1"], "john"),
        ([(CN, "john@example.org")], ["example.org"], "john@example.org"),
        ([(CN, "J" * 64)], [], "J" * 64),
        ([(CN, "john"), (NameOID.ORGANIZATION_NAME, "key-1/../x")], [], "john"),
    ],
)
def test_names_by_the_first_two_rules(subject: Subject, sans: list[str], name: str) -> None:
    """The clientName wins over the CN, and a CN that is no host of the certificate is the name."""
    assert named(subject, *sans, rules=TAILS) == name


def test_a_name_in_a_cn_is_the_operator_s_to_believe() -> None:
    """Whoever may choose a CN would be anybody: refused by default, also beside an attribute."""
    for subject in ([(CN, "localhost/clientName=john")], [(CN, "mary/clientName=john"), (OID, "john")]):
        with pytest.raises(NotAuthenticatedError, match=r"its CN has a clientName.*client_name_in_cn"):
            named(subject)


def test_a_short_name_is_kept() -> None:
    """Of a client that had one from a version before; another's key is not given its own short name."""
    one, two = issue(CA, [(CN, "localhost")]), issue(CA, [(CN, "localhost")])
    short = key_name(one)[: len("key-") + 16]
    rules = NameRules(short_names=frozenset({short}))
    assert [identity_of(made.crt_pem, rules).client_name for made in (one, two)] == [short, key_name(two)]
    assert (is_short_key_name(short), is_short_key_name(key_name(one))) == (True, False)


@pytest.mark.parametrize(
    ("subject", "sans"),
    [
        ([(CN, "localhost")], ["localhost"]),
        ([(CN, "LocalHost")], ["localhost"]),
        ([(CN, "a.example.org.")], ["A.example.org"]),
        ([(CN, "a.example.org")], ["*.example.org"]),
        ([(CN, "127.0.0.1")], ["127.0.0.1"]),
        ([(CN, "*.example.org")], ["*.example.org"]),
        ([(CN, "localhost")], []),
        ([(NameOID.ORGANIZATION_NAME, "nobody")], []),
        ([], []),
    ],
)
def test_host_names_are_nobody(subject: Subject, sans: list[str]) -> None:
    """A CN that says where, or none, leaves the key to tell one client from the other."""
    one, two = (issue(CA, subject, sans=sans) for _ in range(2))
    assert identity_of(one.crt_pem).client_name == key_name(one)
    assert identity_of(two.crt_pem).client_name == key_name(two) != key_name(one)


def test_key_name_outlives_the_certificate() -> None:
    """A certificate that is renewed with the same key keeps its name, under another serial."""
    key = certs_factory.ec_key()
    one, two = (identity_of(issue(CA, [(CN, "localhost")], key=key).crt_pem) for _ in range(2))
    assert one.client_name == two.client_name
    assert one.serial != two.serial


@pytest.mark.parametrize("rules", [OUR_RULES, TAILS], ids=["default", "tails"])
@pytest.mark.parametrize("case", ODD_SUBJECTS)
def test_odd_subject_is_refused(case: str, rules: NameRules) -> None:
    """A name that breaks the rule is refused, never replaced, and quoted so that a terminal survives it."""
    pem = issue(CA, ODD_SUBJECTS[case], sans=["localhost"]).crt_pem
    with pytest.raises(NotAuthenticatedError) as caught:
        identity_of(pem, rules)
    message = str(caught.value)
    assert message.isascii()
    assert message.isprintable()
    assert len(message) < 250


def test_name_is_quoted_in_the_refusal() -> None:
    """The operator sees which name was refused."""
    with pytest.raises(
        NotAuthenticatedError, match=r"cannot name the client: 'john\\nmary' is no client name"
    ):
        named([(CN, "john\nmary")])


def test_attribute_that_is_no_text_is_refused() -> None:
    """A clientName of bits is malformed, and no reason to look at the CN."""
    name = x509.Name(
        [
            x509.NameAttribute(CN, "john"),
            x509.NameAttribute(NameOID.X500_UNIQUE_IDENTIFIER, b"mary", x509.name._ASN1Type.BitString),
        ]
    )
    key = certs_factory.ec_key()
    template = issue(CA).certificate
    builder = (
        x509.CertificateBuilder(issuer_name=template.issuer, subject_name=name, public_key=key.public_key())
        .serial_number(1)
        .not_valid_before(template.not_valid_before_utc)
        .not_valid_after(template.not_valid_after_utc)
    )
    pem = builder.sign(key, SHA256()).public_bytes(Encoding.PEM)
    with pytest.raises(NotAuthenticatedError, match="malformed"):
        identity_of(pem, NameRules(NameOID.X500_UNIQUE_IDENTIFIER.dotted_string))


def test_malformed_san_is_refused() -> None:
    """Host names that cannot be read do not turn a host's CN into a client's name."""
    broken = x509.UnrecognizedExtension(ExtensionOID.SUBJECT_ALTERNATIVE_NAME, b"\x30\x05garbage")
    with pytest.raises(NotAuthenticatedError, match="malformed"):
        identity_of(issue(CA, [(CN, "web1")], extensions=[broken]).crt_pem)


def test_oid_can_be_chosen() -> None:
    """Another attribute can carry the name, and then the usual one does not."""
    subject = [(CN, "localhost"), (OID, "john"), (NameOID.USER_ID, "mary")]
    assert named(subject, "localhost", rules=NameRules(NameOID.USER_ID.dotted_string)) == "mary"
    assert named(subject, "localhost") == "john"


@pytest.mark.parametrize("oid", ["", "clientName", "1.2.", "9.9.9", "1.2.x", "1", "\n"])
def test_bad_oid_is_a_setting_error(oid: str) -> None:
    """A setting that is no OID is found at the start, as the operator's error."""
    with pytest.raises(ConfigError, match="is no object identifier"):
        check_client_name_oid(oid)
    check_client_name_oid(CLIENT_NAME_OID)


def test_name_and_date_are_two_questions() -> None:
    """An expired certificate still has its name and serial: whether it holds is check_leaf's to say."""
    expired = certs_factory.ODD_CLIENTS["expired"](CA)
    assert identity_of(expired.crt_pem) == Identity("john", expired.certificate.serial_number)


def test_same_name_by_the_same_word() -> None:
    """Two keys have one name when the CA wrote it into both certificates: that is what renewal is."""
    assert named([(CN, "john")]) == named([(CN, "localhost"), (OID, "john")], "localhost") == "john"


def refuses_or_names(pem: bytes) -> str | None:
    """The name, or None when the certificate is refused as it should be."""
    try:
        name = identity_of(pem).client_name
        check_leaf(x509.load_pem_x509_certificate(pem))
    except NotAuthenticatedError:
        return None
    return name


@given(st.binary(max_size=2000))
@example(b"")
@example(b"-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n")
def test_garbage_is_refused(data: bytes) -> None:
    """No bytes, in PEM or out of it, raise anything but NotAuthenticatedError."""
    assert refuses_or_names(data) is None
    body = base64.encodebytes(data)
    assert refuses_or_names(b"-----BEGIN CERTIFICATE-----\n" + body + b"-----END CERTIFICATE-----\n") is None


TEMPLATES: Final = [
    issue(CA, [(CN, "localhost"), (OID, "john")], sans=["localhost", "::1"]).certificate.public_bytes(
        Encoding.DER
    ),
    issue(CA, [(CN, "localhost")], sans=["localhost"], key=certs_factory.rsa_key()).certificate.public_bytes(
        Encoding.DER
    ),
]


@given(st.sampled_from(TEMPLATES), st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=4))
def test_damaged_certificate_is_refused_or_named(der: bytes, damage: list[tuple[int, int]]) -> None:
    """A few bytes changed in a certificate raise only NotAuthenticatedError, and break no rule."""
    data = bytearray(der)
    for position, value in damage:
        data[position % len(data)] = value
    pem = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(bytes(data)) + b"-----END CERTIFICATE-----\n"
    name = refuses_or_names(pem)
    assert name is None or re.fullmatch("key-[0-9a-f]{32}", name) or name_fault(name) is None


NAMES: Final = st.sampled_from(
    ["john", "JOHN", "localhost", "key-0123456789abcdef", certs_factory.LOOK_ALIKE, "a.b"]
)
SUBJECTS: Final = st.lists(
    st.tuples(st.sampled_from([CN, OID]), NAMES | NAMES.map("localhost/clientName={}".format)), max_size=3
)


@given(SUBJECTS, SUBJECTS, st.lists(st.sampled_from(["localhost", "a.b", "*.b"]), unique=True))
def test_two_keys_share_a_name_only_by_the_word_of_the_ca(
    one: Subject, two: Subject, sans: list[str]
) -> None:
    """Two keys of the same name have that name in both subjects, letter for letter."""
    first, second = (refuses_or_names(issue(CA, subject, sans=sans).crt_pem) for subject in (one, two))
    if first is None or first != second:
        return
    for subject in (one, two):
        assert any(value == first or value.endswith("/clientName=" + first) for _, value in subject)


@given(st.text())
@example("\U0001f600" * 40)
@example("'" * 80)
def test_quote_is_short_and_printable(text: str) -> None:
    """Whatever a name holds, its quote is printable ASCII of at most 80 characters."""
    quote = quoted(text)
    assert len(quote) <= QUOTED_MAX_CHARACTERS
    assert quote.isascii()
    assert quote.isprintable()


@given(st.text(max_size=70))
def test_accepted_names_are_plain(name: str) -> None:
    """A name that passes is ASCII, is safe as a file name, and is no key's name."""
    if name_fault(name) is None:
        assert name.isascii()
        assert 1 <= len(name) <= 64
        assert Path(name).name == name
        assert not name.lower().startswith("key-")
