"""For the tests of the Python client: clients with a registry that is a script."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import httpx
import pytest
import stamina

from greenprompt_client.client import RegistryClient
from greenprompt_client.held_lease import RETRY_FOR_S
from tests.support.scripted_registry import Reply, Script


@pytest.fixture
def registry() -> Iterator[Callable[..., tuple[RegistryClient, Script]]]:
    """Makes a client and the script that answers it; at the end every reply must have been asked for."""
    made: list[tuple[RegistryClient, Script]] = []

    def make(
        *replies: Reply, base_url: str = "http://registry:8000", connect_for_s: float = RETRY_FOR_S
    ) -> tuple[RegistryClient, Script]:
        script, client = Script(*replies), RegistryClient(base_url, connect_for_s=connect_for_s)
        client._http.close()
        client._prompts.close()
        client._http = httpx.Client(base_url=client._http.base_url, transport=httpx.MockTransport(script))
        client._prompts = client._http
        made.append((client, script))
        return client, script

    with stamina.set_testing(True, attempts=4):
        yield make
    for client, script in made:
        client.close()
        assert script.replies == []
