"""How do operations run on a mesh? Inside shard_map, each device on its rows, its heads and its tokens.

The compiler cannot look into a kernel: on sharded arrays it would gather them all. So each operation is wrapped here,
with specs from the one table of logical axes (``sharding.py``), and its arguments stay where they are:

* rows over ``data`` and ``fsdp``;
* heads over ``tensor``. Where there are fewer KV heads than devices of that axis, they are whole on each device, which
  takes the one that its query heads read (not for NSA, whose heads of a group choose their blocks together);
* tokens over ``sequence``. q, gates and outputs never move. Window attention receives the keys, values, scores and
  expiries of as many devices before it as its window reaches into, LTE in training, full attention and NSA those of
  all; later ones are not sent. Where LTE reads under its budget, the retained tokens travel and no others
  (``partition_retained.py``). The delta rule passes each device's state map on:

    S_after = A S_before + B,    B = S_after from zeros,  A = S_after from the identity with v = 0

  so that all devices compute at once, three passes instead of one. NSA computes its shard as the end of the row.

Without a mesh (``jax.sharding.use_abstract_mesh``, which ``sharding.on`` enters) or on one device, the operations are
called as they are.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from lte_jax import partition_retained, sharding
from lte_jax.partition_plan import (
    KEYS,
    ROWS,
    SEQUENCE,
    SLOTS,
    TENSOR,
    Arrays,
    Axes,
    Plan,
    current_mesh,
    ends,
    pad_front,
    with_past,
)
from pallas_kernels import block_attention as blocks
from pallas_kernels import gated_delta_rule as delta
from pallas_kernels import rms_norm as norms
from pallas_kernels import short_convolution as convolutions
from pallas_kernels import window_attention as windows
from pallas_kernels.short_convolution.rows import final_state


def check_heads(name: str, config: Any, mesh: Mesh) -> None:
    """Raises ValueError where the heads of the mixer ``name`` cannot be split over ``tensor``."""
    ways, heads = mesh.shape[TENSOR], getattr(config, "value_heads", config.num_heads)
    kv_heads = config.num_heads if name == "gated_deltanet" else config.num_kv_heads or heads
    if heads % ways:
        raise ValueError(
            f"{name}: mesh.tensor={ways} must divide its {heads} heads: lower it, or raise mesh.fsdp instead"
        )
    if kv_heads % ways and (name == "nsa" or ways % kv_heads):
        rule = "divide" if name == "nsa" else "divide, or be a multiple of,"
        raise ValueError(f"{name}: mesh.tensor={ways} must {rule} its {kv_heads} key/value heads: change mesh.tensor")


def constrain(x: Array, *axes: str | None) -> Array:
    """``x`` placed by the table on the current mesh, so that the compiler moves weights and not activations."""
    mesh = current_mesh()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, sharding.spec(axes, x.shape, mesh))


def lookup(table: Array, tokens: Array, dtype: Any) -> Array:
    """Rows of ``table`` [L,D]: over ``fsdp`` it is gathered as all weights are, and no activation is."""
    rows = jnp.take(constrain(table, "vocab", None), tokens, axis=0).astype(dtype)
    return constrain(rows, "batch", "length", None)


def window_attention(
    q: Array,
    k: Array,
    v: Array,
    scores: Array | None = None,
    *,
    window: int | None = None,
    expiry: Array | None = None,
    columns: windows.Columns | None = None,
    segment_ids: Array | None = None,
    budget: int | None = None,
    implementation: str | None = None,
) -> Array:
    """``pallas_kernels.window_attention`` on the current mesh; with columns, tokens are not split.

    Args:
      budget: at most so many tokens of a document and head are retained at any index, so that they travel alone.
    """
    options: Any = {"window": window, "implementation": implementation}
    mesh = current_mesh()
    if mesh is None:
        arrays: Any = {"scores": scores, "expiry": expiry, "columns": columns, "segment_ids": segment_ids}
        return windows.window_attention(q, k, v, **arrays, **options)
    beside: Arrays = {"scores": (scores, KEYS[:3]), "expiry": (expiry, KEYS[:3]), "segments": (segment_ids, KEYS[:2])}
    if columns is not None:
        names = zip(columns._fields, columns, strict=True)
        beside |= {f"column_{name}": (x, SLOTS[: x.ndim]) for name, x in names}
    named: Any = {"q": (q, ROWS), "k": (k, KEYS), "v": (v, KEYS), **beside}
    plan = Plan(mesh, q.shape, k.shape, whole=columns is not None or q.shape[1] != k.shape[1])

    def local(arrays: Arrays) -> Array:
        arrays = plan.own_kv_heads(arrays)
        tokens = arrays["q"].shape[1]
        held: Any = [arrays.get(f"column_{name}") for name in windows.Columns._fields]
        kept = None if columns is None else windows.Columns(*held)
        if plan.shards > 1:
            past = plan.shards - 1
            if window is not None and (expiry is None or budget is not None):
                past = min(past, -(-(window - 1) // tokens))
            own, arrays = arrays, with_past(arrays, past)
            if expiry is not None and past < plan.shards - 1:
                assert budget is not None
                own |= {"segments": arrays["segments"][:, -tokens:]}
                first, _ = ends(arrays["segments"], len(arrays["q"]))
                kept = partition_retained.columns(own, first, axis=SEQUENCE, past=past, budget=budget)
        return windows.window_attention(
            arrays["q"],
            arrays["k"],
            arrays["v"],
            arrays.get("scores"),
            expiry=arrays.get("expiry"),
            columns=kept,
            segment_ids=arrays.get("segments"),
            **options,
        )

    return plan.run(local, named, ROWS)


def block_attention(
    q: Array, k: Array, v: Array, gates: Array, *, segment_ids: Array | None = None, **options: Any
) -> Array:
    """``pallas_kernels.block_attention`` on the current mesh."""
    mesh = current_mesh()
    if mesh is None:
        return blocks.block_attention(q, k, v, gates, segment_ids=segment_ids, **options)
    named: Any = {
        "q": (q, ROWS),
        "k": (k, KEYS),
        "v": (v, KEYS),
        "gates": (gates, ROWS),
        "segments": (segment_ids, KEYS[:2]),
    }
    plan = Plan(mesh, q.shape, k.shape, share_groups=False)

    def local(arrays: Arrays) -> Array:
        tokens = arrays["q"].shape[1]
        if plan.shards > 1:
            arrays = with_past(arrays, plan.shards - 1)
            before = (plan.shards - 1) * tokens  # queries that other devices have: their outputs are dropped
            arrays |= {name: pad_front(arrays[name], before) for name in ("q", "gates")}
        o = blocks.block_attention(
            *(arrays[name] for name in ("q", "k", "v", "gates")), segment_ids=arrays.get("segments"), **options
        )
        return o[:, -tokens:]

    return plan.run(local, named, ROWS)


def gated_delta_rule(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    beta: Array,
    *,
    segment_ids: Array | None = None,
    initial_state: Array | None = None,
    return_updates: bool = False,
    implementation: str | None = None,
) -> tuple[Array, ...]:
    """``pallas_kernels.gated_delta_rule`` on the current mesh; tokens are split where no initial state is given."""
    options: Any = {"return_updates": return_updates, "implementation": implementation}
    mesh = current_mesh()
    if mesh is None:
        return delta.gated_delta_rule(q, k, v, g, beta, segment_ids=segment_ids, initial_state=initial_state, **options)
    state_axes: Axes = ("batch", "heads", None, None)
    named: Any = {"q": (q, KEYS), "k": (k, KEYS), "v": (v, ROWS), "g": (g, ROWS[:3]), "beta": (beta, ROWS[:3])}
    named |= {"segments": (segment_ids, KEYS[:2]), "state": (initial_state, state_axes)}
    plan = Plan(mesh, v.shape, k.shape, whole=initial_state is not None)

    def local(arrays: Arrays) -> tuple[Array, ...]:
        arrays = plan.own_kv_heads(arrays, ("q", "k"))
        inputs = [arrays[name] for name in ("q", "k", "v", "g", "beta")]
        segments, state = arrays.get("segments"), arrays.get("state")
        if plan.shards > 1:
            state = _state_before(inputs, segments, implementation)
        o, after, *updates = delta.gated_delta_rule(*inputs, segment_ids=segments, initial_state=state, **options)
        if plan.shards > 1:
            last = jax.lax.axis_index(SEQUENCE) == plan.shards - 1
            after = jax.lax.psum(jnp.where(last, after, 0.0), SEQUENCE)
        return (o, after, *updates)

    return plan.run(local, named, (ROWS, state_axes, *([ROWS] if return_updates else [])))


def short_convolution(
    x: Array, weight: Array, *, segment_ids: Array | None = None, initial_state: Array | None = None, **options: Any
) -> tuple[Array, Array]:
    """``pallas_kernels.short_convolution`` on the current mesh; a shard receives the last inputs of those before."""
    mesh, given = current_mesh(), {"segment_ids": segment_ids, "initial_state": initial_state, **options}
    if mesh is None:
        return convolutions.short_convolution(x, weight, **given)  # type: ignore[arg-type]
    taps, shards = weight.shape[0], mesh.shape[SEQUENCE]
    split = x.shape[1] % shards == 0 and x.shape[1] // shards >= taps - 1
    length, over_shards = "length" if split else None, split and shards > 1

    def local(arrays: Arrays) -> tuple[Array, Array]:
        x, segments, before = arrays["x"], arrays.get("segments"), arrays.get("state")
        if over_shards:
            before, whole = _inputs_before(x, segments, before, taps - 1)
        y, after = convolutions.short_convolution(
            x, arrays["weight"], segment_ids=segments, initial_state=before, **options
        )
        return y, whole if over_shards else after

    named: dict[str, tuple[Any, Axes]] = {
        "x": (x, ("batch", length, "heads")),
        "weight": (weight, (None, "heads")),
        "segments": (segment_ids, ("batch", length)),
        "state": (initial_state, ("batch", None, "heads")),
    }
    arrays = {name: array for name, (array, _) in named.items() if array is not None}
    specs = {name: sharding.spec(named[name][1], array.shape, mesh, every=True) for name, array in arrays.items()}
    outs = specs["x"], PartitionSpec(specs["x"][0], None, specs["x"][2])
    return jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=outs, check_vma=False)(arrays)


def rms_norm(x: Array, weight: Array, gate: Array | None = None, *, axes: Axes, **options: Any) -> Array:
    """``pallas_kernels.rms_norm`` on the current mesh; ``axes`` are those of x, whose last is whole."""
    mesh = current_mesh()
    if mesh is None:
        return norms.rms_norm(x, weight, gate, **options)
    rows = sharding.spec(axes, x.shape, mesh, every=True)
    local = functools.partial(norms.rms_norm, **options)
    specs = (rows, PartitionSpec(), rows)  # the last is not used where there is no gate
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)(x, weight, gate)


def residual_rms_norm(x: Array, weight: Array, **options: Any) -> tuple[Array, Array]:
    """``pallas_kernels.rms_norm.residual_rms_norm`` of x [B,T,D] on the current mesh."""
    mesh = current_mesh()
    if mesh is None:
        return norms.residual_rms_norm(x, weight, **options)
    if mesh.shape["tensor"] > 1:
        # Rows are whole on each device of ``tensor``: split by hand, their gradients would be summed over it.
        return norms.residual_rms_norm(x, weight, **{**options, "implementation": "xla"})
    rows = sharding.spec(("batch", "length", None), x.shape, mesh, every=True)
    local = functools.partial(norms.residual_rms_norm, **options)
    specs = (rows, PartitionSpec())
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(rows, rows), check_vma=False)(x, weight)


def sum_over_tokens(function: Any, rows: Array, weight: Array, labels: Array) -> Any:
    """The sum over devices of ``function(rows [B,T,D], weight [D,L], labels [B,T])``, each on its own tokens.

    The weight is whole on each device but for ``tensor``, which the compiler splits; its gradient is summed once.
    """
    mesh = current_mesh()
    if mesh is None:
        return function(rows, weight, labels)
    tokens = sharding.spec(("batch", "length"), labels.shape, mesh)
    weight = constrain(weight, None, "vocab")
    names = [name for entry in tokens for name in ((entry,) if isinstance(entry, str) else entry or ())]
    if not names:
        return function(rows, weight, labels)

    def local(rows: Array, weight: Array, labels: Array) -> Any:
        return jax.lax.psum(function(rows, weight, labels), tuple(names))

    specs = (PartitionSpec(*tokens, None), PartitionSpec(), tokens)
    return jax.shard_map(
        local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), axis_names=set(names), check_vma=False
    )(rows, weight, labels)


def _state_before(inputs: list[Array], segments: Array | None, implementation: str | None) -> Array:
    """The delta rule's state before this device's tokens."""
    q, k, v, g, beta = inputs
    B, _, H, V = v.shape
    N = k.shape[-1]

    def after(values: Array, state: Array | None) -> Array:
        return delta.gated_delta_rule(
            q, k, values, g, beta, segment_ids=segments, initial_state=state, implementation=implementation
        )[1]

    unit = jnp.broadcast_to(jnp.eye(N, dtype=jnp.float32), (B, H, N, N))
    maps = after(jnp.zeros((*v.shape[:3], N), v.dtype), unit)
    gathered = [jax.lax.all_gather(x, SEQUENCE) for x in (maps, after(v, None), *ends(segments, B))]
    state, last = jnp.zeros((B, H, N, V), jnp.float32), jnp.zeros(B, jnp.int32)
    mine, states = jax.lax.axis_index(SEQUENCE), []
    for A, S, first, end in zip(*gathered, strict=True):
        # A state enters only the document that it comes from. Over a shard of padding (first 0) A is the identity.
        state = jnp.where(((first == last) | (first == 0))[:, None, None, None], state, 0.0)
        states.append(state)
        state = jnp.matmul(A, state, precision="highest") + S
        last = jnp.where(first == 0, last, end)
    return jnp.stack(states)[mine]


def _inputs_before(x: Array, segments: Array | None, state: Array | None, history: int) -> tuple[Array, Array]:
    """The short convolution's state [B,history,D] before this device's tokens, and the one after the whole row.

    Shards of padding, and those whose last document has fewer than ``history`` tokens, hand on what came before them.
    """
    first, end = ends(segments, len(x))
    count = jnp.full_like(end, history)
    if segments is not None:
        tokens = jnp.sum((segments == end[:, None]) & (segments != 0), axis=1, dtype=jnp.int32)
        count = jnp.minimum(tokens, history)
    own = final_state(x, segments, None, history)
    gathered = [jax.lax.all_gather(one, SEQUENCE) for one in (own, jnp.stack([first, end, count]))]
    state, last = jnp.zeros_like(own) if state is None else state, jnp.zeros_like(end)
    states = []
    for tail, (first, end, count) in zip(*gathered, strict=True):
        # A state enters only the document that it comes from, that of the whole row the first one that there is.
        enters = (first == last) | (first == 0) | (last == 0)
        state = jnp.where(enters[:, None, None], state, jnp.zeros((), x.dtype))
        states.append(state)
        slot = jnp.arange(history, dtype=jnp.int32) + count[:, None]
        moved = jnp.take_along_axis(state, jnp.minimum(slot, history - 1)[..., None], axis=1)
        stays = (slot < history) & (first == end)[:, None]
        state = tail + jnp.where(stays[..., None], moved, jnp.zeros((), x.dtype))
        last = jnp.where(first == 0, last, end)
    return jnp.stack(states)[jax.lax.axis_index(SEQUENCE)], state
