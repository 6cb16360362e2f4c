"""What all pages share: the servers, and where uploads go."""

from dataclasses import dataclass
from pathlib import Path

from app.client import Server, ServerProblem
from app.compare import BLOCK, PLAIN, Comparison
from app.pairs import BASE, Pair, pair_adapters
from app.served import Adapter, Served


@dataclass(frozen=True)
class Context:
    """server: block-diagonal adapters, and plain ones too unless compare_server has those. cluster: the URL of one to draw, if any."""

    server: Server
    compare_server: Server | None
    uploads: Path
    cluster: str | None = None

    @property
    def arms(self) -> dict[str, Server]:
        return {PLAIN: self.compare_server or self.server, BLOCK: self.server}

    @property
    def servers(self) -> list[Server]:
        return [self.server] + ([self.compare_server] if self.compare_server else [])

    def named(self, url: str | None) -> Server:
        return next((s for s in self.servers if s.url == url), self.server)


def look(server: Server) -> Served:
    """The server's state; while a comparison runs the last known one, because asking would disturb it. Raises ServerProblem."""
    if Comparison.running() and server.known:
        return server.known
    return server.state()


def look_or_none(server: Server) -> Served | None:
    try:
        return look(server)
    except ServerProblem:
        return None


def pairs(context: Context) -> list[Pair]:
    """The pairs that can be compared now; none while a server does not answer."""
    block, plain = look_or_none(context.arms[BLOCK]), look_or_none(context.arms[PLAIN])
    if not block or not plain:
        return []
    return pair_adapters([a for a in block.adapters if not a.plain], [a for a in plain.adapters if a.plain])


def plain_title(served: Served) -> str:
    return "S-LoRA sharding" if served.sharding == "s-lora" else "Plain, replicated"


def kind_class(adapter: Adapter | None) -> str:
    """The style of an adapter's chip or bar."""
    return "base" if adapter is None else "plain" if adapter.plain else "block"


def shown_name(adapter: str | None) -> str:
    return adapter or BASE
