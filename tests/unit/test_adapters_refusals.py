"""Every adapter that cannot be served exactly is refused, in words that name the adapter, the fault and the fix."""

import json
import os
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sgl_bdlora.adapters import (
    AdapterConfig,
    AdapterError,
    adapter_from_tensors,
    check_features,
    check_finite,
    read_adapter,
)

Q = "model.layers.0.self_attn.q_proj"
O = "model.layers.0.self_attn.o_proj"  # noqa: E741
CONFIG = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "o_proj"]}
BD = {"nblocks": 4, "target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["q_proj"]}


def pair(path, a=(8, 64), b=(64, 8)):
    prefix = f"base_model.model.{path}"
    return {f"{prefix}.lora_A.weight": torch.randn(a), f"{prefix}.lora_B.weight": torch.randn(b)}


PLAIN = {**pair(Q), **pair(O)}
PACKED = {**pair(Q, b=(64, 2)), **pair(O, a=(8, 16))}


def write(directory, config=CONFIG, tensors=PLAIN):
    (directory / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if tensors is not None:
        save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def refusal(action, *words):
    """Run the action, which must refuse; check the message and give the error back."""
    with pytest.raises(AdapterError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for word in ("'tuned'", "Fix: ", *words):
        assert word in message, f"{word!r} is not in {message!r}"
    return caught.value


def test_the_adapters_these_tests_start_from_are_accepted(tmp_path):
    assert read_adapter(write(tmp_path), "tuned").kind == "plain"
    assert adapter_from_tensors("tuned", PACKED, CONFIG | {"use_bdlora": BD}).kind == "block-diagonal"


CONFIG_FIELDS = [
    ({"peft_type": "ADALORA"}, "peft_type = 'ADALORA'", "LoraConfig"),
    ({"peft_type": None}, "peft_type = None", "LoraConfig"),
    ({"peft_type": ["LORA"]}, "peft_type", "LoraConfig"),
    *[
        ({"r": value}, f"r = {value!r}", "set r to a positive integer")
        for value in (0, -8, 8.0, "8", True, None, 2**40)
    ],
    *[
        ({"lora_alpha": value}, f"lora_alpha = {value!r}", "set lora_alpha to a finite number")
        for value in ("16", None, True, float("nan"), float("inf"), [16])
    ],
    ({"lora_alpha": 10**400}, "lora_alpha = ", "finite number"),
    ({"use_rslora": "false"}, "use_rslora = 'false'", "true or false"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern", "positive integers"),
    ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern", "positive integers"),
    ({"rank_pattern": ["q_proj"]}, "rank_pattern", "positive integers"),
    ({"rank_pattern": {"q_(": 4}}, "rank_pattern holds 'q_('", "correct the expression"),
    ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern", "finite numbers"),
    ({"alpha_pattern": {"*": 1}}, "alpha_pattern holds '*'", "correct the expression"),
    ({"target_modules": None}, "target_modules = None", "list of module names"),
    ({"target_modules": 7}, "target_modules = 7", "list of module names"),
    ({"target_modules": [7]}, "target_modules = [7]", "list of module names"),
    ({"target_modules": "(q_proj"}, "target_modules holds '(q_proj'", "correct the expression"),
    ({"target_modules": "q_proj{99999999999}"}, "target_modules holds", "correct the expression"),
    ({"target_modules": []}, "targets nothing", "target_modules"),
    ({"target_modules": ["k_proj"]}, "targets nothing", "target_modules"),
    ({"target_modules": "q_proj"}, "targets nothing", "target_modules"),
    ({"layers_to_transform": [1]}, "targets nothing", "layers_to_transform"),
    ({"exclude_modules": ["q_proj", "o_proj"]}, "targets nothing", "exclude_modules"),
    ({"target_modules": ["q_proj"]}, f"base_model.model.{O}.lora_A.weight", "select every trained module"),
    ({"exclude_modules": ["o_proj"]}, f"base_model.model.{O}.lora_A.weight", "exclude_modules = ('o_proj',)"),
    ({"exclude_modules": {"o_proj": 1}}, "exclude_modules", "list of module names"),
    ({"exclude_modules": "o_proj)"}, "exclude_modules holds", "correct the expression"),
    ({"layers_to_transform": "0"}, "layers_to_transform = '0'", "layer number"),
    ({"layers_to_transform": [True]}, "layers_to_transform = [True]", "layer number"),
    ({"layers_to_transform": [0], "layers_pattern": 3}, "layers_pattern = 3", "list of names"),
    ({"layers_to_transform": [0], "layers_pattern": "("}, "layers_pattern holds '('", "correct the expression"),
    ({"layers_pattern": ["layers"]}, "layers_pattern", "set layers_to_transform"),
    ({"target_modules": ".*proj", "layers_to_transform": [0]}, "layers_to_transform = [0]", "list the target modules"),
    ({"base_model_name_or_path": 3}, "base_model_name_or_path = 3", "a string or null"),
    ({"fan_in_fan_out": 3}, "fan_in_fan_out = 3", "true or false"),
    *[
        ({"init_lora_weights": value}, f"init_lora_weights = {value!r}", "path_initial_model_for_weight_conversion")
        for value in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "new", None, 3)
    ],
    ({"use_dora": True}, "use_dora = True", "merge the adapter"),
    ({"lora_bias": True}, "lora_bias = True", "lora_bias = false"),
    ({"bias": "all"}, "bias = 'all'", "bias = 'none'"),
    ({"bias": "lora_only"}, "bias = 'lora_only'", "bias = 'none'"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save = ['lm_head']", "merge the adapter"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices = [1]", "merge the adapter"),
    ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters", "target linear modules"),
    ({"megatron_config": {"tp": 2}}, "megatron_config", "transformers"),
    ({"layer_replication": [[0, 2]]}, "layer_replication = [[0, 2]]", "replicated model"),
    ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens = [1, 2]", "without it"),
    ({"use_qalora": True}, "use_qalora = True", "without it"),
    ({"arrow_config": {"top_k": 3}}, "arrow_config", "one by one"),
    ({"kasa_config": {"beta": 1e-4}}, "kasa_config", "without it"),
    ({"monteclora_config": {"num_samples": 8}}, "monteclora_config", "without it"),
    ({"velora_config": {"scale": 1.0}}, "velora_config", "without it"),
    ({"use_new_variant": True}, "'use_new_variant' = True", "update sgl-bdlora"),
    ({"new_size": 0}, "'new_size' = 0", "update sgl-bdlora"),
    ({"k" * 5000: "v" * 5000}, "kkk", "update sgl-bdlora"),
    (
        {"rank_pattern": {"q_proj|" + "x" * 5000: 4}},
        "rank_pattern['q_proj|xxx",
        "the rank the adapter was trained with",
    ),
]


@pytest.mark.parametrize(("fields", "fault", "fix"), CONFIG_FIELDS, ids=lambda value: str(value)[:40])
def test_config_field(fields, fault, fix):
    error = refusal(lambda: adapter_from_tensors("tuned", PLAIN, CONFIG | fields), fault, fix)
    assert len(str(error)) < 1000


BLOCK_FIELDS = [
    *[({"nblocks": value}, f"use_bdlora.nblocks = {value!r}", "positive integer") for value in (0, -1, 2.0, "4", True)],
    ({"nblocks": 3}, "nblocks = 3", "r = 8 of module"),
    ({"nblocks": 16}, "nblocks = 16", "r = 8 of module"),
    ({"nblocks": 8}, "nblocks = 8", "as in training"),
    ({"match_strict": "no"}, "use_bdlora.match_strict = 'no'", "true or false"),
    ({"target_modules_bd_a": "o_proj"}, "use_bdlora.target_modules_bd_a = 'o_proj'", "a list of strings"),
    ({"target_modules_bd_b": [1]}, "use_bdlora.target_modules_bd_b = [1]", "a list of strings"),
    ({"target_modules_bd_a": ["o_proj", "q_proj"]}, "['q_proj'] is in both", "one of them only"),
    ({"target_modules_bd_a": ["self_attn"]}, f"module '{Q}' matches both", "one of them only"),
    ({"target_modules_bd_a": []}, f"module '{O}' is in neither", "match_strict to false"),
    ({"target_modules_bd_a": None}, f"module '{O}' is in neither", "match_strict to false"),
    ({"permutation": [1, 0]}, "use_bdlora.'permutation' = [1, 0]", "update sgl-bdlora"),
]


@pytest.mark.parametrize(("fields", "fault", "fix"), BLOCK_FIELDS, ids=lambda value: str(value)[:40])
def test_block_diagonal_field(fields, fault, fix):
    config = CONFIG | {"use_bdlora": BD | fields}
    refusal(lambda: adapter_from_tensors("tuned", PACKED, config), fault, fix)


@pytest.mark.parametrize("value", [[], "yes", True, 4])
def test_use_bdlora_that_is_no_object(value):
    refusal(lambda: adapter_from_tensors("tuned", PLAIN, CONFIG | {"use_bdlora": value}), "use_bdlora", "JSON object")


def test_rank_pattern_that_the_blocks_do_not_divide():
    config = CONFIG | {"use_bdlora": BD, "rank_pattern": {"q_proj": 6}}
    tensors = PACKED | pair(Q, a=(6, 64), b=(64, 2))
    refusal(lambda: adapter_from_tensors("tuned", tensors, config), "rank_pattern['q_proj'] = 6", "nblocks = 4")


SHAPES = [
    ("plain", pair(Q, a=(4, 64)), "shape (4, 64), rank 4, but r = 8", "set r"),
    ("plain", pair(Q, b=(64, 5)), "shape (64, 5)", "set r"),
    ("plain", pair(Q, b=(64, 2)), "4 diagonal blocks", "set use_bdlora as in training"),
    ("bd", pair(Q), "dense shape (64, 8)", "leave the module out of use_bdlora.target_modules_bd_b"),
    ("bd", pair(Q, b=(64, 3)), "shape (64, 3)", "set r and nblocks"),
    ("bd", pair(Q, b=(66, 2)), "66 rows are not divisible by use_bdlora.nblocks = 4", "nblocks"),
    ("bd", pair(O, a=(2, 16)), "shape (2, 16), rank 2, but r = 8", "set r"),
    ("bd", pair(O, a=(8, 16), b=(64, 2)), "shape (64, 2)", "set r"),
]


@pytest.mark.parametrize(("kind", "tensors", "fault", "fix"), SHAPES, ids=lambda value: str(value)[:40])
def test_shape(kind, tensors, fault, fix):
    good, config = (PACKED, CONFIG | {"use_bdlora": BD}) if kind == "bd" else (PLAIN, CONFIG)
    key = "lora_A" if "rank" in fault else "lora_B"
    refusal(lambda: adapter_from_tensors("tuned", good | tensors, config), f"{key}.weight'", fault, fix)


def one(key, *shape, dtype=torch.float32):
    return {f"base_model.model.{key}": torch.zeros(shape or (8, 8), dtype=dtype)}


EXPERT = pair("model.layers.0.mlp.experts.3.gate_proj")
TENSORS = [
    (
        {f"base_model.model.{Q}.lora_A.weight": torch.zeros(8, 64)},
        f"base_model.model.{Q}.lora_B.weight",
        "both factors",
    ),
    (
        {f"base_model.model.{Q}.lora_B.weight": torch.zeros(64, 8)},
        f"base_model.model.{Q}.lora_A.weight",
        "both factors",
    ),
    (PLAIN | one(f"{Q}.lora_magnitude_vector", 1, 64), "lora_magnitude_vector", "use_dora = false"),
    (PLAIN | one(f"{Q}.lora_B.bias", 1, 64), "lora_B.bias", "lora_bias = false"),
    (PLAIN | one("lm_head.modules_to_save.weight"), "modules_to_save", "without modules_to_save"),
    (
        PLAIN | one("model.embed_tokens.token_adapter.trainable_tokens_delta"),
        "token_adapter",
        "trainable_token_indices",
    ),
    (PLAIN | one("model.embed_tokens.weight"), "model.embed_tokens.weight", "save_embedding_layers=False"),
    (pair(O) | one(f"{Q}.lora_A.default.weight"), "lora_A.default.weight", "removes that name"),
    ({key.removeprefix("base_model."): value for key, value in PLAIN.items()}, "lora_A.weight", "'base_model.model.'"),
    (PLAIN | one(f"{Q}.lora_diag"), "lora_diag", "plain or block-diagonal"),
    (PLAIN | one(f"{Q}.base_layer.weight"), "base_layer.weight", "plain or block-diagonal"),
    (PLAIN | {"x" * 600: torch.zeros(2, 2)}, "xxx", "save the adapter again"),
    (PLAIN | pair("model.layers.0.self_attn.k_proj"), "k_proj.lora_A.weight", "select every trained module"),
    ({**PLAIN, **EXPERT}, "experts.3.gate_proj.lora_A.weight", "leave the experts out"),
    (pair(O) | pair(Q, a=(8, 64, 1)), "shape (8, 64, 1)", "linear layers only"),
    (pair(O) | pair(Q, b=(0, 8)), "shape (0, 8)", "gather the parameters"),
    *[
        (PLAIN | one(f"{Q}.lora_A.weight", 8, 64, dtype=dtype), f"dtype {dtype}", "bfloat16")
        for dtype in (torch.float64, torch.int8, torch.float8_e4m3fn)
    ],
    ({}, "targets nothing", "holds no tensors"),
    (PLAIN | {"x": None}, "tensors['x'] is None", "dict"),
]


@pytest.mark.parametrize(("tensors", "fault", "fix"), TENSORS, ids=lambda value: str(value)[:40])
def test_tensors(tensors, fault, fix):
    refusal(lambda: adapter_from_tensors("tuned", tensors, CONFIG), fault, fix)


EMBEDDING = one("model.embed_tokens.lora_embedding_A", 8, 96) | one("model.embed_tokens.lora_embedding_B", 64, 8)
HEAD = pair("lm_head", b=(96, 8))
VOCABULARY = [
    (EMBEDDING | one("model.embed_tokens.base_layer.weight", 90, 64), {}, "shape (90, 64)", "save the adapter again"),
    (HEAD | one("lm_head.base_layer.weight", 64, 96), {}, "shape (64, 96)", "save the adapter again"),
    (HEAD, {"target_modules": "all-linear"}, "targets nothing", "target_modules"),
    (PLAIN | EMBEDDING, {"target_modules": "all-linear"}, "lora_embedding_A", "select every trained module"),
    (EMBEDDING, {"use_bdlora": BD | {"match_strict": False}}, "lora_embedding_A", "plain LoRA adapter"),
    (HEAD, {"use_bdlora": BD | {"target_modules_bd_b": ["lm_head"]}}, "target_modules_bd_b", "lm_head"),
    (HEAD | EMBEDDING, {"ensure_weight_tying": True}, "ensure_weight_tying = True", "ensure_weight_tying = false"),
    (
        one("lm_head.lora_embedding_A") | one("lm_head.lora_B.weight"),
        {},
        "module 'lm_head' has tensors of a linear layer and of an embedding",
        "save the adapter again",
    ),
]


@pytest.mark.parametrize(("tensors", "fields", "fault", "fix"), VOCABULARY, ids=lambda value: str(value)[:40])
def test_vocabulary(tensors, fields, fault, fix):
    config = CONFIG | {"target_modules": ["embed_tokens", "lm_head"]} | fields
    refusal(lambda: adapter_from_tensors("tuned", tensors, config), fault, fix)


def test_tied_weights_do_not_matter_without_the_vocabulary():
    assert adapter_from_tensors("tuned", PLAIN, CONFIG | {"ensure_weight_tying": True}).modules.keys() == {Q, O}


def test_fields_without_effect_are_accepted():
    fields = {
        "peft_version": "9.0",
        "task_type": "CAUSAL_LM",
        "lora_dropout": 0.1,
        "loftq_config": {"loftq_bits": 4},
        "init_lora_weights": "eva",
        "eva_config": {"rho": 2.0},
        "enable_lora": None,
        "merge_weights": False,
        "later_list": [],
    }
    assert adapter_from_tensors("tuned", PLAIN, CONFIG | fields).rank == 8


FILES = [
    (lambda path: (path / "away", "does not exist", "local directory")),
    (lambda path: (path / ("x" * 5000), "does not exist", "local directory")),
    (lambda path: (f"{path}/\0", "does not exist", "local directory")),
    (lambda path: (write(path) / "adapter_config.json", "is a file, not a directory", "local directory")),
    (lambda path: (path, "has no adapter_config.json", "save_pretrained")),
    (lambda path: (write(path, ""), "not valid JSON", "save_pretrained")),
    (lambda path: (write(path, '{"r": 8'), "not valid JSON", "save_pretrained")),
    (lambda path: (write(path, "[" * 100_000), "not valid JSON", "save_pretrained")),
    (lambda path: (write(path, '{"r": ' + "9" * 5000 + "}"), "not valid JSON", "save_pretrained")),
    (lambda path: (write(path, "[1, 2]"), "adapter_config.json holds [1, 2]", "JSON object")),
    (lambda path: (write(path, "null"), "adapter_config.json holds None", "JSON object")),
    (lambda path: (write(path, json.dumps(CONFIG)[:-1] + " " * 2**20 + "}"), "larger than 1048576 bytes", "PEFT")),
    (lambda path: (write(path, '{"peft_type": "LORA", "lora_alpha": 1}'), "r is missing", "set r")),
    (lambda path: (write(path, '{"peft_type": "LORA", "r": 8}'), "lora_alpha is missing", "set lora_alpha")),
    (lambda path: (write(path, tensors=None), "has no adapter_model.safetensors", "save_pretrained")),
]


@pytest.mark.parametrize("case", FILES)
def test_files(case, tmp_path):
    path, fault, fix = case(tmp_path)
    refusal(lambda: read_adapter(path, "tuned"), fault, fix)


def test_undecodable_config(tmp_path):
    (tmp_path / "adapter_config.json").write_bytes(b"\xff\xfe{")
    refusal(lambda: read_adapter(tmp_path, "tuned"), "not valid JSON", "save_pretrained")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_unreadable_config(tmp_path):
    (write(tmp_path) / "adapter_config.json").chmod(0)
    refusal(lambda: read_adapter(tmp_path, "tuned"), "cannot be read", "save_pretrained")


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


@pytest.mark.parametrize("file", ["adapter_model.bin", "adapter_model.pt", "weights.pth"])
def test_pickles_are_refused_and_not_loaded(file, tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    (write(tmp_path, tensors=None) / file).write_bytes(pickle.dumps(Bomb()))
    refusal(lambda: read_adapter(tmp_path, "tuned"), file, "pickle", "safetensors.torch.save_file")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"",
        lambda data: data[:5],
        lambda data: data[:200],
        lambda data: data[:-4],
        lambda data: data + b"\0" * 8,
        lambda data: b"garbage " * 100,
        lambda data: (2**62).to_bytes(8, "little") + data[8:],
        lambda data: data.replace(b'"F32"', b'"Q32"'),
        lambda data: data.replace(b"[8,64]", b"[9,64]"),
    ],
)
def test_damaged_safetensors(spoil, tmp_path):
    file = write(tmp_path) / "adapter_model.safetensors"
    file.write_bytes(spoil(file.read_bytes()))
    refusal(lambda: read_adapter(tmp_path, "tuned"), "adapter_model.safetensors", "again")


def shards(directory, weight_map, files):
    write(directory, tensors=None)
    for name, tensors in files.items():
        save_file(tensors, directory / name)
    (directory / "adapter_model.safetensors.index.json").write_text(json.dumps(weight_map))
    return directory


def test_shards(tmp_path):
    files = {"one.safetensors": pair(Q), "two.safetensors": pair(O)}
    weight_map = {key: name for name, tensors in files.items() for key in tensors}
    adapter = read_adapter(shards(tmp_path, {"weight_map": weight_map}, files))
    assert list(adapter.modules) == [O, Q]
    assert torch.equal(
        adapter.modules[Q].a.tensor.read(), files["one.safetensors"][f"base_model.model.{Q}.lora_A.weight"]
    )


@pytest.mark.parametrize(
    ("index", "fault"),
    [
        ([], "no weight_map"),
        ({}, "no weight_map"),
        ({"weight_map": {"x": 1}}, "no weight_map"),
        ({"weight_map": {"x": "../one.safetensors"}}, "'../one.safetensors'"),
        ({"weight_map": {"x": "/etc/passwd"}}, "'/etc/passwd'"),
        ({"weight_map": {"x": "adapter_config.json"}}, "'adapter_config.json'"),
        ({"weight_map": {"x": "none.safetensors"}}, "'none.safetensors'"),
        ({"weight_map": dict.fromkeys([*pair(Q), "z"], "one.safetensors")}, "lists 'z' in one.safetensors"),
        ({"weight_map": dict.fromkeys(list(pair(Q))[:1], "one.safetensors")}, "lora_B.weight' of one.safetensors"),
    ],
)
def test_faulty_index(index, fault, tmp_path):
    directory = tmp_path / "adapter"
    directory.mkdir()
    save_file(pair(Q), tmp_path / "one.safetensors")
    shards(directory, index, {"one.safetensors": pair(Q)})
    refusal(lambda: read_adapter(directory, "tuned"), "index.json", fault)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(value, dtype):
    values = torch.randn(8, 16).to(dtype)
    check_finite("tuned", "q_proj.lora_A.weight", values)
    values[-1, -1] = value
    refusal(
        lambda: check_finite("tuned", "q_proj.lora_A.weight", values), "'q_proj.lora_A.weight' holds NaN or infinite"
    )


@pytest.mark.parametrize(
    ("tensors", "path", "fault", "fix"),
    [
        (PACKED | pair(O), O, "dense shape (8, 64)", "leave the module out of use_bdlora.target_modules_bd_a"),
        (PACKED | pair(O, a=(8, 20)), O, "80 inputs and 64 outputs", "base model"),
        (PACKED | pair(Q, b=(128, 2)), Q, "64 inputs and 128 outputs", "base model"),
        (PLAIN | pair(Q, a=(8, 16)), Q, "packed in 4 diagonal blocks", "set use_bdlora as in training"),
    ],
)
def test_sizes_of_another_model(tensors, path, fault, fix):
    packed = tensors[f"base_model.model.{Q}.lora_B.weight"].shape[1] == 2
    adapter = adapter_from_tensors("tuned", tensors, CONFIG | ({"use_bdlora": BD} if packed else {}))
    refusal(lambda: check_features("tuned", adapter.modules[path], 64, 64), fault, fix)


def test_the_error_survives_pickling():
    error = AdapterError("tuned", "r = 0", "set r")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.fix) == (AdapterError, str(error), "set r")


def test_a_refusal_is_one_line_of_bounded_length_whatever_names_it_quotes():
    error = AdapterError("tuned\n", "tensor 'x\r\n\u2028\ud800\x1b[31m' " + "y" * 10_000, "save it again")
    message = str(error)
    assert message.isprintable()
    assert message.encode()
    assert len(message) < 2100
    assert message.endswith("Fix: save it again.")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    """r lora_alpha target_modules exclude_modules layers_to_transform layers_pattern rank_pattern alpha_pattern
    use_rslora use_bdlora fan_in_fan_out init_lora_weights base_model_name_or_path ensure_weight_tying bias
    modules_to_save runtime_config other""".split()  # noqa: SIM905
)
BLOCK_JSON = st.dictionaries(st.sampled_from([*BD, "match_strict", "other"]), JSON | st.lists(st.text(max_size=4)))


@given(fields=st.dictionaries(FIELDS, JSON | BLOCK_JSON, max_size=3))
@settings(max_examples=150, deadline=None)
def test_any_config_is_read_or_refused(fields):
    try:
        adapter = adapter_from_tensors("tuned", PLAIN, CONFIG | fields)
    except AdapterError as error:
        message = str(error)
    else:
        assert adapter.modules.keys() == {Q, O}
        return
    assert "'tuned'" in message
    assert len(message) < 2000


@given(raw=JSON)
def test_any_json_is_refused(raw):
    with pytest.raises(AdapterError):
        AdapterConfig.from_dict("tuned", raw)
