"""The tenants file, limits, and what a request of a tenant may hold; with a real server: tests/server/test_tenants.py."""

import hashlib
import json

import pytest

from sgl_bdlora import config
from sgl_bdlora.tenants import ADMIN, TenantsError, current, digest, principal, read
from sgl_bdlora.tenants.limits import Limited, Limits

KEY = "k" * 16
ADMIN_KEY = "administrator"


def tenants(tmp_path, **entries):
    path = tmp_path / "tenants.json"
    path.write_text(json.dumps({"tenants": entries}))
    return read(path, ADMIN_KEY)


def entry(**fields):
    return {"key": KEY, "adapters": ["acme-*"], **fields}


def test_keys_come_as_text_file_environment_and_digest(tmp_path, monkeypatch):
    (tmp_path / "secret").write_text("from a file, 16 or more\n")
    monkeypatch.setenv("SECRET", "from the environment")
    found = tenants(
        tmp_path,
        a={"key": "as text in the file"},
        b={"key_file": "secret"},
        c={"key_env": "SECRET"},
        d={"key_sha256": hashlib.sha256(b"only its digest").hexdigest()},
    )
    keys = (b"as text in the file", b"from a file, 16 or more", b"from the environment", b"only its digest")
    assert [found.holder(key).name for key in keys] == ["a", "b", "c", "d"]
    assert found.holder(ADMIN_KEY.encode()) == ADMIN
    assert found.holder(b"") is found.holder(b"other") is None


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"key": "short"}, "16 or more"),
        ({"key": None}, "needs one of"),
        ({"key_env": "X"}, "needs one of"),
        ({"adapter": ["x"]}, "unknown fields: adapter"),
        ({"adapters": "acme-*"}, "list of names"),
        ({"base": "no"}, "true or false"),
        ({"max_concurrent": 0}, "positive whole number"),
        ({"requests_per_minute": True}, "positive whole number"),
        ({"max_body_mib": None}, "positive whole number"),
        ({"may_load": True}, "needs --adapter-root"),
    ],
)
def test_mistakes_name_the_tenant_and_the_field(tmp_path, fields, said):
    with pytest.raises(TenantsError, match=said) as caught:
        tenants(tmp_path, acme=entry(**fields))
    assert "tenants.acme" in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "[]", "tenants: {}", "tenants: {a: {}}\nother: 1", "{", "tenants: {../x: {key: abcdefghijklmnopq}}"]
)
def test_files_that_are_none_are_refused(tmp_path, text):
    path = tmp_path / "tenants.yaml"
    path.write_text(text)
    with pytest.raises(TenantsError, match=r"tenants\.yaml"):
        read(path, ADMIN_KEY)


def test_a_key_belongs_to_one(tmp_path):
    with pytest.raises(TenantsError, match="same key"):
        tenants(tmp_path, a=entry(), b=entry())
    with pytest.raises(TenantsError, match="same key"):
        tenants(tmp_path, a={"key_sha256": digest(ADMIN_KEY.encode()).hex()})


def test_patterns_choose_names(tmp_path):
    tenant = tenants(tmp_path, acme=entry(adapters=["acme-*", "shared", "v[12]"])).all[0]
    assert [name for name in ("acme-", "acme-x/y", "shared", "Shared", "sharedx", "v1", "v3", "xacme-", "") if tenant.sees(name)] == [
        "acme-", "acme-x/y", "shared", "v1",
    ]  # fmt: skip
    assert not tenant.sees("acme-" + "x" * 600)


def test_lists_follow_loads(tmp_path):
    class Ref:
        def __init__(self, name):
            self.lora_name = name

    found = tenants(tmp_path, acme=entry(), other={"key": "o" * 16, "adapters": ["*"]})
    for name in ("acme-a", "b"):
        found.registered(Ref(name))
    assert [list(tenant.loaded) for tenant in found.all] == [["acme-a"], ["acme-a", "b"]]
    found.unregistered("acme-a")
    assert [list(tenant.loaded) for tenant in found.all] == [[], ["b"]]


def test_a_request_that_came_round_the_middleware_is_refused(monkeypatch):
    assert current() is None
    monkeypatch.setenv(config.ENV, json.dumps({"tenants": "/tenants.yaml"}))
    with pytest.raises(PermissionError):
        current()
    token = principal.set(ADMIN)
    assert current() is None
    principal.reset(token)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_requests_are_let_in_at_an_even_rate():
    clock = Clock()
    limits = Limits(requests_per_minute=60, clock=clock)
    for _ in range(60):
        limits.admit()
    with pytest.raises(Limited) as caught:
        limits.admit()
    assert caught.value.retry_after == 1
    clock.now = 1
    limits.admit()
    with pytest.raises(Limited):
        limits.admit()
    # No more than a minute's worth is ever saved up.
    clock.now = 10_000
    for _ in range(60):
        limits.admit()
    with pytest.raises(Limited):
        limits.admit()


def test_tokens_are_paid_afterwards():
    clock = Clock()
    limits = Limits(tokens_per_minute=60, clock=clock)
    limits.admit()
    limits.spend_tokens(120)
    with pytest.raises(Limited) as caught:
        limits.admit()
    assert caught.value.retry_after == 61
    clock.now = 60.9
    with pytest.raises(Limited):
        limits.admit()
    clock.now = 61.1
    limits.admit()


def test_a_refused_request_costs_nothing():
    clock = Clock()
    limits = Limits(requests_per_minute=1, tokens_per_minute=60, clock=clock)
    limits.spend_tokens(90)
    with pytest.raises(Limited):
        limits.admit()
    clock.now = 31
    limits.admit()


def test_a_batch_runs_whole_or_not_at_all():
    limits = Limits(requests_per_minute=100, max_concurrent=4)
    with limits.run(3):
        with pytest.raises(Limited), limits.run(2):
            pass
        with limits.run(1):
            assert limits.running == 4
    assert limits.running == 0
    with pytest.raises(ZeroDivisionError), limits.run(4):
        raise ZeroDivisionError
    assert limits.running == 0
