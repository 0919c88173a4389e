"""Decides which variables of the operator's environment reach Ray workers, and passes secret ones on in a file.

Ray writes the variables of a ``runtime_env`` to its logs and to its state. Every process of a cluster inherits the
environment of the process that starts Ray. So secrets must be in neither: the process that starts Ray moves them to a
file. Only the parts that use the Hugging Face hub read the file.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Final

import structlog

from deployments.machine.private_files import require_unchanged_by_others, write_private

log = structlog.get_logger("deployments.machine.worker_environment")

_PREFIXES = ("HF_", "HUGGING_FACE_", "VLLM_", "TRANSFORMERS_", "OMP_", "CUDA_DEVICE_ORDER")

PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
"""Proxy variables, in upper or lower case."""

CERTIFICATE_VARIABLES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
"""Variables with the paths of trusted certificates."""

SECRETS_FILE: Final = "GREENPROMPT_SECRETS_FILE"
"""Variable with the path of the file that holds the secret variables."""

FILE_NAME: Final = "secrets.json"
"""Name of that file in ``state_dir``."""

NOT_FOR_RAY: Final = ("GREENPROMPT_DATABASE_URL", "GREENPROMPT_API_KEY")
"""Secrets that no process of Ray reads from its environment: they are in the settings, or only commands use them."""

_SECRET_NAME = re.compile(r"(?<!DISABLE_IMPLICIT)_(TOKEN|KEY|SECRET|PASSWORD)$")


def forwarded_environment() -> dict[str, str]:
    """Return the variables that Ray workers need to load models as in the operator's shell, without secrets.

    Proxy variables are included in every spelling, since programs read different ones.
    """
    return {name: value for name, value in _for_models(os.environ) if not is_secret(name, value)}


def secret_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the secret ones of these variables: tokens and keys, and URLs that contain a user or a password."""
    return {name: value for name, value in _for_models(environment) if is_secret(name, value)}


# D130: secrets reach processes by a file
def hide_secrets(file: Path, environment: MutableMapping[str, str]) -> None:
    """Move the secrets from an environment, which Ray's processes inherit, to a file that only this user can read.

    ``load_secrets`` reads it whenever a replica starts, so it must not be in a folder whose old files are removed, as
    those of ``/tmp`` are. Without secrets there is no file. Its folder is created if it is needed.

    Raises:
        BadSettings: Others can change the folder.
        OSError: The file can't be written.
    """
    secrets = secret_environment(environment)
    for name in (*secrets, *NOT_FOR_RAY, SECRETS_FILE):
        environment.pop(name, None)
    if secrets:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        require_unchanged_by_others(file.parent, str(file.parent))
        write_private(file, json.dumps(secrets))
        environment[SECRETS_FILE] = str(file)
    else:
        file.unlink(missing_ok=True)  # left by an earlier start


def load_secrets() -> None:
    """Set the secret variables in this process and its future children. Other users can't read them in ``/proc``.

    Does nothing if there are none, or if Ray was started in another way: its processes then have inherited the
    operator's variables. If the file can't be read, an error is logged, because public models need no secrets.
    """
    if (file := os.environ.get(SECRETS_FILE)) is None:
        return
    try:
        os.environ.update(json.loads(Path(file).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        # no traceback: it may show the secrets
        log.error("secrets can't be read; start Ray again to write them", file=file, problem=str(error))  # noqa: TRY400
    # The hub's library reads HF_ENDPOINT when it is imported, and unpickling a replica's class has imported it already.
    if (constants := sys.modules.get("huggingface_hub.constants")) is not None:
        importlib.reload(constants)


def _for_models(environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for name, value in environment.items():
        if name.startswith(_PREFIXES) or name.upper() in PROXY_VARIABLES or name in CERTIFICATE_VARIABLES:
            yield name, value


def is_secret(name: str, value: str) -> bool:
    """Whether a variable is a token, a key, or a URL with credentials. A proxy's URL may lack a scheme."""
    may_have_credentials = "://" in value or name.upper() in PROXY_VARIABLES
    return _SECRET_NAME.search(name) is not None or (may_have_credentials and "@" in value)
