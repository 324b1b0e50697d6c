"""One token of the gated delta rule for Hopper (Pallas, Mosaic GPU): a single pass over the state.

    S <- exp(g) S;   u = beta (v - S^T k);   S <- S + k u^T;   o = scale S^T q

A warpgroup has one sequence, one head and 64 values, with its part of the state in registers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule import pallas_tiles as t
from pallas_kernels.gated_delta_rule.pallas_tiles import BLOCK_V, COLUMNS, ROWS, WGMMA


def _body(m: Any, *, group: int, scale: float, normalize: bool) -> None:
    b, h, block = (jax.lax.axis_index(name) for name in ("b", "h", "block"))
    hk, columns = jax.lax.div(h, jnp.int32(group)), pl.ds(block * BLOCK_V, BLOCK_V)
    shape = (m.state.shape[2], BLOCK_V)

    def rows(ref):
        x = plgpu.load(ref.at[b, hk], layout=ROWS, optimized=False).astype(jnp.float32)
        x = t.along_rows(x, shape)
        # The sum over all rows stands in every column.
        return x * t.along_columns(jax.lax.rsqrt((x * x).sum(axis=0) + 1e-6), shape) if normalize else x

    q, k = rows(m.q), rows(m.k)
    v = plgpu.load(m.v.at[b, h, columns], layout=COLUMNS, optimized=False).astype(jnp.float32)
    state = plgpu.load(m.state.at[b, h, :, columns], layout=WGMMA, optimized=False) * jnp.exp(m.g[b, h])
    update = (v - (state * k).sum(axis=0)) * m.beta[b, h]
    state += k * t.along_columns(update, shape)
    m.next[b, h, :, columns] = state
    m.o_s[...] = ((state * q).sum(axis=0) * scale).astype(m.o_s.dtype)
    m.update_s[...] = update
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(m.o_s, m.o.at[b, h, columns])
    plgpu.copy_smem_to_gmem(m.update_s, m.update.at[b, h, columns])
    plgpu.wait_smem_to_gmem(0)


def one_token(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    state: jax.Array,
    *,
    scale: float,
    normalize: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(o [B,H,V] in the dtype of v, the new state, u [B,H,V] float32)."""
    B, H, V = v.shape
    results = t.launch(
        "gated_delta_rule_step",
        lambda m: _body(m, group=H // k.shape[1], scale=scale, normalize=normalize),
        inputs={"q": q, "k": k, "v": v, "g": g, "beta": beta, "state": state},
        outputs={
            "o": jax.ShapeDtypeStruct(v.shape, v.dtype),
            "next": jax.ShapeDtypeStruct(state.shape, jnp.float32),
            "update": jax.ShapeDtypeStruct(v.shape, jnp.float32),
        },
        scratch={"o_s": plgpu.SMEM((BLOCK_V,), v.dtype), "update_s": plgpu.SMEM((BLOCK_V,), jnp.float32)},
        grid={"b": B, "h": H, "block": V // BLOCK_V},
    )
    return results["o"], results["next"], results["update"]
