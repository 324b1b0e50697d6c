"""The gated delta rule in plain jax.numpy: token by token (the slow reference), in chunks, and one step.

In a chunk of C tokens that starts from the state S, with G(i,j) = exp(sum of g over j < l <= i), start(i) the decay
from before the chunk to i and end(j) that from j to its last token, the updates u solve a unit lower triangular system
(the WY form; arXiv 2412.06464, section 3.3):

    (I + A) U = beta (V - start K S),   A_ij = beta_i G(i,j) k_i.k_j  for j < i
    O = start Q S + (G q_i.k_j, j <= i) U,      S' = start(C) S + (end K)^T U

Sums of g are formed per pair, not as differences of a running sum, which loses the small decays that follow large ones.
All arithmetic is float32 whatever the inputs are.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

CHUNK = 64
_EPS = 1e-6

# float32 products in float32 on every device (a GPU's default is TF32).
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def _normalized(x: jax.Array, scale: float, normalize: bool) -> jax.Array:
    x = x.astype(jnp.float32)
    if normalize:
        x = x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + _EPS)
    return x * scale


def _token(state, q, k, v, g, beta):
    """One step of the recurrence: state [B,K,G,N,V]; q, k [B,K,N]; v [B,K,G,V]; g, beta [B,K,G]; all float32."""
    state = state * jnp.exp(g)[..., None, None]
    update = beta[..., None] * (v - _einsum("bkgnv,bkn->bkgv", state, k))
    state = state + k[:, :, None, :, None] * update[..., None, :]
    return state, _einsum("bkgnv,bkn->bkgv", state, q), update


def recurrence(
    q, k, v, g, beta, *, segment_ids=None, initial_state=None, scale=None, normalize=True, return_updates=False
):
    """The equations of :func:`~pallas_kernels.gated_delta_rule.api.gated_delta_rule`, one token at a time.

    Arguments and results are the same, with gradients by automatic differentiation (of the updates too). It keeps a
    state per token for them: a reference for short sequences.
    """
    (batch, tokens, kv_heads, size), (heads, value_size) = q.shape, v.shape[2:]
    group = heads // kv_heads
    q = _normalized(q, size**-0.5 if scale is None else scale, normalize)
    k = _normalized(k, 1.0, normalize)
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, size, value_size), jnp.float32)
    if segment_ids is None:
        segment_ids = jnp.ones((batch, tokens), jnp.int32)

    def advance(carry, inputs):
        state, current = carry
        q, k, v, g, beta, segment = inputs
        live = segment != 0
        reset = live & (current != 0) & (segment != current)
        start = jnp.where(reset[:, None, None, None, None], 0.0, state)
        after, o, update = _token(start, q, k, v, g, beta)
        state = jnp.where(live[:, None, None, None, None], after, state)
        o, update = (jnp.where(live[:, None, None, None], x, 0.0) for x in (o, update))
        return (state, jnp.where(live, segment, current)), (o, update)

    def by_group(x):
        x = x.astype(jnp.float32)
        return jnp.moveaxis(x.reshape(batch, tokens, kv_heads, group, *x.shape[3:]), 1, 0)

    carry = (initial_state.reshape(batch, kv_heads, group, size, value_size), jnp.zeros((batch,), jnp.int32))
    by_time = (jnp.moveaxis(q, 1, 0), jnp.moveaxis(k, 1, 0), by_group(v), by_group(g), by_group(beta), segment_ids.T)
    (state, _), (o, updates) = jax.lax.scan(advance, carry, by_time)
    o, updates = (jnp.moveaxis(x, 0, 1).reshape(v.shape) for x in (o, updates))
    results = (o.astype(v.dtype), state.reshape(batch, heads, size, value_size))
    return (*results, updates) if return_updates else results


def check(case) -> None:
    """Every case is supported."""


def _inverse(a: jax.Array) -> jax.Array:
    """(I + A)^-1 for strictly lower triangular A [..., C, C], C a power of two, by doubling the diagonal blocks.

    With X the inverse of the diagonal blocks of one size, X - X A' X is that of the blocks of twice the size, A' being
    A inside the larger blocks and below the smaller.
    """
    size = a.shape[-1]
    index = jnp.arange(size)
    inverse = jnp.broadcast_to(jnp.eye(size, dtype=a.dtype), a.shape)
    for level in range(size.bit_length() - 1):
        block = index >> level
        joined = jnp.where((block[:, None] ^ block) == 1, a, 0.0)
        inverse = inverse - _einsum("...ij,...jk,...kl->...il", inverse, joined, inverse)
    return inverse


@jax.custom_vjp
def _solve(a: jax.Array, right: jax.Array) -> jax.Array:
    """X of (I + A) X = R: with (I + A)^T dR = dX, the gradient of A is -dR X^T below the diagonal."""
    return _solve_forward(a, right)[0]


def _solve_forward(a, right):
    inverse = _inverse(a)
    x = _einsum("...ij,...jv->...iv", inverse, right)
    return x, (inverse, x)


def _solve_backward(saved, dx):
    inverse, x = saved
    dright = _einsum("...ji,...jv->...iv", inverse, dx)
    return jnp.tril(-_einsum("...iv,...jv->...ij", dright, x), -1), dright


_solve.defvjp(_solve_forward, _solve_backward)


def _decays(g, runs, run_before):
    """The decay between each pair of tokens, from before the chunk to each token, and from each token to the end.

    g [B,K,G,C]; runs [B,C] and run_before [B], or None. Across a change of run, and forward in time, the decay is 0:
    the exponent is masked before the exponential, so that no infinity meets a zero in the gradient.
    """
    size = g.shape[-1]
    row, column = jnp.arange(size)[:, None], jnp.arange(size)
    up_to = (column <= row).astype(g.dtype)
    after = (row > column).astype(g.dtype)
    between = _einsum("il,bkgl,lj->bkgij", up_to, g, after)
    from_start = _einsum("il,bkgl->bkgi", up_to, g)
    to_end = _einsum("lj,bkgl->bkgj", after, g)
    pairs, seen, kept = column <= row, jnp.ones((size,), bool), jnp.ones((size,), bool)
    if runs is not None:
        pairs = (pairs & (runs[:, :, None] == runs[:, None, :]))[:, None, None]
        seen = (runs == run_before[:, None])[:, None, None]
        kept = (runs == runs[:, -1:])[:, None, None]

    def masked_exp(exponent, mask):
        return jnp.where(mask, jnp.exp(jnp.where(mask, exponent, 0.0)), 0.0)

    return masked_exp(between, pairs), masked_exp(from_start, seen), masked_exp(to_end, kept)


def _chunk(state, q, k, v, g, beta, runs, run_before, *, scale, normalize):
    """One chunk: state [B,K,G,N,V] float32; q, k [B,K,C,N]; v [B,K,G,C,V]; g, beta [B,K,G,C] -> state, o, updates."""
    dtype = v.dtype
    q, k, v = _normalized(q, scale, normalize), _normalized(k, 1.0, normalize), v.astype(jnp.float32)
    decay, from_start, to_end = _decays(g, runs, run_before)
    strictly = jnp.tril(jnp.ones(decay.shape[-2:], jnp.float32), -1)
    a = beta[..., None] * decay * strictly * _einsum("bkin,bkjn->bkij", k, k)[:, :, None]
    read = from_start[..., None] * _einsum("bkcn,bkgnv->bkgcv", k, state)
    updates = _solve(a, beta[..., None] * (v - read))
    scores = decay * _einsum("bkin,bkjn->bkij", q, k)[:, :, None]
    o = from_start[..., None] * _einsum("bkcn,bkgnv->bkgcv", q, state) + _einsum("bkgij,bkgjv->bkgiv", scores, updates)
    written = _einsum("bkcn,bkgcv->bkgnv", k, to_end[..., None] * updates)
    state = from_start[..., -1, None, None] * state + written
    return state, o.astype(dtype), updates


def _chunk_size(tokens: int) -> int:
    """``CHUNK``, or for shorter sequences the least power of two that holds them."""
    return min(CHUNK, 1 << (tokens - 1).bit_length())


def _split(x: jax.Array, chunk: int, groups: tuple[int, ...], padding: str = "constant") -> jax.Array:
    """[B, T, heads, ...] -> [chunks, B, *groups, C, ...], with T padded to whole chunks."""
    batch, tokens = x.shape[:2]
    count = -(-tokens // chunk)
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, count * chunk - tokens)
    x = jnp.pad(x, widths, mode=padding).reshape(batch, count, chunk, *groups, *x.shape[3:])
    x = jnp.moveaxis(x, 1, 0)
    return jnp.moveaxis(x, 2, 2 + len(groups))


def _join(x: jax.Array, groups: int, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of ``_split``: [chunks, B, *groups, C, ...] -> ``shape`` [B, T, heads, ...]."""
    x = jnp.moveaxis(jnp.moveaxis(x, 2 + groups, 2), 0, 1)
    x = x.reshape(x.shape[0], x.shape[1] * x.shape[2], *shape[2:])
    return x[:, : shape[1]]


def _chunks(q, k, v, g, beta, runs):
    """What the chunk scan reads: the differentiable arrays, and the runs with the run before each chunk."""
    kv_heads, heads = q.shape[2], v.shape[2]
    chunk = _chunk_size(q.shape[1])
    one, two = (kv_heads,), (kv_heads, heads // kv_heads)
    arrays = tuple(_split(x, chunk, groups) for x, groups in ((q, one), (k, one), (v, two), (g, two), (beta, two)))
    if runs is None:
        return arrays, (None, None)
    runs = _split(runs, chunk, (), "edge")
    before = jnp.concatenate([jnp.zeros_like(runs[:1, :, -1]), runs[:-1, :, -1]])
    return arrays, (runs, before)


def _first_state(q, v, initial_state):
    (batch, _, kv_heads, size), (heads, value_size) = q.shape, v.shape[2:]
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, size, value_size), jnp.float32)
    return initial_state.reshape(batch, kv_heads, heads // kv_heads, size, value_size)


def forward(q, k, v, g, beta, runs, initial_state, *, scale, normalize, return_updates):
    """A scan over the chunks; the residuals are the states at which chunks start, [chunks,B,K,G,N,V] float32."""

    def advance(state, inputs):
        arrays, marks = inputs
        after, o, updates = _chunk(state, *arrays, *marks, scale=scale, normalize=normalize)
        return after, (state, o, updates if return_updates else None)

    state, (states, o, updates) = jax.lax.scan(
        advance, _first_state(q, v, initial_state), _chunks(q, k, v, g, beta, runs)
    )
    o = _join(o, 2, v.shape)
    updates = _join(updates, 2, v.shape) if return_updates else None
    return o, state.reshape(state.shape[0], -1, *state.shape[3:]), updates, states


def backward(q, k, v, g, beta, runs, initial_state, residuals, do, dfinal_state, *, scale, normalize):
    """The scan in reverse: each chunk is recomputed from the state at its start and differentiated on the spot."""
    states = residuals
    arrays, marks = _chunks(q, k, v, g, beta, runs)
    dos = _split(do, arrays[0].shape[-2], states.shape[2:4])

    def retreat(dstate, inputs):
        state, arrays, marks, do = inputs

        def run(state, *arrays):
            return _chunk(state, *arrays, *marks, scale=scale, normalize=normalize)[:2]

        _, pullback = jax.vjp(run, state, *arrays)
        dstate, *gradients = pullback((dstate, do))
        return dstate, gradients

    dstate, gradients = jax.lax.scan(
        retreat, dfinal_state.reshape(states.shape[1:]), (states, arrays, marks, dos), reverse=True
    )
    dinitial_state = None if initial_state is None else dstate.reshape(initial_state.shape)
    groups = (1, 1, 2, 2, 2)
    joined = [_join(d, n, x.shape) for d, n, x in zip(gradients, groups, (q, k, v, g, beta), strict=True)]
    return (*joined, dinitial_state)


def step(q, k, v, g, beta, state, *, scale, normalize, return_update):
    """One token; plain autodiff differentiates it."""
    (batch, kv_heads, size), (heads, value_size) = q.shape, v.shape[1:]
    grouped = (batch, kv_heads, heads // kv_heads)
    after, o, update = _token(
        state.reshape(*grouped, size, value_size),
        _normalized(q, scale, normalize),
        _normalized(k, 1.0, normalize),
        v.astype(jnp.float32).reshape(*grouped, value_size),
        g.reshape(grouped),
        beta.reshape(grouped),
    )
    return (
        o.reshape(v.shape).astype(v.dtype),
        after.reshape(state.shape),
        update.reshape(v.shape) if return_update else None,
    )
