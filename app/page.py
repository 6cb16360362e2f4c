"""The whole page: status line and four tabs, five with a cluster."""

import gradio as gr

from app import cluster_page
from app.context import Context
from app.pages import adapters, chat, compare, how, status

ASK_EVERY_S = 3
TABS = (("Compare", compare), ("Chat", chat), ("Adapters", adapters), ("How it works", how))


def build(context: Context) -> gr.Blocks:
    with gr.Blocks(title="Block-diagonal LoRA, live", analytics_enabled=False) as demo:
        timer = gr.Timer(ASK_EVERY_S)
        status.build(context, timer, demo)
        with gr.Tabs():
            tabs = (*TABS, ("Cluster", cluster_page)) if context.cluster else TABS
            for title, page in tabs:
                with gr.Tab(title):
                    page.build(context, timer, demo)
    demo.queue(default_concurrency_limit=16, api_open=False)
    return demo
