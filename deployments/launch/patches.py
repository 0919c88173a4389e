"""What of Ray and of its HAProxy is edited, subclassed or privately read: the table and its checks.

Ray can't be imported at a start before its environment is set, so HAProxy's template is read from its file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from deployments.patch import Has, How, Patch


@dataclass(frozen=True, slots=True)
class HasLine:
    """Serve's template of HAProxy's configuration has a line that matches a regular expression."""

    pattern: str

    def __str__(self) -> str:
        return f"a line of Serve's template matches `{self.pattern}`"

    def missing_in(self, template: str) -> bool:
        """Whether no line of this template matches."""
        return re.search(self.pattern, template, re.MULTILINE) is None

    def problem(self) -> str | None:
        """Return the pattern, as text, if the template of the installed Ray lacks it; else None."""
        missing = self.missing_in(serves_template())
        return f"Ray's template of HAProxy's configuration has no {self.pattern!r}" if missing else None


_PROVIDER = "ray.autoscaler._private.local.node_provider"
_AT_A_START = "at each start of HAProxy Serve's file is edited; without our program in its place it is Serve's own"

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
            "they listen on the loopback interface only, where nothing else is wanted",
            r"^    bind :.*metrics_port",
            r"^  bind \*:.*stats_port",
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
            "limits of connections and polls, Retry-After, and hang-ups that a wrapper notices itself are added",
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
"""Of HAProxy: Serve's configuration, which ``launch.haproxy`` edits."""

RAY: Final = (
    Patch(
        "Ray", f"{_PROVIDER}.LocalNodeProvider", How.SUBCLASSED,
        "a machine whose start failed is tried again without limit",
        tuple(
            Has(_PROVIDER, f"LocalNodeProvider.{name}")
            for name in (
                "non_terminated_nodes", "is_running", "node_tags", "set_node_tags", "internal_ip", "external_ip",
                "terminate_node",
            )
        ),
        "never: it is the provider that the launcher's configuration names",
    ),
    Patch(
        "Ray", "ray._common.constants.HEAD_NODE_RESOURCE_NAME", How.READ, "the head of the cluster is known",
        (Has("ray._common.constants", "HEAD_NODE_RESOURCE_NAME"),), "only read",
    ),
)  # fmt: skip
"""Of Ray itself."""


def serves_template() -> str:
    """Return Serve's template, read from its file. Ray can't be imported yet: on import it reads its environment."""
    ray = find_spec("ray")
    folders = [] if ray is None else ray.submodule_search_locations or []
    files = [Path(folder) / "serve" / "_private" / "haproxy_templates.py" for folder in folders]
    return "".join(file.read_text(encoding="utf-8") for file in files if file.is_file())


def first_missing_line(template: str) -> str | None:
    """Return the first pattern of HAPROXY that no line of a template matches; None if all have one."""
    guards = (guard for patch in HAPROXY for guard in patch.guards if isinstance(guard, HasLine))
    return next((guard.pattern for guard in guards if guard.missing_in(template)), None)
