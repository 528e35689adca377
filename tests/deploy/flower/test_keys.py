"""Keys and certificates, and what TLS makes of them over a real socket."""

from __future__ import annotations

import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest

from fedloom.core.errors import Refused
from fedloom.deploy.flower import keys
from fedloom.deploy.server.key_facts import KeyFacts, facts_file, read_facts


def handshake(server: Path, trusted: Path, name: str) -> None:
    """A TLS handshake with the certificate of one folder by a client that trusts the authority of another."""
    inside = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    inside.load_cert_chain(server / "keys/server.crt", server / "keys/server.key")
    outside = ssl.create_default_context(cafile=str(trusted / "keys/ca.crt"))
    outside.verify_flags |= ssl.VERIFY_X509_STRICT
    ours, theirs = socket.socketpair()

    def serve() -> None:
        try:
            inside.wrap_socket(ours, server_side=True).recv(1)
        except (ssl.SSLError, ConnectionError):
            ours.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        outside.wrap_socket(theirs, server_hostname=name).sendall(b"x")
    finally:
        theirs.close()
        thread.join()
        ours.close()


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    folder = tmp_path / "server"
    keys.new(folder, ["fedloom.example.org", "10.1.2.3", "[2001:db8::5]"])
    return folder


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
class TestTls:
    @pytest.mark.parametrize(
        "name", ["fedloom.example.org", "10.1.2.3", "2001:db8::5", "localhost", "127.0.0.1", "::1"]
    )
    def test_the_server_is_known_by_the_names_it_was_given(self, authority: Path, name: str) -> None:
        handshake(authority, authority, name)

    def test_and_by_no_other(self, authority: Path) -> None:
        with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
            handshake(authority, authority, "elsewhere.example.org")

    def test_a_foreign_authority_is_refused(self, authority: Path, tmp_path: Path) -> None:
        keys.new(tmp_path / "other", ["fedloom.example.org"])
        with pytest.raises(ssl.SSLCertVerificationError):
            handshake(tmp_path / "other", authority, "fedloom.example.org")

    def test_an_expired_certificate_is_refused_until_it_is_renewed(self, authority: Path) -> None:
        keys.renew(authority, ["localhost"], days=-1)
        with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
            handshake(authority, authority, "localhost")
        keys.renew(authority, ["localhost"])
        handshake(authority, authority, "localhost")


def test_only_the_owner_reads_private_keys(authority: Path, tmp_path: Path) -> None:
    private, _ = keys.site("ward", tmp_path / "site")
    for path in (authority / "keys/ca.key", authority / "keys/server.key", private):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_nothing_is_overwritten(authority: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="authority already"):
        keys.new(authority, ["localhost"])
    private, _ = keys.site("ward", tmp_path)
    before = private.read_bytes()
    with pytest.raises(Refused, match="never overwritten"):
        keys.site("ward", tmp_path)
    assert private.read_bytes() == before


def test_flower_reads_a_site_s_key(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key
    from flwr.cli.supernode.register import try_load_public_key
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    private, public = keys.site("ward", tmp_path)
    key = load_ssh_private_key(private.read_bytes(), None)
    assert public_key_to_bytes(key.public_key()) == try_load_public_key(public)


def test_sites_are_accepted_by_name_and_key_and_removed(authority: Path, tmp_path: Path) -> None:
    _, one = keys.site("one", tmp_path)
    _, two = keys.site("two", tmp_path)
    first = keys.add(one, "north", authority)
    assert keys.add(one, "north", authority) == first, "adding twice is adding once"
    with pytest.raises(Refused, match="another key"):
        keys.add(two, "north", authority)
    with pytest.raises(Refused, match="already, as north"):
        keys.add(one, "south", authority)
    keys.add(two, "south", authority)
    assert [entry.name for entry in keys.listed(authority)] == ["north", "south"]
    keys.remove("north", authority)
    with pytest.raises(Refused, match="no key is authorised"):
        keys.remove("north", authority)
    assert [entry.name for entry in keys.listed(authority)] == ["south"]


def test_what_the_operator_says_stands_beside_the_key_and_goes_with_it(authority: Path, tmp_path: Path) -> None:
    _, public = keys.site("one", tmp_path)
    keys.add(public, "north", authority, KeyFacts(region=True, examples=1200))
    assert read_facts(authority, "north") == KeyFacts(True, 1200)
    facts_file(authority, "north").write_text('{"region": 1}')
    assert read_facts(authority, "north") == KeyFacts(), "damaged: it is a site with its own word"
    keys.add(public, "north", authority, KeyFacts(examples=7))
    assert read_facts(authority, "north") == KeyFacts(examples=7)
    keys.remove("north", authority)
    assert not facts_file(authority, "north").exists()
    for wrong in (0, -1, 10**13, True):
        with pytest.raises(Refused):
            KeyFacts(examples=wrong)


@pytest.mark.parametrize("name", ["", "../x", "a/b", "-x", "a b", "x" * 64])
def test_a_name_is_a_plain_word(authority: Path, tmp_path: Path, name: str) -> None:
    _, public = keys.site("one", tmp_path)
    for call in (lambda: keys.add(public, name, authority), lambda: keys.site(name, tmp_path)):
        with pytest.raises(Refused, match="letters"):
            call()


def test_what_is_no_key_of_ours_is_refused(authority: Path, tmp_path: Path) -> None:
    (tmp_path / "ed.pub").write_text(
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPbpZ7wKyoxEgwnlqzAZ4ZY2bWn3zBqH0YBcyVmCvBzB x\n"
    )
    (tmp_path / "junk.pub").write_bytes(bytes(range(256)))
    private, _ = keys.site("one", tmp_path)
    for path in (tmp_path / "ed.pub", tmp_path / "junk.pub", tmp_path / "none.pub", private):
        with pytest.raises(Refused, match=r"\.pub file"):
            keys.add(path, "x", authority)


@pytest.mark.parametrize(
    "host", ["fed.example.org:8080", "[::1]:8080", "https://fed", "b\u00fccher.example", "a b", ""]
)
def test_what_is_no_host_is_refused_before_anything_is_made(tmp_path: Path, host: str) -> None:
    with pytest.raises(Refused, match="without a port"):
        keys.new(tmp_path / "server", ["localhost", host])
    assert not (tmp_path / "server").exists()


def test_a_folder_without_authority_says_so(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="keys new"):
        keys.renew(tmp_path, ["localhost"])
