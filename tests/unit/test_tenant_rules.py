"""The tenants file, limits, and what a request of a tenant may hold; with a real server: tests/server/test_tenants.py."""

import hashlib
import json

import pytest

from sgl_bdlora import config
from sgl_bdlora.tenants import ADMIN, TenantsError, current, digest, principal, read
from sgl_bdlora.tenants.limits import Limited, Limits, TooLarge

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


def let_in(limits: Limits, count: int) -> None:
    limits.admit()
    with limits.run(count):
        pass


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"requests_per_minute": 60}, "counts as 61 .*requests_per_minute of this API key lets in: 60"),
        ({"max_concurrent": 60}, "counts as 61 .*max_concurrent of this API key lets in: 60"),
        ({"requests_per_minute": 100, "max_concurrent": 60, "tokens_per_minute": 1}, "max_concurrent"),
    ],
)
def test_a_batch_above_a_limit_is_never_let_in(given, named):
    clock = Clock()
    limits = Limits(**given, clock=clock)
    let_in(limits, 60)
    for _ in range(2):
        clock.now += 3600
        with pytest.raises(TooLarge, match=named):
            let_in(limits, 61)
    # It is not told to come again while another one runs, either.
    clock.now += 3600
    limits.admit()
    with limits.run(1), pytest.raises(TooLarge, match=named):
        let_in(limits, 61)
    assert limits.running == 0


@pytest.mark.parametrize("per_minute", [7, 10, 60, 997])
def test_a_batch_is_let_in_after_its_wait_and_not_before(per_minute):
    for count in {2, 3, per_minute // 2, per_minute - 1, per_minute}:
        for early in (0, 1.01):
            clock = Clock()
            limits = Limits(requests_per_minute=per_minute, clock=clock)
            let_in(limits, per_minute - 1)
            with pytest.raises(Limited, match=f"{per_minute} requests .* counts as {count}") as caught:
                let_in(limits, count)
            clock.now = max(0, caught.value.retry_after - early)
            if not early:
                let_in(limits, count)
                continue
            with pytest.raises(Limited):
                let_in(limits, count)


def test_asking_again_and_again_does_not_make_the_wait_longer():
    """Nor does the rounding of what is added at each."""
    for per_minute in (7, 60):
        clock = Clock()
        limits = Limits(requests_per_minute=per_minute, clock=clock)
        let_in(limits, per_minute)
        for part in range(1, 7):
            clock.now = part * 60 / per_minute / 7
            with pytest.raises(Limited):
                limits.admit()
        clock.now = 60 / per_minute
        limits.admit()


def test_a_refused_batch_costs_one_request():
    clock = Clock()
    limits = Limits(requests_per_minute=10, max_concurrent=8, clock=clock)
    with pytest.raises(TooLarge):
        let_in(limits, 9)
    let_in(limits, 3)
    with pytest.raises(Limited):
        let_in(limits, 7)
    for _ in range(5):
        limits.admit()
    with pytest.raises(Limited):
        limits.admit()


def test_batches_never_get_more_than_a_minutes_worth():
    clock = Clock()
    limits = Limits(requests_per_minute=20, clock=clock)
    served = 0
    for step in range(600):
        clock.now = step / 10
        try:
            let_in(limits, step % 9 + 1)
        except Limited:
            continue
        served += step % 9 + 1
    assert 20 <= served <= 40


@pytest.mark.parametrize(
    ("per_minute", "tokens", "wait", "named"),
    [(60, 100, 41, "tokens"), (2, 65, 30, "requests"), (1, 0, 60, "requests")],
)
def test_the_wait_is_that_of_the_limit_that_takes_longest(per_minute, tokens, wait, named):
    clock = Clock()
    limits = Limits(requests_per_minute=per_minute, tokens_per_minute=60, clock=clock)
    let_in(limits, per_minute)
    limits.spend_tokens(tokens)
    with pytest.raises(Limited, match=named) as caught:
        limits.admit()
    assert caught.value.retry_after == wait
    clock.now = wait
    limits.admit()


def test_the_wait_for_others_to_end_is_no_shorter_than_that_of_the_other_limits():
    for tokens, wait in ((0, 1), (80, 21)):
        limits = Limits(tokens_per_minute=60, max_concurrent=30, clock=Clock())
        limits.admit()
        with limits.run(1):
            limits.admit()
            limits.spend_tokens(tokens)
            with pytest.raises(Limited, match="30 requests at a time") as caught, limits.run(30):
                pass
        assert caught.value.retry_after == wait
