"""Whatever is in an adapter's directory: it is read, or refused in one line that names it; nothing crashes or hangs.

`make fuzz` tries 100,000 cases; docs/fuzzing.md says what that found.
"""

import contextlib
import io
import json
import os
from pathlib import Path

import pytest
from budget import at_most, few_and_many, settings_for
from damaged import INDEXES, JSON, configurations, damaged, good, headers
from hypothesis import given
from hypothesis import strategies as st

from sgl_bdlora.adapters import AdapterError, ModelError, read_adapter
from sgl_bdlora.adapters.__main__ import main
from sgl_bdlora.adapters.model import read_model
from sgl_bdlora.adapters.validate import Server, validate

CONFIG, WEIGHTS, INDEX = "adapter_config.json", "adapter_model.safetensors", "adapter_model.safetensors.index.json"
MODEL = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One directory for all cases: what is fuzzed is what is in it."""
    folder = tmp_path_factory.mktemp("fuzzed") / "adapter"
    folder.mkdir()
    (folder.parent / "model").mkdir()
    (folder.parent / "model" / "config.json").write_text(json.dumps(MODEL))
    return folder


@pytest.fixture(scope="module")
def servers(folder) -> list[Server]:
    """The checks of servers of every sharding, with a model and without."""
    model = read_model(folder.parent / "model")
    return [Server(None, 1, 1024, "replicated", 2**30, 2), Server(model, 2, 1024, "s-lora", 2**30, 4)]


def put(folder: Path, **files: bytes) -> None:
    for name in (CONFIG, WEIGHTS, INDEX):
        with contextlib.suppress(FileNotFoundError):
            os.remove(folder / name)
    for name, content in files.items():
        (folder / {"config": CONFIG, "weights": WEIGHTS, "index": INDEX}[name]).write_bytes(content)


def is_clear(error: Exception) -> None:
    """One line of bounded length: who, what, and what to do."""
    message = str(error)
    assert message.startswith(("LoRA adapter 'adapter': ", "model 'model': ")), message
    assert " Fix: " in message
    assert "\n" not in message
    assert len(message) < 4000, len(message)


def look(folder: Path, servers: list[Server]) -> bool:
    """Read and check the adapter; whether it was accepted. Raises whatever is not a clear refusal."""
    with at_most():
        try:
            adapter = read_adapter(folder)
        except AdapterError as refusal:
            is_clear(refusal)
            adapter = None
        else:
            size = (folder / WEIGHTS).stat().st_size
            for module in adapter.modules.values():
                assert module.rank > 0
                for factor in (module.a, module.b):
                    rows, columns = factor.tensor.shape
                    assert factor.tensor.read().shape == (rows, columns)
                    assert 2 * rows * columns < size
        for server in servers:
            verdict = validate(folder, server)
            assert verdict.problems or adapter is not None
            for problem in verdict.problems:
                is_clear(problem.error)
    return adapter is not None


def test_the_cases_start_from_good_adapters(folder, servers):
    for fields, weights in good():
        put(folder, config=json.dumps(fields).encode(), weights=weights)
        assert look(folder, servers)
        assert not validate(folder, servers[1]).problems


@few_and_many(0.5)
def test_configurations(folder, servers, cases):
    accepted = []

    @settings_for(cases)
    @given(configurations())
    def run(files):
        put(folder, config=files[0], weights=files[1])
        accepted.append(look(folder, servers))

    run()
    assert {True, False} == set(accepted), "the cases are all of one kind"


@few_and_many(0.4)
def test_safetensors_headers(folder, servers, cases):
    accepted = []

    @settings_for(cases)
    @given(headers())
    def run(files):
        put(folder, config=files[0], weights=files[1])
        accepted.append(look(folder, servers))

    run()
    assert {True, False} == set(accepted), "the cases are all of one kind"


@few_and_many(0.05)
def test_indexes_of_shards(folder, cases):
    fields, weights = good()[0]

    @settings_for(cases)
    @given(INDEXES.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=40))
    def run(index):
        put(folder, config=json.dumps(fields).encode(), index=index)
        (folder / "adapter_model-1.safetensors").write_bytes(weights)
        with at_most(), pytest.raises(AdapterError) as refusal:
            read_adapter(folder)
        is_clear(refusal.value)

    try:
        run()
    finally:
        (folder / "adapter_model-1.safetensors").unlink(missing_ok=True)


@few_and_many(0.04)
def test_model_configurations(folder, cases):
    """What `validate` and `plan` read with --model."""
    names = st.sampled_from([*MODEL, "head_dim", "text_config", "tie_word_embeddings"])
    texts = st.dictionaries(names, JSON, max_size=3).map(lambda fields: json.dumps(MODEL | fields).encode())

    @settings_for(cases)
    @given(texts | JSON.map(lambda value: json.dumps(value).encode()) | damaged(json.dumps(MODEL).encode()))
    def run(content):
        (folder.parent / "model" / "config.json").write_bytes(content)
        with at_most():
            try:
                model = read_model(folder.parent / "model")
                model.check_tp(2)
            except ModelError as refusal:
                is_clear(refusal)

    try:
        run()
    finally:
        (folder.parent / "model" / "config.json").write_text(json.dumps(MODEL))


@few_and_many(0.01)
def test_the_tools(folder, cases):
    """Exit codes and one line on stderr for each problem, whatever the files hold."""
    command = st.sampled_from(
        [["inspect"], ["inspect", "--tp", "3"], ["validate"], ["validate", "--model", "MODEL", "--tp", "2"]]
    )

    @settings_for(cases)
    @given(command, configurations() | headers(), st.booleans())
    def run(words, files, as_json):
        put(folder, config=files[0], weights=files[1])
        words = [str(folder.parent / "model") if word == "MODEL" else word for word in words]
        said, complaints = io.StringIO(), io.StringIO()
        with at_most(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(complaints):
            code = main([*words, str(folder), *(["--json"] if as_json else [])])
        assert code in (0, 1, 2)
        assert bool(code) == bool(complaints.getvalue())
        if as_json and (code == 0 or words[0] == "validate"):
            json.loads(said.getvalue())

    run()
