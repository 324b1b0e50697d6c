"""How fast does jax-linear-attention train the paper's Gated DeltaNet models? Its own model and compiled step.

    python -m experiments.benchmarks.jla_training --model=gdn --size=1.4B --rows=4
    python -m experiments.benchmarks.training --model=gdn --size=1.4B --rows=4

Shapes as ours: width, depth, heads, MLP and vocabulary; bfloat16 computation with float32 weights and AdamW, random
tokens. Of its settings those meant for speed where memory suffices: no recomputation with its memory-lean gradients,
its kernels where they apply, the head's gradient formed in the forward pass.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments.benchmarks import clock

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_enum("model", "gdn", ["gdn", "gdn_swa"], "Gated DeltaNet alone, or with sliding windows.")
    flags.DEFINE_string("size", "1.4B", "0.4B or 1.4B.")
    flags.DEFINE_integer("rows", 4, "Rows of a step.")
    flags.DEFINE_integer("length", 4096, "Tokens of a row.")
    flags.DEFINE_integer("steps", 10, "Steps whose median counts.")
    flags.DEFINE_string("remat", "none", "Its recomputation policy.")
    flags.DEFINE_bool("scan_layers", True, "Its default.")
    flags.DEFINE_string("lock", None, "A file to hold while timing: several processes then compile side by side.")


def config(name: str, size: str) -> Any:
    """Its settings for the shapes of ours."""
    from jla.models.config import AttentionConfig, LinearAttentionConfig, ModelConfig

    from experiments.benchmarks import models
    from lte_jax.layers import mlp_width

    ours: Any = models.model_config(name, size)
    delta = ours.pattern[0]
    window = ours.pattern[1] if name == "gdn_swa" else None
    heads = delta.num_heads if window is None else window.num_heads
    attention = AttentionConfig(
        num_heads=heads,
        num_kv_heads=heads if window is None else window.num_kv_heads or heads,
        head_dim=ours.width // heads,
        qk_norm=False,
        sliding_window=None if window is None else window.window,
    )
    linear = LinearAttentionConfig(
        num_k_heads=delta.num_heads,
        num_v_heads=delta.value_heads,
        head_k_dim=delta.head_dim,
        head_v_dim=delta.value_dim,
    )
    kinds = ("gated_deltanet",) if window is None else ("gated_deltanet", "attention")
    return ModelConfig(
        vocab_size=ours.vocab_size,
        d_model=ours.width,
        n_layers=ours.num_layers,
        d_ff=mlp_width(ours.width, ours.hidden_ratio, ours.intermediate_size),
        tie_embeddings=ours.tie_embeddings,
        norm_eps=ours.norm_eps,
        attention=attention,
        linear_attention=linear,
        layer_types=kinds * (ours.num_layers // len(kinds)),
        remat=FLAGS.remat,
        lean_vjp=True,
        scan_layers=FLAGS.scan_layers,
    )


def measure() -> dict[str, Any]:
    """The line of one setting."""
    import equinox
    import optax
    from jla.config import OptimConfig
    from jla.models import build_model
    from jla.training.optimizers import optimizer_from_config
    from jla.training.step import LossConfig, build_train_step, lm_loss

    settings = config(FLAGS.model, FLAGS.size)
    model = equinox.filter_jit(build_model)(settings, key=jax.random.key(0))
    optimizer = optimizer_from_config(OptimConfig(lr=3e-4), optax.constant_schedule(3e-4))
    state = optimizer.init(equinox.filter(model, equinox.is_inexact_array))
    kernels = jax.default_backend() == "gpu"
    loss = lm_loss(LossConfig(impl="auto", grad_in_forward=True) if kernels else LossConfig())
    step = build_train_step(optimizer, loss)
    tokens = np.random.default_rng(0).integers(0, settings.vocab_size, (1, FLAGS.rows, FLAGS.length + 1), np.int32)
    batch = {"input_ids": jnp.asarray(tokens[..., :-1]), "labels": jnp.asarray(tokens[..., 1:])}
    began, key = time.perf_counter(), jax.random.key(1)
    step.use_compiled(step.lower(model, state, batch, key).compile())
    compiled = time.perf_counter() - began
    times: list[float] = []
    losses: list[jax.Array] = []
    with clock.alone(FLAGS.lock):
        for _ in range(FLAGS.steps + 3):
            start = time.perf_counter()
            model, state, numbers, key = step(model, state, batch, key)
            jax.block_until_ready(losses[-1:])  # one step late, as ours
            losses.append(numbers["loss"])
            times.append(time.perf_counter() - start)
        jax.block_until_ready(losses)
    median = statistics.median(times[3:])
    device = jax.local_devices()[0]
    return {
        "who": "jax-linear-attention",
        "model": FLAGS.model,
        "size": FLAGS.size,
        "rows": FLAGS.rows,
        "remat": FLAGS.remat,
        "scan_layers": FLAGS.scan_layers,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(equinox.filter(model, equinox.is_inexact_array))),
        "compile": round(compiled, 1),
        "step_ms": round(median * 1e3, 1),
        "spread": round(max(times[3:]) / min(times[3:]), 3),
        "tokens_per_second": round(FLAGS.rows * FLAGS.length / median),
        "peak_gib": round((device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30, 1),
        "losses": [round(float(loss), 4) for loss in losses[:4]],
        "device": device.device_kind,
    }


def main(argv: list[str]) -> None:
    try:
        if len(argv) > 1:
            raise ValueError(f"{argv[1]!r}: no such argument")
        print(json.dumps(measure()), flush=True)
    except (ValueError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
