"""Read an adapter's files before the schedulers do, so that a slow disk holds up the load and nobody else.

Every rank reads an adapter between two batches, while all requests wait. The launcher reads its files first, in a thread; the ranks
then find them in the page cache (where it is the same machine).
"""

import asyncio
import logging
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sgl_bdlora import config
from sgl_bdlora.adapters import AdapterError
from sgl_bdlora.adapters.root import confined

logger = logging.getLogger(__name__)

# More than any adapter that fits a pool; what is longer the ranks refuse by its header.
MAX_BYTES = 2**34
_BLOCK = 2**23
_reader = ThreadPoolExecutor(1, "bdlora-reader")


async def around_load_lora_adapter(original, manager, obj, request=None):
    """Hook of TokenizerManager.load_lora_adapter."""
    if manager.server_args.lora_backend == config.BACKEND:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(_reader, warm, obj.lora_name, obj.lora_path, config.options().adapter_root)
    return await original(manager, obj, request)


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
