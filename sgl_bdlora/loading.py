"""The launcher's part of a load: what takes long holds up nobody else, and no load is left half done.

It reads an adapter's files first, in a thread, so that the ranks find them in the page cache (where it is the same machine); then it has
the ranks cut their pieces beside the batches (preparing.py); then SGLang's load goes on, which all requests wait for (loader.py).
"""

import asyncio
import logging
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sgl_bdlora import config, preparing
from sgl_bdlora.adapters import AdapterError
from sgl_bdlora.adapters.root import confined

logger = logging.getLogger(__name__)

# More than any adapter that fits a pool; what is longer the ranks refuse by its header.
MAX_BYTES = 2**34
_BLOCK = 2**23
POLL_S = 0.01
_reader = ThreadPoolExecutor(1, "bdlora-reader")
# Loads under way: as many as the ranks keep prepared.
_turns = asyncio.Semaphore(preparing.WAITING)
# The event loop alone would not keep them.
_loads: set[asyncio.Future] = set()


async def around_load_lora_adapter(original, manager, obj, request=None):
    """Hook of TokenizerManager.load_lora_adapter. A load that has begun goes on when its request is cancelled.

    SGLang loads an unloaded adapter again for a request that names it. When that client leaves its stream in the meantime, the ranks would
    have the adapter, and the registry not: nobody could unload it.
    """
    if manager.server_args.lora_backend != config.BACKEND or not manager.server_args.enable_lora:
        return await original(manager, obj, request)
    load = asyncio.ensure_future(_read_and_load(original, manager, obj, request))
    _loads.add(load)
    load.add_done_callback(_loads.discard)
    return await asyncio.shield(load)


async def _read_and_load(original, manager, obj, request):
    loop = asyncio.get_running_loop()
    async with _turns:
        await loop.run_in_executor(_reader, warm, obj.lora_name, obj.lora_path, config.options().adapter_root)
        await _prepare(manager, obj)
        return await original(manager, obj, request)


async def _prepare(manager, obj) -> None:
    """Returns when the first rank has cut its pieces: the others have as many."""
    from sglang.srt.managers.io_struct import LoadLoRAAdapterReqInput

    manager.auto_create_handle_loop()
    token, order = preparing.new_token(), preparing.BEGIN
    while True:
        ask = LoadLoRAAdapterReqInput(lora_name=obj.lora_name, lora_path=obj.lora_path, lora_id=order + token)
        if all(answer.success for answer in await manager.update_lora_adapter_communicator(ask)):
            return
        order = preparing.POLL
        await asyncio.sleep(POLL_S)


def warm(name: str, path: str, root: str | None) -> int:
    """Read the weights in an adapter's directory; returns how many bytes. What is wrong with them the ranks will say."""
    total = 0
    try:
        for file in sorted(Path(confined(name, path, root)).glob("*.safetensors")):
            total += _read(file, MAX_BYTES - total)
    except (AdapterError, OSError, ValueError) as error:
        logger.debug("sgl-bdlora: %s not read ahead: %s", path, error)
    return total


def _read(file: Path, most: int) -> int:
    descriptor, done = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), 0
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return 0
        buffer = bytearray(_BLOCK)
        while done < most and (count := os.readv(descriptor, [buffer])):
            done += count
        return done
    finally:
        os.close(descriptor)
