"""Ray's local node provider, changed so that a machine whose start failed is tried again without limit.

Ray's launcher on the head (autoscaler v1, Ray 2.60) stops trying a node after its first failure, and remembers it by
its id, which for local machines is the address. Here a machine gets a new node id after each failure.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from ray.autoscaler._private.local.node_provider import LocalNodeProvider

from deployments.launch.patches import PROVIDER
from registry.errors import BadSettings

OURS = ".greenprompt.yaml"
"""Suffix of the configuration file that Ray's monitor reads, beside the launcher's own file."""


class Machines(LocalNodeProvider):
    """Ray's provider for local machines, with a new node id for a machine that is used again after a failure.

    A node's id is its machine's address, followed by the number of earlier failures if there were
    any. They are counted in the monitor's process, which also holds Ray's own list of failed nodes.
    With the id of an earlier node, the address can still be read; but the node counts as not running,
    and it can't be changed.
    """

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self._given_up: Counter[str] = Counter()

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        """Return the ids of the nodes with these tags."""
        return [self._node(machine) for machine in super().non_terminated_nodes(tag_filters)]

    def is_running(self, node_id: str) -> bool:
        """Whether this node is current for its machine, and was started and not terminated."""
        return self._is_now(node_id) and bool(super().is_running(_machine(node_id)))

    def node_tags(self, node_id: str) -> dict[str, str]:
        """Return the tags of the machine's current node."""
        return dict(super().node_tags(_machine(node_id)))

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        """Add tags to a node, if it is current."""
        if self._is_now(node_id):
            super().set_node_tags(_machine(node_id), tags)

    def internal_ip(self, node_id: str) -> str:
        """Return the address of the machine."""
        return str(super().internal_ip(_machine(node_id)))

    def external_ip(self, node_id: str) -> str:
        """Return the address for access from outside; it differs from the internal one only for some heads."""
        return str(super().external_ip(_machine(node_id)))

    def terminate_node(self, node_id: str) -> None:
        """Terminate a node. Its machine then gets a new node id. No effect on a node that is not current.

        Another thread may use the machine again at any moment.
        """
        if self._is_now(node_id):
            super().terminate_node(_machine(node_id))
            self._given_up[_machine(node_id)] += 1

    # D46: no machine is given up
    def _node(self, machine: str) -> str:
        times = self._given_up[machine]
        return f"{machine}#{times}" if times else machine

    def _is_now(self, node_id: str) -> bool:
        return node_id == self._node(_machine(node_id))


def _machine(node_id: str) -> str:
    return node_id.partition("#")[0]


def with_machines(options: Sequence[str]) -> list[str]:
    """Return the options of ``ray start`` with Machines as provider; unchanged if they configure another provider.

    A new list of machines takes effect at once, even in a running monitor. The monitor rereads the
    configuration and Ray's record of the machines, but does not update the record; that is done here.

    Raises:
        BadSettings: The file can't be read, or this version of Ray has another provider of local machines.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--autoscaling-config", type=Path)
    known, others = parser.parse_known_args(options)
    if known.autoscaling_config is None:
        return list(options)
    path = known.autoscaling_config.expanduser()
    try:
        config = yaml.safe_load(path.read_bytes())
    except (OSError, yaml.YAMLError) as error:
        raise BadSettings("--autoscaling-config", str(error)) from error
    if config["provider"]["type"] != "local":
        return list(options)
    if (problem := PROVIDER.problem()) is not None:
        raise BadSettings("--autoscaling-config", f"{problem}; use the version in the lock file")
    config["provider"] |= {"type": "external", "module": f"{Machines.__module__}.{Machines.__qualname__}"}
    Machines(config["provider"], config["cluster_name"])  # updates the record, before the monitor reads the file
    ours = path.with_suffix(OURS)
    ours.touch(mode=0o600)  # like the launcher's own file: its commands may contain the database password
    ours.write_text(json.dumps(config), encoding="utf-8")
    return [*others, f"--autoscaling-config={ours}"]
