"""Tenants: who may use which adapters, and how much. The file of `--tenants`, and who the request at hand comes from.

tenants:
  acme:
    key_env: ACME_KEY            # or key: text, key_file: path, key_sha256: 64 hexadecimal digits
    adapters: [acme-*, shared]   # names, or patterns with * ? [...]
    base: true                   # may use the model without an adapter
    may_load: false              # may load and unload adapters of these names from ROOT/acme (needs --adapter-root)
    metrics: false               # may read /metrics, which names all adapters
    requests_per_minute: 600     # the three limits: null or left out for none
    tokens_per_minute: 100000
    max_concurrent: 8
    max_body_mib: 32
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from sgl_bdlora import config
from sgl_bdlora.tenants.limits import Limited, Limits

MIN_KEY = 16
MAX_NAME = 512
ADMIN = "admin"


class TenantsError(ValueError):
    """The tenants file says something that cannot be meant."""


@dataclass(eq=False)
class Tenant:
    """One tenant of a running server.

    digest: sha256 of its key. adapters: patterns of names. salt: set before the key of its cached prefixes, and known to nobody.
    loaded: the adapters that it sees and that are loaded now, by name.
    """

    name: str
    digest: bytes
    adapters: tuple[str, ...]
    base: bool
    may_load: bool
    metrics: bool
    max_body_bytes: int
    limits: Limits
    salt: str = field(default_factory=lambda: secrets.token_hex(16))
    loaded: dict[str, Any] = field(default_factory=dict)

    def sees(self, adapter: str) -> bool:
        """Whether adapters of this name are its own. The answer does not depend on which exist."""
        return len(adapter) <= MAX_NAME and any(fnmatchcase(adapter, pattern) for pattern in self.adapters)


class Tenants:
    """All tenants of a server, and the administrator's key."""

    def __init__(self, tenants: list[Tenant], admin_key: str):
        self.all, self._admin = tenants, digest(admin_key.encode())

    def holder(self, key: bytes) -> Tenant | str | None:
        """The tenant of a key, ADMIN, or None. Takes the same time whichever it is."""
        given, found = digest(key), None
        for tenant in self.all:
            if hmac.compare_digest(given, tenant.digest):
                found = tenant
        return ADMIN if hmac.compare_digest(given, self._admin) else found

    def registered(self, ref) -> None:
        """An adapter (SGLang's LoRARef) has been loaded."""
        for tenant in self.all:
            if tenant.sees(ref.lora_name):
                tenant.loaded[ref.lora_name] = ref

    def unregistered(self, adapter: str) -> None:
        for tenant in self.all:
            tenant.loaded.pop(adapter, None)


# Who the request at hand comes from: set by the middleware, and inherited by the tasks that serve the request.
principal: ContextVar[Tenant | str | None] = ContextVar("bdlora_principal", default=None)

# Limits that refused the request at hand after the middleware had let it in: a list of the middleware's, which reads it for Retry-After.
limits_met: ContextVar[list[Limited]] = ContextVar("bdlora_limits_met")


def current() -> Tenant | None:
    """The tenant whose request this is; None for the administrator, and on a server without tenants.

    Raises PermissionError on a server with tenants for a request that came round the middleware.
    """
    found = principal.get()
    if isinstance(found, Tenant):
        return found
    if found is None and config.options().tenants is not None:
        raise PermissionError("sgl-bdlora: a request without a key")
    return None


def read(path: Path, admin_key: str) -> Tenants:
    """Parse the file. Raises TenantsError, which names the file, the tenant and the field."""
    import yaml

    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise TenantsError(f"{path} cannot be read: {error}") from error
    entries = raw.get("tenants") if isinstance(raw, dict) and set(raw) == {"tenants"} else None
    if not isinstance(entries, dict) or not entries:
        raise TenantsError(f"{path} has to hold one object, tenants, with a tenant under each name")
    tenants = [_tenant(f"{path}: tenants.{name}", name, entry, path.parent) for name, entry in entries.items()]
    digests = [tenant.digest for tenant in tenants] + [digest(admin_key.encode())]
    if len(set(digests)) < len(digests):
        raise TenantsError(f"{path}: two tenants, or a tenant and the administrator, have the same key")
    return Tenants(tenants, admin_key)


def digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


_KEYS = ("key", "key_env", "key_file", "key_sha256")
_FLAGS = {"base": True, "may_load": False, "metrics": False}
_LIMITS = ("requests_per_minute", "tokens_per_minute", "max_concurrent")


def _tenant(where: str, name: object, entry: object, folder: Path) -> Tenant:
    if not isinstance(name, str) or not name or "/" in name or name in (".", ".."):
        raise TenantsError(f"{where}: a tenant's name is a word without slashes, also for its directory")
    if not isinstance(entry, Mapping):
        raise TenantsError(f"{where} is no object")
    unknown = set(entry) - {*_KEYS, *_FLAGS, *_LIMITS, "adapters", "max_body_mib"}
    if unknown:
        raise TenantsError(f"{where} has unknown fields: {', '.join(sorted(map(str, unknown)))}")
    adapters = entry.get("adapters", [])
    if not isinstance(adapters, list) or not all(isinstance(pattern, str) and pattern for pattern in adapters):
        raise TenantsError(f"{where}.adapters has to be a list of names or patterns")
    flags = {flag: entry.get(flag, default) for flag, default in _FLAGS.items()}
    limits = {limit: entry.get(limit) for limit in _LIMITS}
    body = entry.get("max_body_mib", 32)
    for flag, value in flags.items():
        if not isinstance(value, bool):
            raise TenantsError(f"{where}.{flag} has to be true or false, not {value!r}")
    if body is None:
        raise TenantsError(f"{where}.max_body_mib has to be a positive whole number")
    for limit, value in {**limits, "max_body_mib": body}.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise TenantsError(f"{where}.{limit} has to be a positive whole number, not {value!r}")
    if flags["may_load"] and config.options().adapter_root is None:
        raise TenantsError(
            f"{where}.may_load needs --adapter-root: the tenant loads from the directory {name} below it"
        )
    return Tenant(
        name,
        _digest(where, entry, folder),
        tuple(adapters),
        **flags,
        max_body_bytes=body << 20,
        limits=Limits(**limits),
    )


def _digest(where: str, entry: Mapping[str, Any], folder: Path) -> bytes:
    given = [name for name in _KEYS if name in entry]
    if len(given) != 1 or not isinstance(entry[given[0]], str):
        raise TenantsError(f"{where} needs one of {', '.join(_KEYS)}, a string")
    value = entry[given[0]]
    if given[0] == "key_sha256":
        try:
            found = bytes.fromhex(value)
        except ValueError:
            found = b""
        if len(found) != 32:
            raise TenantsError(f"{where}.key_sha256 has to be 64 hexadecimal digits")
        return found
    if given[0] == "key_env":
        value = os.environ.get(value, "")
    elif given[0] == "key_file":
        try:
            value = (folder / value).read_text().strip()
        except (OSError, ValueError) as error:
            raise TenantsError(f"{where}.key_file cannot be read: {error}") from error
    if len(value) < MIN_KEY:
        raise TenantsError(
            f"{where}.{given[0]} gives a key of {len(value)} characters; it has to have {MIN_KEY} or more"
        )
    return digest(value.encode("utf-8", "surrogateescape"))
