"""Without an adapter the plugin changes nothing: base answers equal stock SGLang's bit for bit."""

import os
from pathlib import Path

import pytest
from harness import Server, check
from servers import LLAMA, QWEN2, on


@on(QWEN2)
def test_answers_equal_stock_bit_for_bit(live, tmp_path):
    """Ours has tenants and metrics too."""
    _compare(live, tmp_path, ())


@pytest.mark.slow
@on(LLAMA)
def test_answers_equal_stock_bit_for_bit_with_collectives(live, tmp_path):
    _compare(live, tmp_path, live.served.arguments)


def _compare(live, tmp_path, arguments: tuple[str, ...]) -> None:
    check(live.oracle, live.probes, live.untouched)
    environment = {
        "SGLANG_PLUGINS": "none",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH")))),
    }
    model, tp = live.zoo.model(live.served.family), live.served.tp
    log = tmp_path / "stock.log"
    with Server(model, tp, log, arguments, environment, module="stock_server") as stock:
        expected = [stock.generate([probe])[0] for probe in live.probes]
    assert "sgl-bdlora" not in log.read_text(), "the plugin ran in the stock server"
    # Before any adapter was loaded, and beside loaded ones.
    assert live.untouched == expected
    live.ensure("bd4-r16")
    check(live.oracle, [ask := live.ask("bd4-r16")], live.server.generate([ask]))
    assert [live.server.generate([probe])[0] for probe in live.probes] == expected
