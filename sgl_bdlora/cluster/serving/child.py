"""`python -m sgl_bdlora.cluster.serving.child ARGUMENTS`: a replica's server, sgl_bdlora.launch_server with one more route.

It ends when its standard input does, and so with the process that started it, however that one ends.
"""

import os
import signal
import sys
import threading
import time

ROUTE = "/bdlora/load_adapter_body"


def main(argv: list[str]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from sgl_bdlora import launch_server

    launch_server.main(argv, prepare=add_route)


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    # The starter made this process the leader of a group, in which its own children are too.
    os.killpg(0, signal.SIGTERM)
    time.sleep(5)
    os.killpg(0, signal.SIGKILL)


def add_route() -> None:
    """POST /bdlora/load_adapter_body?name=NAME with a safetensors body (catalog.py): load an adapter that is in no file here."""
    from fastapi import Request
    from fastapi.responses import ORJSONResponse
    from sglang.srt.entrypoints import http_server
    from sglang.srt.utils.auth import AuthLevel, auth_level

    from sgl_bdlora.cluster.serving.catalog import NAME, parse_body

    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def load_adapter_body(name: str, request: Request):
        if not NAME.fullmatch(name):
            return ORJSONResponse(
                {"success": False, "error_message": f"name = {name!r} is no adapter's name"}, status_code=400
            )
        try:
            tensors, config = parse_body(await request.body())
        except ValueError as error:
            return ORJSONResponse({"success": False, "error_message": f"adapter {name!r}: {error}"}, status_code=400)
        manager = http_server._global_state.tokenizer_manager
        result = await manager.load_lora_adapter_from_tensors(
            as_request(name, tensors, config, manager.server_args.tp_size)
        )
        status = 200 if result.success else 400
        return ORJSONResponse({"success": result.success, "error_message": result.error_message}, status_code=status)

    http_server.app.add_api_route(ROUTE, load_adapter_body, methods=["POST"])


def as_request(name: str, tensors: dict, config: dict, tp_size: int):
    """SGLang's own request: one flat tensor in shared memory for all ranks, which is pickled here and nowhere else."""
    from sglang.srt.managers.io_struct import LoadLoRAAdapterFromTensorsReqInput
    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    bucket = FlattenedTensorBucket(named_tensors=list(tensors.items()))
    data = {"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.get_metadata()}
    return LoadLoRAAdapterFromTensorsReqInput(
        lora_name=name,
        config_dict=config,
        serialized_named_tensors=[MultiprocessingSerializer.serialize(data) for _ in range(tp_size)],
        load_format="flattened_bucket",
    )


if __name__ == "__main__":
    main(sys.argv[1:])
