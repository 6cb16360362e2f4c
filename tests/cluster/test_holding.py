"""What a replica's server has, with a server that loads when the test says so."""

import asyncio

import pytest

from sgl_bdlora.cluster.serving.holding import LOADS, Holding

SIZE = 10


class Server:
    """Loads wait for `go`; `asked` has what was asked for, in order."""

    def __init__(self, budget: int = 1000, refusal: str | None = None):
        self.asked, self.has, self.most, self.go, self._refusal, self._now = [], set(), 0, asyncio.Event(), refusal, 0
        self.holding = Holding(self._load, self._unload, dict.fromkeys("abcdef", SIZE), budget)

    async def _load(self, adapter: str) -> str | None:
        self.asked.append(("load", adapter))
        assert adapter not in self.has
        self._now += 1
        self.most = max(self.most, self._now)
        await self.go.wait()
        self._now -= 1
        if self._refusal is None:
            self.has.add(adapter)
        return self._refusal

    async def _unload(self, adapter: str) -> None:
        self.asked.append(("unload", adapter))
        await asyncio.sleep(0)
        self.has.remove(adapter)

    async def use(self, adapter: str, until: asyncio.Event | None = None) -> str | None:
        async with self.holding.using(adapter) as refusal:
            assert refusal or adapter in self.has
            if until:
                await until.wait()
            return refusal


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def leave(*tasks: asyncio.Task) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def run(test) -> None:
    asyncio.run(asyncio.wait_for(test(), 10))


def test_loads_run_a_few_at_a_time_and_once_for_all_who_ask():
    async def test():
        server = Server()
        tasks = [asyncio.create_task(server.use(a)) for a in "abcdabcd"]
        await settle()
        assert server.asked == [("load", a) for a in "abcd"[:LOADS]]
        assert server.holding.waiting() == list("abcd")
        server.go.set()
        assert await asyncio.gather(*tasks) == [None] * 8
        assert server.asked == [("load", a) for a in "abcd"]
        assert server.most == LOADS
        assert list(server.holding.loaded) == list("abcd")

    run(test)


def test_a_load_that_nobody_waits_for_any_more_is_not_begun():
    async def test():
        server = Server()
        tasks = {a: asyncio.create_task(server.use(a)) for a in "abcd"}
        await settle()
        await leave(tasks["a"], tasks["c"])
        server.go.set()
        await asyncio.gather(tasks["b"], tasks["d"])
        # One that had begun goes on, and is of use to the next request.
        assert server.asked == [("load", a) for a in "abd"]
        assert server.has == set(server.holding.loaded) == set("abd")
        assert await server.use("c") is None

    run(test)


def test_a_request_does_not_wait_behind_copies_in_advance():
    async def test():
        server = Server()
        ahead = [asyncio.create_task(server.holding.copy_ahead(a)) for a in "abcde"]
        await settle()
        used = asyncio.create_task(server.use("f"))
        needed = asyncio.create_task(server.use("e"))
        await settle()
        assert server.asked == [("load", "a"), ("load", "f")]
        assert sorted(server.holding.waiting()) == list("abcdef")
        server.go.set()
        await asyncio.gather(*ahead, used, needed)
        # One that a request needs has its turn before those that none does.
        order = [adapter for _, adapter in server.asked]
        assert order.index("e") < order.index("c")
        assert sorted(order) == list("abcdef")

    run(test)


def test_forgetting_covers_loads_under_way_and_those_that_wait():
    async def test():
        server = Server()
        ahead = [asyncio.create_task(server.holding.copy_ahead(a)) for a in "ab"]
        wait = asyncio.Event()
        used = asyncio.create_task(server.use("c", wait))
        late = asyncio.create_task(server.holding.copy_ahead("d"))
        await settle()
        await server.holding.forget()
        server.go.set()
        await asyncio.gather(*ahead, late)
        await settle()
        assert server.has == set(server.holding.loaded) == {"c"}
        assert {("load", "b"), ("load", "d")}.isdisjoint(server.asked)
        assert server.holding.waiting() == []
        wait.set()
        await used
        await server.holding.forget()
        assert server.has == set(server.holding.loaded) == set()
        assert server.holding.unloads == 2

    run(test)


def test_what_was_not_asked_for_longest_makes_room_and_what_is_used_stays():
    async def test():
        server = Server(budget=2 * SIZE)
        server.go.set()
        wait = asyncio.Event()
        used = asyncio.create_task(server.use("a", wait))
        await settle()
        for adapter in "bc":
            await server.use(adapter)
        assert server.has == {"a", "c"}
        await asyncio.gather(*(server.use(a) for a in "bcd"))
        assert "a" in server.has
        wait.set()
        await used
        await server.use("e")
        assert len(server.has) == 2

    run(test)


def test_a_load_waits_for_the_unload_of_the_same_adapter():
    async def test():
        server = Server()
        server.go.set()
        await server.use("a")
        forget = asyncio.create_task(server.holding.forget())
        await asyncio.sleep(0)
        assert await server.use("a") is None
        await forget
        assert server.has == {"a"}

    run(test)


def test_refusals_and_failures_reach_every_request_and_are_not_kept():
    async def test():
        server = Server(refusal="too large")
        server.go.set()
        assert await asyncio.gather(*(server.use("a") for _ in range(3))) == ["too large"] * 3
        assert not server.holding.loaded
        assert not server.holding.waiting()

        async def broken(adapter):
            raise OSError(adapter)

        holding = Holding(broken, server._unload, {"a": 1}, 10)
        for _ in range(2):
            with pytest.raises(OSError, match="a"):
                async with holding.using("a"):
                    pass
        assert not holding.waiting()

    run(test)
