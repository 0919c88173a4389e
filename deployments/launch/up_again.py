"""Remembers the command that started the registry of a cluster, so that the head's keeper can repeat it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import structlog

from deployments.launch import ray_tls
from deployments.machine.private_files import require_unchanged_by_others, write_private
from deployments.machine.worker_environment import is_secret
from registry.environment import ENV_PREFIX

log = structlog.get_logger("deployments.launch.up_again")

REPEATED = "GREENPROMPT_REPEATED_UP"
"""Variable with which the keeper repeats the command. It is not remembered then: ``down`` may have forgotten it."""


class UpCommand(NamedTuple):
    """A command that starts a registry on a running cluster."""

    command: list[str]
    folder: str
    """Its working folder."""
    environment: dict[str, str]
    """Its environment."""


def command_file() -> Path:
    """Return the file that remembers the command. It is named after the machine, because machines may share a home.

    It is next to the secrets of the node and not in ``/tmp``, where many systems remove old files.
    """
    return Path.home() / ".greenprompt" / f"up-{socket.gethostname()}.json"


def remember(command: list[str]) -> None:
    """Remember this command, with the working folder and the environment of this process, for this user alone.

    Raises:
        BadSettings: Others can change the folder.
        OSError: The file can't be written.
    """
    file = command_file()
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    require_unchanged_by_others(file.parent, str(file.parent))
    write_private(file, json.dumps(UpCommand(command, str(Path.cwd()), _needed(os.environ))))


def forget() -> None:
    """Remove the remembered command. Idempotent."""
    command_file().unlink(missing_ok=True)


def remembered() -> UpCommand | None:
    """Return the remembered command, None if there is none. A file that can't be read is logged, and counts as none."""
    try:
        return UpCommand(*json.loads(command_file().read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        log.error("the command that starts the registry is not known", problem=str(error))  # noqa: TRY400
        return None


def _needed(environment: Mapping[str, str]) -> dict[str, str]:
    """Leave out secrets that are not settings of the registry: the command reads none of them."""
    settings = {name for name in environment if name.upper().startswith(ENV_PREFIX)} - {"GREENPROMPT_API_KEY"}
    settings |= environment.keys() & set(ray_tls.FILES)  # the key's variable has its path
    return {name: value for name, value in environment.items() if name in settings or not is_secret(name, value)}
