"""Do two GPUs compute what one computes, through their kernels, and does a run move from one to the other?

    python -m pytest -m gpu -n 0 -s tests/system/test_gpus.py

Without GPUs the same command, with JAX_PLATFORMS=cpu, rehearses it on simulated devices in XLA form.
"""

import functools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from lte_jax.sharding import MeshConfig
from tests.system.mesh_cases import KERNELS, SMALL, check_collectives, collectives, config_of, loss_and_gradients
from tests.system.test_processes import ROOT, launch, losses
from tests.system.test_train import sums

REAL = jax.default_backend() == "gpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.device_count() < 2, reason="needs two GPUs of one machine; this one shows fewer"),
]
SIZES = KERNELS if REAL else SMALL
MESHES = {axis: MeshConfig(**{"data": 1, axis: 2}) for axis in ("data", "fsdp", "tensor", "sequence")}
CASES = [(mixer, dtype) for dtype in ("bfloat16", "float32") for mixer in SIZES.mixers]
CASES.remove(("gdn", "float32"))  # its kernels take 16-bit inputs alone


@functools.cache
def truth(mixer):
    """Loss and gradients of one device in float32 and XLA form."""
    with jax.default_matmul_precision("highest"):
        return loss_and_gradients(
            config_of(SIZES.mixers[mixer], SIZES, implementation="xla"), MeshConfig(), jax.devices()[:1], SIZES
        )[0]


def worst(found, expected):
    """The largest relative difference of the loss or of a gradient, by its norm."""
    (loss, gradients), (true_loss, true_gradients) = found, expected
    differences = {
        name: np.linalg.norm(np.float64(gradients[name]) - leaf) / max(np.linalg.norm(leaf), 1e-5)
        for name, leaf in true_gradients.items()
    }
    return max(abs(float(loss) - float(true_loss)) / float(true_loss), *differences.values())


@pytest.mark.parametrize(("mixer", "dtype"), CASES)
def test_two_devices_are_as_near_to_float32_as_one_and_send_no_queries(mixer, dtype):
    """The same kernels on one device and on every axis of two."""
    compute = dict(dtype=dtype, implementation="triton" if REAL else None)
    config = config_of(SIZES.mixers[mixer], SIZES, **compute)
    one = loss_and_gradients(config, MeshConfig(), jax.devices()[:1], SIZES)[0]
    expected = truth(mixer)
    alone = worst(one, expected)
    for axis, mesh in MESHES.items():
        found, _, text = loss_and_gradients(config, mesh, jax.devices()[:2], SIZES)
        error, apart, moved = worst(found, expected), worst(found, one), sum(1 for _ in collectives(text))
        print(
            f"\nmesh {mixer} {dtype} {axis}=2: error {error:.1e}, of one device {alone:.1e}, between them {apart:.1e}, "
            f"{moved} arrays moved whole",
            flush=True,
        )
        check_collectives(text, mesh, SIZES.mixers[mixer], SIZES)
        assert error <= 1.5 * alone + 3e-5, (mixer, dtype, axis)


@pytest.fixture
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("xla")


DEVICES = 0 if REAL else 1
"""Of each process, as ``launch`` counts: 0 is a GPU."""
SETTINGS = ("--set", "steps=14", "--set", "optimizer.learning_rate=1e-3")


def test_a_run_moves_from_two_processes_to_one_device_and_back_and_to_a_cpu(tmp_path, cache):
    """Each time stopped by SIGTERM with exit code 75; the losses are those of a run that was never stopped."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    with ThreadPoolExecutor() as pool:
        uninterrupted = pool.submit(launch, whole, cache, 1, DEVICES, *SETTINGS, mixer="kernels")
        move(folder, cache)
    assert uninterrupted.result()[0].returncode == 0
    ours, theirs = losses(folder), losses(whole)
    difference = max(abs(ours[step] - theirs[step]) / theirs[step] for step in range(1, 15))
    print(f"\nmove: largest difference of a loss in 14 steps {difference:.1e}")
    assert sorted(ours) == list(range(1, 15)) and difference < 5e-3
    assert sums(folder, 14)[1] == sums(whole, 14)[1], "another data position"


def move(folder, cache):
    """Two processes, one, two on another mesh, and a CPU."""
    stages = [
        (2, DEVICES, ("--set", "mesh.fsdp=2"), "term:1:2"),
        (1, DEVICES, (), "term:0:5"),
        (2, DEVICES, ("--set", "mesh.data=2"), "term:0:8"),
        (1, 1, (), "none:0:-1"),
    ]
    for count, devices, mesh, fault in stages:
        run, _ = launch(folder, cache, count, devices, *SETTINGS, *mesh, mixer="kernels", fault=fault)
        said = [line for line in run.stdout.splitlines() if line.startswith(("process ", "mesh ", "continuing"))]
        print(f"\nmove: {count} processes, {fault}: exit code {run.returncode}, {len(losses(folder))} steps; {said}")
        assert run.returncode == (75 if "term" in fault else 0), run.stderr[-3000:]


def test_deterministic_processes_give_the_same_bits(tmp_path, cache):
    settings = (*SETTINGS, "--set", "mesh.fsdp=2", "--deterministic")

    def run(name):
        done, _ = launch(tmp_path / name, cache / name, 2, DEVICES, *settings, mixer="kernels")
        assert done.returncode == 0, done.stderr[-3000:]
        return sums(tmp_path / name, 14)[0]

    with ThreadPoolExecutor() as pool:
        one, other = pool.map(run, ("one", "other"))
    print(f"\ndeterministic: {len(one)} arrays, the same bits: {one == other}")
    assert one == other


@pytest.mark.parametrize(
    ("processes", "arguments", "message"),
    [
        (2, ("--set", "mesh.fsdp=3"), "fsdp x tensor x sequence = 3 does not divide the 2 devices"),
        (1, ("--set", "mesh.devices=2"), "mesh.devices=2, and this launch has 1"),
    ],
)
def test_a_launch_that_does_not_fit_its_mesh_is_refused(processes, arguments, message, tmp_path, cache):
    run, _ = launch(tmp_path / "run", cache, processes, DEVICES, *arguments, mixer="kernels")
    assert run.returncode == 1 and message in run.stderr, run.stderr[-3000:]
    assert not (tmp_path / "run").exists()


def test_more_processes_than_gpus_are_refused():
    command = [sys.executable, "-m", "experiments.launch.local", "--processes=99", "--", "--config=text"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 1 and "--processes=99, but this machine shows" in run.stderr
