"""A server with --adapter-root reads no adapter from elsewhere, and serves those below it by absolute and relative paths."""

import base64
import pickle
import shutil

import pytest
from harness import Ask, check
from servers import QWEN3, on

pytestmark = on(QWEN3)


@pytest.fixture
def root(live):
    """The server's root, where the zoo writes its adapters; what a test adds there is removed."""
    folder = live.folder("bd4-r16").parent
    before = set(folder.iterdir())
    yield folder
    for path in set(folder.iterdir()) - before:
        path.unlink() if path.is_symlink() else shutil.rmtree(path)


@pytest.fixture
def outside(live, tmp_path):
    """A good adapter elsewhere."""
    return shutil.copytree(live.folder("bd4-r16"), tmp_path / "elsewhere")


def refused(live, path) -> str:
    """Loading it is refused with the path and the option, and the server goes on as before."""
    response = live.server.load("escape", path)
    assert response.status_code == 400, response.text
    body = response.json()
    assert body["success"] is False
    message = body["error_message"]
    for word in ("'escape'", str(path), "--adapter-root", "Fix: "):
        assert word in message, message
    assert "escape" not in body["loaded_adapters"]
    asks = [live.ask(recipe, 12) for recipe in (None, "bd4-r16")]
    check(live.oracle, asks, live.server.generate(asks))
    return message


def test_relative_and_absolute_paths_below_the_root_are_served(live, root):
    (root / "alias").symlink_to("bd4-r16")
    for path in ("bd4-r16", "alias", "./bd4-r16/../bd4-r16", str(root / "bd4-r16")):
        live.load("relative", path)
        ask = Ask(live.prompt(12), "relative", root / "bd4-r16")
        check(live.oracle, [ask], live.server.generate([ask]))
        live.unload("relative")


def test_an_adapter_elsewhere_is_refused(live, root, outside):
    refused(live, outside)
    assert refused(live, outside.parent / "nowhere").replace("nowhere", outside.name) == refused(live, outside)


def test_dots_are_refused(live, root):
    refused(live, f"../../{root.parent.name}-other/bd4-r16")
    refused(live, root / ".." / ".." / "qwen3")


def test_links_that_leave_are_refused(live, root, outside):
    (root / "link").symlink_to(outside)
    refused(live, "link")
    refused(live, root / "link")
    inside = shutil.copytree(outside, root / "copy")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (inside / name).unlink()
        (inside / name).symlink_to(outside / name)
        assert name in refused(live, "copy")
        (inside / name).unlink()
        shutil.copy(outside / name, inside / name)
    live.load("mended", "copy")
    live.unload("mended")


def test_tensors_in_a_request_are_refused_before_they_are_unpickled(live, tmp_path):
    """What is sent would make a file when it is unpickled."""

    class Payload:
        def __reduce__(self):
            return open, (str(tmp_path / "made"), "w")

    data = base64.b64encode(pickle.dumps(Payload())).decode()
    body = {"lora_name": "escape", "config_dict": {}, "serialized_named_tensors": [data] * live.served.tp}
    response = live.server.post("/load_lora_adapter_from_tensors", body)
    assert response.status_code == 400, response.text
    for word in ("'escape'", "--adapter-root", "Fix: "):
        assert word in response.json()["error_message"]
    assert not (tmp_path / "made").exists()
