"""TLS between the processes of Ray, which Ray itself does if its variables are set: are the files usable?

With it, the GCS, the raylets and the workers refuse each connection without a certificate of the CA.
"""

# D139: Ray's connections can be encrypted

from __future__ import annotations

import os
import ssl
import stat
from collections.abc import Mapping

from deployments.machine.private_files import ANYONE_ELSE
from registry.errors import BadSettings

SWITCH = "RAY_USE_TLS"
CERTIFICATE, KEY, CA = FILES = ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")
"""Ray's variables: the paths of this machine's certificate, of its key, and of the CA's certificate (PEM)."""


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
