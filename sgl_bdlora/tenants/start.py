"""Putting tenants in place when a server starts, and keeping their lists of adapters. Hooks of the launcher's process."""

from __future__ import annotations

import copy
from pathlib import Path

from sgl_bdlora import config
from sgl_bdlora.tenants import Tenants, TenantsError, read
from sgl_bdlora.tenants.view import described, models

_serving: Tenants | None = None


def start(server_args) -> None:
    """Read the tenants file; end the process where another option would open what it closes."""
    global _serving
    path = config.options().tenants
    if path is None:
        return
    for wrong, problem in (
        (not server_args.admin_api_key, "needs --admin-api-key, which loads and unloads adapters"),
        (bool(server_args.api_key), "takes the place of --api-key: give each client a key in the file"),
        (server_args.lora_backend != config.BACKEND, f"works with --lora-backend {config.BACKEND} only"),
        (not server_args.enable_lora, "needs --enable-lora"),
        (server_args.tokenizer_worker_num > 1, "does not work with --tokenizer-worker-num"),
        (server_args.grpc_port is not None, "does not work with --grpc-port, which asks for no key"),
        (server_args.smg_grpc_mode or server_args.grpc_mode, "does not work with gRPC, which asks for no key"),
        (server_args.use_ray, "does not work with --use-ray"),
        (server_args.encoder_only, "does not work with --encoder-only"),
    ):
        if wrong:
            raise SystemExit(f"sgl-bdlora: --tenants {problem}.")
    if _serving is None:
        try:
            _serving = read(Path(path), server_args.admin_api_key)
        except TenantsError as error:
            raise SystemExit(f"sgl-bdlora: {error}") from error


def around_add_api_key_middleware(original, app, *, api_key, admin_api_key) -> None:
    """Hook of add_api_key_middleware, which is called last, so that ours comes before every other."""
    if _serving is None:
        original(app, api_key=api_key, admin_api_key=admin_api_key)
        return
    from sglang.srt.entrypoints import http_server

    from sgl_bdlora.tenants.http import TenantMiddleware

    app.add_middleware(
        TenantMiddleware,
        tenants=_serving,
        models=lambda tenant: models(tenant, http_server._global_state.tokenizer_manager),
    )


def warm_up_with_key(warm_up):
    """SGLang's own first request, which sends --api-key, with the administrator's."""

    def with_key(server_args):
        if _serving is None:
            return warm_up(server_args)
        keyed = copy.copy(server_args)
        object.__setattr__(keyed, "api_key", server_args.admin_api_key)
        return warm_up(keyed)

    return with_key


def after_register_adapter(result, registry, lora_ref) -> None:
    """Hook of LoRARegistry._register_adapter."""
    if _serving is not None:
        _serving.registered(lora_ref)
        described.refresh_soon()


async def around_unregister(original, registry, lora_name):
    """Hook of LoRARegistry.unregister."""
    lora_id = await original(registry, lora_name)
    if _serving is not None:
        _serving.unregistered(lora_name)
    return lora_id
