"""Does one table place every array, and does every mesh compute what one device computes?"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lte_jax import NSA, FullAttention, GatedDeltaNet, partition, sharding
from lte_jax.experiment import step_config
from lte_jax.mixers import mixer_name
from lte_jax.sharding import MeshConfig, make_mesh
from lte_jax.step import Builder
from pallas_kernels.window_attention import NEVER
from tests.system.mesh_cases import (
    MIXERS,
    SMALL,
    batch_of,
    check_collectives,
    collectives,
    config_of,
    loss_and_gradients,
    packed_rows,
)
from tests.system.tiny import DATA, tiny_experiment, tiny_model
from tests.tolerances import assert_close


def test_the_table_splits_what_divides_and_replicates_the_rest():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    assert sharding.spec(("embed", "heads"), (6, 8), mesh) == PartitionSpec("fsdp", "tensor")
    assert sharding.spec(("embed", "kv_heads"), (6, 2), mesh) == PartitionSpec("fsdp", None)
    assert sharding.spec(("embed", "embed"), (6, 6), mesh) == PartitionSpec("fsdp", None)
    assert sharding.spec(("embed",), (24, 6), mesh) == PartitionSpec(None, "fsdp")
    every = sharding.spec(("embed", "heads"), (6, 8), mesh, every=True)
    assert every == PartitionSpec(("fsdp", "data", "sequence"), "tensor")
    with pytest.raises(ValueError, match="'width' is not in the table"):
        sharding.spec(("width",), (6,), mesh)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(devices=4), "this launch has 8"),
        (MeshConfig(data=3), "3 places for 8"),
        (MeshConfig(tensor=3), "does not divide the 8 devices"),
        (MeshConfig(fsdp=0), "at least 1"),
    ],
)
def test_meshes_that_do_not_fit_the_devices_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(config)


def test_batches_that_the_mesh_does_not_divide_are_refused():
    mesh = make_mesh(MeshConfig(data=4, sequence=2))
    with pytest.raises(ValueError, match="batch 6 is not a multiple of data x fsdp = 4"):
        sharding.batch_sharding((6, 8), mesh)
    with pytest.raises(ValueError, match="length 7"):
        sharding.batch_sharding((8, 7), mesh)


@pytest.mark.parametrize(
    ("mixer", "tensor", "message"),
    [
        (FullAttention(num_heads=6, num_kv_heads=2, head_dim=8), 4, "tensor=4 must divide its 6 heads"),
        (FullAttention(num_heads=12, num_kv_heads=3, head_dim=8), 4, "or be a multiple of, its 3 key/value heads"),
        (NSA(num_heads=8, num_kv_heads=2, head_dim=8), 4, "nsa: mesh.tensor=4 must divide its 2 key/value heads"),
        (GatedDeltaNet(num_heads=2, head_dim=4), 4, "gated_deltanet: mesh.tensor=4 must divide its 2 heads"),
    ],
)
def test_heads_that_do_not_fit_the_tensor_axis_are_refused(mixer, tensor, message):
    with pytest.raises(ValueError, match=message):
        partition.check_heads(mixer_name(mixer), mixer, make_mesh(MeshConfig(tensor=tensor)))
    partition.check_heads("full_attention", FullAttention(num_heads=8, num_kv_heads=2), make_mesh(MeshConfig(tensor=4)))


@functools.cache
def on_one_device(mixer):
    return loss_and_gradients(below(mixer), MeshConfig(), jax.devices()[:1])[0]


def below(mixer):
    """The mixer above a layer of the delta rule."""
    return config_of(MIXERS[mixer], SMALL, tiny_model().pattern[0])


def check_mesh(mixer, mesh_config):
    expected, gradients = on_one_device(mixer)
    (loss, found), state, text = loss_and_gradients(below(mixer), mesh_config, None)
    np.testing.assert_allclose(loss, expected, rtol=3e-5)
    for name, gradient in gradients.items():
        scale = np.linalg.norm(gradient)
        assert np.linalg.norm(found[name] - gradient) <= 3e-5 * scale + 1e-9, name
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    split = [leaf for leaf in state.params.values() if not leaf.sharding.is_fully_replicated]
    assert len([leaf for leaf in moments if not leaf.sharding.is_fully_replicated]) == 2 * len(split)
    check_collectives(text, mesh_config, MIXERS[mixer])


MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=2, fsdp=4),
    "tensor": MeshConfig(data=4, tensor=2),
    "sequence": MeshConfig(data=2, sequence=4),
    "all": MeshConfig(data=1, fsdp=2, tensor=2, sequence=2),
}


@pytest.mark.rotating
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mesh_gives_the_loss_and_gradients_of_one_device_for_every_mixer(mixer, mesh):
    check_mesh(mixer, MESHES[mesh])


def random(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


def operations(segments):
    """Name -> (function of arrays that differs with a mesh, its arrays); 4 query heads to one key head."""
    B, T = segments.shape
    q, k, v, scores = random(B, T, 8, 6), random(B, T, 2, 6), random(B, T, 2, 6), random(B, T, 2)
    expiry = jnp.where(scores > 0, jnp.where(scores > 1, NEVER, jnp.arange(T)[:, None] + 17), 0).astype(jnp.int32)
    g, beta = -jnp.abs(random(B, T, 8)), jax.nn.sigmoid(random(B, T, 8))
    values = random(B, T, 8, 5)
    return {
        "window": (functools.partial(partition.window_attention, window=5, segment_ids=segments), (q, k, v)),
        "lte": (
            functools.partial(partition.window_attention, window=5, expiry=expiry, segment_ids=segments),
            (q, k, v, scores),
        ),
        "delta": (
            lambda *arrays: partition.gated_delta_rule(*arrays, segment_ids=segments)[0],
            (k, 2 * k + v, values, g, beta),
        ),
        "convolution": (
            lambda x, w: partition.short_convolution(x, w, segment_ids=segments)[0],
            (random(B, T, 12), random(4, 12)),
        ),
        "norm": (
            lambda x, w, gate: partition.rms_norm(x, w, gate, eps=1e-6, axes=partition.ROWS),
            (random(B, T, 8, 6), random(6), random(B, T, 8, 6)),
        ),
        "residual": (
            lambda x, w: jnp.stack(partition.residual_rms_norm(x, w, eps=1e-6)),
            (random(B, T, 12), random(12)),
        ),
    }


def check_operation(name, mesh_config):
    mesh = make_mesh(mesh_config)
    function, arrays = operations(jnp.asarray(packed_rows(4)))[name]
    direction = random(*jax.eval_shape(function, *arrays).shape)

    def loss(*arrays):
        o = function(*arrays)
        return jnp.sum(o * direction), o

    def on_mesh(*arrays):
        with sharding.on(mesh):
            return jax.value_and_grad(loss, argnums=tuple(range(len(arrays))), has_aux=True)(*arrays)

    expected = jax.jit(jax.value_and_grad(loss, argnums=tuple(range(len(arrays))), has_aux=True))(*arrays)
    found = jax.jit(on_mesh)(*jax.device_put(arrays, sharding.replicated(mesh)))
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert np.linalg.norm(other - one) <= 3e-5 * np.linalg.norm(one) + 1e-9


PADDED = [
    [1] * 3 + [0] * 13,  # shards of padding alone hand the last inputs on
    [0] * 9 + [2] * 7,  # and the state before the row
    [3] * 2 + [0] * 13 + [4],  # a document of one token in the last shard
    [5] * 5 + [6] * 2 + [-7] * 9,
    [8] * 7 + [9] * 9,
    [0] * 3 + [8] * 2 + [0] * 11,  # its two tokens lie in two shards
    [0] * 16,
]


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("given", [False, True], ids=["empty", "state"])
def test_the_short_convolutions_state_goes_from_shard_to_shard(padded, given):
    """Of four tokens each, with three inputs to remember: outputs, the last inputs, and all gradients."""
    ids = jnp.asarray(PADDED, jnp.int32) if padded else None
    B, T = len(PADDED), len(PADDED[0])
    arrays = [random(B, T, 5), random(4, 5), *([random(B, 3, 5)] if given else [])]
    directions = random(B, T, 5) + 1, random(B, 3, 5) - 1
    mesh = make_mesh(MeshConfig(data=1, sequence=4), jax.devices()[:4])

    def run(x, weight, state=None):
        return partition.short_convolution(x, weight, segment_ids=ids, initial_state=state)

    def on_mesh(*arrays):
        with sharding.on(mesh):
            outputs, pullback = jax.vjp(run, *arrays)
            return outputs, pullback(directions)

    outputs, pullback = jax.vjp(run, *arrays)
    found = jax.jit(on_mesh)(*jax.device_put(arrays, sharding.replicated(mesh)))
    for one, other in zip(jax.tree.leaves((outputs, pullback(directions))), jax.tree.leaves(found), strict=True):
        assert_close(other, one, "short_convolution")


def test_few_key_heads_and_split_tokens_give_what_one_device_gives():
    check_operation("lte", MeshConfig(data=1, tensor=4, sequence=2))
    check_operation("delta", MeshConfig(data=1, tensor=2, sequence=4))
    check_operation("convolution", MeshConfig(data=2, tensor=4))
    check_operation("norm", MeshConfig(data=2, tensor=2, sequence=2))
    check_operation("residual", MeshConfig(data=2, fsdp=2, sequence=2))


@pytest.mark.rotating
@pytest.mark.parametrize("mesh", [dict(tensor=4, sequence=2), dict(sequence=8), dict(data=2, sequence=4)], ids=str)
@pytest.mark.parametrize("name", ["window", "lte", "delta", "convolution", "norm", "residual"])
def test_every_operation_on_every_mesh_gives_what_one_device_gives(name, mesh):
    check_operation(name, MeshConfig(**{"data": 1, **mesh}))


@pytest.mark.parametrize("name", ["window", "delta", "convolution", "norm", "residual"])
def test_no_gradient_of_rows_is_summed_over_devices(name):
    """Not even over an axis of one device, where the sum would stand between the kernels all the same."""
    mesh = make_mesh(MeshConfig(data=2), jax.devices()[:2])
    function, arrays = operations(jnp.asarray(packed_rows(4)))[name]

    def loss(*arrays):
        with sharding.on(mesh):
            return jnp.sum(function(*arrays))

    assert "psum" not in str(jax.make_jaxpr(jax.grad(loss))(*arrays))


def test_lte_layers_of_unlike_budgets_are_refused():
    model = tiny_model()
    lte = model.pattern[1]
    model = dataclasses.replace(
        model, num_layers=4, pattern=(*model.pattern, model.pattern[0], dataclasses.replace(lte, budget=9))
    )
    with pytest.raises(ValueError, match=r"budgets \[5, 9\]"):
        Builder(step_config(tiny_experiment(model=model), DATA.length), make_mesh(MeshConfig(), jax.devices()[:1]))


@pytest.mark.rotating
@pytest.mark.parametrize("shards", [4, 8])
@pytest.mark.parametrize("reading", ["prompt", "streaming"])
def test_reading_under_a_budget_sends_the_window_and_what_is_retained(reading, shards):
    """Hidden states and gradients of one device; of keys and values, each device receives its halo and the budget."""
    config, rows = config_of(MIXERS["lte"]), batch_of(SMALL)
    one = Builder(step_config(config, SMALL.length), make_mesh(MeshConfig(), jax.devices()[:1]))
    params = jax.device_get(one.init_state().params)
    direction = random(*rows["input_ids"].shape, SMALL.width)

    def run(mesh_config, devices):
        mesh = make_mesh(mesh_config, devices)
        builder = Builder(step_config(config, SMALL.length), mesh)

        def loss(params, rows):
            with sharding.on(mesh):
                hidden, aux = builder.model(params).hidden(
                    rows["input_ids"], segment_ids=rows["segment_ids"], reading=reading
                )
            return jnp.sum(hidden * direction), (hidden, aux["selected"])

        state = builder.init_state(params)
        arrays = {name: jax.device_put(x, sharding.batch_sharding(x.shape, mesh)) for name, x in rows.items()}
        compiled = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(state.params, arrays).compile()
        return jax.device_get(compiled(state.params, arrays)), compiled.as_text()

    ((_, (hidden, kept)), gradients), _ = run(MeshConfig(), jax.devices()[:1])
    ((_, (found, selected)), others), text = run(MeshConfig(data=1, sequence=shards), jax.devices()[:shards])
    assert 0 < kept.mean() < 1
    np.testing.assert_array_equal(selected, kept)
    assert_close(found, hidden, "model")
    for name, gradient in gradients.items():
        assert np.linalg.norm(others[name] - gradient) <= 3e-5 * np.linalg.norm(gradient) + 1e-7, name
    tokens, lte = SMALL.length // shards, MIXERS["lte"]
    moved = [(shape, where) for _, shape, where in collectives(text) if len(shape) >= 4]
    halos = [shape for shape, _ in moved if shape[1:] == (tokens, lte.num_kv_heads, SMALL.head)]
    back = -(-lte.window // tokens)
    assert len(halos) == 2 * 2 * back, "k and v, there and back: more than the halo travels"
    retained = [shape for shape, where in moved if "shard_map/all_to_all" in where]
    assert retained and all(min(lte.budget, tokens) in shape for shape in retained), retained
