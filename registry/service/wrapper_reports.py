"""Asks wrappers for reports, and records what they say: windows, memory, activity, flags, failures.

Each request for a report contains the registry's view of the wrapper's lease. A report may be older
than a command that was sent meanwhile; the wrapper's status in it is then out of date.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace

from registry.contract.messages import Belief, Cluster, Moment, WrapperReport
from registry.core.commands import Effect
from registry.core.events import (
    Event,
    LeaseFlagged,
    LeaseLapsed,
    LeaseUsed,
    LLMDied,
    MachineJoined,
    WrapperFailed,
    WrapperStarted,
)
from registry.core.records import Wrapper, WrapperStatus
from registry.errors import WrapperUnreachable
from registry.service.accounts import Accounts
from registry.service.loop import Loop
from registry.service.turns import Turns
from registry.settings import Settings
from registry.wire.words import canonical_json

ACTIVITY_GRAIN = 0.05
"""A lease's last use is stored only if it is newer than the stored one by this fraction of the idle limit, because each
change takes a commit. No lease ends too early because of that: its wrapper is asked first."""

ANSWERING = frozenset(
    {WrapperStatus.IDLE, WrapperStatus.DEPLOYING, WrapperStatus.READY, WrapperStatus.LEASED, WrapperStatus.STOPPING}
)
"""Statuses in which a wrapper that does not answer has failed."""


class WrapperReports:
    """Asks wrappers for reports, and knows the last report of each."""

    def __init__(self, loop: Loop, cluster: Cluster, turns: Turns, *, accounts: Accounts, settings: Settings) -> None:
        self.latest: dict[str, WrapperReport] = {}
        self.heard_s: dict[str, float] = {}
        """By wrapper: when this process received the wrapper's last report, UTC seconds."""
        self._loop = loop
        self._allocator = loop.allocator
        self._cluster = cluster
        self._accounts = accounts
        self._turns = turns
        self._settings = settings

    # --- what the registry knows ------------------------------------------------------------------------

    def moment(self, wrapper_id: str) -> Moment | None:
        """Return the wrapper's own timestamp of its last report, None if there is no report.

        What the registry knows of the wrapper now is at least as recent as this timestamp.
        """
        report = self.latest.get(wrapper_id)
        return None if report is None else report.moment

    def versions(self, wrapper_id: str) -> str | None:
        """Return the versions that a wrapper last reported, as canonical JSON; None if it reported none."""
        report = self.latest.get(wrapper_id)
        return None if report is None or report.versions is None else canonical_json(report.versions)

    def belief(self, wrapper_id: str) -> Belief:
        """Return the registry's view of a wrapper and its lease, for a request for a report."""
        wrapper, lease = self._allocator.wrapper(wrapper_id), self._allocator.lease_by_wrapper(wrapper_id)
        as_of = self.moment(wrapper_id)
        return Belief(
            epoch=0 if wrapper is None else wrapper.epoch,
            request_id=None if lease is None else lease.request_id,
            as_of=as_of,
            windows_kept=self._accounts.kept(wrapper_id, as_of),
        )

    def forget(self, wrapper_id: str) -> None:
        """Drop what is known of a wrapper that does not exist any more."""
        self.latest.pop(wrapper_id, None)
        self.heard_s.pop(wrapper_id, None)

    # --- asking -----------------------------------------------------------------------------------------

    async def ask(self, wrapper_id: str) -> WrapperReport:
        """Return a wrapper's report without recording anything. Raises WrapperUnreachable."""
        return await self._cluster.report(wrapper_id, self.belief(wrapper_id))

    async def fetch(self, wrapper_id: str, own: Effect | None = None) -> tuple[WrapperReport, bool]:
        """Return a wrapper's report, and whether its status may be applied. Stores its windows and memory.

        The status may not be applied (False) if a command other than ``own`` was in progress: the report
        may be older than that command's result.

        Raises:
            WrapperUnreachable: the wrapper did not answer.
            StoreUnavailable: its windows could not be stored; ``on_fatal`` was called.
        """
        before = self._turns.quiet(wrapper_id, own)
        report = await self.ask(wrapper_id)
        self.latest[wrapper_id] = report
        self.heard_s[wrapper_id] = self._loop.now_s()
        self._record_memory(wrapper_id, report)
        self._store_windows(wrapper_id, report)
        return report, before is not None and before == self._turns.quiet(wrapper_id, own)

    async def fetch_last_windows(self, wrapper: Wrapper) -> None:
        """Store the energy windows of a wrapper's last lease, before the wrapper is removed."""
        if wrapper.status in ANSWERING:
            with suppress(WrapperUnreachable):
                await self.fetch(wrapper.wrapper_id)

    async def await_start(self, wrapper_id: str, own: Effect | None = None) -> Event | None:
        """Wait until a starting wrapper answers, at most ``wrappers.start_timeout_s``. Return the resulting event.

        The timeout restarts whenever another command is sent. ``own``: the command that this wait
        is part of, None: no command. Returns None if ``own`` is superseded.

        Raises:
            StoreUnavailable: the report's windows could not be stored; ``on_fatal`` was called.
        """
        clock, limit_s = asyncio.get_running_loop().time, self._settings.wrappers.start_timeout_s
        deadline_s = clock() + limit_s
        while own is None or self._turns.is_newest(own):
            before = self._turns.quiet(wrapper_id, own)
            try:
                report, is_current = await self.fetch(wrapper_id, own)
            except WrapperUnreachable as error:
                is_current = before is not None and before == self._turns.quiet(wrapper_id, own)
                if is_current and clock() >= deadline_s:
                    return WrapperFailed(wrapper_id, f"did not start: {error.reason}")
            else:
                if is_current:
                    return WrapperStarted(wrapper_id, report.epoch, report.running)
            if not is_current:
                deadline_s = clock() + limit_s
            await asyncio.sleep(self._settings.watch.period_s)
        return None

    # --- recording --------------------------------------------------------------------------------------

    def apply_report(self, wrapper_id: str, report: WrapperReport, *, is_current: bool) -> None:
        """Apply the events that a report gives. Its status counts only if ``is_current``, as ``fetch`` returned it."""
        self.record_activity(report, grain=ACTIVITY_GRAIN)
        self._record_flags(report)
        wrapper = self._allocator.wrapper(wrapper_id)
        if wrapper is None or not is_current:
            return
        has_llm = wrapper.status in (WrapperStatus.READY, WrapperStatus.LEASED)
        replaced = report.epoch < wrapper.epoch or (has_llm and not report.starts)
        if wrapper.status is WrapperStatus.FAILED or replaced:
            # A FAILED wrapper answers again, or the wrapper's process is new and empty. A command meant for the old
            # process may have reached the new one, which then has the current epoch but no LLM. So ``starts`` is
            # checked, too.
            self._loop.apply(WrapperStarted(wrapper_id, report.epoch, report.running))
        elif report.died is not None and has_llm:
            self._loop.apply(LLMDied(wrapper_id, report.epoch, report.died, report.death_flags))
        elif wrapper.status is WrapperStatus.LEASED and report.bound is None and wrapper.request_id is not None:
            self._loop.apply(LeaseLapsed(wrapper.request_id))

    def record_activity(self, report: WrapperReport, *, grain: float) -> None:
        """Restart the idle time of a wrapper's lease if the report shows a later use.

        The use must be later than the recorded one by more than ``grain`` (fraction of the idle limit).
        """
        if report.bound is None or report.idle_for_s is None:
            return
        at_s = self._loop.now_s() - report.idle_for_s
        lease = self._allocator.lease_of(report.bound)
        if lease is not None and at_s > lease.last_active_s + grain * lease.idle_limit_s:
            self._loop.apply(LeaseUsed(report.bound, at_s))

    def _record_flags(self, report: WrapperReport) -> None:
        if report.bound is None or self._allocator.lease_of(report.bound) is None:
            return
        measurement = self._allocator.measurement(self._allocator.request(report.bound).measurement_key)
        if not set(report.lease_flags) <= set(measurement.flags):
            self._loop.apply(LeaseFlagged(report.bound, report.lease_flags))

    def _record_memory(self, wrapper_id: str, report: WrapperReport) -> None:
        """Update the machine's memory from a wrapper's report; values that are missing stay unchanged."""
        wrapper = self._allocator.wrapper(wrapper_id)
        machine = None if wrapper is None else self._allocator.machine(wrapper.machine_id)
        if machine is None:
            return
        reported = replace(
            machine,
            memory_bytes=report.memory_bytes or machine.memory_bytes,
            gpu_memory_bytes=report.gpu_memory_bytes or machine.gpu_memory_bytes,
        )
        if reported != machine:
            self._loop.apply(MachineJoined(reported))

    def _store_windows(self, wrapper_id: str, report: WrapperReport) -> None:
        if self._loop.closed:
            return  # not confirmed, so the wrapper keeps the windows
        with self._loop.fail_stop():
            self._accounts.keep(wrapper_id, report)
