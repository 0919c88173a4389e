"""What a tenant has used in a month, as it is added up while windows come, against the sum in the database."""

from __future__ import annotations

from dataclasses import replace
from math import isclose
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from registry.accounting.totals import Sum
from registry.contract.messages import Moment, WrapperReport
from registry.core.allocator import Allocator
from registry.core.decision import Changes, Limits
from registry.core.records import LLMSpec, Measurement, Request, StoredToken
from registry.service.accounts import Accounts
from registry.service.archive import Archive
from registry.service.budgets import CHARGED, month_begin_s
from registry.settings import TenantBudget
from registry.store.store import Store
from registry.wire.words import WindowKind
from tests.support.energy_windows import window

TENANTS = "ann", "bob"
BEGUN_S, HOUR_S, KEEP_S = 1_800_000_000.0, 3600.0, 31 * 86_400.0

hours = st.integers(-900, 900)
"""From BEGUN_S on: over three months."""
windows = st.tuples(
    st.just("window"),
    st.sampled_from(TENANTS),
    st.sampled_from(list(WindowKind)),
    hours,
    st.none() | st.floats(0, 1e6),
    st.integers(1, 20),
    st.sampled_from(["measured", "modeled"]),
)
steps = st.lists(
    windows | windows | st.tuples(st.just("clock"), hours) | st.sampled_from([("restart",), ("forget",)]), max_size=25
)


class Books:
    """A database with a request of each tenant, and the accounts over it."""

    def __init__(self, store: Store) -> None:
        self.store, self.now_s = store, BEGUN_S
        spec = LLMSpec("org/tiny", "text-generation")
        store.commit(
            Changes(
                measurements=tuple(Measurement(7, n, tenant=tenant) for n, tenant in enumerate(TENANTS, 1)),
                requests=tuple(
                    Request(f"r-{tenant}", 7, n, spec, "{}", tenant=tenant) for n, tenant in enumerate(TENANTS, 1)
                ),
            )
        )
        self.restart()

    def restart(self) -> None:
        allocator = Allocator(Limits(), lambda: StoredToken("token", ""))
        archive = Archive(self.store, allocator)
        budgets = dict.fromkeys(TENANTS, TenantBudget(max_joules_per_month=1.0))
        self.accounts = Accounts(
            self.store, allocator, archive, budgets=budgets, now_s=lambda: self.now_s, on_kept=lambda _: None
        )

    def clock(self, at_h: int) -> None:
        self.now_s = BEGUN_S + at_h * HOUR_S

    def forget(self) -> None:
        while self.store.forget(ended_before_s=self.now_s - KEEP_S, limit=3).more:
            pass

    def window(
        self, tenant: str, kind: WindowKind, ended_h: int, joules: float | None, number: int, label: str
    ) -> None:
        """Report a window, perhaps one that was reported before."""
        begun_s = BEGUN_S + ended_h * HOUR_S - 2
        found = window(number, kind, request_id=f"r-{tenant}", begun_s=begun_s, seconds=2.0, joules=joules, label=label)
        report = WrapperReport(1, moment=Moment("process 1", 0.0), windows=(replace(found, number=number),))
        self.accounts.keep("a-0", report)


def same(one: Sum, other: Sum) -> bool:
    alike = isclose(one.of_known, other.of_known, rel_tol=1e-9, abs_tol=1e-9)
    return (one.count, one.known) == (other.count, other.known) and alike


@settings(deadline=None, max_examples=30)
@given(steps)
def test_what_is_added_up_is_the_sum_in_the_database(taken: list[tuple[Any, ...]]) -> None:
    """Over restarts, changes of month, late windows, windows that come twice and forgetting: it is the same sum."""
    with TemporaryDirectory() as folder:
        store = Store.open(f"sqlite:///{Path(folder)}/registry.db")
        try:
            books = Books(store)
            for name, *how in taken:
                getattr(books, name)(*how)
                for tenant in TENANTS:
                    added = books.accounts.used_in_month(tenant)
                    summed = store.costs_of_tenant(tenant, CHARGED, month_begin_s(books.now_s))
                    assert added.keys() == summed.keys()
                    for kind in added:
                        ours, theirs = added[kind], summed[kind]
                        assert ours.label == theirs.label
                        assert same(ours.joules, theirs.joules)
                        assert same(ours.o_g, theirs.o_g)
                        assert same(ours.m_g, theirs.m_g)
        finally:
            store.close()


def test_a_post_does_not_ask_the_database_what_was_used() -> None:
    """After the first of a month it is known, however many windows there are."""
    with TemporaryDirectory() as folder:
        store = Store.open(f"sqlite:///{Path(folder)}/registry.db")
        books = Books(store)
        books.window("ann", WindowKind.PROMPT, 0, 0.5, 1, "measured")
        books.clock(1)
        assert books.accounts.notes("ann") == ()
        store.close()
        assert books.accounts.notes("ann") == ()
