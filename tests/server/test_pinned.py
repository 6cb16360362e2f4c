"""Pinned adapters stay in the pool; they may not take the place that others need."""

from harness import Ask, check
from servers import QWEN3, on


@on(QWEN3)
def test_pinned_adapters_leave_room_for_the_others(live):
    """Pinning goes on until the pool could no longer hold the largest other adapter; all are served while they are pinned."""
    live.ensure("plain-r32")
    folder, pinned = live.folder("bd4-r16"), []
    try:
        for i in range(15):
            body = {"lora_name": f"pinned-{i}", "lora_path": str(folder), "pinned": True}
            response = live.server.post("/load_lora_adapter", body)
            if response.status_code != 200:
                break
            pinned.append(f"pinned-{i}")
        assert response.status_code == 400
        assert "pin" in response.json()["error_message"]
        assert "Fix:" in response.json()["error_message"]
        assert pinned
        asks = [live.ask("plain-r32"), *(Ask(prompt=live.prompt(20), adapter=name, folder=folder) for name in pinned)]
        check(live.oracle, asks, live.server.generate(asks))
    finally:
        for name in pinned:
            live.unload(name)
