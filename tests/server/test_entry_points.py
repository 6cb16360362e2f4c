"""The other ways in: SGLang's own launcher with the plugin installed, and the offline engine; and what they refuse."""

import json
import subprocess
import sys

import pytest
from harness import Ask, Server, check

from sgl_bdlora import cpu, defaults

ARGUMENTS = ("--enable-lora", "--lora-backend", "bdlora", "--max-loras-per-batch", "4")

ENGINE = """
import json, sys
from sgl_bdlora import Engine

if __name__ == "__main__":
    model, prompt, *folders = json.loads(sys.argv[1])
    engine = Engine(
        model_path=model, dtype="float32", max_total_tokens=2048, lora_paths=[f"a{i}={f}" for i, f in enumerate(folders)]
    )
    names = [None, *(f"a{i}" for i in range(len(folders)))]
    answers = engine.generate(
        input_ids=[prompt] * len(names), lora_path=names, return_logprob=True, logprob_start_len=0,
        sampling_params={"temperature": 0, "max_new_tokens": 4, "ignore_eos": True},
    )
    print("ANSWER" + json.dumps([a["meta_info"]["input_token_logprobs"] for a in answers]))
    engine.shutdown()
"""


@pytest.mark.slow
def test_sglang_launch_server_with_the_plugin(zoo, tmp_path):
    flags = defaults.as_flags(cpu.default_fields({}))
    with Server(zoo.model("llama"), 1, tmp_path / "log", (*ARGUMENTS, *flags), module="sglang.launch_server") as server:
        folder = zoo.adapter("llama", "bd4-r16")
        assert server.load("a", folder).status_code == 200
        prompt = tuple(range(10, 40))
        asks = [Ask(prompt=prompt), Ask(prompt=prompt, adapter="a", folder=folder)]
        check(zoo.oracle("llama"), asks, server.generate(asks))


def test_offline_engine(zoo, tmp_path):
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    prompt = list(range(10, 40))
    folders = [zoo.adapter("llama", recipe) for recipe in ("bd4-r16", "plain-r2")]
    argument = json.dumps([str(zoo.model("llama")), prompt, *map(str, folders)])
    run = subprocess.run(
        [sys.executable, str(script), argument], capture_output=True, text=True, timeout=280, check=False
    )
    line = next((line for line in run.stdout.splitlines() if line.startswith("ANSWER")), None)
    assert line, run.stdout[-2000:] + run.stderr[-4000:]
    for served, folder in zip(json.loads(line[6:]), [None, *folders], strict=True):
        score = zoo.oracle("llama").score(prompt, folder)
        assert max(abs(served[i][0] - score.of(i, prompt[i])) for i in range(1, len(prompt))) < 1e-4


@pytest.mark.parametrize(
    ("arguments", "said", "last"),
    [
        # By the launcher, before anything is loaded.
        (
            ("--enable-lora-overlap-loading", "--max-loaded-loras", "16"),
            "sgl-bdlora: --enable-lora-overlap-loading does not work with --lora-backend bdlora",
            True,
        ),
        (("--lora-paths", "broken=/nonexistent/adapter"), "LoRA adapter 'broken'", False),
    ],
)
def test_refused_at_start(zoo, tmp_path, arguments, said, last):
    with (
        pytest.raises(RuntimeError, match="ended with code"),
        Server(zoo.model("llama"), 1, tmp_path / "log", arguments),
    ):
        pass
    log = (tmp_path / "log").read_text()
    assert said in (log.splitlines()[-1] if last else log)
