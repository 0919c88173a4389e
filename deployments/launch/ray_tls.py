"""TLS between the processes of Ray, which Ray itself does if its variables are set: the files that it needs.

With it, the GCS, the raylets and the workers refuse each connection without a certificate of the CA.
"""

# D139: Ray's connections can be encrypted

from __future__ import annotations

import os
import ssl
import stat
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
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

LIFETIME = timedelta(days=3650)
"""How long a certificate of ``make_tls_files`` is valid: longer than any local cluster runs."""


def require_tls_files(environment: Mapping[str, str]) -> None:
    """Check the files of Ray's TLS. Does nothing if it is off: if RAY_USE_TLS is neither 1 nor true.

    Raises:
        BadSettings: TLS is on, and a file is missing, can't be read, or is not what its variable says, or other users
            can read the key; or TLS is off although a file is named.
    """
    named = [name for name in FILES if environment.get(name)]
    if environment.get(SWITCH, "0").lower() not in ("1", "true"):
        if named:
            raise BadSettings(named[0], f"has no effect without {SWITCH}=1: set it, too, or remove this variable")
        return
    for name in FILES:
        if name not in named:
            raise BadSettings(name, f"is missing: with {SWITCH}, Ray needs {', '.join(FILES)}")
        try:
            mode = os.stat(environment[name]).st_mode  # noqa: PTH116 - the value may be no path at all
            with open(environment[name], "rb"):  # noqa: PTH123
                pass
        except (OSError, ValueError) as error:
            raise BadSettings(name, f"{environment[name]!r} can't be read ({error})") from error
        if name == KEY and mode & ANYONE_ELSE & ~stat.S_IXGRP & ~stat.S_IXOTH:
            raise BadSettings(name, f"other users have access to {environment[name]!r}; run `chmod 600` on it")
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(environment[CERTIFICATE], environment[KEY], password="")
    except (ssl.SSLError, ValueError) as error:
        raise BadSettings(CERTIFICATE, f"is no certificate of the key in {KEY}, or has a password ({error})") from error
    try:
        context.load_verify_locations(environment[CA])
    except ssl.SSLError as error:
        raise BadSettings(CA, f"has no certificate ({error})") from error


# D140: a local cluster uses Ray's TLS
def make_tls_files(folder: Path) -> dict[str, str]:
    """Make files for Ray's TLS on this machine alone, and return Ray's variables that name them and switch it on.

    ``folder``: exists, and only this user can enter it. The certificate is for loopback addresses, is its own CA, and
    is valid from yesterday on, because a clock may be put back.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Ray on this machine")])
    addresses = [x509.DNSName("localhost"), *(x509.IPAddress(ip_address(each)) for each in ("127.0.0.1", "::1"))]
    now, public = datetime.now(UTC), key.public_key()
    certificate = (
        x509.CertificateBuilder(name, name, public, x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + LIFETIME)
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
