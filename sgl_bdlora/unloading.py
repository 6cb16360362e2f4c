"""When an adapter may be unloaded: not before the scheduler has ended every request that names it, and no later.

SGLang counts an adapter's requests (lora/lora_registry.py) and waits for zero, with a lock held that every load and unload needs. Its
count goes wrong: a client that leaves a stream, a prompt above the context length and refused sampling parameters are never taken off
(managers/tokenizer_manager.py: generate_request), an abort in the waiting queue neither (_handle_abort_req), and n > 1 is taken off once
too often (_handle_batch_request). One of these is enough for an unload, and all loads after it, to hang for ever.

So the requests themselves are looked at. The tokenizer manager keeps a state for each; what is added here is that the state of a request
that the scheduler has stays until the scheduler says that it ended. These are hooks of the launcher's process.
"""

import asyncio
from collections import Counter
from weakref import WeakKeyDictionary

from sgl_bdlora import config

POLL_S = 0.02

_managers: WeakKeyDictionary = WeakKeyDictionary()
_acquiring: Counter[int] = Counter()


def after_init_lora(result, manager) -> None:
    """Hook of TokenizerManager.init_lora: remember whose registry it is."""
    if manager.server_args.lora_backend == config.BACKEND:
        _managers[manager.lora_registry] = manager


async def around_acquire(original, registry, lora_name):
    """Hook of LoRARegistry.acquire: between looking up an adapter's id and noting it in the request there are awaits."""
    _acquiring[id(registry)] += 1
    try:
        return await original(registry, lora_name)
    finally:
        _acquiring[id(registry)] -= 1


async def around_release(original, registry, lora_id) -> None:
    """Hook of LoRARegistry.release, which runs a little after a request's end: an unload may have been quicker."""
    try:
        await original(registry, lora_id)
    except KeyError:
        if registry not in _managers:
            raise


async def around_wait_for_unload(original, registry, lora_id: str) -> None:
    """Hook of LoRARegistry.wait_for_unload; the name is gone from the registry, so that no new request can begin."""
    manager = _managers.get(registry)
    if manager is None:
        await original(registry, lora_id)
        return
    while _acquiring[id(registry)] or in_use(manager.rid_to_state.values(), lora_id):
        await asyncio.sleep(POLL_S)
    del registry._counters[lora_id]


def in_use(states, lora_id: str) -> bool:
    """Whether one of these requests names the adapter."""
    return any(getattr(state.obj, "lora_id", None) == lora_id for state in states)


def around_discard_pending_req_states(original, manager, obj, lifecycle_ids=None) -> None:
    """Hook of TokenizerManager._discard_pending_req_states: it sends the abort; the state stays until the scheduler's answer."""
    with_scheduler = {}
    if manager.lora_registry in _managers:
        with_scheduler = {
            rid: state
            for rid, state in manager.rid_to_state.items()
            if state.dispatched and not state.finished and getattr(state.obj, "lora_id", None) is not None
        }
    original(manager, obj, lifecycle_ids)
    for rid, state in with_scheduler.items():
        manager.rid_to_state.setdefault(rid, state)
