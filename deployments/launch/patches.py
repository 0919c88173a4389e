"""Lists and checks our changes to Ray and to Serve's HAProxy configuration, and the private names of Ray that we read.

Ray must not be imported before its environment is set, so the checks read Serve's files as text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from deployments.patch import Has, How, Patch
from deployments.serve.patches import DIRECT_INGRESS, REPLICA_PORT

TEMPLATE: Final = "haproxy_templates.py"
CONSTANTS: Final = "constants.py"


@dataclass(frozen=True, slots=True)
class HasLine:
    """Checks that a file of Serve has a line that matches a regular expression.

    By default the file is the template of HAProxy's configuration.
    """

    pattern: str
    file: str = TEMPLATE

    def __str__(self) -> str:
        return f"a line of Serve's `{self.file}` matches `{self.pattern}`"

    def missing_in(self, text: str) -> bool:
        """Whether no line of this text matches."""
        return re.search(self.pattern, text, re.MULTILINE) is None

    def problem(self) -> str | None:
        """Return the pattern and the file, as text, if the installed Ray lacks it; else None."""
        missing = self.missing_in(text_of_serve(self.file))
        return f"Ray's {self.file} has no {self.pattern!r}" if missing else None


_PROVIDER = "ray.autoscaler._private.local.node_provider"
_AT_A_START = "when Serve starts HAProxy without our program; the program edits Serve's file at each start"

HAPROXY: Final = tuple(
    Patch("HAProxy", name, How.EDITED, why, tuple(map(HasLine, patterns)), _AT_A_START)
    for name, why, *patterns in (
        ("`log … local0 info`", "lease tokens, which are in paths, do not reach syslog", r"^    log .* local0 info$"),
        (
            "`option splice-request`",
            "HAProxy 2.8 would miss hang-ups and use a whole core",
            r"^    option splice-request$",
        ),
        (
            "`bind` of metrics and statistics",
            "they listen on the loopback interface only",
            r"^    bind :.*metrics_port",
            r"^  bind \*:.*stats_port",
            r"^    bind \{\{ config\.frontend_host",
        ),
        (
            "`stats socket … mode 666`",
            "HAProxy's admin socket is for its owner only",
            r"^    stats socket .* mode 666 ",
        ),
        (
            "`errorfile`",
            "HAProxy's own answers have our error format",
            r"^    errorfile 502 ",
            r"^    errorfile 503 ",
            r"^    errorfile 504 ",
        ),
        (
            "`http-request return status 404`",
            "a HAProxy that knows no server yet answers 503, so that clients try again",
            r"^    http-request return status 404 content-type text/plain ",
        ),
        (
            "sections `global`, `defaults`, `http_frontend`",
            "adds limits of connections and polls, Retry-After, and a secret for replicas; wrappers watch for hang-ups",
            r'^(HAPROXY_CONFIG_TEMPLATE = """)?global$',
            r"^defaults$",
            r"^frontend http_frontend$",
        ),
        (
            "`timeout client`, `timeout http-keep-alive`",
            "connections that hang are closed",
            r"timeout client \{\{ config\.timeout_client_s \}\}s",
            r"timeout http-keep-alive \{\{ config\.timeout_http_keep_alive_s \}\}s",
        ),
    )
)
"""The lines of Serve's configuration of HAProxy that ``launch.haproxy`` edits."""

VARIABLES: Final = Patch(
    "Ray",
    "environment variables of Serve",
    How.SET,
    "Serve starts our program, which edits HAProxy's configuration and starts HAProxy; HAProxy logs no prompts",
    tuple(
        HasLine(f'"{name}"', CONSTANTS)
        for name in (
            "RAY_SERVE_ENABLE_HA_PROXY",
            "RAY_SERVE_HAPROXY_BINARY_PATH",
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC",
            "RAY_SERVE_HAPROXY_METRICS_ENABLED",
        )
    ),
    "never: they are set for Ray's processes only",
)
"""Ray ignores a variable that it does not know: then HAProxy would run unedited, and log lease tokens."""

HANG_UPS: Final = Patch(
    "Ray",
    "header x-request-disconnect-disabled",
    How.SET,
    "Serve does not watch whether the client of a prompt hangs up; the wrapper does",
    (HasLine('"x-request-disconnect-disabled"', CONSTANTS),),
    "never: HAProxy sets it for prompts only",
)

PROVIDER: Final = Patch(
    "Ray",
    f"{_PROVIDER}.LocalNodeProvider",
    How.SUBCLASSED,
    "a machine whose start failed is tried again without limit",
    tuple(
        Has(_PROVIDER, f"LocalNodeProvider.{name}")
        for name in (
            "non_terminated_nodes",
            "is_running",
            "node_tags",
            "set_node_tags",
            "internal_ip",
            "external_ip",
            "terminate_node",
        )
    ),
    "never: it is the provider that the launcher's configuration names",
)

RAY: Final = (
    VARIABLES,
    HANG_UPS,
    PROVIDER,
    REPLICA_PORT,
    DIRECT_INGRESS,
    Patch(
        "Ray",
        "ray._common.constants.HEAD_NODE_RESOURCE_NAME",
        How.READ,
        "the head of the cluster is the node that has this resource",
        (Has("ray._common.constants", "HEAD_NODE_RESOURCE_NAME"),),
        "only read",
    ),
)
"""What is changed in Ray itself, and the private names that are read."""


def text_of_serve(name: str) -> str:
    """Return the text of a file of Serve; empty if Ray or the file is missing.

    Does not import Ray, because Ray reads its environment on import.
    """
    ray = find_spec("ray")
    folders = [] if ray is None else ray.submodule_search_locations or []
    files = [Path(folder) / "serve" / "_private" / name for folder in folders]
    return "".join(file.read_text(encoding="utf-8") for file in files if file.is_file())


def first_missing_line(template: str) -> str | None:
    """Return the first pattern of HAPROXY that no line of a template matches; None if there is none."""
    guards = (guard for patch in HAPROXY for guard in patch.guards if isinstance(guard, HasLine))
    return next((guard.pattern for guard in guards if guard.missing_in(template)), None)
