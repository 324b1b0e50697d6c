"""Does one table place every array, and does every mesh compute what one device computes?"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lte_jax import LTE, NSA, FullAttention, GatedDeltaNet, WindowAttention, sharding
from lte_jax.data import Batches
from lte_jax.experiment import step_config
from lte_jax.sharding import MeshConfig, make_mesh
from lte_jax.step import Builder
from tests.system.tiny import DATA, ROUTER, tiny_experiment, tiny_model


def test_the_table_splits_what_divides_and_replicates_the_rest():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    assert sharding.spec(("embed", "heads"), (6, 8), mesh) == PartitionSpec("fsdp", "tensor")
    assert sharding.spec(("embed", "kv_heads"), (6, 2), mesh) == PartitionSpec("fsdp", None)
    assert sharding.spec(("embed", "embed"), (6, 6), mesh) == PartitionSpec("fsdp", None)
    assert sharding.spec(("embed",), (24, 6), mesh) == PartitionSpec(None, "fsdp")
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


def loss_and_gradients(config, mesh_config, devices):
    mesh = make_mesh(mesh_config, devices)
    builder = Builder(step_config(config, DATA.length), mesh)
    batch = next(Batches(config.data.rows("train"), config.batch_size))
    arrays = {
        name: jax.device_put(batch[name], sharding.batch_sharding(batch[name].shape, mesh))
        for name in ("input_ids", "labels")
    }
    state = builder.init_state()
    for name, leaf in state.params.items():
        assert leaf.sharding == builder.param_shapes[name].sharding, name

    def compute(state, arrays):
        gradients, metrics = builder._gradients(state, arrays, jnp.int32(1), None)
        return metrics["loss"], gradients

    return jax.device_get(jax.jit(compute)(state, arrays)), state


def check_mesh(config, mesh_config):
    (expected, gradients), _ = loss_and_gradients(config, MeshConfig(), jax.devices()[:1])
    (loss, found), state = loss_and_gradients(config, mesh_config, None)
    np.testing.assert_allclose(loss, expected, rtol=3e-5)
    for name, gradient in gradients.items():
        scale = np.linalg.norm(gradient)
        assert np.linalg.norm(found[name] - gradient) <= 3e-5 * scale + 1e-9, name
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    split = [leaf for leaf in state.params.values() if not leaf.sharding.is_fully_replicated]
    assert len([leaf for leaf in moments if not leaf.sharding.is_fully_replicated]) == 2 * len(split)


def config_of(mixer):
    model = tiny_model(dropout=0.0)
    pattern = (model.pattern[0], mixer)
    return tiny_experiment(model=dataclasses.replace(model, pattern=pattern))


MIXERS = {
    "lte": LTE(num_heads=2, window=6, budget=5, sinks=1, dropout=0.0, **ROUTER),
    "window": WindowAttention(num_heads=2, window=6),
    "full": FullAttention(num_heads=4, num_kv_heads=2),
    "nsa": NSA(num_heads=4, num_kv_heads=2, head_dim=8, block_size=4, block_counts=3, window=6),
    "gdn": GatedDeltaNet(num_heads=2, head_dim=4),
}
MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=2, fsdp=4),
    "tensor": MeshConfig(data=4, tensor=2),
    "sequence": MeshConfig(data=4, sequence=2),
    "all": MeshConfig(data=1, fsdp=2, tensor=2, sequence=2),
}


def test_a_mesh_gives_the_loss_and_gradients_of_one_device():
    check_mesh(config_of(MIXERS["lte"]), MESHES["all"])


@pytest.mark.exhaustive
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mesh_gives_the_loss_and_gradients_of_one_device_for_every_mixer(mixer, mesh):
    check_mesh(config_of(MIXERS[mixer]), MESHES[mesh])
