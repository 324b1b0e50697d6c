"""Does the look inside show what step-by-step decoding holds, and does its attention add up to the model's own?"""

from __future__ import annotations

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import evaluations
from lte_jax import LTE, GatedDeltaNet, LanguageModel, ModelConfig, restore
from lte_jax.data import Packing, Text
from lte_jax.data.tokenizer import load_tokenizer
from lte_jax.evaluate.probe import MASSES, probe

WINDOW, BUDGET, SINKS = 6, 5, 2
TEXT = "what is kept of this text, and for how long?"


@functools.cache
def build(retention: str = "learned") -> LanguageModel:
    router = dict(conv_sizes=(3,), conv_dilations=(2,))
    pattern = (
        GatedDeltaNet(num_heads=2, head_dim=4),
        LTE(num_heads=4, num_kv_heads=2, window=WINDOW, budget=BUDGET, sinks=SINKS, retention=retention, **router),
    )
    config = ModelConfig(vocab_size=260, width=16, num_layers=4, pattern=pattern, init_std=0.3, max_length=64)
    model = LanguageModel(config, rngs=nnx.Rngs(1))
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        if "router" in path and "bias" in path:  # slots are fought for
            leaf.set_value(jnp.zeros_like(leaf.get_value()))
    return model


@functools.cache
def found(retention: str = "learned"):
    return probe(build(retention), tokens())


def tokens() -> np.ndarray:
    return np.array([256, *TEXT.encode()])


@functools.cache
def stores(retention: str = "learned") -> np.ndarray:
    """[T, layers, M, K]: the positions in every store after each token, from decoding one by one."""
    model, seen = build(retention), []
    cache = model.init_cache(1)
    for token in tokens():
        _, cache = model.extend(np.array([[token]]), cache)
        seen.append(np.asarray(cache.layers[1].store.position)[:, 0])
    return np.stack(seen)


@pytest.mark.parametrize(
    "retention",
    [
        "learned",
        *(pytest.param(rule, marks=pytest.mark.exhaustive) for rule in ("recency", "random", "write_strength")),
    ],
)
def test_what_is_held_is_what_decoding_holds(retention):
    look, last = found(retention), stores(retention)[-1]
    for layer in range(2):
        for head in range(2):
            held = np.flatnonzero(look.held[layer, :, head])
            assert held.tolist() == sorted(p for p in last[layer, :, head].tolist() if p >= 0)
    assert look.counts.max() == BUDGET and look.layers == (1, 3)


def test_lives_are_those_of_the_store():
    look = found()
    for layer, head, at in np.ndindex(2, 2, len(tokens())):
        queries = [
            query
            for query in range(at, len(tokens()))
            if query - at <= WINDOW or at in stores()[query, layer, :, head].tolist()
        ]
        assert look.gone[layer, at, head] == queries[-1] + 1 and queries == list(range(at, queries[-1] + 1))
    stayed = look.lives[:, : -WINDOW - 2] > WINDOW
    assert stayed[:, :SINKS].all() and 0.05 < stayed.mean() < 0.95
    alive = look.alive(0)
    assert (alive[: WINDOW + 1] == 1).all() and 0 < alive[-WINDOW] <= 1 and np.isfinite(alive).all()


def test_attention_splits_as_that_of_the_layer():
    """The shares from a mask and softmax of their own, on the first unit's own activations."""
    look, model = found(), build()
    size, half, at = 4, 2, jnp.arange(len(tokens()))[None]

    @nnx.jit
    def layer(model):
        unit = nnx.merge(nnx.graphdef(model.units), jax.tree.map(lambda leaf: leaf[0], nnx.state(model.units)))
        x, _ = unit.blocks[0](model.embeddings(tokens()[None]), positions=at, segment_ids=None, reading="streaming")
        x, mixer = unit.blocks[1].mixer_norm(x), unit.blocks[1].mixer
        out = mixer.o_proj.weight[...]
        return mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x), mixer(x, positions=at, reading="streaming")[0], out

    q, k, v, own, out = map(np.asarray, layer(model))
    angles = np.arange(len(tokens()))[:, None] / 10000.0 ** (np.arange(half) / half)

    def heads(y) -> np.ndarray:
        y = y[0].reshape(len(tokens()), -1, size)
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        return np.concatenate(
            [y[..., :half] * cos - y[..., half:] * sin, y[..., half:] * cos + y[..., :half] * sin], axis=-1
        )

    q, k, v = heads(q), heads(k), v[0].reshape(-1, 2, size)
    expected, output = np.zeros((4, 3)), np.zeros((len(tokens()), 4, size))
    for head in range(4):
        for query in range(len(tokens())):
            kept = stores()[query, 0, :, head // 2]
            kinds = [
                0 if query - key <= WINDOW else (1 if key < SINKS else 2) if key in kept else None
                for key in range(query + 1)
            ]
            weights = np.exp(k[: query + 1, head // 2] @ q[query, head] / 2.0) * [kind is not None for kind in kinds]
            weights /= weights.sum()
            output[query, head] = weights @ v[: query + 1, head // 2]
            if query > WINDOW:
                for weight, kind in zip(weights, kinds, strict=True):
                    expected[head, kind or 0] += weight
    np.testing.assert_allclose(look.mass[0], expected / (len(tokens()) - 1 - WINDOW), atol=1e-4)
    np.testing.assert_allclose(look.mass.sum(-1), 1.0, atol=1e-5)
    # The table by hand is the layer's own attention, or the shares would say nothing.
    np.testing.assert_allclose(output.reshape(1, -1, 16) @ out, own, atol=1e-4)


def test_the_program_writes_pictures_and_one_page(tmp_path, capsys):
    restore.save_model(build(), tmp_path / "run", tokenizer=load_tokenizer("bytes"))
    (tmp_path / "text.txt").write_text(TEXT + " </script> & more")
    run = str(tmp_path / "run")
    written = evaluations.inspect(run, text=str(tmp_path / "text.txt"), length=len(tokens()) + 10)
    assert sorted(path.name for path in written) == sorted(path.name for path in (tmp_path / "run/inspect").iterdir())
    for name in ("kept", "counts", "lives", "mass"):
        assert (tmp_path / f"run/inspect/{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "run/inspect/index.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and not re.findall(r"(?:src|href)=\"(?!data:)", page)
    assert page.count("</script>") == 1
    data = json.loads(re.search(r"const found = (.*);\nconst choice", page).group(1).replace("<\\/", "</"))
    assert "".join(data["pieces"]) == TEXT + " </script>" and len(data["heads"]) == 4
    numbers = json.loads((tmp_path / "run/inspect/inspect.json").read_text())
    for layer, heads in zip(numbers["layers"], (data["heads"][:2], data["heads"][2:]), strict=True):
        assert layer["held"] == [sum(held for _, held in head["life"].values()) for head in heads]
        np.testing.assert_allclose(np.sum([layer["mass"][name] for name in MASSES], axis=0), 1, atol=1e-4)
    assert "attention mass" in capsys.readouterr().out


def test_of_a_packed_row_one_document_is_looked_at(tmp_path, monkeypatch):
    """Not its neighbours and the padding after them, as if they were one text."""
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(("a few words", "more words")):
        (tmp_path / f"texts/{number}.txt").write_text(text)
    restore.save_model(build(), tmp_path / "run", tokenizer=load_tokenizer("bytes"))
    given = [f"path={tmp_path / 'texts'}", "packing.length=48", "packing.method=greedy"]
    rows = Text(path=str(tmp_path / "texts"), packing=Packing(48, "greedy")).rows()
    monkeypatch.setattr(Text, "rows", lambda self, split, batch_size: rows[:1])
    seen = []
    monkeypatch.setattr(evaluations, "probe", lambda model, tokens: seen.append(tokens) or probe(model, tokens))
    evaluations.inspect(str(tmp_path / "run"), kind="Text", assignments=given)
    assert seen == [[256, *b"a few words", 257]]


def test_what_cannot_be_inspected_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no lte layer to look into; its layers are gated_deltanet"):
        plain = ModelConfig(vocab_size=8, width=8, num_layers=1, pattern=(GatedDeltaNet(num_heads=1, head_dim=4),))
        probe(LanguageModel(plain, rngs=nnx.Rngs(0)), tokens())
    with pytest.raises(ValueError, match="token id 260 is outside the vocabulary"):
        probe(build(), np.array([260]))
    with pytest.raises(ValueError, match="at least 1 token"):
        probe(build(), np.array([], np.int32))
    restore.save_model(build(), tmp_path / "bare")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        evaluations.inspect(str(tmp_path / "bare"), text=str(tmp_path / "empty.txt"))
    with pytest.raises(ValueError, match="the files hold no text"):
        evaluations.inspect(str(tmp_path / "bare"), text=str(tmp_path / "empty.txt"), tokenizer="bytes")
    with pytest.raises(ValueError, match="names no data set"):
        evaluations.inspect(str(tmp_path / "bare"))
    assert not (tmp_path / "bare" / "inspect").exists()
