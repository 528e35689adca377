"""Keys of a deployment: our own certificate authority and server certificate for TLS, and a key for each site.

In the server's folder: `keys/ca.crt` (give it to every site), `keys/ca.key`, `keys/server.crt`, `keys/server.key`, and in `sites/`
the public key of each site, named after it. A site makes its key itself; the private half never leaves it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedloom.core.errors import Refused
from fedloom.deploy.flower.address import HOST
from fedloom.deploy.server.key_facts import KeyFacts, write_facts
from fedloom.deploy.site.site_key import key_fingerprint

LOOPBACK = ("localhost", "127.0.0.1", "::1")
CA_DAYS, SERVER_DAYS = 3650, 397
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)


@dataclass(frozen=True, slots=True)
class Registered:
    """A site whose key the server accepts.

    Fields:
        name: the name that it is registered under.
        fingerprint: sha256 of the key.
        path: the file of the key.
        key: the key as text (PEM), as Flower's headers bear it.
    """

    name: str
    fingerprint: str
    path: Path
    key: str


def new(folder: Path, hosts: Sequence[str], days: int = SERVER_DAYS) -> Path:
    """Make the authority and the server's certificate for these host names and addresses; returns the certificate for the sites.

    Raises:
        Refused: the folder has an authority already, or a host is none.
    """
    keys = folder / "keys"
    _alternatives(hosts)
    if (keys / "ca.key").exists():
        raise Refused(
            "FOLDER",
            str(folder),
            "it has a certificate authority already; `fedloom keys renew` makes a new server certificate",
        )
    for part in (folder, keys, folder / "sites"):
        part.mkdir(mode=0o700, parents=True, exist_ok=True)
    key, name = ec.generate_private_key(ec.SECP384R1()), _named("fedloom authority")
    certificate = (
        _draft(name, name, key.public_key(), key.public_key(), CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA384())
    )
    _secret(keys / "ca.key", _pem(key))
    (keys / "ca.crt").write_bytes(certificate.public_bytes(Encoding.PEM))
    renew(folder, hosts, days)
    return keys / "ca.crt"


def renew(folder: Path, hosts: Sequence[str], days: int = SERVER_DAYS) -> Path:
    """A new server certificate under the authority that is there; the sites need nothing new.

    Raises:
        Refused: there is no authority, or no host is named.
    """
    keys, alternatives = folder / "keys", _alternatives(hosts)
    authority = x509.load_pem_x509_certificate(_present(keys / "ca.crt", folder).read_bytes())
    signer = load_pem_private_key(_present(keys / "ca.key", folder).read_bytes(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        _draft(_named(hosts[0]), authority.subject, key.public_key(), signer.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .sign(signer, hashes.SHA384())
    )
    (keys / "server.key").unlink(missing_ok=True)
    _secret(keys / "server.key", _pem(key))
    (keys / "server.crt").write_bytes(certificate.public_bytes(Encoding.PEM))
    return keys / "server.crt"


def site(name: str, folder: Path) -> tuple[Path, Path]:
    """Make a site's key, at the site; returns the private half, which stays, and the public half, which goes to the server.

    Raises:
        Refused: the name is no plain word, or there is such a key already.
    """
    private, public = folder / f"{_plain(name)}.key", folder / f"{name}.pub"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP384R1())
    _secret(private, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + f" {name}\n".encode())
    return private, public


def add(public: Path, name: str, folder: Path, facts: KeyFacts | None = None) -> Registered:
    """Accept the public key of a site, or a region, under a name. A server that runs sees it within seconds.

    Args:
        public: file of the key.
        name: what the server calls the holder.
        folder: of the server.
        facts: what else is known of the holder (None: it is a site, and counts with the examples that it registers).

    Raises:
        Refused: it is no public key that Flower takes, or the name or the key is taken.
    """
    entry = _read(public, _plain(name))
    for other in listed(folder):
        if name == other.name and entry.fingerprint != other.fingerprint:
            raise Refused(
                "--name",
                name,
                f"another key is authorised under this name; revoke it first (fedloom keys remove {name})",
            )
        if entry.fingerprint == other.fingerprint and name != other.name:
            raise Refused("PUB", str(public), f"this key is authorised already, as {other.name}")
    (folder / "sites").mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / "sites" / f"{name}.pub"
    write_facts(folder, name, facts or KeyFacts())
    path.write_bytes(public.read_bytes())
    return replace(entry, path=path)


def remove(name: str, folder: Path) -> None:
    """Accept a site's key no longer.

    Raises:
        Refused: there is no such site.
    """
    path = folder / "sites" / f"{_plain(name)}.pub"
    if not path.exists():
        raise Refused("NAME", name, f"no key is authorised under this name; see: fedloom keys list {folder}")
    path.unlink()
    write_facts(folder, name, KeyFacts())


def listed(folder: Path) -> list[Registered]:
    """The sites whose keys are accepted, by name."""
    return [_read(path, path.stem) for path in sorted((folder / "sites").glob("*.pub"))]


def expiry(certificate: Path) -> datetime:
    """Return the time at which a certificate ends."""
    return x509.load_pem_x509_certificate(certificate.read_bytes()).not_valid_after_utc


def _read(public: Path, name: str) -> Registered:
    try:
        key = load_ssh_public_key(public.read_bytes())
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, CURVES):
            raise ValueError("no ECDSA key on a NIST curve")
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise Refused("PUB", str(public), f"give the .pub file that `fedloom keys site` made ({error})") from None
    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode("ascii")
    return Registered(name, key_fingerprint(key), public, pem)


def _plain(name: str) -> str:
    if not NAME.fullmatch(name):
        raise Refused("NAME", name, "use letters, digits, `.`, `-` and `_`, at most 63, the first a letter or digit")
    return name


def _present(path: Path, folder: Path) -> Path:
    if not path.exists():
        raise Refused(
            "FOLDER",
            str(folder),
            f"it has no certificate authority; make one with: fedloom keys new {folder} --host NAME",
        )
    return path


def _secret(path: Path, data: bytes) -> None:
    """Write a file that only its owner may read, and that is not there yet."""
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        raise Refused("file", str(path), "it exists already, and a key is never overwritten") from None
    with os.fdopen(handle, "wb") as file:
        file.write(data)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _alternatives(hosts: Sequence[str]) -> list[x509.GeneralName]:
    """Return what a certificate says for these hosts and for this machine itself. Raises Refused."""
    if not hosts:
        raise Refused("--host", "", "name the host names and addresses by which sites reach the server")
    names = list[x509.GeneralName]()
    for host in dict.fromkeys((*hosts, *LOOPBACK)):
        try:
            names.append(x509.IPAddress(ip_address(host.removeprefix("[").removesuffix("]").partition("%")[0])))
        except ValueError:
            if not HOST.fullmatch(host.removeprefix("*.")):
                remedy = "name a host or an address without a port, for instance fed.example.org or ::1"
                raise Refused("--host", host, remedy) from None
            names.append(x509.DNSName(host))
    return names


def _draft(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    signer: ec.EllipticCurvePublicKey,
    days: int,
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    begins = min(now, now + timedelta(days=days)) - timedelta(hours=1)  # clocks differ
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
