"""One token of the gated delta rule in Triton: a single pass over the state, which is updated in place.

    S <- exp(g) S;   u = beta (v - S^T k);   S <- S + k u^T;   o = scale S^T q

One program per sequence, head and block of values. The time is that of reading and writing the state once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.triton_call import jit, tl, triton_call


@jit
def _one_token(
    q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, state_ptr, scale,
    o_ptr, next_ptr, update_ptr,
    H: tl.constexpr, K: tl.constexpr, N: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    n = tl.arange(0, N)
    columns = tl.program_id(0) * BV + tl.arange(0, BV)
    at_state = bh * N * V + n[:, None] * V + columns[None, :]
    state = tl.load(state_ptr + at_state)
    at_k = (b * K + h // (H // K)) * N + n
    q = tl.load(q_ptr + at_k).to(tl.float32)
    k = tl.load(k_ptr + at_k).to(tl.float32)
    if NORMALIZE:
        q *= tl.rsqrt(tl.sum(q * q, 0) + 1e-6)
        k *= tl.rsqrt(tl.sum(k * k, 0) + 1e-6)
    state *= tl.exp(tl.load(g_ptr + bh))
    v = tl.load(v_ptr + bh * V + columns).to(tl.float32)
    update = (v - tl.sum(state * k[:, None], 0)) * tl.load(beta_ptr + bh)
    state += k[:, None] * update[None, :]
    o = tl.sum(state * q[:, None], 0) * scale
    tl.store(next_ptr + at_state, state)
    tl.store(o_ptr + bh * V + columns, o.to(o_ptr.dtype.element_ty))
    tl.store(update_ptr + bh * V + columns, update)


def one_token(q, k, v, g, beta, state, *, scale: float, normalize: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(o [B,H,V] in the dtype of v, the new state, in the old one's buffer if that is donated, u [B,H,V] float32)."""
    B, H, V = v.shape
    K, N = k.shape[1:]
    block = min(V, 8192 // N)  # 32 KiB of state for each program, less where that would leave the GPU idle
    while block > 8 and B * H * (V // block) < 264:
        block //= 2
    return triton_call(
        _one_token, q, k, v, g, beta, state, scale,
        out_shape=(
            jax.ShapeDtypeStruct(v.shape, v.dtype),
            jax.ShapeDtypeStruct(state.shape, jnp.float32),
            jax.ShapeDtypeStruct(v.shape, jnp.float32),
        ),
        grid=(V // block, B * H), num_warps=8, num_stages=1, input_output_aliases={5: 1},
        H=H, K=K, N=N, V=V, BV=block, NORMALIZE=normalize,
    )  # fmt: skip
