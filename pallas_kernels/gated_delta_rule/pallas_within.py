"""What can be computed for every chunk at once: inverse, scores and factors (Pallas, Mosaic GPU).

With c the running sum of the log decays g inside a chunk and rows of q, k divided by their norms:

    A    = (I + L)^-1,  L_ij = exp(c_i - c_j) k_i.k_j beta_j    (i > j)
    P_ij = scale exp(c_i - c_j) q_i.k_j beta_j                  (i >= j)

and per token the factors of ``pallas_tiles``: what multiplies k S and q S, and what multiplies r before it is written.
"""

from __future__ import annotations

import types
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule import pallas_tiles as t
from pallas_kernels.gated_delta_rule.pallas_tiles import CHUNK, COLUMNS, ROWS, SQUARE
from pallas_kernels.tiles import ceil_div


def warpgroups_for(head_size: int) -> int:
    """Each has a chunk of its own; three where there is room: a thread has 168 registers and the waits overlap."""
    return 2 if head_size == 256 else 3


def gates(g: jax.Array, beta: jax.Array, runs: jax.Array | None) -> jax.Array:
    """[B,H,chunks,4,64] float32: two summands of the running log decay, beta, and runs since before the chunk.

    A difference of running sums loses small decays that follow large ones. So the sum comes in two parts: one of
    multiples of 1/16, exact because logarithms stop at -100 (a decay below that is zero in float32), and the rest.
    """
    B, T, H = g.shape

    def by_chunk(x):
        return jnp.moveaxis(x, 1, 2).reshape(B, H, T // CHUNK, CHUNK)

    g = jnp.maximum(by_chunk(g), -100.0)
    coarse = jnp.floor(g * 16.0 + 0.5) * 0.0625
    sums = [jnp.cumsum(x, axis=-1) for x in (coarse, g - coarse)]
    run = jnp.zeros(g.shape, jnp.float32)
    if runs is not None:
        runs = runs.reshape(B, 1, T // CHUNK, CHUNK)
        before = jnp.concatenate([jnp.zeros_like(runs[:, :, :1, -1:]), runs[:, :, :-1, -1:]], axis=2)
        run += (runs - before).astype(jnp.float32)
    return jnp.stack([*sums, by_chunk(beta), run], axis=3)


def invert_unit_lower(lower: jax.Array, i: jax.Array, j: jax.Array, rights: list[Any], room: Any) -> jax.Array:
    """(I + lower)^-1 of a strictly lower [64,64] by doubling diagonal blocks: X <- X - X L X.

    Kept as X = I - Y, so that the products round only corrections to L. With one right operand its dtype is float16,
    which has the precision of tf32 at twice its speed: normalised keys and beta at most 2 bound all entries by 2.
    Without such a bound there are two, bfloat16, whose sum is the matrix.
    """

    def parts(x):
        return [x.astype(jnp.float16)] if len(rights) == 1 else list(t.split(x, jnp.bfloat16))

    def add_product(start, a, b):
        for right, part in zip(rights, b, strict=True):
            right[...] = part
        plgpu.commit_smem()
        pairs = [(a[0], rights[0])] if len(rights) == 1 else [(a[0], rights[0]), (a[0], rights[1]), (a[1], rights[0])]
        return t.products(pairs, SQUARE, start, room=room)

    apart = i ^ j
    y = jnp.where(apart < 2, lower, 0.0)
    if len(rights) == 1:
        lower = lower.astype(jnp.float16)  # for registers: an eighth of the error that rounding the result makes
    for level in range(1, 6):
        size = 1 << level
        corner = jnp.where((apart >= size) & (apart < 2 * size), lower.astype(jnp.float32), 0.0)
        corner = add_product(corner, parts(-corner), parts(y))
        y = add_product(y + corner, parts(-y), parts(corner))
    return jnp.where(apart == 0, 1.0, 0.0) - y


def _chunk(m: Any, place: Any, *, group: int, scale: float, runs: bool, normalize: bool) -> None:
    """One warpgroup's chunk. ``m`` holds its own buffers; q's and k's take the results when they are done with."""
    b, n, h = place
    rows, hk = pl.ds(n * CHUNK, CHUNK), jax.lax.div(h, jnp.int32(group))
    parts = range(m.k_s.shape[0])  # of 64 columns each
    for part in parts:
        plgpu.copy_gmem_to_smem(m.k.at[b, rows, hk, pl.ds(part * CHUNK, CHUNK)], m.k_s.at[part], m.full)
    plgpu.copy_gmem_to_smem(m.gates.at[b, h, n], m.by_row, m.full)
    plgpu.copy_gmem_to_smem(m.gates.at[b, h, n], m.by_column, m.full)
    for part in parts:
        plgpu.copy_gmem_to_smem(m.q.at[b, rows, hk, pl.ds(part * CHUNK, CHUNK)], m.q_s.at[part], m.full)
    plgpu.barrier_wait(m.full)

    i, j = t.index(0), t.index(1)
    coarse, fine, beta = (plgpu.load(m.by_row.at[x], layout=ROWS) for x in (t.COARSE, t.FINE, t.BETA))
    coarse_end, fine_end = m.by_row[t.COARSE, CHUNK - 1], m.by_row[t.FINE, CHUNK - 1]
    run = last = None
    if runs:
        run, last = plgpu.load(m.by_row.at[t.RUN], layout=ROWS), m.by_row[t.RUN, CHUNK - 1]

    def decays():
        columns = (plgpu.load(m.by_column.at[x], layout=COLUMNS) for x in (t.COARSE, t.FINE))
        coarse_j, fine_j = (t.along_columns(x) for x in columns)
        apart = (t.along_rows(coarse) - coarse_j) + (t.along_rows(fine) - fine_j)
        sees = i >= j
        if runs:
            sees &= t.along_rows(run) == t.along_columns(plgpu.load(m.by_column.at[t.RUN], layout=COLUMNS))
        return jnp.exp(jnp.where(sees, apart, -jnp.inf))

    def pairs(left, right):
        return [(left.at[part], right.at[part].T) for part in parts]

    keys, decay = t.products(pairs(m.k_s, m.k_s), SQUARE, meanwhile=decays)
    norm_k = norm_q = beta * 0.0 + 1.0
    if normalize:
        norm_k = jax.lax.rsqrt(jnp.where(i == j, keys, 0.0).sum(axis=1) + 1e-6)
        queries = t.products(pairs(m.q_s, m.q_s), SQUARE)
        norm_q = jax.lax.rsqrt(jnp.where(i == j, queries, 0.0).sum(axis=1) + 1e-6)
    m.column[...] = norm_k
    plgpu.commit_smem()
    beta_j = plgpu.load(m.by_column.at[t.BETA], layout=COLUMNS)
    decay *= t.along_columns(beta_j * plgpu.load(m.column, layout=COLUMNS))
    scores = t.products(pairs(m.q_s, m.k_s), SQUARE) * decay * t.along_rows(norm_q * scale)
    scores_s, inverse_s = m.q_s.at[0], m.k_s.at[0]
    scores_s[...] = scores.astype(m.q_s.dtype)

    read, carry = jnp.exp(coarse + fine), jnp.exp(coarse_end + fine_end)
    write = jnp.exp((coarse_end - coarse) + (fine_end - fine)) * norm_k
    if runs:
        read = jnp.where(run == 0.0, read, 0.0)
        write = jnp.where(run == last, write, 0.0)
        carry = jnp.where(last == 0.0, carry, 0.0)
    values = {
        t.READ_K: read * norm_k, t.READ_Q: read * norm_q * scale, t.WRITE: write * beta, t.CARRY: beta * 0.0 + carry,
        t.WRITE_UNWEIGHTED: write, t.NORM_K: norm_k, t.NORM_Q: norm_q,
    }  # fmt: skip
    for row, value in values.items():
        m.factors_s.at[row][...] = value
    m.factors_s.at[t.FACTORS - 1][...] = norm_k  # unused; written so that no copy reads undefined memory
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(scores_s, m.scores.at[b, h, n])
    plgpu.copy_smem_to_gmem(m.factors_s, m.factors.at[b, h, n])

    lower = jnp.where(i > j, keys * decay * t.along_rows(norm_k), 0.0)
    rights = [m.right0] if normalize else [m.right0, m.right1]
    inverse = invert_unit_lower(lower, i, j, rights, getattr(m, "spare", None))
    inverse_s[...] = inverse.astype(m.k_s.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(inverse_s, m.inverse.at[b, h, n])
    plgpu.wait_smem_to_gmem(0)


def _body(m: Any, *, chunks: int, warpgroups: int, **options: Any) -> None:
    b, block, h = (jax.lax.axis_index(name) for name in ("b", "block", "h"))
    warpgroup = jax.lax.axis_index("warpgroup")
    n = block * warpgroups + warpgroup
    buffers = scratch(64, jnp.bfloat16)
    own = {name: getattr(m, name).at[warpgroup] for name in vars(m) if name in buffers}

    @pl.when(n < chunks)
    def _():
        _chunk(types.SimpleNamespace(**{**vars(m), **own}), (b, n, h), **options)

    plgpu.barrier_arrive(m.end)
    plgpu.barrier_wait(m.end)


def scratch(head_size: int, dtype: Any, normalize: bool = True) -> dict[str, Any]:
    """Buffers of each warpgroup."""
    low = jnp.float16 if normalize else jnp.bfloat16
    warpgroups = warpgroups_for(head_size)
    square = (warpgroups, *SQUARE)
    return {
        "q_s": t.buffer((warpgroups, head_size // CHUNK, *SQUARE), dtype),
        "k_s": t.buffer((warpgroups, head_size // CHUNK, *SQUARE), dtype),
        "by_row": plgpu.SMEM((warpgroups, t.GATES, CHUNK), jnp.float32),
        "by_column": plgpu.SMEM((warpgroups, t.GATES, CHUNK), jnp.float32),
        "column": plgpu.SMEM((warpgroups, CHUNK), jnp.float32),
        "factors_s": plgpu.SMEM((warpgroups, t.FACTORS, CHUNK), jnp.float32),
        "full": plgpu.Barrier(num_arrivals=2 + 2 * (head_size // CHUNK), num_barriers=warpgroups),
        **{f"right{n}": t.buffer(square, low) for n in range(1 if normalize else 2)},
        **t.spare(square, low),
    }


def within_chunks(
    q: jax.Array, k: jax.Array, gates: jax.Array, *, scale: float, runs: bool, normalize: bool = True
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(A, P [B,H,chunks,64,64] in the dtype of k, factors [B,H,chunks,8,64] float32) of every chunk; T whole chunks."""
    B, _, K, N = k.shape
    H, chunks = gates.shape[1:3]
    warpgroups = warpgroups_for(N)
    square = jax.ShapeDtypeStruct((B, H, chunks, CHUNK, CHUNK), k.dtype)
    results = t.launch(
        "gated_delta_rule_within",
        lambda m: _body(
            m, chunks=chunks, warpgroups=warpgroups, group=H // K, scale=scale, runs=runs, normalize=normalize
        ),
        inputs={"q": q, "k": k, "gates": gates},
        outputs={
            "inverse": square,
            "scores": square,
            "factors": jax.ShapeDtypeStruct((B, H, chunks, t.FACTORS, CHUNK), jnp.float32),
        },
        scratch={**scratch(N, k.dtype, normalize), "end": plgpu.Barrier(num_arrivals=warpgroups)},
        grid={"b": B, "block": ceil_div(chunks, warpgroups), "h": H},
        warpgroups=warpgroups,
    )
    return results["inverse"], results["scores"], results["factors"]
