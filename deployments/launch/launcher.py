"""What Ray's launcher on the head holds of one's own machines: one that could not be started is tried again, for ever.

The launcher there (Ray's autoscaler v1, Ray 2.60) tries a node until that has failed once, and remembers it by its id,
which for machines of one's own is the address. Here a machine that was given up is a new node, which never failed.
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

from registry.errors import BadSettings

OURS = ".greenprompt.yaml"
"""How the file ends that Ray's monitor reads in place of the launcher's own, beside it."""


class Machines(LocalNodeProvider):
    """Ray's provider for one's own machines, but that a machine that was given up is a new node when taken again.

    A node's id is its machine's address, and from the second time on a number behind that. How often a machine was
    given up is known for as long as the monitor's process lives, which is as long as that remembers failures. A node
    that is no more can still be asked about its machine, but doesn't run and changes nothing.
    """

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self._given_up: Counter[str] = Counter()

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        """Ids of the nodes with these tags."""
        return [self._node(machine) for machine in super().non_terminated_nodes(tag_filters)]

    def is_running(self, node_id: str) -> bool:
        """Whether this node, and not a later one of the same machine, was taken and not given up."""
        return self._is_now(node_id) and bool(super().is_running(_machine(node_id)))

    def node_tags(self, node_id: str) -> dict[str, str]:
        """The tags of the machine's node of now."""
        return dict(super().node_tags(_machine(node_id)))

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        """Add to a node's tags."""
        if self._is_now(node_id):
            super().set_node_tags(_machine(node_id), tags)

    def internal_ip(self, node_id: str) -> str:
        """Address of the machine."""
        return str(super().internal_ip(_machine(node_id)))

    def external_ip(self, node_id: str) -> str:
        """The same, but of a head that has another one from outside."""
        return str(super().external_ip(_machine(node_id)))

    def terminate_node(self, node_id: str) -> None:
        """Give a node up; its machine may be taken again, by another thread too, at any moment."""
        if self._is_now(node_id):
            super().terminate_node(_machine(node_id))
            self._given_up[_machine(node_id)] += 1

    def _node(self, machine: str) -> str:
        times = self._given_up[machine]
        return f"{machine}#{times}" if times else machine

    def _is_now(self, node_id: str) -> bool:
        return node_id == self._node(_machine(node_id))


def _machine(node_id: str) -> str:
    return node_id.partition("#")[0]


def with_machines(options: Sequence[str]) -> list[str]:
    """Options of ``ray start``, with Machines in the autoscaling configuration; unchanged if that has other providers.

    Which machines there are holds at once, also for a monitor that runs: it reads its configuration and Ray's record of
    the machines anew all the time, but makes its provider, which alone compares the two, only once.

    Raises:
        BadSettings: the file can't be read.
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
    config["provider"] |= {"type": "external", "module": f"{Machines.__module__}.{Machines.__qualname__}"}
    Machines(config["provider"], config["cluster_name"])  # writes the record of the machines; first, so none is missed
    ours = path.with_suffix(OURS)
    ours.touch(mode=0o600)  # as the launcher's own, whose commands may hold the database's password
    ours.write_text(json.dumps(config), encoding="utf-8")
    return [*others, f"--autoscaling-config={ours}"]
