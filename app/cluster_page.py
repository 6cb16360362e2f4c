"""Cluster: which adapters each replica has, what moves, and how the cluster fares; asked again every few seconds."""

import os
from html import escape

import gradio as gr
import httpx

from app import text
from app.context import Context

ASK_S = 5.0
# More adapters of one rank on one replica are a number instead of tiles.
MAX_TILES = 48
CSS = """
.replicas { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 280px), 1fr)); gap: 1rem; margin: .6rem 0; }
.replica { border: 1px solid var(--line); border-radius: 12px; padding: .7rem .9rem; background: var(--card); min-width: 0; }
.replica h3 { margin: 0; font-size: 1.05rem; color: var(--ink); }
.replica p { margin: 0 0 .4rem; color: var(--ink-soft); font-size: .85rem; }
.replica .load { height: .6rem; border-radius: 4px; background: var(--line); overflow: hidden; margin: .2rem 0 .5rem; }
.replica .load i { display: block; height: 100%; background: var(--block); } .replica .load.over i { background: var(--bad); }
.bin { display: grid; grid-template-columns: 3.6rem 1fr; gap: .4rem; align-items: start; margin: .25rem 0; }
.bin { font-size: .8rem; color: var(--ink-soft); }
.tiles { display: flex; flex-wrap: wrap; gap: 3px; }
.tile { border-radius: 4px; padding: 0 .3rem; font-size: .72rem; overflow: hidden; }
.tile { border: 1px solid var(--block); color: var(--block-text); }
.tile.there { background: var(--block-soft); font-weight: 600; } .tile.absent { border-style: dashed; opacity: .75; }
"""


def build(context: Context, timer: gr.Timer, demo: gr.Blocks) -> None:
    gr.HTML(f"<style>{CSS}</style>")
    shown = gr.HTML("<p>Waiting for the cluster …</p>", elem_id="cluster")
    key = os.environ.get("BDLORA_API_KEY")
    http = httpx.Client(
        base_url=context.cluster,
        timeout=ASK_S,
        trust_env=False,
        headers={"Authorization": f"Bearer {key}"} if key else {},
    )

    def show() -> str:
        return look(http)

    for event in (demo.load, timer.tick):
        event(show, None, shown, show_progress="hidden", api_visibility="private", concurrency_limit=None)


def look(http: httpx.Client) -> str:
    """The page's content; what is wrong where the cluster does not answer."""
    try:
        response = http.get("/cluster/status")
        if response.status_code != 200:
            return text.message(
                "bad", f"{http.base_url} answers with HTTP {response.status_code}: {response.text[:300]}"
            )
        return draw(response.json())
    except httpx.HTTPError as error:
        return text.message(
            "bad", f"Nothing answers at {http.base_url} ({type(error).__name__}). Asking again every few seconds."
        )
    except (KeyError, TypeError, ValueError) as error:
        return text.message("bad", f"{http.base_url} is no cluster of this version ({error!r}).")


def draw(status: dict) -> str:
    """HTML of what /cluster/status says."""
    parts = [text.message("bad", status["problem"])] if status["problem"] else []
    if status["admitted"] < 1:
        done = "the rest is refused" if status["shedding"] else "nothing is refused, policy.shed is off"
        parts.append(
            text.message(
                "note", f"The demand is beyond the replicas: {100 * status['admitted']:.0f} % can be served; {done}."
            )
        )
    requests, moved = status["requests"], status["bytes_moved"]
    last = status["history"][-1]["moves"] if status["history"] else 0
    most = f"at most {status['most_moves']} at once, {status['max_moves']} are allowed"
    loads = status["cold_loads"]
    facts = [
        ("Table", f"version {status['version']}, {status['policy']}, a plan every {status['period_s']:g} s"),
        (
            "Replicas",
            f"{len(status['replicas'])} run, {status['required_replicas']} needed, at most {status['max_replicas']}",
        ),
        ("Moves", f"{last} in the last plan, {status['moves']} in all, {most}"),
        ("Cold loads", f"{loads['peer']} from a peer ({text.size(moved['peer'])}), {loads['disk']} from disk"),
        ("Requests", ", ".join(f"{text.count(requests[key])} {key}" for key in ("done", "retried", "shed", "failed"))),
    ]
    parts.append("<div class='headline'><div class='what'><ul>" + "".join(
        f"<li>{escape(name)} <b>{escape(words)}</b></li>" for name, words in facts
    ) + "</ul></div></div>")  # fmt: skip
    ranks = {a["name"]: a["rank"] for a in status["adapters"]}
    placed: dict[str, list[tuple[str, float]]] = {}
    for adapter in status["adapters"]:
        for replica, part in adapter["shares"].items():
            placed.setdefault(replica, []).append((adapter["name"], part))
    parts.append("<div class='replicas'>")
    parts += [_replica(replica, placed.get(replica["name"], []), ranks) for replica in status["replicas"]]
    parts.append(
        "</div><p class='aside'>A tile is an adapter that the table gives to the replica: filled once it is on the server, "
        "dashed until somebody asks for it. A per cent sign says which part of its requests, where several replicas share it.</p>"
    )
    busiest = sorted(status["adapters"], key=lambda a: (-a["demand"], -a["requests"], a["name"]))[:20]
    rows = [
        [
            a["name"],
            str(a["rank"]),
            text.size(a["bytes"]),
            f"{a['demand']:.3g}",
            text.count(a["requests"]),
            ", ".join(sorted(a["shares"])),
        ]
        for a in busiest
    ]
    head = ["Adapter", "Rank", "Size", "Tokens/s asked for", "Requests", "Replicas"]
    return "".join(parts) + text.table(head, rows, "The adapters most asked for")


def _replica(replica: dict, placed: list[tuple[str, float]], ranks: dict[str, int]) -> str:
    loaded, load = set(replica["loaded"]), replica["load"]
    bins: dict[int, list[tuple[str, float]]] = {}
    for name, part in placed:
        bins.setdefault(ranks[name], []).append((name, part))
    rows = "".join(
        f"<div class='bin'><span>rank {rank}</span><div class='tiles'>{_tiles(sorted(bins[rank]), loaded)}</div></div>"
        for rank in sorted(bins)
    )
    over = " over" if load > 1 else ""
    return (
        f"<section class='replica' data-replica='{escape(replica['name'], quote=True)}'><h3>{escape(replica['name'])}</h3>"
        f"<p>{len(placed)} placed, {len(loaded)} on the server ({text.size(replica['loaded_bytes'])}), {replica['running']} requests, "
        f"load {100 * load:.0f} %</p><div class='load{over}' role='img' aria-label='load {100 * load:.0f} %'>"
        f"<i style='width:{min(100.0, 100 * load):.1f}%'></i></div>{rows}</section>"
    )


def _tiles(placed: list[tuple[str, float]], loaded: set[str]) -> str:
    parts = []
    for name, part in placed[:MAX_TILES]:
        share = "" if part > 0.995 else f" {100 * part:.0f} %"
        there = "there" if name in loaded else "absent"
        parts.append(f"<span class='tile {there}'>{escape(name)}{share}</span>")
    if len(placed) > MAX_TILES:
        parts.append(f"<span>and {len(placed) - MAX_TILES} more</span>")
    return "".join(parts)
