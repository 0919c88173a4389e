"""How long callers wait for the keys of an issuer, how long its keys are used, and how often they are read."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from jwt import PyJWK
from structlog.testing import capture_logs

from deployments.serve import issuer_keys
from deployments.serve.issuer_keys import (
    AGAIN_S,
    EARLY_S,
    GRACE_S,
    KEPT_S,
    MAX_BYTES,
    MAX_WAITING,
    OLD_S,
    READ_S,
    IssuerKey,
    IssuerKeys,
    parse_keys,
)
from registry.access_errors import JWTNotChecked
from tests.support.fake_counters import ManualClock
from tests.support.oidc import ec_key, jwk, jwks, rsa_key


async def test_a_slow_issuer_has_a_time_limit(clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read of the keys ends after READ_S, also if the issuer sends a byte now and then."""
    monkeypatch.setattr(issuer_keys, "READ_S", 0.05)

    async def read() -> Sequence[IssuerKey]:
        await asyncio.Event().wait()
        return []

    with capture_logs() as logs, pytest.raises(JWTNotChecked):
        await IssuerKeys("https://idp.example", read).fitting("r1", "RS256")
    assert "Timeout" in logs[0]["reason"]


class SlowIssuer:
    """The keys of an issuer that answers with ``answer`` when ``ready`` is set, or not at all if it is None.

    ``reads``: how many have begun.
    """

    def __init__(self) -> None:
        self.reads = 0
        self.answer: bytes | None = jwks()
        self.ready = asyncio.Event()
        self.keys = IssuerKeys("https://idp.example", self._read)

    async def _read(self) -> Sequence[IssuerKey]:
        self.reads += 1
        await self.ready.wait()
        if self.answer is None:
            raise OSError("no answer")
        return parse_keys(self.answer, ["RS256"])

    async def call(self, key_id: str = "r1") -> asyncio.Task[list[PyJWK]]:
        """Begin to ask for a key, and return the task, which is done unless it waits for the issuer."""
        task = asyncio.create_task(self.keys.fitting(key_id, "RS256"))
        for _ in range(2):  # the call begins a read, and then the read begins
            await asyncio.sleep(0)
        return task


@pytest.fixture
async def slow(clock: ManualClock) -> SlowIssuer:
    """An issuer whose keys were read just now, and which has become slow."""
    slow = SlowIssuer()
    slow.ready.set()
    assert len(await slow.keys.fitting("r1", "RS256")) == 1
    slow.ready.clear()
    return slow


async def test_a_forged_kid_delays_no_new_key(slow: SlowIssuer, clock: ManualClock) -> None:
    """A JWT whose key the issuer had not when somebody made the registry ask is not refused: it may come again."""
    slow.ready.set()
    clock.now_s += AGAIN_S
    assert await slow.keys.fitting("forged", "RS256") == []
    slow.answer = jwks(jwk(rsa_key(), "r2"))
    clock.now_s += 1
    with pytest.raises(JWTNotChecked, match="try again in 14 s"):
        await slow.keys.fitting("r2", "RS256")
    clock.now_s += 14
    assert len(await slow.keys.fitting("r2", "RS256")) == 1


WITHOUT_KEYS: dict[str, bytes] = {
    "none": b'{"keys": []}',
    "its private part is published": jwks({**jwk(rsa_key(), "r1"), "d": "AQAB"}),
    "only another algorithm": jwks(jwk(ec_key(), "r1", alg="ES256")),
}


@pytest.mark.parametrize("name", WITHOUT_KEYS)
async def test_the_last_key_can_be_withdrawn(slow: SlowIssuer, clock: ManualClock, name: str) -> None:
    """An issuer without usable keys is not one that can't be reached: its old key is refused, and the log says why."""
    slow.answer = WITHOUT_KEYS[name]
    slow.ready.set()
    clock.now_s += OLD_S + 1
    with capture_logs() as logs:
        assert await slow.keys.fitting("r1", "RS256") == []
    assert "all JWTs are refused" in logs[-1]["event"]
    assert logs[-1]["issuer"] == "https://idp.example"


async def test_keys_are_read_again_before_callers_have_to_wait(slow: SlowIssuer, clock: ManualClock) -> None:
    """From EARLY_S on, a read begins, and callers use the keys that they have."""
    clock.now_s += EARLY_S + 1
    assert len((await slow.call()).result()) == 1
    slow.answer = b'{"keys": []}'
    slow.ready.set()
    assert slow.keys._reading is not None
    await slow.keys._reading
    assert await (await slow.call()) == []


async def test_a_slow_issuer_withdraws_keys_in_time(slow: SlowIssuer, clock: ManualClock) -> None:
    """If the keys are older than OLD_S, callers wait for the issuer's answer, so a withdrawn key is not used."""
    clock.now_s += KEPT_S - 10
    calls = [await slow.call(), await slow.call()]
    assert not any(each.done() for each in calls)
    slow.answer = b'{"keys": []}'
    slow.ready.set()
    assert await asyncio.gather(*calls) == [[], []]


async def test_nobody_waits_for_an_issuer_that_has_just_failed(slow: SlowIssuer, clock: ManualClock) -> None:
    """While an issuer does not answer, its keys are used at once; the next attempts are in the background."""
    slow.answer = None
    clock.now_s += OLD_S + 1
    first = await slow.call()
    slow.ready.set()
    assert len(await first) == 1
    slow.ready.clear()
    clock.now_s += AGAIN_S
    for _ in range(3):
        assert len((await slow.call()).result()) == 1
    assert slow.keys._reading is not None
    assert not slow.keys._reading.done()
    slow.ready.set()
    await slow.keys._reading


async def test_a_bounded_number_of_callers_waits(slow: SlowIssuer, clock: ManualClock) -> None:
    """If 100 wait, another JWT with an unknown key is a 503 at once; a known key needs no wait."""
    clock.now_s += AGAIN_S
    waiting = [await slow.call(f"forged{number}") for number in range(100)]
    for _ in range(2):
        with pytest.raises(JWTNotChecked, match=r"too many callers wait.*try again in 1 s"):
            (await slow.call("forged")).result()
    assert len((await slow.call()).result()) == 1
    assert not any(each.done() for each in waiting)
    waiting[0].cancel()
    await asyncio.sleep(0)
    waiting.append(await slow.call("forged"))
    assert not waiting[-1].done(), "a caller that hangs up makes room"
    slow.ready.set()
    assert await asyncio.gather(*waiting[1:]) == [[]] * 100


async def test_any_failure_is_an_issuer_that_is_not_reached(clock: ManualClock) -> None:
    """An error of a library, for instance of a proxy's URL, does not end the ingress's background task."""

    async def read() -> Sequence[IssuerKey]:
        raise ImportError("socksio is missing")

    with capture_logs() as logs, pytest.raises(JWTNotChecked):
        await IssuerKeys("https://idp.example", read).fitting("r1", "RS256")
    event = "the keys of the issuer of JWTs can't be read"
    reason = "ImportError: socksio is missing"
    assert logs == [{"event": event, "issuer": "https://idp.example", "reason": reason, "log_level": "warning"}]


async def test_the_log_says_when_keys_change(clock: ManualClock) -> None:
    """It has a line for each change of ids or algorithms, and none for a read of the same keys."""
    answer = b""

    async def read() -> Sequence[IssuerKey]:
        return parse_keys(answer, ["RS256", "RS512"])

    keys = IssuerKeys("https://idp.example", read)
    with capture_logs() as logs:
        for key_id, algorithm, lines in (
            ("r1", "RS256", 1),
            ("r1", "RS256", 1),
            ("r2", "RS256", 2),
            ("r2", "RS512", 3),
        ):
            answer = jwks(jwk(rsa_key(), key_id, alg=algorithm))
            clock.now_s += OLD_S + 1
            await keys.fitting(key_id, algorithm)
            assert len(logs) == lines
    event = "the keys of the issuer of JWTs were read"
    assert logs == [{"event": event, "issuer": "https://idp.example", "keys": 1, "log_level": "info"}] * 3


async def test_keys_are_used_for_the_documented_times(slow: SlowIssuer, clock: ManualClock) -> None:
    """They are read again after 5 minutes, and callers wait for that after 10."""
    begin_s = clock.now_s
    for age_s, reads in ((300, 1), (301, 2), (600, 2)):
        clock.now_s = begin_s + age_s
        assert len((await slow.call()).result()) == 1
        assert slow.reads == reads, f"after {age_s} s"
    clock.now_s = begin_s + 601
    waiting = await slow.call()
    assert not waiting.done()
    slow.ready.set()
    assert len(await waiting) == 1


async def test_keys_are_used_for_an_hour_of_an_outage(slow: SlowIssuer, clock: ManualClock) -> None:
    """If the issuer does not answer for KEPT_S, its keys may have been withdrawn: the answer is 503."""
    begin_s = clock.now_s
    slow.answer = None
    slow.ready.set()
    clock.now_s = begin_s + 3600
    assert len(await slow.keys.fitting("r1", "RS256")) == 1
    clock.now_s = begin_s + 3601
    with pytest.raises(JWTNotChecked, match="can't be read"):
        await slow.keys.fitting("r1", "RS256")


async def test_reads_begin_15_seconds_apart(slow: SlowIssuer, clock: ManualClock) -> None:
    """The pause counts from the begin of a read, however long it takes."""
    clock.now_s += 14.5
    with pytest.raises(JWTNotChecked, match="try again in 1 s"):
        await slow.keys.fitting("forged", "RS256")
    assert slow.reads == 1
    clock.now_s += 0.5
    call = await slow.call("forged")
    clock.now_s += 9
    slow.ready.set()
    assert await call == []
    clock.now_s += 5
    with pytest.raises(JWTNotChecked):
        await slow.keys.fitting("forged", "RS256")
    assert slow.reads == 2
    clock.now_s += 1
    assert await slow.keys.fitting("forged", "RS256") == []
    assert slow.reads == 3


def test_the_documented_bounds_of_a_read() -> None:
    """SECURITY.md says how much an issuer may answer, how long that may take, and how often it is asked."""
    text = (Path(__file__).parents[3] / "SECURITY.md").read_text()
    assert f"at most {MAX_BYTES / 1024:g} KiB in {READ_S:g} seconds" in text
    assert f"every {AGAIN_S:g} seconds, and at most {MAX_WAITING} of them wait" in text


async def test_one_read_runs_at_a_time(slow: SlowIssuer, clock: ManualClock) -> None:
    """A read ends before the next one may begin; if it does not, the next one does not begin."""
    assert READ_S + GRACE_S < AGAIN_S
    calls = []
    for _ in range(3):
        clock.now_s += AGAIN_S
        calls.append(await slow.call("forged"))
    assert slow.reads == 2
    slow.ready.set()
    await asyncio.wait(calls, timeout=5)


async def test_keys_are_as_old_as_the_begin_of_their_read(slow: SlowIssuer, clock: ManualClock) -> None:
    """What the issuer changes during a read may not be in its answer, so that callers wait for the next answer."""
    clock.now_s += AGAIN_S
    call = await slow.call("forged")
    clock.now_s += 9
    slow.ready.set()
    assert await call == []
    slow.ready.clear()
    clock.now_s += OLD_S - 9
    assert len((await slow.call()).result()) == 1
    clock.now_s += 1
    waiting = await slow.call()
    assert not waiting.done()
    slow.ready.set()
    await waiting


async def test_an_earlier_read_does_not_refuse_a_new_key(slow: SlowIssuer, clock: ManualClock) -> None:
    """The key of a JWT that comes during a read may be newer than the answer: it is no 401, it may come again."""
    clock.now_s += AGAIN_S
    forged = await slow.call("forged")
    clock.now_s += 1
    new = await slow.call("r2")
    slow.ready.set()
    assert await forged == []
    with pytest.raises(JWTNotChecked, match="had no such key when its keys were read last"):
        await new


async def test_an_earlier_read_can_have_a_new_key(slow: SlowIssuer, clock: ManualClock) -> None:
    """A JWT that comes during a read is accepted if the answer has its key."""
    slow.answer = jwks(jwk(rsa_key(), "r2"))
    clock.now_s += AGAIN_S
    forged = await slow.call("forged")
    clock.now_s += 1
    new = await slow.call("r2")
    slow.ready.set()
    assert len(await new) == 1
    assert await forged == []


async def test_callers_wait_again_some_time_after_a_failure(slow: SlowIssuer, clock: ManualClock) -> None:
    """An issuer that failed once may answer now: 25 seconds later, callers wait for it, because it withdraws keys."""
    slow.answer = None
    slow.ready.set()
    clock.now_s += OLD_S + 1
    assert len(await slow.keys.fitting("r1", "RS256")) == 1
    slow.ready.clear()
    clock.now_s += 24
    assert len((await slow.call()).result()) == 1
    clock.now_s += 1
    waiting = await slow.call()
    assert not waiting.done()
    slow.answer = b'{"keys": []}'
    slow.ready.set()
    with pytest.raises(JWTNotChecked):
        await waiting


async def test_a_read_that_does_not_end_holds_no_caller(clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers wait for a bounded time, also if a read ignores its time limit."""
    monkeypatch.setattr(issuer_keys, "READ_S", 0.01)
    monkeypatch.setattr(issuer_keys, "GRACE_S", 0.01)
    ended = asyncio.Event()

    async def read() -> Sequence[IssuerKey]:
        while not ended.is_set():
            with suppress(asyncio.CancelledError):
                await ended.wait()
        return []

    keys = IssuerKeys("https://idp.example", read)
    try:
        with pytest.raises(JWTNotChecked):
            await asyncio.wait_for(keys.fitting("r1", "RS256"), timeout=5)
    finally:
        ended.set()
    assert keys._reading is not None
    await keys._reading


async def test_callers_wait_for_the_longest_read(clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read may take READ_S, and callers get its keys."""
    monkeypatch.setattr(issuer_keys, "GRACE_S", 0.001)

    async def read() -> Sequence[IssuerKey]:
        await asyncio.sleep(0.05)
        return parse_keys(jwks(), ["RS256"])

    assert len(await IssuerKeys("https://idp.example", read).fitting("r1", "RS256")) == 1


async def test_a_key_without_kid_fits_no_kid(clock: ManualClock) -> None:
    """A JWT that names a key gets no other one; one without kid gets any key of its algorithm."""

    async def read() -> Sequence[IssuerKey]:
        return parse_keys(jwks(jwk(rsa_key(), None)), ["RS256"])

    keys = IssuerKeys("https://idp.example", read)
    assert await keys.fitting("r1", "RS256") == []
    assert len(await keys.fitting(None, "RS256")) == 1
