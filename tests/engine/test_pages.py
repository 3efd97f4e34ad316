from __future__ import annotations

import pytest

from gossamer.engine.pages import IntegrityError, KVPages, PagePool


def test_a_page_is_free_when_its_last_holder_lets_go() -> None:
    pool = PagePool(2)
    page = pool.allocate()
    pool.share(page)
    pool.release(page)
    assert len(pool.free) == 1
    pool.check([page])
    pool.release(page)
    assert len(pool.free) == 2
    pool.check([])


def test_releasing_a_free_page_is_an_error() -> None:
    with pytest.raises(IntegrityError, match="nobody holds"):
        PagePool(2).release(1)


def test_check_finds_a_leak_and_a_page_held_without_a_count() -> None:
    pool = PagePool(3)
    page = pool.allocate()
    with pytest.raises(IntegrityError, match="count 1, but 0"):
        pool.check([])
    with pytest.raises(IntegrityError, match="count 1, but 2"):
        pool.check([page, page])
    pool.free.append(page)
    with pytest.raises(IntegrityError, match="free or idle"):
        pool.check([page])


def test_tables_grow_on_demand_and_never_by_more() -> None:
    kv = KVPages(16, (4,))
    tables = kv.new_tables()
    for tokens, pages in ((1, 1), (16, 1), (17, 2), (64, 4)):
        assert kv.extend(tables, tokens)
        assert len(tables[0]) == pages
    assert not kv.extend(tables, 65)
    assert kv.usage == 1
    kv.release(tables)
    assert kv.usage == 0 and len(tables[0]) == 0


def test_growth_is_in_every_group_or_in_none() -> None:
    kv = KVPages(16, (4, 2))
    tables = kv.new_tables()
    assert kv.capacity == 32
    assert not kv.extend(tables, 48)
    assert [len(t) for t in tables] == [0, 0]
    assert kv.extend(tables, 32)
    assert kv.free == 0
    kv.check([tables])
