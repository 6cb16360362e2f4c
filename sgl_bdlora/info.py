"""`GET /bdlora/info`: what is loaded, how it is sharded, and what it costs on every rank.

The numbers live in the scheduler processes. SGLang's own `get_internal_state` request already goes to every rank, so the answer
travels with it; the route only unwraps it.
"""

import time
from collections import Counter

from sgl_bdlora import origin, tenants
from sgl_bdlora.tenants.view import described

STATE_KEY = "bdlora"
# Adapters in one answer: 1.5 kB each at TP 8.
PAGE = 1000


def describe(manager, running: Counter, waiting: Counter) -> dict:
    """The state of one engine; a collective call among its tensor-parallel ranks.

    manager: this rank's BDLoRAManager. running, waiting: adapter id -> requests. Lists are by rank; sizes in bytes; times in
    seconds since the epoch.
    """
    pool = manager.memory_pool
    mine = {
        "pool_bytes": pool.budget,
        "pool_used_bytes": pool.used,
        "adapters": {
            uid: {
                "host_bytes": shard.nbytes,
                "pool_bytes": shard.nbytes if pool.get(uid) else 0,
                "local_ranks": shard.local_ranks,
                "plain_bytes": {name: n * shard.weights.itemsize for name, n in shard.plain_numel.items()},
            }
            for uid, shard in manager.shards.items()
        },
    }
    ranks = manager.all_ranks(mine)
    return {
        "time": time.time(),
        "origin": {**origin.version(), **origin.hardware(manager.device.type)},
        "model_layers": _layers(manager.host),
        "dtype": str(manager.dtype).removeprefix("torch."),
        "tp_size": manager.tp_size,
        "lora_sharding": manager.sharding,
        "max_lora_rank": manager.max_lora_rank,
        "max_loras_per_batch": manager.max_loras_per_batch,
        "pool": {
            "bytes": [rank["pool_bytes"] for rank in ranks],
            "used_bytes": [rank["pool_used_bytes"] for rank in ranks],
            "resident_adapters": sum(pool.get(uid) is not None for uid in manager.shards),
            "loads": pool.loads,
            "evictions": pool.evictions,
        },
        "collectives_per_step": max((shard.collectives for shard in manager.shards.values()), default=0),
        "adapters": [_adapter(manager, uid, ranks, running, waiting) for uid in manager.shards],
    }


def _adapter(manager, uid: str, ranks: list[dict], running: Counter, waiting: Counter) -> dict:
    ref, shard = manager.lora_refs[uid], manager.shards[uid]
    return {
        "id": uid,
        "name": ref.lora_name,
        "path": ref.lora_path,
        "kind": shard.kind,
        "nblocks": shard.nblocks,
        "rank": shard.rank,
        "parameters": shard.parameters,
        "local_ranks": [rank["adapters"][uid]["local_ranks"] for rank in ranks],
        "host_bytes": [rank["adapters"][uid]["host_bytes"] for rank in ranks],
        "pool_bytes": [rank["adapters"][uid]["pool_bytes"] for rank in ranks],
        # What each rank would hold of a plain adapter of the same ranks, under each sharding.
        "plain_bytes": {
            sharding: [rank["adapters"][uid]["plain_bytes"][sharding] for rank in ranks]
            for sharding in shard.plain_numel
        },
        "resident": manager.memory_pool.get(uid) is not None,
        "pinned": bool(ref.pinned),
        "collectives_per_step": shard.collectives,
        "requests_running": running[uid],
        "requests_waiting": waiting[uid],
        "last_used": manager.last_used.get(uid),
    }


def _layers(host) -> list[dict]:
    """The model's linear layers that take LoRA, as rank 0 sees them; layers of the same name and shapes are one entry.

    count: how many there are. slices: the adapter modules of a layer, with whole and local sizes.
    """
    counts = Counter(
        (
            layer.path.rpartition(".")[2],
            layer.parallelism,
            tuple((s.name, s.inputs.size, s.outputs.size, len(s.inputs), len(s.outputs)) for s in layer.slices),
        )
        for layer in host.layers.values()
    )
    keys = ("name", "inputs", "outputs", "local_inputs", "local_outputs")
    return [
        {
            "name": name,
            "parallelism": parallelism,
            "count": count,
            "slices": [dict(zip(keys, piece, strict=True)) for piece in slices],
        }
        for (name, parallelism, slices), count in counts.items()
    ]


def prompt_format(tokenizer) -> str:
    """How one question is put to the model: its chat template around "{prompt}", or "{prompt}" alone without one.

    For /generate, which adds the tokenizer's first token itself where there is one.
    """
    mark = "{prompt}"
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True
        )
    except Exception:
        # No template, or one that wants more than a question (transformers raises what the template raises).
        return mark
    first = tokenizer.bos_token
    if first and text.startswith(first) and tokenizer.encode("x")[:1] == [tokenizer.bos_token_id]:
        text = text.removeprefix(first)
    return text if text.count(mark) == 1 else mark


def after_get_internal_state(result, scheduler, recv_req):
    """Hook of Scheduler.get_internal_state: every rank runs it for the same request."""
    from sgl_bdlora.manager import BDLoRAManager

    manager = getattr(scheduler.tp_worker.model_runner, "lora_manager", None)
    if isinstance(manager, BDLoRAManager):
        running = Counter(req.lora_id for req in scheduler.running_batch.reqs)
        waiting = Counter(req.lora_id for req in scheduler.waiting_queue)
        result.internal_state[STATE_KEY] = describe(manager, running, waiting)


def add_route(app) -> None:
    """Add GET /bdlora/info to SGLang's FastAPI application, with the authentication of its admin routes."""
    from fastapi import Query
    from fastapi.responses import ORJSONResponse
    from sglang.srt.entrypoints import http_server
    from sglang.srt.utils.auth import AuthLevel, auth_level

    async def whole() -> dict | None:
        tokenizer_manager = http_server._global_state.tokenizer_manager
        states = await tokenizer_manager.get_internal_state()
        found = [state[STATE_KEY] for state in states if STATE_KEY in state]
        return {**found[0], "prompt_format": prompt_format(tokenizer_manager.tokenizer)} if found else None

    described.use(whole)

    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def bdlora_info(limit: int = Query(PAGE, ge=1, le=PAGE), offset: int = Query(0, ge=0)):
        """What the bdlora LoRA back end has loaded: `limit` adapters from number `offset` on, in the order of their loads."""
        tenant = tenants.current()
        found = await (whole() if tenant is None else described.view(tenant))
        if found is None:
            message = "this server does not run --lora-backend bdlora with --enable-lora"
            return ORJSONResponse({"error": {"message": message}}, status_code=404)
        adapters = found["adapters"]
        return ORJSONResponse(
            {**found, "adapters_loaded": len(adapters), "adapters": adapters[offset : offset + limit]}
        )

    app.add_api_route("/bdlora/info", bdlora_info, methods=["GET"])
