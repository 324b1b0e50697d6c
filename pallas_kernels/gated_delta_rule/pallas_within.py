"""What can be computed for every chunk at once: inverse, scores and factors (Pallas, Mosaic GPU).

With c the running sum of the log decays g inside a chunk and rows of q, k divided by their norms:

    A    = (I + L)^-1,  L_ij = exp(c_i - c_j) k_i.k_j beta_j    (i > j)
    P_ij = scale exp(c_i - c_j) q_i.k_j beta_j                  (i >= j)

and per token the factors of ``pallas_tiles``: what multiplies k S and q S, and what multiplies r before it is written.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule import pallas_tiles as t
from pallas_kernels.gated_delta_rule.pallas_tiles import CHUNK, COLUMNS, ROWS, SQUARE


def warpgroups_for(head_size: int, normalize: bool = True) -> int:
    """Each has chunks of its own: three where there is room, so that the waits of one are filled by the others."""
    return {64: 3, 128: 3, 256: 2}[head_size] - (0 if normalize or head_size == 64 else 1)


def since_before_chunk(runs: jax.Array) -> jax.Array:
    """[B,T] int32: the resets of each token, counted from the last token before its chunk; T whole chunks."""
    by_chunk = runs.reshape(runs.shape[0], -1, CHUNK)
    before = jnp.pad(by_chunk[:, :-1, -1:], ((0, 0), (1, 0), (0, 0)))
    return (by_chunk - before).reshape(runs.shape)


def gates(g: jax.Array, beta: jax.Array, resets: jax.Array | None) -> jax.Array:
    """[B,H,chunks,4,64] float32: two summands of the running log decay, beta, and ``since_before_chunk``'s resets.

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
    if resets is not None:
        run += resets.reshape(B, 1, T // CHUNK, CHUNK).astype(jnp.float32)
    return jnp.stack([*sums, by_chunk(beta), run], axis=3)


def _summands(x: jax.Array, bounded: bool) -> list[jax.Array]:
    """x in 16 bits. Bounded by 2, in one float16, with the precision of tf32; else in a sum of two bfloat16."""
    return [x.astype(jnp.float16)] if bounded else list(t.split(x, jnp.bfloat16))


def _publish(buffers: Sequence[Any], values: Sequence[jax.Array]) -> None:
    for buffer, value in zip(buffers, values, strict=True):
        buffer[...] = value
    plgpu.commit_smem()


def invert_unit_lower(lower: list[jax.Array], i: jax.Array, j: jax.Array, m: Any, room: Any) -> jax.Array:
    """(I + L)^-1 of a strictly lower L [64,64] by doubling diagonal blocks: X <- X - X C X, C = L between two blocks.

    ``lower`` are the summands of L, which are in ``m.lower_s`` too: one if normalised keys and beta at most 2 bound all
    entries of L and X by 2. Kept as X = I - Y, so that the products round only corrections to L; Y C needs no mask
    before the product, because Y has blocks on its diagonal only.
    """

    def pairs(a, b):
        return [(a[0], b[0])] if len(b) == 1 else [(a[0], b[0]), (a[0], b[1]), (a[1], b[0])]

    def whole() -> jax.Array:
        return functools.reduce(jnp.add, [x.astype(jnp.float32) for x in lower])

    apart, bounded = i ^ j, len(lower) == 1
    y = jnp.where(apart < 2, whole(), 0.0)
    for level in range(1, 6):
        size = 1 << level
        minus = _summands(-y, bounded)
        meanwhile = functools.partial(_publish, m.y_s, minus)
        corner = t.products(pairs(minus, m.lower_s), SQUARE, whole(), room=room, meanwhile=meanwhile)
        corner = jnp.where((apart >= size) & (apart < 2 * size), corner, 0.0)
        y = t.products(pairs(_summands(corner, bounded), m.y_s), SQUARE, y + corner, room=room)
    return jnp.where(apart == 0, 1.0, 0.0) - y


def _bring(m: Any, place: Any, *, group: int) -> None:
    b, n, h = place
    rows, hk = pl.ds(n * CHUNK, CHUNK), jax.lax.div(h, jnp.int32(group))
    plgpu.copy_gmem_to_smem(m.k.at[b, rows, hk], m.k_s, m.full)
    plgpu.copy_gmem_to_smem(m.q.at[b, rows, hk], m.q_s, m.full)
    plgpu.copy_gmem_to_smem(m.gates.at[b, h, n], m.by_row, m.full)
    plgpu.copy_gmem_to_smem(m.gates.at[b, h, n], m.by_column, m.full)


def _chunk(
    m: Any, place: Any, turn: Any, bring_next: Callable[[], None], *, scale: float, runs: bool, normalize: bool
) -> None:
    """One warpgroup's chunk. ``m`` holds its own buffers, which the next chunk's inputs may enter half-way."""
    b, n, h = place
    plgpu.barrier_wait(m.full)
    i, j = t.indices(turn)
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

    pairs = [(m.k_s, m.k_s.T), (m.q_s, m.q_s.T)]
    keys, *queries, decay = t.together(pairs if normalize else pairs[:1], SQUARE, decays)
    norm_k = norm_q = beta * 0.0 + 1.0
    if normalize:
        norm_k, norm_q = (jax.lax.rsqrt(jnp.where(i == j, x, 0.0).sum(axis=1) + 1e-6) for x in (keys, *queries))
    m.column[...] = norm_k
    plgpu.commit_smem()
    beta_j = plgpu.load(m.by_column.at[t.BETA], layout=COLUMNS)
    decay *= t.along_columns(beta_j * plgpu.load(m.column, layout=COLUMNS))
    lower = _summands(jnp.where(i > j, keys * decay * t.along_rows(norm_k), 0.0), normalize)
    _publish(m.lower_s, lower)

    def factors():
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the results before these have left the buffers
        read, carry = jnp.exp(coarse + fine), jnp.exp(coarse_end + fine_end)
        write = jnp.exp((coarse_end - coarse) + (fine_end - fine)) * norm_k
        if runs:
            read = jnp.where(run == 0.0, read, 0.0)
            write = jnp.where(run == last, write, 0.0)
            carry = jnp.where(last == 0.0, carry, 0.0)
        values = {
            t.READ_K: read * norm_k, t.READ_Q: read * norm_q * scale, t.WRITE: write * beta,
            t.CARRY: beta * 0.0 + carry, t.WRITE_UNWEIGHTED: write, t.NORM_K: norm_k, t.NORM_Q: norm_q,
            t.FACTORS - 1: norm_k,  # unused; written so that no copy reads undefined memory
        }  # fmt: skip
        for row, value in values.items():
            m.factors_s.at[row][...] = value

    scores, _ = t.product(m.q_s, m.k_s.T, SQUARE, meanwhile=factors)
    m.scores_s[...] = (scores * decay * t.along_rows(norm_q * scale)).astype(m.scores_s.dtype)
    plgpu.commit_smem()  # also for what was read from the inputs' buffers
    plgpu.copy_smem_to_gmem(m.scores_s, m.scores.at[b, h, n])
    plgpu.copy_smem_to_gmem(m.factors_s, m.factors.at[b, h, n])
    bring_next()

    inverse = invert_unit_lower(lower, i, j, m, getattr(m, "spare", None))
    m.inverse_s[...] = inverse.astype(m.inverse_s.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(m.inverse_s, m.inverse.at[b, h, n])


def _body(m: Any, *, chunks: int, heads: int, items: int, warpgroups: int, group: int, **options: Any) -> None:
    """Persistent: every warpgroup takes chunks in turn."""
    warpgroup = jax.lax.axis_index("warpgroup")
    workers = t.PROGRAMS * warpgroups
    worker = jax.lax.axis_index("program") * warpgroups + warpgroup
    turns = jax.lax.div(items - worker + workers - 1, jnp.int32(workers))

    def own(index):
        buffers = {name: jax.tree.map(lambda x: x.at[index], getattr(m, name)) for name in m.own}
        return types.SimpleNamespace(**{**vars(m), **buffers})

    def place(turn):
        row, n = (f(worker + turn * workers, jnp.int32(chunks)) for f in (jax.lax.div, jax.lax.rem))
        b, h = (f(row, jnp.int32(heads)) for f in (jax.lax.div, jax.lax.rem))
        return b, n, h

    def bring(turn):
        pl.when(turn < turns)(lambda: _bring(own(warpgroup), place(turn), group=group))

    bring(0)

    @pl.loop(0, turns)
    def _(turn):
        _chunk(own(warpgroup + t.zero_of(turn)), place(turn), turn, lambda: bring(turn + 1), **options)

    plgpu.wait_smem_to_gmem(0)
    plgpu.barrier_arrive(m.end)
    plgpu.barrier_wait(m.end)


def scratch(head_size: int, dtype: Any, normalize: bool = True) -> dict[str, Any]:
    """Buffers of each warpgroup."""
    warpgroups = warpgroups_for(head_size, normalize)
    low, summands = (jnp.float16, 1) if normalize else (jnp.bfloat16, 2)
    square, rows = (warpgroups, *SQUARE), (warpgroups, CHUNK, head_size)
    gates = plgpu.SMEM((warpgroups, t.GATES, CHUNK), jnp.float32)
    return {
        "q_s": t.buffer(rows, dtype),
        "k_s": t.buffer(rows, dtype),
        "by_row": gates,
        "by_column": gates,
        "column": plgpu.SMEM((warpgroups, CHUNK), jnp.float32),
        "scores_s": t.buffer(square, dtype),
        "inverse_s": t.buffer(square, dtype),
        "factors_s": plgpu.SMEM((warpgroups, t.FACTORS, CHUNK), jnp.float32),
        "lower_s": (t.buffer(square, low),) * summands,
        "y_s": (t.buffer(square, low),) * summands,
        "full": plgpu.Barrier(num_arrivals=4, num_barriers=warpgroups),
        **t.spare(square, low),
    }


def within_chunks(
    q: jax.Array, k: jax.Array, gates: jax.Array, *, scale: float, runs: bool, normalize: bool = True
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(A, P [B,H,chunks,64,64] in the dtype of k, factors [B,H,chunks,8,64] float32) of every chunk; T whole chunks."""
    B, _, K, N = k.shape
    H, chunks = gates.shape[1:3]
    warpgroups, buffers = warpgroups_for(N, normalize), scratch(N, k.dtype, normalize)
    square = jax.ShapeDtypeStruct((B, H, chunks, CHUNK, CHUNK), k.dtype)

    def body(m):
        m.own = tuple(buffers)
        _body(
            m, chunks=chunks, heads=H, items=B * H * chunks, warpgroups=warpgroups, group=H // K, scale=scale,
            runs=runs, normalize=normalize,
        )  # fmt: skip

    results = t.launch(
        "gated_delta_rule_within",
        body,
        inputs={"q": q, "k": k, "gates": gates},
        outputs={
            "inverse": square,
            "scores": square,
            "factors": jax.ShapeDtypeStruct((B, H, chunks, t.FACTORS, CHUNK), jnp.float32),
        },
        scratch={**buffers, "end": plgpu.Barrier(num_arrivals=warpgroups)},
        grid={"program": t.PROGRAMS},
        warpgroups=warpgroups,
    )
    return results["inverse"], results["scores"], results["factors"]
