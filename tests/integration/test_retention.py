"""What is forgotten, when, and what its link says then: the service over real databases, with a clock moved by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import cast

import pytest
from sqlalchemy import NullPool, create_engine

from registry.contract.messages import Cluster, Observation
from registry.core.decision import Snapshot
from registry.core.events import NewRequest
from registry.core.records import Lease, LLMSpec, Machine, Measurement, Request, Wrapper, WrapperStatus
from registry.errors import RegistryError, RequestForgotten, StoreUnavailable, UnknownMeasurement, UnknownRequest
from registry.service.lease_tokens import LeaseTokens
from registry.service.retention import DAY_S
from registry.service.service import Idempotency, Service
from registry.settings import Settings, WatchSettings
from registry.store.store import Store
from registry.wire.words import Priority, RequestStatus
from tests.support.fake_counters import ManualClock

DATA = Path(__file__).resolve().parents[1] / "data"
SPEC = LLMSpec("org/tiny", "text-generation")
OLD, NEW = "0" * 32, "f" * 32


class NoMachines:
    """A cluster in which nothing is and nothing comes: requests wait. ``looked`` is set when somebody has looked."""

    def __init__(self) -> None:
        self.looked = asyncio.Event()

    async def observe(self) -> Observation:
        self.looked.set()
        return Observation((), frozenset())

    async def remove(self, wrapper_ids: Sequence[str]) -> None:
        assert not wrapper_ids


class Registry:
    """A service over a database, as often as it is started anew."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.clock = ManualClock()
        self.clock.now_s = 1_760_000_000.0
        self.cluster = NoMachines()
        self.fatal: list[RegistryError] = []

    async def start(self, keep_days: float = 90) -> Service:
        self.store = Store.open(self.url)
        self.service = Service(
            Settings(keep_days=keep_days, watch=WatchSettings(period_s=0.001)),
            self.store,
            cast("Cluster", self.cluster),
            now_s=self.clock,
            tokens=LeaseTokens(b"a key", lambda: "token"),
            homes={},
            on_fatal=self.fatal.append,
        )
        await self.service.start()
        return self.service

    def ask(self, request_id: str, measurement_id: int = 1, **options: object) -> None:
        self.service.request(measurement_id, [NewRequest(request_id, SPEC, "{}")], **options)  # type: ignore[arg-type]

    async def until_forgotten(self, request_id: str) -> None:
        """Return when the request is gone; the service looks at its clock every millisecond."""
        while True:
            try:
                await self.service.wait_for_change(request_id, 0.0)
            except RequestForgotten:
                return
            self.cluster.looked.clear()
            await self.cluster.looked.wait()

    async def until_forgotten_audit(self) -> None:
        """Return when the audit is empty."""
        while self.store.audit().rows:
            self.cluster.looked.clear()
            await self.cluster.looked.wait()


@pytest.fixture
async def registry(database_url: str):
    registry = Registry(database_url)
    yield registry
    if not registry.fatal:
        await registry.service.shutdown()


def every_call(service: Service, request_id: str) -> dict[str, Callable[[], Awaitable[object]]]:
    """What a client can do with a link."""

    async def release() -> None:
        service.release(request_id)

    return {
        "status": lambda: service.wait_for_change(request_id, 0.0),
        "wait": lambda: service.wait_for_change(request_id, 1.0),
        "keepalive": lambda: service.keep_alive(request_id),
        "release": release,
    }


async def test_the_link_of_a_forgotten_request_is_gone(registry: Registry):
    """After keep_days the link answers 410 on every call; one that nobody ever had still answers 404."""
    service = await registry.start(keep_days=90)
    registry.ask(OLD)
    service.release(OLD)
    registry.clock.now_s += 90 * DAY_S + 1
    await registry.until_forgotten(OLD)
    for call in every_call(service, OLD).values():
        with pytest.raises(RequestForgotten, match=OLD):
            await call()
    for call in every_call(service, NEW).values():
        with pytest.raises(UnknownRequest):
            await call()
    with pytest.raises(UnknownMeasurement):
        service.allocator.measurement(("default", 1))
    assert RequestForgotten.http_status == 410
    assert RequestForgotten.code == "request_forgotten"


async def test_a_clock_that_is_ahead_forgets_nothing(registry: Registry):
    """A registry starts 1,000 days later, or so its clock says: all is kept until it starts once more.

    Its clock is right again then, or the time has passed.
    """
    service = await registry.start(keep_days=90)
    registry.ask(OLD)
    service.release(OLD)
    await service.shutdown()
    registry.clock.now_s += 1000 * DAY_S
    service = await registry.start(keep_days=90)
    registry.clock.now_s += DAY_S
    registry.cluster.looked.clear()
    await registry.cluster.looked.wait()
    registry.ask(NEW)
    assert (await service.wait_for_change(OLD, 0.0)).status is RequestStatus.CANCELLED
    await service.shutdown()
    registry.clock.now_s -= 1000 * DAY_S
    service = await registry.start(keep_days=90)
    assert (await service.wait_for_change(OLD, 0.0)).status is RequestStatus.CANCELLED
    await service.shutdown()
    registry.clock.now_s += 1000 * DAY_S
    await registry.start(keep_days=90)
    await registry.until_forgotten(OLD)


async def test_what_ended_later_or_not_at_all_is_kept(registry: Registry):
    """The last second before keep_days are over counts, and a request that waits is never forgotten."""
    service = await registry.start(keep_days=90)
    registry.ask(OLD, 1)
    registry.ask(NEW, 2)
    service.release(OLD)
    registry.clock.now_s += 90 * DAY_S
    registry.cluster.looked.clear()
    await registry.cluster.looked.wait()
    assert (await service.wait_for_change(OLD, 0.0)).status is RequestStatus.CANCELLED
    registry.clock.now_s += 1000 * DAY_S
    await registry.until_forgotten(OLD)
    assert service.allocator.request(NEW).status is RequestStatus.QUEUED
    assert service.allocator.queue_position(NEW) == 1


async def test_it_is_forgotten_without_a_restart(registry: Registry):
    """Once a day the running registry forgets, too; nothing that is left has changed, and it goes on as before."""
    service = await registry.start(keep_days=1)
    for number in range(6):
        registry.ask(f"{number}" * 32, number // 2 + 1, priority=Priority.LOW if number < 2 else Priority.HIGH)
    service.release("0" * 32)
    service.release("3" * 32)
    kept = [service.allocator.request(f"{number}" * 32) for number in (1, 2, 4, 5)]
    waiting = asyncio.create_task(service.wait_for_change("1" * 32, 60.0))
    registry.clock.now_s += 1.5 * DAY_S
    await registry.until_forgotten("0" * 32)
    assert [service.allocator.request(request.request_id) for request in kept] == kept
    service.allocator.check()
    service.release("1" * 32)
    assert (await waiting).status is RequestStatus.CANCELLED
    registry.ask(NEW, 3)
    assert service.allocator.queue_position(NEW) == 4


async def test_a_forgotten_key_may_be_used_again(registry: Registry):
    """An Idempotency-Key is forgotten no earlier than its requests; then it makes new ones."""
    service = await registry.start(keep_days=10)
    key = Idempotency("key", "00")
    registry.ask(OLD, idempotency=key)
    service.release(OLD)
    registry.ask(NEW, idempotency=key)
    with pytest.raises(UnknownRequest):
        service.allocator.request(NEW)
    registry.clock.now_s += 11 * DAY_S
    await registry.until_forgotten(OLD)
    registry.ask(NEW, idempotency=key)
    assert service.allocator.request(NEW).status is RequestStatus.QUEUED


async def test_a_database_that_fails_while_forgetting_ends_the_registry(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
):
    """When the database fails in the middle, memory may differ from it: the registry is to be started anew."""
    await registry.start()

    def fail(**_: object) -> None:
        raise StoreUnavailable("disk full")

    monkeypatch.setattr(registry.store, "forget", fail)
    registry.clock.now_s += 2 * DAY_S
    while not registry.fatal:
        registry.cluster.looked.clear()
        await registry.cluster.looked.wait()
    assert "disk full" in str(registry.fatal[0])
    monkeypatch.undo()
    registry.fatal.clear()


@pytest.mark.parametrize("request_id", ["", "nope", "\0", "\ud800", "a" * 5000, "' OR 1=1 --", "ümlaut"])
async def test_what_nobody_had_is_unknown(registry: Registry, request_id: str):
    """Whatever a client makes up is a 404, in every database, and never an error of the database's."""
    service = await registry.start()
    with pytest.raises(UnknownRequest):
        await service.wait_for_change(request_id, 0.0)


# --- databases of earlier releases --------------------------------------------------------------------------

A = LLMSpec("build/llms/a", "text-generation", engine_args='{"dtype":"bfloat16","enforce_eager":true}')
B = LLMSpec("Qwen/Qwen2.5-0.5B-Instruct", "text-generation", "main", '{"max_model_len":4096}', gpus=1)
LLMCONFIG = (
    '{"args":{"deployment":{"torch_dtype":"torch.bfloat16"},"prompting":{"max_new_tokens":32}},'
    '"model":"build/llms/a","modeltyp":"text-generation","uses_chat_template":true}'
)
T = 1_760_000_000.0
HOST, FIRST, SECOND = "10.0.0.1", "10.0.0.1-0", "10.0.0.1-1"
URL = "http://10.0.0.1:8000/wrappers"
OLD_DATABASE = Snapshot(
    machines=(
        Machine(HOST, "node-1", HOST, gpus=2, gpu_type="A100", memory_bytes=2**36, gpu_memory_bytes=2**35),
        Machine("10.0.0.2", "node-2", "10.0.0.2", alive=False),
    ),
    wrappers=(
        Wrapper(FIRST, HOST, f"{URL}/{FIRST}", 1, WrapperStatus.LEASED, 7, A, "7" * 32, B, T + 70),
        Wrapper(
            SECOND, HOST, f"{URL}/{SECOND}", 1, WrapperStatus.FAILED, 3, failures=3, reason="did not start: no answer"
        ),
    ),
    measurements=(
        Measurement(41, 1, created_s=T),
        Measurement(42, 2, "team-a", Priority.HIGH, HOST, ("engine_restarted",), T + 10),
    ),
    requests=(
        Request(
            request_id="1" * 32,
            measurement_id=41,
            seq=1,
            spec=B,
            llmconfig=LLMCONFIG,
            status=RequestStatus.FAILED,
            reason="the engine could not start 'Qwen/Qwen2.5-0.5B-Instruct': out of memory",
            notes=("torch_dtype: became dtype",),
            wrapper_id=SECOND,
            machine_id=HOST,
            failed_on=(SECOND, FIRST),
            created_s=T,
            deploying_s=T + 1,
            ended_s=T + 60,
        ),
        Request(
            request_id="7" * 32,
            measurement_id=42,
            seq=2,
            spec=A,
            llmconfig=LLMCONFIG,
            status=RequestStatus.DEPLOYED,
            wrapper_id=FIRST,
            machine_id=HOST,
            overtaken=1,
            created_s=T + 10,
            deploying_s=T + 61,
            deployed_s=T + 65,
            tenant="team-a",
        ),
        Request("9" * 32, 42, 3, B, LLMCONFIG, created_s=T + 10, tenant="team-a"),
    ),
    leases=(Lease("7" * 32, FIRST, "", sha256(b"token-of-a-lease").hexdigest(), T + 61, T + 3665, 600.0, T + 70),),
)
"""What is in the databases of tests/data, as the release wrote it that is in their names."""


def restore(revision: str, database_url: str) -> None:
    """Fill an empty database with what a release left behind."""
    with create_engine(database_url, poolclass=NullPool).connect() as connection:
        dump = (DATA / f"{revision}.{connection.dialect.name}.sql").read_text(encoding="utf-8")
        driver = connection.connection.driver_connection
        assert driver is not None
        if connection.dialect.name == "sqlite":
            driver.executescript(dump)
        else:
            driver.execute(dump)
            driver.commit()


@pytest.mark.parametrize("revision", sorted({path.name.partition(".")[0] for path in DATA.glob("*.sql")}))
def test_a_database_of_an_earlier_release_is_taken_over(database_url: str, tmp_path: Path, revision: str):
    """Opening upgrades it, and everything that it held is still there: records, events and keys."""
    (tmp_path / "state").mkdir()
    restore(revision, database_url)
    store = Store.open(database_url)
    after = store.load()
    for kind in ("machines", "wrappers", "measurements", "requests", "leases"):
        assert set(getattr(after, kind)) == set(getattr(OLD_DATABASE, kind))
    tokens = LeaseTokens(b"a key", lambda: "id")
    assert [lost.request_id for lost in tokens.lost(after.leases)] == ["7" * 32]  # it ends at the start
    assert [stored.event.kind for stored in store.events()] == ["LeaseBound", "LeaseUsed"]
    assert store.idempotent_request_ids("team-a", "key-1") == ("ab" * 32, ("7" * 32, "9" * 32))
    assert store.forget(ended_before_s=T + 61, limit=10).request_ids == ("1" * 32,)
    assert store.was_forgotten("1" * 32)
    assert not store.was_forgotten("7" * 32)
    store.close()
