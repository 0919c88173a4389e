"""TLS between the processes of Ray, which Ray itself does if its variables are set: the files that it needs.

With it, the GCS, the raylets and the workers refuse each connection without a certificate of the CA.
"""

# D139: Ray's connections can be encrypted

from __future__ import annotations

import hashlib
import os
import ssl
import stat
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from deployments.machine.private_files import ANYONE_ELSE, write_private
from registry.errors import BadSettings

SWITCH = "RAY_USE_TLS"
CERTIFICATE, KEY, CA = FILES = ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")
"""Ray's variables: the paths of this machine's certificate, of its key, and of the CA's certificate (PEM)."""

VERBOSITY = "GRPC_VERBOSITY"

VALID = datetime(2000, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)
"""From when until when a certificate of ``make_tls_files`` is valid: always, because its key lives for one start."""


def uses_tls(environment: Mapping[str, str]) -> bool:
    """Whether Ray's TLS is on: RAY_USE_TLS is 1 or true. Raises BadSettings for a value that Ray would take for off."""
    value = environment.get(SWITCH, "").lower()
    if value not in ("", "0", "1", "false", "true"):
        raise BadSettings(SWITCH, f"{environment[SWITCH]!r} is no answer; set 1 or 0")
    return value in ("1", "true")


def require_tls_files(environment: Mapping[str, str]) -> None:
    """Check the files of Ray's TLS. Does nothing if it is off: if RAY_USE_TLS is neither 1 nor true.

    Raises:
        BadSettings: TLS is on, and a file is missing, can't be read, or is not what its variable says, or other users
            can read the key or change a file; or TLS is off although a file is named.
    """
    named = [name for name in FILES if environment.get(name)]
    if not uses_tls(environment):
        if named:
            raise BadSettings(named[0], f"has no effect without {SWITCH}=1: set it, too, or remove this variable")
        return
    for name in FILES:
        if name not in named:
            raise BadSettings(name, f"is missing: with {SWITCH}, Ray needs {', '.join(FILES)}")
        _require_safe(name, environment[name])
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(environment[CERTIFICATE], environment[KEY], password="")
    except (ssl.SSLError, ValueError) as error:
        raise BadSettings(CERTIFICATE, f"is no certificate of the key in {KEY}, or has a password ({error})") from error
    try:
        trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        trusting.load_verify_locations(environment[CA])
    except ssl.SSLError as error:
        raise BadSettings(CA, f"has no certificate ({error})") from error
    trusting.check_hostname = False  # which names it needs depends on the addresses of the machines
    try:
        _shake_hands(context, trusting)
    except ssl.SSLError as error:
        raise BadSettings(CERTIFICATE, f"is not valid by the certificate in {CA} ({error})") from error


def quiet(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variable that keeps gRPC from logging each connection that it refuses, unless somebody has set it.

    With TLS, strangers could fill the disk with such lines.
    """
    return {} if VERBOSITY in environment else {VERBOSITY: "NONE"}


def tls_digest(environment: Mapping[str, str]) -> str | None:
    """Return a digest of certificate and CA, which changes when they are renewed; None without TLS."""
    if not uses_tls(environment):
        return None
    return hashlib.sha256(b"".join(Path(environment[name]).read_bytes() for name in (CERTIFICATE, CA))).hexdigest()


def _require_safe(name: str, file: str) -> None:
    """Raise BadSettings if a file can't be read, or if other users can change it, or read the key."""
    try:
        found = os.stat(file)  # noqa: PTH116 - the value may be no path at all
        with open(file, "rb"):  # noqa: PTH123
            pass
    except (OSError, ValueError) as error:
        raise BadSettings(name, f"{file!r} can't be read ({error})") from error
    if not os.path.isabs(file):  # noqa: PTH117
        raise BadSettings(name, f"{file!r} must be an absolute path: Ray's processes have other working folders")
    if found.st_uid not in (os.geteuid(), 0):
        raise BadSettings(name, f"{file!r} belongs to another user (uid {found.st_uid})")
    others = ANYONE_ELSE & ~stat.S_IXGRP & ~stat.S_IXOTH if name == KEY else stat.S_IWGRP | stat.S_IWOTH
    if found.st_mode & others:
        raise BadSettings(name, f"other users have access to {file!r}; run `chmod 600` on it")


def _shake_hands(own: ssl.SSLContext, trusting: ssl.SSLContext) -> None:
    """Let a client that trusts only the CA connect to the certificate, in memory. Raises ssl.SSLError."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    client, server = trusting.wrap_bio(to_client, to_server), own.wrap_bio(to_server, to_client, server_side=True)
    for side in (client, server, client):
        with suppress(ssl.SSLWantReadError):
            side.do_handshake()


# D140: a local cluster uses Ray's TLS
def make_tls_files(folder: Path) -> dict[str, str]:
    """Make files for Ray's TLS on this machine alone, and return Ray's variables that name them and switch it on.

    ``folder``: exists, and only this user can enter it. The certificate is for loopback addresses, and its own CA.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Ray on this machine")])
    addresses = [x509.DNSName("localhost"), *(x509.IPAddress(ip_address(each)) for each in ("127.0.0.1", "::1"))]
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(VALID[0])
        .not_valid_after(VALID[1])
        .add_extension(x509.SubjectAlternativeName(addresses), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    files = {CERTIFICATE: folder / "cert.pem", KEY: folder / "key.pem", CA: folder / "cert.pem"}
    pem, unencrypted = serialization.Encoding.PEM, serialization.NoEncryption()
    write_private(files[CERTIFICATE], certificate.public_bytes(pem).decode())
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, unencrypted)
    write_private(files[KEY], secret.decode())
    return {SWITCH: "1", **{variable: str(file) for variable, file in files.items()}}
