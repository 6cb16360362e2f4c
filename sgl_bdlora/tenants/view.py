"""What a tenant is shown of a server: its adapters, and nothing whose content or duration depends on the others'."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from sgl_bdlora.tenants import Tenant

# What /bdlora/info says of the server and of an adapter that does not tell who else uses them.
SERVER_FACTS = ("model_layers", "dtype", "tp_size", "lora_sharding", "max_lora_rank", "max_loras_per_batch")
ADAPTER_FACTS = (
    "name",
    "kind",
    "nblocks",
    "rank",
    "parameters",
    "local_ranks",
    "host_bytes",
    "plain_bytes",
    "collectives_per_step",
)
REFRESH_S = 0.5


def models(tenant: Tenant, manager) -> dict:
    """GET /v1/models: the base model, if the tenant may use it, and its adapters, without their paths."""
    card = {"object": "model", "created": int(time.time()), "owned_by": "sglang"}
    served, length = manager.served_model_name, manager.model_config.context_len
    cards = [{**card, "id": served, "root": served, "parent": None, "max_model_len": length}] if tenant.base else []
    cards += [{**card, "id": name, "root": name, "parent": served, "max_model_len": None} for name in tenant.loaded]
    return {"object": "list", "data": cards}


class Described:
    """A tenant's /bdlora/info, from facts that are kept by adapter id.

    The schedulers take the longer to answer the more adapters everyone has loaded; so they are asked after a load, not when a tenant asks.
    """

    def __init__(self):
        self._ask: Callable[[], Awaitable[dict | None]] | None = None
        self._server: dict = {}
        self._adapters: dict[str, dict] = {}
        self._refreshing: asyncio.Task | None = None

    def use(self, ask: Callable[[], Awaitable[dict | None]]) -> None:
        """ask: gives the whole of /bdlora/info; None where there is none."""
        self._ask = ask

    def refresh_soon(self) -> None:
        """An adapter was loaded; many often are, one after another."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return
        if self._ask is not None and (self._refreshing is None or self._refreshing.done()):
            self._refreshing = loop.create_task(self._refresh(REFRESH_S))

    async def view(self, tenant: Tenant) -> dict:
        loaded = [ref.lora_id for ref in tenant.loaded.values()]
        if not self._server or not self._adapters.keys() >= set(loaded):
            await self._refresh()
        known = [self._adapters[uid] for uid in loaded if uid in self._adapters]
        return {"time": time.time(), **self._server, "adapters": known}

    async def _refresh(self, after_s: float = 0) -> None:
        await asyncio.sleep(after_s)
        whole = await self._ask()
        if whole is not None:
            self._server = {fact: whole[fact] for fact in SERVER_FACTS}
            self._adapters = {each["id"]: {fact: each[fact] for fact in ADAPTER_FACTS} for each in whole["adapters"]}


described = Described()
