"""The tables of patches against the real Ray: each row notices a change of what our code uses, and stops the start."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from deployments.launch import haproxy, patches
from deployments.launch.haproxy import haproxy_environment
from deployments.launch.launcher import with_machines
from deployments.launch.patches import CONSTANTS, HAPROXY, PROVIDER, RAY, TEMPLATE, text_of_serve
from deployments.serve.patches import DIRECT_INGRESS, REPLICA_PORT
from deployments.serve.replica_process import _listen_on_node_address, proxy_guard
from registry.errors import BadSettings
from tests.support.renamed import renamed

LINES: dict[str, Sequence[tuple[str, str]]] = {
    "`log … local0 info`": [(TEMPLATE, " local0 info")],
    "`option splice-request`": [(TEMPLATE, "option splice-request")],
    "`bind` of metrics and statistics": [
        (TEMPLATE, "metrics_port"),
        (TEMPLATE, "bind *:"),
        (TEMPLATE, "bind {{ config.frontend_host"),
    ],
    "`stats socket … mode 666`": [(TEMPLATE, " mode 666 ")],
    "`errorfile`": [(TEMPLATE, f"errorfile {status} ") for status in (502, 503, 504)],
    "`http-request return status 404`": [(TEMPLATE, "http-request return status 404 ")],
    "sections `global`, `defaults`, `http_frontend`": [
        (TEMPLATE, '"""global\n'),
        (TEMPLATE, "\ndefaults\n"),
        (TEMPLATE, "\nfrontend http_frontend\n"),
    ],
    "`timeout client`, `timeout http-keep-alive`": [
        (TEMPLATE, "timeout client {{ config."),
        (TEMPLATE, "timeout http-keep-alive {{ config."),
    ],
    "environment variables of Serve": [
        (CONSTANTS, f'"RAY_SERVE_{name}"')
        for name in ("ENABLE_HA_PROXY", "HAPROXY_BINARY_PATH", "HAPROXY_CONFIG_FILE_LOC", "HAPROXY_METRICS_ENABLED")
    ],
    "header x-request-disconnect-disabled": [(CONSTANTS, '"x-request-disconnect-disabled"')],
}
"""By the name of each row, words in the files of Serve that our changes look for."""

OVERRIDDEN = [
    "non_terminated_nodes", "is_running", "node_tags", "set_node_tags", "internal_ip", "external_ip", "terminate_node",
]  # fmt: skip
HEAD = "HEAD_NODE_RESOURCE_NAME"


def noticed() -> list[str]:
    """The rows whose guards fail."""
    return [patch.name for patch in (*HAPROXY, *RAY) if patch.problem() is not None]


def test_every_row_has_a_case() -> None:
    """A row that is added to the tables needs a change that its guard notices."""
    others = {PROVIDER.name, REPLICA_PORT.name, DIRECT_INGRESS.name, f"ray._common.constants.{HEAD}"}
    assert {*LINES, *others} == {patch.name for patch in (*HAPROXY, *RAY)}


def test_the_installed_ray_passes(tmp_path: Path) -> None:
    """Without a change no row is noticed, and the checks of a start pass."""
    assert noticed() == []
    haproxy_environment(tmp_path, "0" * 64)


@pytest.mark.parametrize(("row", "file", "word"), [(row, *case) for row, cases in LINES.items() for case in cases])
def test_a_changed_line_is_named(
    row: str, file: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serve's own file with one word changed: one row notices it, and a start is refused with the row's pattern."""
    middle = len(word) // 2
    changed = {name: text_of_serve(name) for name in (TEMPLATE, CONSTANTS)}
    assert word in changed[file]
    changed[file] = changed[file].replace(word, f"{word[:middle]}X{word[middle:]}")
    for module in (haproxy, patches):
        monkeypatch.setattr(module, "text_of_serve", changed.__getitem__)
    assert noticed() == [row]
    with pytest.raises(BadSettings) as refused:
        haproxy_environment(tmp_path, "0" * 64)
    (patch,) = [patch for patch in (*HAPROXY, *RAY) if patch.name == row]
    (guard,) = [guard for guard in patch.guards if guard.problem() is not None]
    assert isinstance(guard, patches.HasLine)
    assert repr(guard.pattern) in str(refused.value)


def test_another_port_of_replicas_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Serve that opens a replica's own port in another way: the replica does not start, and says what is missing."""

    async def another_way(self: Any) -> None:
        self._internal_grpc_port = self._server.add_insecure_port("0.0.0.0:0")

    monkeypatch.setattr("ray.serve._private.replica.Replica._on_initialized", another_way)
    assert noticed() == [REPLICA_PORT.name]
    with pytest.raises(BadSettings, match=r"no longer uses add_port_to_grpc_server, \[::\]:0"):
        _listen_on_node_address()


def test_another_way_to_a_replica_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Serve that decides about HTTP ports of replicas in another way: no replica starts with its guard off."""

    async def another_way(self: Any) -> None:
        await self._open_ports()

    monkeypatch.setattr("ray.serve._private.replica.Replica._maybe_start_direct_ingress_servers", another_way)
    assert noticed() == [DIRECT_INGRESS.name]
    with pytest.raises(BadSettings, match=r"no longer uses RAY_SERVE_ENABLE_DIRECT_INGRESS"):
        proxy_guard()


@pytest.mark.parametrize("method", OVERRIDDEN)
def test_a_renamed_method_of_the_provider_is_named(method: str, tmp_path: Path) -> None:
    """Ray's provider of local machines without a method that ours overrides: the head's `ray-start` is refused."""
    file = tmp_path / "cluster.yaml"
    file.write_text("{cluster_name: x, provider: {type: local, head_ip: 192.0.2.1, worker_ips: []}}")
    with renamed("ray.autoscaler._private.local.node_provider", f"LocalNodeProvider.{method}"):
        assert noticed() == [PROVIDER.name]
        with pytest.raises(BadSettings, match=rf"LocalNodeProvider\.{method}\b"):
            with_machines([f"--autoscaling-config={file}"])


def test_all_that_our_provider_overrides_is_guarded() -> None:
    """A method that is added to our provider needs a guard, too."""
    from deployments.launch.launcher import Machines

    assert {name for name, member in vars(Machines).items() if callable(member) and not name.startswith("_")} == {
        *OVERRIDDEN
    }


def test_a_renamed_resource_of_the_head_is_named() -> None:
    """``greenprompt up`` imports it: the error of the import has the name."""
    with renamed("ray._common.constants", HEAD):
        assert noticed() == [f"ray._common.constants.{HEAD}"]
    program = f"import ray._common.constants as it; del it.{HEAD}; import deployments.serve.app"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert f"ImportError: cannot import name '{HEAD}' from 'ray._common.constants'" in done.stderr
