"""The app's page of a cluster."""

import httpx
import pytest
from test_control import control, front, replica

cluster_page = pytest.importorskip("app.cluster_page", reason="needs the extra: pip install 'sgl-bdlora[app]'")


def status(**more) -> dict:
    made = control()
    made.front_says(front({"a1": 3}, ("x", "y")))
    made.replica_says("x", replica(["a0", "a1"], peer=1, disk=2))
    return {**made.status(), "store_bytes": 0, **more}


def test_every_adapter_is_drawn_on_its_replicas():
    shown = status()
    page = cluster_page.draw(shown)
    for replica_shown in shown["replicas"]:
        section = page.split(f"data-replica='{replica_shown['name']}'")[1].split("</section>")[0]
        for adapter in shown["adapters"]:
            assert (f">{adapter['name']}<" in section or f">{adapter['name']} " in section) == (
                replica_shown["name"] in adapter["shares"]
            )
    assert "1 from a peer" in page
    assert "version 1" in page


def test_names_and_problems_are_escaped():
    shown = status(problem="no room <script>")
    shown["adapters"][0]["name"] = "<b>x</b>"
    page = cluster_page.draw(shown)
    assert "<script>" not in page
    assert "<b>x</b>" not in page
    assert "&lt;b&gt;x&lt;/b&gt;" in page


def test_a_demand_beyond_the_replicas_is_said():
    assert "75 % can be served; nothing is refused" in cluster_page.draw(status(admitted=0.75))


@pytest.mark.parametrize(("answer", "words"), [
    (httpx.Response(503, text="the controller does not answer"), "HTTP 503: the controller"),
    (httpx.Response(200, text="hello"), "is no cluster of this version"),
    (httpx.Response(200, json={"version": 1}), "is no cluster of this version"),
    (None, "Nothing answers at"),
])  # fmt: skip
def test_what_is_no_cluster_is_said(answer, words):
    def handle(request):
        if answer is None:
            raise httpx.ConnectError("no")
        return answer

    with httpx.Client(base_url="http://cluster", transport=httpx.MockTransport(handle)) as http:
        assert words in cluster_page.look(http)
