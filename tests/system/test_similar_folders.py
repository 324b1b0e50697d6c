"""Are folders right that the reference does not hold? Other heads, windows, dilations, routing, and padding.

Logits, scores, cached decoding, the training loss and its gradients, against ``authors_truth``, which knows nothing of
this project and is itself held to the authors' arrays.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import lte_jax
from lte_jax import NSA, FullAttention, GatedDeltaNet
from lte_jax.convert import abstract_model, to_authors, weight_names
from lte_jax.hf_config import MODEL_TYPES, model_config_from_hf, model_config_to_hf
from lte_jax.losses import training_loss
from tests.system import authors_truth

REFERENCE = Path(__file__).parent.parent / "data" / "reference"
FOLDERS = ["gdn", "gdn_swa", "gdn_attn", "gdn_lte", "gdn_nsa", "transformer", "nsa"]
TOKENS, PADDING = 43, 6

SMALL = dict(hidden_size=24, num_hidden_layers=2, vocab_size=61, intermediate_size=40, max_position_embeddings=64)
LTE = dict(attn_type="lte", layers=[1], num_heads=6, num_kv_heads=2, window_size=10, buffer_size=5, sink_size=1)
SIMILAR = {
    "LTE: one KV head, two unlike convolutions, relu, wide values, biases": (
        "gdn_lte",
        dict(expand_v=2, head_dim=6, num_heads=3, num_v_heads=6),  # the last is of no effect in their hybrid
        dict(LTE, num_kv_heads=1, conv_size=[3, 5], conv_dilation=[1, 2], routing_method="relu", qkv_bias=True),
    ),
    "LTE: a router for the layer, one wide convolution, no sinks, odd value size": (
        "gdn_lte",
        dict(expand_v=1.5, head_dim=6, num_heads=2, use_gate=False),
        dict(LTE, conv_size=[3], conv_dilation=[4], routing_shared="layer", sink_size=0, l1_lambda_shared="layer"),
    ),
    "GDN: more value heads, negative eigenvalues, no convolution; full attention below, few KV heads": (
        "gdn_attn",
        dict(num_heads=2, num_v_heads=4, head_dim=6, allow_neg_eigval=True, use_short_conv=False),
        dict(layers=[0], num_heads=4, num_kv_heads=1, window_size=None, qk_norm=True),  # the last is not read either
    ),
    "transformer: normalised queries and keys, few KV heads, a window, biases, an untied head": (
        "transformer",
        dict(num_heads=4, num_kv_heads=2, qk_norm=True, window_size=7, qkv_bias=True, tie_word_embeddings=False),
        None,
    ),
    "NSA: other groups, blocks and counts": (
        "nsa",
        dict(num_heads=6, num_kv_heads=2, block_size=5, block_counts=3, window_size=7),
        None,
    ),
}


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_second_opinion_agrees_with_the_authors(folder):
    golden = load_file(REFERENCE / folder / "golden.safetensors")
    logits, scores = authors_truth.forward(REFERENCE / folder, golden["input_ids"][0])
    np.testing.assert_allclose(logits, golden["logits"][0], atol=1e-4, rtol=0)
    for layer, found in scores.items():
        np.testing.assert_allclose(found[:-6], golden[f"score.{layer}"][0], atol=1e-5, rtol=0)


def test_the_second_opinion_decodes_as_the_authors_do():
    folder = REFERENCE / "decode_lte"
    golden = load_file(folder / "golden.safetensors")
    logits = authors_truth.decode(folder, golden["input_ids"][0], int(golden["prefill_len"]))
    np.testing.assert_allclose(logits, golden["logits"][0], atol=1e-4, rtol=0)


def test_the_second_opinion_has_the_authors_loss_and_gradients():
    folder = REFERENCE / "gdn_lte"
    golden = load_file(folder / "golden.safetensors")
    along = {name.removeprefix("grad."): golden[name] for name in golden if name.startswith("grad.")}
    found = [authors_truth.derivative(folder, ids, golden["train.l1_lambda"], along) for ids in golden["input_ids"]]
    loss, slope = np.mean(found, axis=0)
    np.testing.assert_allclose(loss, golden["train.loss"], atol=1e-5)
    np.testing.assert_allclose(slope, sum(np.sum(np.float64(value) ** 2) for value in along.values()), rtol=1e-4)


def rows() -> np.ndarray:
    return np.random.default_rng(1).integers(0, SMALL["vocab_size"], (2, TOKENS))


def make_folder(folder: Path, base: str, changes: dict, attn: dict | None) -> None:
    """A folder like ``base`` with other settings, and weights drawn so that every branch and mask matters."""
    values = {**json.loads((REFERENCE / base / "config.json").read_text()), **SMALL, **changes}
    if attn is not None:
        values["attn"] = {**values["attn"], **attn}
    model = lte_jax.LanguageModel(model_config_from_hf(values), rngs=nnx.Rngs(0))
    lte_jax.save_pretrained(model, folder)
    tensors, rng = load_file(folder / "model.safetensors"), np.random.default_rng(5)
    for name, value in tensors.items():
        scale = 0.3 if value.ndim < 2 or "router" in name else value[0].size ** -0.5
        tensors[name] = (rng.normal(size=value.shape) * scale + ("norm" in name)).astype(np.float32)
    for layer in values["attn"]["layers"] if "buffer_size" in (values.get("attn") or {}) else ():
        balance(values, tensors, layer)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(values))


def balance(values: dict, tensors: dict, layer: int) -> None:
    """Moves the biases of a router so that about half of its scores are positive."""
    config = {**values, "attn": {**values["attn"], "routing_method": "sigmoid"}}
    weights = {name: value.astype(np.float64) for name, value in tensors.items()}
    found = [authors_truth.run(config, weights, row, "train")[1][layer] for row in rows()]
    chances = np.concatenate(found) + 0.5
    bias = tensors[f"model.layers.{layer}.attn.router.conv_stack.proj.bias"]
    bias -= np.median(np.log(chances / (1 - chances)), axis=0 if len(bias) > 1 else None).astype(bias.dtype)


@pytest.mark.rotating
@pytest.mark.parametrize("name", SIMILAR)
def test_a_similar_folder_is_read_right_with_padding_at_the_left_and_written_back(name, tmp_path):
    make_folder(tmp_path / "in", *SIMILAR[name])
    check(tmp_path)


def check(tmp_path):
    """Of the folder ``in``: logits and scores with padding, decoding, loss and gradients, and writing it back."""
    model = lte_jax.from_pretrained(tmp_path / "in")
    ids = rows()
    check_logits(model, tmp_path / "in", ids)
    check_decoding(model, tmp_path / "in", ids)
    check_gradients(model, tmp_path / "in", ids[0])

    lte_jax.save_pretrained(model, tmp_path / "out")
    ours, theirs = (load_file(tmp_path / part / "model.safetensors") for part in ("out", "in"))
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        if "l1_lambda" not in key and "num_kept" not in key:
            np.testing.assert_array_equal(ours[key], value, err_msg=key)
    assert lte_jax.from_pretrained(tmp_path / "out").config == model.config


def check_logits(model, folder, ids):
    mask = np.ones_like(ids)
    mask[1, :PADDING] = 0
    output = model(ids, mask)
    selected = []
    for row, start in ((0, 0), (1, PADDING)):
        logits, scores = authors_truth.forward(folder, ids[row, start:])
        assert logits.std() > 0.1
        np.testing.assert_allclose(output.logits[row, start:], logits, atol=2e-4, rtol=0)
        for layer, found in scores.items():
            selected.append(np.mean(found > 0))
            np.testing.assert_allclose(output.scores[layer][row, start:], found, atol=1e-5, rtol=1e-5)
    if selected:
        assert 0.1 < np.mean(selected) < 0.9, "the routers keep everything or nothing: the case pins nothing down"


def check_decoding(model, folder, ids, prompt=27):
    """A prompt padded at the left, single steps, and a piece of several tokens at the end."""
    mask = np.ones_like(ids)
    mask[1, :PADDING] = 0
    cache, pieces = model.init_cache(len(ids)), []
    for start, stop in [(0, prompt), *((i, i + 1) for i in range(prompt, TOKENS - 4)), (TOKENS - 4, TOKENS)]:
        logits, cache = model.extend(ids[:, start:stop], cache, mask[:, :stop])
        pieces.append(logits)
    found = np.concatenate(pieces, axis=1)
    for row, start in ((0, 0), (1, PADDING)):
        expected = authors_truth.decode(folder, ids[row, start:], prompt - start)
        np.testing.assert_allclose(found[row, start:], expected, atol=2e-4, rtol=0)


def check_gradients(model, folder, ids):
    """Along (g + noise) / |g|^2 every tensor weighs the same, so that the slope tells an error in any of them.

    Those of a few numbers, such as A_log, go by themselves: each is a sum over all tokens whose terms nearly cancel.
    """
    graph, state = nnx.split(model)
    config = model.config
    layers = sum(name == "lte" for name in config.layer_names())
    heads = next((mixer.kv_heads for mixer in config.pattern if hasattr(mixer, "budget")), 1)
    rng = np.random.default_rng(3)
    penalty = rng.random((layers, heads)).astype(np.float32)

    @jax.jit
    @jax.value_and_grad
    def compute(state):
        return training_loss(nnx.merge(graph, state), ids[None].astype(np.int32), penalty if layers else None)[0]

    loss, gradients = compute(state)
    groups: list[dict] = [{}, {}]
    tensors = [0, 0]
    for path, variable in nnx.to_flat_state(gradients):
        value = np.asarray(variable.get_value())
        for index, names in enumerate(weight_names(path, config)):
            gradient = np.float64(to_authors(path, value[index] if path[0] == "units" else value))
            size = np.linalg.norm(gradient)
            assert size > 1e-7, names
            noise = rng.normal(size=gradient.shape)
            towards = gradient / size + 0.7 * noise / np.linalg.norm(noise)
            towards /= np.sum(gradient * towards)
            few = gradient.size <= 8
            groups[few] |= dict.fromkeys(names, towards)  # several: copies of one router for all layers
            tensors[few] += 1
    # With negative eigenvalues every token may be a reflection, and rounding does not fade.
    reflected = any(getattr(mixer, "allow_neg_eigval", False) for mixer in config.pattern)
    for direction, count, bound in zip(groups, tensors, (3e-4 if reflected else 3e-5, 1e-3), strict=True):
        true_loss, slope = authors_truth.derivative(folder, ids, penalty, direction)
        np.testing.assert_allclose(loss, true_loss, atol=1e-5, rtol=0)
        np.testing.assert_allclose(slope, count, rtol=bound)


def drawn(seed: int) -> tuple[str, dict, dict | None]:
    """A folder's base and settings, all drawn."""
    rng = np.random.default_rng(seed)

    def of(*values):
        return values[rng.integers(len(values))]

    K, size = of(1, 2, 3), of(4, 6, 8)
    heads = K * of(1, 2, 3)
    width = dict(hidden_size=heads * size)
    delta = dict(num_heads=of(1, 2, 3), head_dim=of(4, 6), expand_v=of(1, 1.5, 2), use_gate=bool(of(0, 1)))
    attention = dict(num_heads=heads, num_kv_heads=K, qkv_bias=bool(of(0, 1)))
    base = of("gdn_lte", "gdn_lte", "gdn_lte", "gdn_swa", "gdn_nsa", "nsa", "transformer", "gdn")
    blocks = dict(block_size=of(2, 3, 5, 8), block_counts=of(3, 4, 5), window_size=of(1, 4, 9))
    tied = dict(tie_word_embeddings=bool(of(0, 1)), num_hidden_layers=of(2, 3))
    if base == "gdn":
        more = dict(num_v_heads=delta["num_heads"] * of(1, 2), allow_neg_eigval=bool(of(0, 1)))
        return base, {**width, **tied, **delta, **more, "use_short_conv": bool(of(0, 1)), "conv_size": of(2, 4)}, None
    if base == "transformer":
        return base, {**width, **tied, **attention, "qk_norm": bool(of(0, 1)), "window_size": of(None, 5, 11)}, None
    if base == "nsa":
        return base, {**width, **tied, **attention, **blocks}, None
    layers = dict(layers=list(range(of(0, 1), tied["num_hidden_layers"], 2)))
    if base == "gdn_nsa":
        return base, {**width, **tied, **delta}, {**layers, **attention, **blocks, "attn_type": "nsa"}
    if base == "gdn_swa":
        return base, {**width, **tied, **delta}, {**layers, **attention, "window_size": of(2, 3, 7, 16)}
    convolutions = of(([3], [1]), ([3], [3]), ([5], [1]), ([3, 3], [1, 2]), ([3, 5], [2, 1]), ([3, 3], [2, 1]))
    if 2 * size % 2 ** len(convolutions[0]):
        convolutions = ([3], [2])
    side = sum((taps - 1) * dilation // 2 for taps, dilation in zip(*convolutions, strict=True))
    sinks = of(0, 1, 2)
    router = dict(conv_size=convolutions[0], conv_dilation=convolutions[1], routing_method=of("sigmoid", "relu"))
    router |= dict(routing_shared=of("head", "layer"), l1_lambda_shared="layer", routing_grad=bool(of(0, 1, 1)))
    lte = dict(attn_type="lte", window_size=2 * side + of(0, 1, 3), buffer_size=sinks + of(1, 2, 5), sink_size=sinks)
    return base, {**width, **tied, **delta}, {**layers, **attention, **router, **lte}


@pytest.mark.rotating
@pytest.mark.parametrize("seed", range(100))
def test_a_hundred_drawn_folders_are_read_right(seed, tmp_path):
    make_folder(tmp_path / "in", *drawn(seed))
    check(tmp_path)


def test_one_router_for_all_layers_is_read_from_one_copy_or_from_many(tmp_path):
    attn = dict(LTE, layers=[0, 1], conv_size=[3], conv_dilation=[4], routing_shared="all")
    make_folder(tmp_path / "in", "gdn_lte", dict(num_heads=2, head_dim=6, expand_v=1), attn)
    many = load_file(tmp_path / "in" / "model.safetensors")
    copies = [name for name in many if ".1.attn.router" in name]
    assert copies
    for name in copies:
        many[name] = many[name.replace(".1.attn", ".0.attn")]
    save_file(many, tmp_path / "in" / "model.safetensors")
    whole = lte_jax.from_pretrained(tmp_path / "in")
    save_file({name: value for name, value in many.items() if name not in copies}, tmp_path / "in/model.safetensors")
    one = lte_jax.from_pretrained(tmp_path / "in")
    for ours, theirs in zip(jax.tree.leaves(nnx.state(one)), jax.tree.leaves(nnx.state(whole)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("mixers", "message"),
    [
        (
            (GatedDeltaNet(num_heads=2, head_dim=8), FullAttention(num_heads=2, qk_norm=True)),
            "hybrid models have no qk_norm; only their transformer has",
        ),
        ((FullAttention(num_heads=2, head_dim=4),), "full_attention: head_dim=4 .* width / num_heads = 8"),
        ((NSA(num_heads=4, num_kv_heads=2, head_dim=8),), "head_dim=8: .* heads of 64"),
    ],
)
def test_models_of_ours_that_the_authors_do_not_have_are_refused(tmp_path, mixers, message):
    config = lte_jax.ModelConfig(vocab_size=7, width=16, num_layers=2, pattern=mixers)
    with pytest.raises(ValueError, match=message):
        lte_jax.save_pretrained(abstract_model(config), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_hybrid_config_without_a_setting_names_it():
    attn = {name: value for name, value in LTE.items() if name != "buffer_size"}
    values = dict(model_type="hybrid_gated_deltanet", vocab_size=7, hidden_size=16, num_hidden_layers=2)
    with pytest.raises(ValueError, match="attn has no buffer_size"):
        model_config_from_hf({**values, "attn": {**attn, "layers": [1]}})


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_config_may_leave_out_every_setting_that_has_a_default(model_type):
    config = model_config_from_hf({"model_type": model_type})
    assert config == model_config_from_hf({**model_config_to_hf(config), "model_type": model_type})
