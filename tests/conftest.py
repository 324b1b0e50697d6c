"""Strict settings for every test: float32 dots are float32, promotion is explicit, the CPU shows eight devices."""

import contextlib
import gc
import importlib
import os
from pathlib import Path

import jax
import pytest

from pallas_kernels import triton_call
from pallas_kernels.dispatch import lowering_for_gpu
from pallas_kernels.visible_gpus import visible_gpus
from tests import exhaustive_page, rotation


def choose_devices() -> None:
    """Before JAX starts a device: eight simulated ones on the CPU, or one GPU for each worker, in turn."""
    options = "--xla_force_host_platform_device_count=8"
    if gpus := visible_gpus(os.environ):
        options += " --xla_gpu_autotune_level=0"  # compilation is what GPU tests wait for, and nothing here is timed
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        if "PYTEST_XDIST_WORKER" in os.environ:  # gw0, gw1, ...
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus[int(os.environ["PYTEST_XDIST_WORKER"][2:]) % len(gpus)]
    else:
        # Each fused loop through MLIR takes milliseconds to compile: with XLA's older emitters a program takes a third.
        # The programs that users run go through the newer ones in CI's training run, and with XLA_FLAGS set by hand.
        options += " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    os.environ.setdefault("XLA_FLAGS", options)


choose_devices()
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_threefry_partitionable", True)
# Tracing makes many objects that live long: collecting after every 700, through all modules, is a third of its time.
gc.freeze()
gc.set_threshold(50_000, 20, 50)


@pytest.fixture(autouse=True, scope="module")
def few_mappings():
    """Drops compiled programs between files before Linux's bound on a process's memory mappings (65,530) aborts it."""
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_text().count("\n") > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def interpreted_kernels_count_as_a_gpus():
    """With TRITON_INTERPRET=1 the kernels of ``pytest -m gpu -k triton`` run on the CPU, each address checked."""
    with lowering_for_gpu() if triton_call.interpreting() else contextlib.nullcontext():
        yield


def pytest_generate_tests(metafunc):
    """``implementation``: each one of the operation that the file tests; a GPU's run under ``pytest -m gpu``.

    A file leaves some out by naming the others: IMPLEMENTATIONS.
    """
    if "implementation" in metafunc.fixturenames:
        operation = metafunc.module.__name__.rpartition(".test_")[2]
        offered = importlib.import_module(f"pallas_kernels.{operation}.api").OPERATION.implementations
        names = getattr(metafunc.module, "IMPLEMENTATIONS", offered)
        values = [name if name == "xla" else pytest.param(name, marks=pytest.mark.gpu) for name in names[::-1]]
        metafunc.parametrize("implementation", values)


@pytest.hookimpl(wrapper=True)  # before -m takes cases away and before they are counted
def pytest_collection_modifyitems(config, items):
    rotation.mark_the_others(config, items)
    return (yield)


def pytest_report_header(config):
    return f"TESTS_DAY={rotation.day()}"


def pytest_addoption(parser):
    parser.addoption(
        "--record_gpu_tests",
        nargs="?",
        const="experiments/results/gpu_tests.json",
        metavar="FILE",
        help="Write each operation's outcome of -m gpu, without which experiments.bench reports no time of it.",
    )
    parser.addoption(
        "--check_shapes", action="store_true", help="Check the annotated shapes and dtypes of every call (slower)."
    )


def pytest_configure(config):
    """Whole files only: a record of some of an operation's tests would say more than was seen."""
    if config.getoption("record_gpu_tests") and (config.getoption("keyword") or any("::" in x for x in config.args)):
        raise pytest.UsageError("--record_gpu_tests records whole test files: drop -k and the names of single tests")
    if config.getoption("record_gpu_tests") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(GpuOutcomes())
    if exhaustive_page.wanted(config):
        config.pluginmanager.register(exhaustive_page.Recorder())
    if config.getoption("check_shapes"):
        import jaxtyping

        from tests import typechecker

        jaxtyping.install_import_hook(typechecker.MODULES, f"{typechecker.__name__}.check")
    if config.getoption("markexpr") != "gpu":
        # Most of the time goes into compiling programs that run once: let the compiler's back end do the least. The
        # variable reaches the programs that tests start.
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        jax.config.update("jax_disable_most_optimizations", True)
        # Programs are also kept for the next run, in .pytest_cache: a folder for each worker, as writes are not atomic.
        if config.pluginmanager.hasplugin("cacheprovider"):
            folder = config.cache.mkdir(f"xla-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}")
            jax.config.update("jax_compilation_cache_dir", str(folder))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


class GpuOutcomes:
    """Counts the outcomes of GPU tests by file, in the process that hears of all of them."""

    def __init__(self):
        self.counts = {}

    def pytest_runtest_logreport(self, report):
        # A failure in the set-up or the clean-up counts; a test that passes counts once, by its body.
        if "gpu" in report.keywords and (report.when == "call" or not report.passed):
            file = Path(report.nodeid.partition("::")[0]).stem
            counts = self.counts.setdefault(file, dict(passed=0, failed=0, skipped=0))
            counts[report.outcome] += 1

    def pytest_sessionfinish(self, session):
        if self.counts:
            from experiments.benchmarks import gate

            device, path = jax.devices()[0].device_kind, Path(session.config.getoption("record_gpu_tests"))
            gate.write_record(self.counts, device, path)
