"""Adapters saved by PEFT: what we read, expanded and merged into the base weights, gives PEFT's logits."""

import copy
import json
import warnings

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

peft = pytest.importorskip("peft")
from peft.tuners.tuners_utils import check_target_module_exists  # noqa: E402
from peft.utils.other import get_pattern_key  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from sgl_bdlora.adapters import AdapterConfig, AdapterError, check_features, dense_form, read_adapter  # noqa: E402

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
SEVEN = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
COLUMN = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
ROW = ["o_proj", "down_proj"]
TOKENS = torch.arange(24).reshape(2, 12) * 7 % 96


def block_diagonal(nblocks, bd_a=ROW, bd_b=COLUMN, **extra):
    return peft.BdLoraConfig(target_modules_bd_a=bd_a, target_modules_bd_b=bd_b, nblocks=nblocks, **extra)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """The model is tiny: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pristine():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=96,
        tie_word_embeddings=False,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def base(pristine):
    return copy.deepcopy(pristine)


def save(base, directory, edit=None, **fields):
    """Save a PEFT adapter of random weights; edit(config dict) changes its adapter_config.json afterwards."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**{"r": 16, "lora_alpha": 24, **fields}))
        for name, parameter in model.named_parameters():
            if "lora_" in name:  # by hand: PEFT starts a block-diagonal B at zero in any case
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(directory)
    if edit is not None:
        file = directory / "adapter_config.json"
        config = json.loads(file.read_text())
        edit(config)
        file.write_text(json.dumps(config))
    return directory


def peft_logits(base, directory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), directory).eval()
    with torch.no_grad():
        return model(TOKENS).logits


def our_logits(base, adapter):
    merged = copy.deepcopy(base)
    for module in adapter.modules.values():
        layer = merged.get_submodule(module.path)
        a, b = dense_form(module)
        delta = module.scale * b @ a
        layer.weight.data += delta.T if isinstance(layer, torch.nn.Embedding) else delta
    with torch.no_grad():
        return merged(TOKENS).logits


def assert_same_as_peft(base, directory):
    adapter = read_adapter(directory)
    expected = peft_logits(base, directory)
    with torch.no_grad():
        unadapted = base(TOKENS).logits
    assert (expected - unadapted).abs().max() > 1e-2
    torch.testing.assert_close(our_logits(base, adapter), expected, atol=1e-5, rtol=1e-5)
    for module in adapter.modules.values():
        if not module.embedding:
            layer = base.get_submodule(module.path)
            check_features(adapter.name, module, layer.in_features, layer.out_features)
    return adapter


PLAIN = {
    "defaults": {"target_modules": SEVEN},
    "rank 5, alpha 3.5": {"target_modules": ["q_proj", "v_proj"], "r": 5, "lora_alpha": 3.5},
    "rank-stabilised": {"target_modules": ATTENTION, "use_rslora": True},
    "rank and alpha patterns": {
        "target_modules": SEVEN,
        "rank_pattern": {"q_proj": 4, r"layers\.[01]\.mlp\..*": 2, "model.layers.2.self_attn.o_proj": 7},
        "alpha_pattern": {r"layers\.1\.self_attn\.(q|k)_proj": 5, "down_proj": 1.5},
    },
    "patterns, rank-stabilised": {
        "target_modules": ATTENTION,
        "use_rslora": True,
        "rank_pattern": {"v_proj": 3},
        "alpha_pattern": {"o_proj": 7},
    },
    "first of two patterns": {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 4, "self_attn.*": 2}},
    # PEFT sorts the keys on saving, so that a reloaded adapter may scale otherwise than in training. The file decides.
    "patterns sorted on saving": {"target_modules": ["q_proj"], "alpha_pattern": {"q_proj": 4, ".*proj": 2}},
    "regular expression": {"target_modules": r".*layers\.(0|2)\.(self_attn\.[qk]_proj|mlp\.down_proj)"},
    "all-linear": {"target_modules": "all-linear"},
    "full paths": {"target_modules": ["model.layers.1.mlp.up_proj", "layers.0.self_attn.q_proj"]},
    "one layer": {"target_modules": SEVEN, "layers_to_transform": 1},
    "two layers": {"target_modules": SEVEN, "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "layer patterns": {"target_modules": SEVEN, "layers_to_transform": [2], "layers_pattern": ["h", "layers"]},
    "excluded names": {"target_modules": SEVEN, "exclude_modules": ["model.layers.0.self_attn.q_proj", "down_proj"]},
    "excluded expression": {"target_modules": SEVEN, "exclude_modules": r".*\.1\..*"},
    "embedding and lm_head": {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "use_rslora": True},
    "fan_in_fan_out": {"target_modules": ["q_proj"], "fan_in_fan_out": True},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    "mica": {"target_modules": ["q_proj"], "init_lora_weights": "mica"},
}


@pytest.mark.parametrize("case", PLAIN)
def test_plain(case, base, tmp_path):
    adapter = assert_same_as_peft(base, save(base, tmp_path, **PLAIN[case]))
    assert (adapter.kind, adapter.nblocks) == ("plain", 1)


def test_all_linear_in_the_file(base, tmp_path):
    def edit(config):
        config["target_modules"] = "all-linear"

    adapter = assert_same_as_peft(base, save(base, tmp_path, edit, target_modules="all-linear"))
    assert len(adapter.modules) == 21


@pytest.mark.parametrize("nblocks", [1, 2, 4, 8])
def test_block_diagonal(nblocks, base, tmp_path):
    adapter = assert_same_as_peft(base, save(base, tmp_path, target_modules=SEVEN, use_bdlora=block_diagonal(nblocks)))
    assert (adapter.kind, adapter.nblocks) == ("plain" if nblocks == 1 else "block-diagonal", nblocks)
    assert len(adapter.modules) == 21
    assert all(module.rank == 16 and module.scale == 1.5 for module in adapter.modules.values())
    q, o = (adapter.modules[f"model.layers.0.self_attn.{name}"] for name in ("q_proj", "o_proj"))
    assert (q.a.blocks, q.b.blocks, q.b.tensor.shape) == (1, nblocks, (64, 16 // nblocks))
    assert (o.a.blocks, o.b.blocks, o.a.tensor.shape) == (nblocks, 1, (16, 64 // nblocks))


BLOCK_DIAGONAL = {
    "rank-stabilised": {"use_rslora": True, "use_bdlora": block_diagonal(4)},
    "rank and alpha patterns": {
        "rank_pattern": {"q_proj": 8, r"layers\.1\.mlp\..*": 4},
        "alpha_pattern": {"down_proj": 3},
        "use_bdlora": block_diagonal(4),
    },
    "one layer": {"layers_to_transform": [1], "use_bdlora": block_diagonal(8)},
    "expression": {"target_modules": r".*\.(q|o)_proj", "use_bdlora": block_diagonal(2)},
    "substrings": {"use_bdlora": block_diagonal(2, ["o_pr", "mlp.down"], ["layers.0.self_attn.q", *COLUMN])},
    "wrong side": {"use_bdlora": block_diagonal(4, COLUMN, ROW)},
}


@pytest.mark.parametrize("case", BLOCK_DIAGONAL)
def test_block_diagonal_with(case, base, tmp_path):
    adapter = assert_same_as_peft(base, save(base, tmp_path, **{"target_modules": SEVEN, **BLOCK_DIAGONAL[case]}))
    assert adapter.kind == "block-diagonal"


@pytest.mark.parametrize("strict", ["absent", True, False])
def test_match_strict(strict, base, tmp_path):
    def edit(config):
        if strict == "absent":
            del config["use_bdlora"]["match_strict"]
        else:
            config["use_bdlora"]["match_strict"] = strict

    assert_same_as_peft(base, save(base, tmp_path, edit, target_modules=SEVEN, use_bdlora=block_diagonal(4)))


def test_a_mix_of_block_diagonal_and_plain_modules(base, tmp_path):
    bd = block_diagonal(4, ["o_proj"], ["q_proj"], match_strict=False)
    adapter = assert_same_as_peft(base, save(base, tmp_path, target_modules=[*SEVEN, "lm_head"], use_bdlora=bd))
    assert (adapter.kind, adapter.nblocks) == ("mixed", 4)


@pytest.mark.parametrize("strict", ["absent", True])
def test_strict_refuses_plain_modules_as_peft_does(strict, base, tmp_path):
    def edit(config):
        config["use_bdlora"].pop("match_strict")
        if strict != "absent":
            config["use_bdlora"]["match_strict"] = strict

    bd = block_diagonal(4, ["o_proj"], ["q_proj"], match_strict=False)
    save(base, tmp_path, edit, target_modules=SEVEN, use_bdlora=bd)
    with pytest.raises(AdapterError, match="match_strict is true"):
        read_adapter(tmp_path)
    with pytest.raises(ValueError, match="matches neither"):
        peft_logits(base, tmp_path)


REFUSED_BY_BOTH = {
    "both lists": (
        {"use_bdlora": {"nblocks": 4, "target_modules_bd_a": ["o_"], "target_modules_bd_b": ["proj"]}},
        "both",
    ),
    "overlap": ({"use_bdlora": {"target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["o_proj"]}}, "both"),
    "empty object": ({"use_bdlora": {}}, "match_strict"),
    "blocks do not divide": (
        {"use_bdlora": {"nblocks": 3, "target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["q_proj"]}},
        "not divisible",
    ),
    "layers and expression": ({"target_modules": ".*proj", "layers_to_transform": [0]}, "layers_to_transform"),
    "pattern without layers": ({"layers_pattern": "layers"}, "layers_pattern"),
    "mica": (
        {
            "init_lora_weights": "mica",
            "use_bdlora": {"target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["q_proj"]},
        },
        "mica",
    ),
}


@pytest.mark.parametrize("case", REFUSED_BY_BOTH)
def test_refused_by_peft_too(case, base, tmp_path):
    fields, words = REFUSED_BY_BOTH[case]
    save(base, tmp_path, lambda config: config.update(fields), target_modules=["q_proj", "o_proj"])
    with pytest.raises(AdapterError, match=words):
        read_adapter(tmp_path)
    with pytest.raises(ValueError):  # noqa: PT011 (PEFT's words are not ours to check)
        peft_logits(base, tmp_path)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_initialisations_that_change_the_base_weights(init, base, tmp_path):
    """Refused as they are; exact once PEFT has converted them."""
    fields = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": init}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**fields))
        # As PEFT's documentation says to do before training: from here on the name means a plain reload.
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "initial")
        model.peft_config["default"].init_lora_weights = init
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data += 0.1 * torch.randn_like(parameter)
        with torch.no_grad():
            trained = model.eval()(TOKENS).logits
        model.save_pretrained(tmp_path / "raw")
        model.save_pretrained(
            tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
        )
    with pytest.raises(AdapterError, match="init_lora_weights"):
        read_adapter(tmp_path / "raw")
    adapter = assert_same_as_peft(base, tmp_path / "converted")
    torch.testing.assert_close(our_logits(base, adapter), trained, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_factors_are_read_in_their_own_dtype(dtype, base, tmp_path):
    save(base.to(dtype), tmp_path, target_modules=SEVEN, use_bdlora=block_diagonal(4))
    tensors = peft.utils.load_peft_weights(tmp_path, device="cpu")
    modules = read_adapter(tmp_path).modules.values()
    for factor in (factor for module in modules for factor in (module.a, module.b)):
        assert factor.tensor.dtype == tensors[factor.tensor.key].dtype
        assert torch.equal(factor.tensor.read(), tensors[factor.tensor.key])


NAMES = st.lists(st.sampled_from([*SEVEN, "proj", "self_attn.q_proj", "model.layers.1.mlp.up_proj", "lm_head"]))
PATHS = st.builds(
    "{}layers.{}.{}".format,
    st.sampled_from(["model.", "", "model.language_model.", "vision.blocks.3.", "model.layers.2.inner."]),
    st.integers(0, 12),
    st.sampled_from([f"self_attn.{name}" for name in ATTENTION] + [f"mlp.{name}" for name in SEVEN[4:]]),
) | st.sampled_from(["lm_head", "model.embed_tokens"])


@given(
    targets=NAMES | st.sampled_from([r".*\.(q|v)_proj", r"model\.layers\.\d\.mlp\..*"]),
    excluded=NAMES | st.sampled_from([r".*\.1\..*"]),
    layers=st.none() | st.integers(0, 3) | st.lists(st.integers(0, 12), max_size=3),
    pattern=st.none() | st.sampled_from(["layers", "blocks"]) | st.lists(st.sampled_from(["h", "layers", "blocks"])),
    path=PATHS,
)
@example(
    targets=["q_proj"], excluded=[], layers=[2], pattern="layers", path="model.layers.2.inner.layers.5.self_attn.q_proj"
)
@example(
    targets=["q_proj"], excluded=[], layers=[5], pattern=None, path="model.layers.2.inner.layers.5.self_attn.q_proj"
)
@settings(max_examples=200, deadline=None)
def test_selects_the_modules_that_peft_selects(targets, excluded, layers, pattern, path):
    if isinstance(targets, str) or layers is None:
        layers = pattern = None
    fields = {
        "target_modules": targets,
        "exclude_modules": excluded,
        "layers_to_transform": layers,
        "layers_pattern": pattern,
    }
    ours = AdapterConfig.from_dict("x", {"peft_type": "LORA", "r": 8, "lora_alpha": 8, **fields})
    assert ours.selects(path) == bool(check_target_module_exists(peft.LoraConfig(**fields), path))


@given(
    ranks=st.dictionaries(
        st.sampled_from([*SEVEN, ".*proj", r"layers\.1\..*", "q|k_proj", "up.proj"]), st.integers(1, 64)
    ),
    alphas=st.dictionaries(st.sampled_from([*SEVEN, r"mlp\..*", "o_proj|layers.2"]), st.floats(0.5, 64)),
    rslora=st.booleans(),
    path=PATHS,
)
@settings(max_examples=200, deadline=None)
def test_rank_and_scale_are_peft_s(ranks, alphas, rslora, path):
    raw = {"peft_type": "LORA", "r": 8, "lora_alpha": 12, "target_modules": SEVEN, "use_rslora": rslora}
    ours = AdapterConfig.from_dict("x", raw | {"rank_pattern": ranks, "alpha_pattern": alphas})
    rank = ranks.get(get_pattern_key(ranks, path), 8)
    alpha = alphas.get(get_pattern_key(alphas, path), 12)
    assert ours.rank_of(path)[0] == rank
    assert ours.scale_of(path) == pytest.approx(alpha / (rank**0.5 if rslora else rank))
