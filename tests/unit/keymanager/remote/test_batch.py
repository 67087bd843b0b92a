"""What is asked for in one turn of the loop leaves together, within bounds; one that is alone needs no task."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import pytest_asyncio
from typing_extensions import override

from spire_hw.errors import DeniedError, ErrorKind, LimitError, SpireHwError, UnavailableError
from spire_hw.key import HashAlgorithm, SignOptions
from spire_hw.log import get_logger
from spire_hw.plugin.keymanager import KeySignature
from spire_hw_plugins.keymanager.remote.batch import (
    MAX_BATCH_BYTES,
    MAX_UNDER_WAY,
    MAX_URGENT_UNDER_WAY,
    MAX_WAITING,
    Batcher,
)
from spire_hw_plugins.keymanager.remote.room import MOST, MOST_OTHERS
from spire_hw_plugins.keymanager.remote.wire import MAX_ITEMS, Item, Refused

OPTIONS = SignOptions(HashAlgorithm.SHA256)
TURNS = 3  # of the loop, that a call takes at least


def item(number: int, size: int = 32) -> Item:
    return Item(number.to_bytes(16), "id", None, bytes(size), OPTIONS)


class Far:
    """Where batches go: answers with the request id, once the gate is open."""

    def __init__(self) -> None:
        self.batches: list[list[Item]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.under_way = 0

    async def send(self, items: list[Item], left_s: float) -> list[KeySignature | Refused]:
        assert 0 < left_s <= 30
        self.batches.append(items)
        self.under_way += 1
        try:
            for _ in range(TURNS):
                await asyncio.sleep(0)
            await self.gate.wait()
        finally:
            self.under_way -= 1
        return [self._answer(one) for one in items]

    def _answer(self, one: Item) -> KeySignature | Refused:
        if int.from_bytes(one.request_id) == 13:
            return Refused(DeniedError("not thirteen"), "rate")
        return KeySignature(one.request_id, "f")


def batcher_to(far: Far, timeout_s: float = 30) -> Batcher:
    return Batcher(
        far.send,
        lambda: SpireHwError("too late", kind=ErrorKind.DEADLINE_EXCEEDED),
        timeout_s=timeout_s,
        log=get_logger("test"),
    )


@pytest_asyncio.fixture
async def far() -> Far:
    return Far()


@pytest.mark.asyncio
async def test_one_goes_at_once_the_rest_of_its_turn_together_and_each_gets_its_own_answer(
    far: Far,
) -> None:
    batcher = batcher_to(far)
    numbers = [n for n in range(40) if n != 13]
    made = await asyncio.gather(*(batcher.sign(item(n)) for n in numbers))
    assert [len(b) for b in far.batches] == [1, 38]
    assert [int.from_bytes(m.signature) for m in made] == numbers
    for _ in range(2):  # after many, and after one
        with pytest.raises(DeniedError, match="thirteen"):
            await batcher.sign(item(13))


@pytest.mark.asyncio
async def test_after_many_they_go_in_two_halves_where_nothing_is_under_way(far: Far) -> None:
    batcher = batcher_to(far)
    rounds = ((1, [1]), (9, [1, 8]), (9, [5, 4]), (7, [7]), (16, [8, 8]), (1, [1]), (3, [1, 2]))
    for count, sizes in rounds:
        far.batches.clear()
        await asyncio.gather(*(batcher.sign(item(n + 100)) for n in range(count)))
        assert [len(b) for b in far.batches] == sizes


@pytest.mark.asyncio
async def test_one_that_is_alone_is_sent_by_its_callers_task(far: Far) -> None:
    batcher = batcher_to(far)
    far.gate.clear()
    tasks = len(asyncio.all_tasks())
    alone = asyncio.ensure_future(batcher.sign(item(2)))  # noqa: TID251 - is cancelled below
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert [len(b) for b in far.batches] == [1]
    assert len(asyncio.all_tasks()) == tasks + 1
    others = asyncio.gather(*(batcher.sign(item(n)) for n in range(3, 6)))
    await asyncio.sleep(0)
    alone.cancel()
    far.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await alone
    assert [m.signature for m in await others] == [item(n).request_id for n in range(3, 6)]


@pytest.mark.asyncio
async def test_batches_are_bounded_in_number_and_bytes(far: Far) -> None:
    batcher = batcher_to(far)
    await asyncio.gather(*(batcher.sign(item(n + 100)) for n in range(150)))
    assert [len(b) for b in far.batches] == [1, MAX_ITEMS, MAX_ITEMS, 21]
    far.batches.clear()
    await asyncio.gather(*(batcher.sign(item(n + 400, 4000)) for n in range(40)))
    assert all(sum(i.size for i in b) <= MAX_BATCH_BYTES for b in far.batches)
    assert sum(map(len, far.batches)) == 40


@pytest.mark.asyncio
async def test_few_batches_are_under_way_and_the_rest_waits_together(far: Far) -> None:
    batcher = batcher_to(far)
    far.gate.clear()
    async with asyncio.TaskGroup() as group:
        for n in range(MAX_UNDER_WAY + 20):
            group.create_task(batcher.sign(item(n + 1000)))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert [len(b) for b in far.batches] == [1] * MAX_UNDER_WAY
        far.gate.set()
    assert [len(b) for b in far.batches] == [1] * MAX_UNDER_WAY + [20]


@pytest.mark.asyncio
async def test_who_went_away_is_left_out_and_too_many_are_refused(far: Far) -> None:
    batcher = batcher_to(far)
    far.gate.clear()
    async with asyncio.TaskGroup() as group:
        for n in range(MAX_UNDER_WAY):
            group.create_task(batcher.sign(item(n + 1000)))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        gone = group.create_task(batcher.sign(item(1)))
        rest = [group.create_task(batcher.sign(item(n + 2000))) for n in range(MAX_WAITING - 1)]
        await asyncio.sleep(0)
        with pytest.raises(LimitError):
            await batcher.sign(item(2))
        gone.cancel()
        far.gate.set()
    assert len(rest) == MAX_WAITING - 1
    assert item(1).request_id not in {i.request_id for b in far.batches for i in b}


@pytest.mark.asyncio
async def test_closing_fails_what_waits_and_what_is_under_way(far: Far) -> None:
    batcher = batcher_to(far)
    far.gate.clear()
    kinds = []

    async def sign(number: int) -> None:
        try:
            await batcher.sign(item(number))
        except SpireHwError as e:
            kinds.append(e.kind)

    async with asyncio.TaskGroup() as group:
        for n in range(MAX_UNDER_WAY + 3):
            group.create_task(sign(n + 1000))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        await batcher.close()
        assert far.under_way == 0
    assert kinds == [ErrorKind.UNAVAILABLE] * (MAX_UNDER_WAY + 3)


@pytest.mark.asyncio
async def test_closing_waits_for_one_that_is_alone_to_hang_up(far: Far) -> None:
    batcher = batcher_to(far)
    far.gate.clear()
    alone = asyncio.ensure_future(batcher.sign(item(1)))  # noqa: TID251 - is awaited below
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert far.under_way == 1
    await batcher.close()
    assert far.under_way == 0
    with pytest.raises(UnavailableError, match="closed"):
        await alone
    with pytest.raises(UnavailableError, match="closed"):
        await batcher.sign(item(2))


@pytest.mark.asyncio
async def test_what_does_not_get_its_turn_in_time_is_told_so(far: Far) -> None:
    batcher = batcher_to(far, timeout_s=0.1)
    far.gate.clear()
    async with asyncio.TaskGroup() as group:
        for n in range(MAX_UNDER_WAY):
            group.create_task(batcher.sign(item(n + 1000)))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        for n in range(3):
            group.create_task(expect_late(batcher, n))
        await asyncio.sleep(0.2)
        far.gate.set()
    assert len(far.batches) == MAX_UNDER_WAY


async def expect_late(batcher: Batcher, number: int) -> None:
    with pytest.raises(SpireHwError, match="too late") as caught:
        await batcher.sign(item(number))
    assert caught.value.kind is ErrorKind.DEADLINE_EXCEEDED


def of(key_id: str, number: int, *, urgent: bool = False) -> Item:
    options = replace(OPTIONS, urgent=urgent)
    return Item(number.to_bytes(16), key_id, None, bytes(32), options)


def names(batch: list[Item]) -> list[str]:
    return [one.key_id for one in batch]


async def fill(group: asyncio.TaskGroup, batcher: Batcher, calls: int) -> None:
    """Have so many batches of one under way."""
    for n in range(calls):
        group.create_task(batcher.sign(of("busy", n + 5000)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)


@pytest.mark.asyncio
async def test_what_is_urgent_waits_for_nothing_else_and_keys_take_turns(far: Far) -> None:
    batcher = batcher_to(far)
    far.gate.clear()
    async with asyncio.TaskGroup() as group:
        await fill(group, batcher, MAX_UNDER_WAY)
        for n in range(100):
            group.create_task(batcher.sign(of("busy", n + 100)))
        group.create_task(batcher.sign(of("quiet", 1)))
        group.create_task(batcher.sign(of("ca", 2, urgent=True)))
        group.create_task(batcher.sign(of("ca", 3, urgent=True)))
        for _ in range(3):
            await asyncio.sleep(0)
        # All calls are taken: there are some for what is urgent alone.
        assert names(far.batches[-1]) == ["ca", "ca"]
        assert len(far.batches) == MAX_UNDER_WAY + 1
        far.gate.set()
    rest = far.batches[MAX_UNDER_WAY + 1 :]
    assert names(rest[0]).count("quiet") == 1
    assert sum(map(len, rest)) == 101


@pytest.mark.asyncio
async def test_what_is_urgent_does_not_take_all_calls(far: Far) -> None:
    batcher = batcher_to(far)
    far.gate.clear()
    async with asyncio.TaskGroup() as group:
        for n in range(MAX_URGENT_UNDER_WAY + 3):
            group.create_task(batcher.sign(of("ca", n, urgent=True)))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        sent = len(far.batches)
        group.create_task(batcher.sign(of("jwt", 100)))
        for _ in range(3):
            await asyncio.sleep(0)
        assert [names(b) for b in far.batches[sent:]] == [["jwt"]]
        far.gate.set()


@pytest.mark.asyncio
async def test_no_more_is_under_way_than_signers_take(far: Far) -> None:
    batcher = batcher_to(far)
    far.gate.clear()
    async with asyncio.TaskGroup() as group:
        for n in range(600):
            group.create_task(batcher.sign(of("jwt", n + 100)))
        for _ in range(5):
            await asyncio.sleep(0)
        assert sum(map(len, far.batches)) == MOST_OTHERS
        for n in range(100):
            group.create_task(batcher.sign(of("ca", n + 1000, urgent=True)))
        for _ in range(5):
            await asyncio.sleep(0)
        assert sum(map(len, far.batches)) == MOST
        assert names(far.batches[-1]) == ["ca"] * (MOST - MOST_OTHERS)
        far.gate.set()
    assert sum(map(len, far.batches)) == 700


@pytest.mark.asyncio
async def test_who_has_more_waiting_than_others_gives_way(far: Far) -> None:
    batcher = batcher_to(far)
    far.gate.clear()
    refused: list[SpireHwError] = []

    async def sign(item: Item) -> None:
        try:
            await batcher.sign(item)
        except LimitError as e:
            refused.append(e)

    async with asyncio.TaskGroup() as group:
        await fill(group, batcher, MAX_UNDER_WAY)
        flood = [group.create_task(sign(of("busy", n + 10_000))) for n in range(MAX_WAITING)]
        await asyncio.sleep(0)
        group.create_task(sign(of("quiet", 1)))
        group.create_task(sign(of("ca", 2, urgent=True)))
        for _ in range(3):
            await asyncio.sleep(0)
        # The urgent one left at once, after one of the others had gone for it.
        assert len(refused) == 2
        assert [task.done() for task in flood[-3:]] == [False, True, True]
        far.gate.set()
    assert len(refused) == 2
    assert {"quiet", "ca"} <= {name for b in far.batches for name in names(b)}


class Full(Far):
    """Takes so many at once and refuses the rest, with a word that says it may work later."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.taken = 0

    @override
    async def send(self, items: list[Item], left_s: float) -> list[KeySignature | Refused]:
        taken = max(0, min(len(items), self.most - self.taken))
        self.taken += taken
        try:
            made = await super().send(items, left_s)
        finally:
            self.taken -= taken
        refused = Refused(LimitError("too many at once"), "in_flight", 0.03)
        return [*made[:taken], *([refused] * (len(items) - taken))]


@pytest.mark.asyncio
@pytest.mark.parametrize("most", [1, 10, 100, 200])
async def test_what_there_was_no_room_for_goes_again_until_it_is_signed(most: int) -> None:
    full = Full(most)
    batcher = batcher_to(full)
    numbers = range(100, 500)
    made = await asyncio.gather(
        *(batcher.sign(of("jwt", n, urgent=n % 50 == 0)) for n in numbers),
    )
    assert [int.from_bytes(m.signature) for m in made] == list(numbers)
    # What it takes is learnt: a few are sent in vain, not all of them again and again.
    assert sum(map(len, full.batches)) < len(numbers) + MAX_UNDER_WAY * MAX_ITEMS


@pytest.mark.asyncio
async def test_where_others_have_all_the_room_there_are_pauses_and_in_the_end_the_refusal() -> None:
    full = Full(0)
    batcher = batcher_to(full, timeout_s=0.3)
    kept = asyncio.gather(
        *(refusal(batcher, n) for n in range(30)), refusal(batcher, 99, urgent=True)
    )
    assert {str(e) for e in await kept} == {"too many at once"}
    # A pause of 30 ms each time, for both kinds.
    assert len(full.batches) < 40
    full.most = 1
    assert (await batcher.sign(of("jwt", 7))).signature == of("jwt", 7).request_id


@pytest.mark.asyncio
async def test_one_that_is_alone_goes_again_as_well() -> None:
    full = Full(0)
    batcher = batcher_to(full)
    alone = asyncio.ensure_future(batcher.sign(of("jwt", 1)))  # noqa: TID251 - is awaited below
    await asyncio.sleep(0)
    assert len(full.batches) == 1
    full.most = 1
    assert (await alone).signature == of("jwt", 1).request_id
    assert [names(b) for b in full.batches] == [["jwt"], ["jwt"]]


@pytest.mark.asyncio
async def test_closing_fails_what_waits_for_room() -> None:
    full = Full(0)
    batcher = batcher_to(full)
    kept = asyncio.gather(*(refusal(batcher, n) for n in range(3)))
    await asyncio.sleep(0.05)
    assert len(full.batches) > 1
    await batcher.close()
    assert {e.kind for e in await kept} == {ErrorKind.UNAVAILABLE}


@pytest.mark.asyncio
async def test_one_whose_time_is_over_is_told_so_although_its_call_goes_on(far: Far) -> None:
    batcher = batcher_to(far, timeout_s=0.3)
    far.gate.clear()
    async with asyncio.TaskGroup() as group:
        await fill(group, batcher, MAX_UNDER_WAY)
        old = asyncio.ensure_future(refusal(batcher, 1))  # noqa: TID251 - is awaited below
        await asyncio.sleep(0.2)
        young = [group.create_task(batcher.sign(of("jwt", n + 10))) for n in range(3)]
        await asyncio.sleep(0)
        far.gate.set()
        await asyncio.sleep(0)
        far.gate.clear()
        assert (await old).kind is ErrorKind.DEADLINE_EXCEEDED
        assert len(far.batches[-1]) == 4
        far.gate.set()
    assert all(task.result().signature for task in young)


async def refusal(batcher: Batcher, number: int, *, urgent: bool = False) -> SpireHwError:
    with pytest.raises(SpireHwError) as caught:
        await batcher.sign(of("jwt", number, urgent=urgent))
    return caught.value
