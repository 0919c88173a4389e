"""Which requests have changed, for readers that keep their place."""

from __future__ import annotations

import asyncio

from registry.service.news import News


async def test_a_reader_gets_what_changed_since_its_place() -> None:
    """Each request once, in the order of its first change; its new place is the number of changes."""
    news = News()
    place, everything = await news.after(None, 60.0)
    assert (place, everything) == (0, None)
    news.add(["a", "b"])
    news.add(["a"])
    assert await news.after(0, 60.0) == (3, ["a", "b"])
    assert await news.after(2, 60.0) == (3, ["a"])


async def test_a_reader_waits_for_the_next_change() -> None:
    """All that wait are woken by one change; who waits in vain is answered with nothing new."""
    news = News()
    readers = [asyncio.create_task(news.after(0, 60.0)) for _ in range(3)]
    await asyncio.sleep(0)
    news.add([])
    await asyncio.sleep(0)
    assert not any(reader.done() for reader in readers)
    news.add(["a"])
    assert await asyncio.gather(*readers) == [(1, ["a"])] * 3
    assert await news.after(1, 0.0) == (1, [])


async def test_a_reader_that_is_too_far_behind_looks_at_everything() -> None:
    """Of three changes the last two are kept: place 0 is too old, place 1 is not. So is a place of another process."""
    news = News(kept=2)
    news.add(["a", "b", "c"])
    assert await news.after(0, 60.0) == (3, None)
    assert await news.after(1, 60.0) == (3, ["b", "c"])
    assert await news.after(7, 60.0) == (3, None)


async def test_a_reader_that_is_cancelled_leaves_nothing() -> None:
    """Readers that gave up are not kept until the next change."""
    news = News()
    reader = asyncio.create_task(news.after(0, 60.0))
    await asyncio.sleep(0)
    reader.cancel()
    await asyncio.wait([reader])
    assert not news._readers
