"""``experiments.train`` on a tiny model, as one of several processes, with TEST_FAULT=KIND:PROCESS:STEP to order."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import time

import jax
from absl import app

from experiments import train as program
from lte_jax import LTE, NSA, FullAttention, GatedDeltaNet, WindowAttention, configs, train
from lte_jax.checkpoint import CheckpointConfig
from lte_jax.experiment import EvaluationConfig
from lte_jax.step import ComputeConfig
from tests.system.mesh_cases import KERNELS, config_of
from tests.system.tiny import DATA, ROUTER, tiny_experiment, tiny_model

STEPS = 6


MIXERS = {
    "lte": LTE(num_heads=4, num_kv_heads=2, window=6, budget=5, sinks=1, dropout=0.0, **ROUTER),
    "window_attention": WindowAttention(num_heads=4, num_kv_heads=2, window=6),
    "full_attention": FullAttention(num_heads=4, num_kv_heads=2),
    "nsa": NSA(num_heads=4, num_kv_heads=2, head_dim=8, block_size=4, block_counts=3, window=6),
    "gated_deltanet": GatedDeltaNet(num_heads=2, head_dim=4),
}


def experiment(mixer: str = "lte"):
    """One layer, for quick compilation; saves each step, so that every one can be compared.

    "kernels": a layer of the delta rule and one of LTE in sizes that a GPU's kernels take, in bfloat16.
    """
    if mixer == "kernels":
        model = config_of(KERNELS.mixers["lte"], KERNELS, KERNELS.mixers["gdn"]).model
        compute = ComputeConfig(dtype="bfloat16")
    else:
        model = dataclasses.replace(tiny_model(), num_layers=1, pattern=(MIXERS[mixer],))
        compute = ComputeConfig()
    return tiny_experiment(
        model=model,
        compute=compute,
        data=dataclasses.replace(DATA, heldout_rows=0),
        steps=STEPS,
        evaluation=EvaluationConfig(every=100),
        checkpoint=CheckpointConfig(every=1, keep=100),
    )


def _inject(kind: str, process: int, step: int) -> None:
    """Before step ``step`` + 1 on ``process``; the time is written beside the run."""
    run_step = train._Run._run_step

    def and_fail(self, state, batch, interrupted):
        (self.folder / f"pid-{os.getpid()}").touch()
        if self.step == step and jax.process_index() == process:
            (self.folder / "fault.json").write_text(json.dumps({"time": time.time()}))
            if kind == "error":
                raise ValueError("a bad record on one process")
            if kind == "disk":  # a write beyond the limit fails as on a full disk
                limit = 1_000 if process else 5_000  # process 0 writes more, and goes on with its metrics
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
                return run_step(self, state, batch, interrupted)
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "term": signal.SIGTERM, "usr1": signal.SIGUSR1}[kind])
        return run_step(self, state, batch, interrupted)

    train._Run._run_step = and_fail


if __name__ == "__main__":
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_default_matmul_precision", "highest")
    configs.load_named = lambda package, name: experiment(name)
    fault = os.environ.get("TEST_FAULT", "none:0:-1").split(":")
    _inject(fault[0], int(fault[1]), int(fault[2]))
    program.define_flags()
    app.run(program.main)
