"""What a wrapper reports of energy, and the budget of a lease."""

from __future__ import annotations

import json
from dataclasses import replace

from registry.contract.messages import Belief
from tests.support.llm_wrapper import SECOND, Make


async def test_reports_bring_energy_windows(make: Make) -> None:
    """A report brings the windows of starts, prompts and leases, again until the registry has written them down."""
    client = await make(finish=False)
    await client.prompt("token-1")
    status = (await client.status("token-1")).json()
    assert status["energy"].keys() >= {"total_j", "idle_j", "label", "o_g", "m_g", "max_j", "max_g", "flags"}
    await client.wrapper.unbind(3, "request-1", "released")
    moment = client.wrapper._gate.moment
    meter = client.wrapper._meter.meter
    meter._contention.look(meter.mark())  # the poller is stopped here: what is written has to have been looked at
    report = await client.wrapper.report(Belief(3, None, moment))
    assert {window.wrapper_id for window in report.windows} == {"a-0"}
    assert [window.number for window in report.windows] == [*range(1, len(report.windows) + 1)]
    assert all(window.window_id.startswith(f"{moment.process}-") for window in report.windows)
    by_kind = {window.kind.value: window for window in report.windows}
    assert by_kind.keys() == {"load", "prompt", "idle", "lease"}
    assert json.loads(by_kind["load"].detail)["model"] == "org/tiny"
    assert (by_kind["lease"].request_id, by_kind["lease"].measurement_id) == ("request-1", 1)
    assert json.loads(by_kind["prompt"].detail)["tokens"] == {"prompt": 7, "cached": None, "output": 3}
    again = await client.wrapper.report(Belief(3, None, moment, windows_kept=len(report.windows)))
    assert again.windows == ()


async def test_budget_of_a_lease_reaches_its_prompts(make: Make) -> None:
    """A budget comes with the bind; where nothing is measured it can't hold, and the answer says so."""
    client = await make(finish=False)
    await client.bind(3, replace(SECOND, max_j=10.0))
    answer = await client.prompt("token-2")
    assert answer.status_code == 200
    assert "budget_not_enforced" in answer.json()["flags"]
    assert (await client.status("token-2")).json()["energy"]["max_j"] == 10.0
