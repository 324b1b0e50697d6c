"""How do operations run on a mesh? Inside shard_map, each device on its rows, its heads and its tokens.

The compiler cannot look into a kernel: on sharded arrays it would gather them all. So each operation is wrapped here,
with specs from the one table of logical axes (``sharding.py``), and its arguments stay where they are:

* rows over ``data`` and ``fsdp``;
* heads over ``tensor``. Where there are fewer KV heads than devices of that axis, they are whole on each device, which
  takes the one that its query heads read (not for NSA, whose heads of a group choose their blocks together);
* tokens over ``sequence``. q, gates and outputs never move. Window attention receives the keys, values, scores and
  expiries of as many devices before it as its window reaches into, LTE in training, full attention and NSA those of
  all; later ones are not sent. Where LTE reads under its budget, the retained tokens travel and no others
  (``retained.py``). The delta rule passes each device's state map on:

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
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec
from jaxtyping import Array

from lte_jax import retained, sharding
from pallas_kernels import block_attention as blocks
from pallas_kernels import gated_delta_rule as delta
from pallas_kernels import rms_norm as norms
from pallas_kernels import short_convolution as convolutions
from pallas_kernels import window_attention as windows

SEQUENCE, TENSOR = "sequence", "tensor"

Arrays = dict[str, Any]
Axes = tuple[str | None, ...]

ROWS: Axes = ("batch", "length", "heads", None)
KEYS: Axes = ("batch", "length", "kv_heads", None)
SLOTS: Axes = ("batch", None, "kv_heads", None)


def current_mesh() -> AbstractMesh | None:
    """The mesh of several devices that is being traced for; None where there is none, or inside another shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or not set(sharding.AXES) <= set(mesh.axis_names):
        return None
    return None if any(kind == AxisType.Manual for kind in mesh.axis_types) else mesh


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
    plan = _Plan(mesh, q.shape, k.shape, whole=columns is not None or q.shape[1] != k.shape[1])

    def local(arrays: Arrays) -> Array:
        arrays = plan.own_kv_heads(arrays)
        tokens = arrays["q"].shape[1]
        held: Any = [arrays.get(f"column_{name}") for name in windows.Columns._fields]
        kept = None if columns is None else windows.Columns(*held)
        if plan.shards > 1:
            past = plan.shards - 1
            if window is not None and (expiry is None or budget is not None):
                past = min(past, -(-(window - 1) // tokens))
            own, arrays = arrays, _with_past(arrays, past)
            if expiry is not None and past < plan.shards - 1:
                assert budget is not None
                own |= {"segments": arrays["segments"][:, -tokens:]}
                first, _ = _ends(arrays["segments"], len(arrays["q"]))
                kept = retained.columns(own, first, axis=SEQUENCE, past=past, budget=budget)
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
    plan = _Plan(mesh, q.shape, k.shape, share_groups=False)

    def local(arrays: Arrays) -> Array:
        tokens = arrays["q"].shape[1]
        if plan.shards > 1:
            arrays = _with_past(arrays, plan.shards - 1)
            before = (plan.shards - 1) * tokens  # queries that other devices have: their outputs are dropped
            arrays |= {name: _pad_front(arrays[name], before) for name in ("q", "gates")}
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
    plan = _Plan(mesh, v.shape, k.shape, whole=initial_state is not None)

    def local(arrays: Arrays) -> tuple[Array, ...]:
        arrays = plan.own_kv_heads(arrays, ("q", "k"))
        inputs = [arrays[name] for name in ("q", "k", "v", "g", "beta")]
        segments, state = arrays.get("segments"), arrays.get("state")
        if plan.shards > 1:
            state = _state_before(inputs, segments, implementation, plan.shards)
        o, after, *updates = delta.gated_delta_rule(*inputs, segment_ids=segments, initial_state=state, **options)
        if plan.shards > 1:
            last = jax.lax.axis_index(SEQUENCE) == plan.shards - 1
            after = jax.lax.psum(jnp.where(last, after, 0.0), SEQUENCE)
        return (o, after, *updates)

    return plan.run(local, named, (ROWS, state_axes, *([ROWS] if return_updates else [])))


def short_convolution(
    x: Array, weight: Array, *, segment_ids: Array | None = None, initial_state: Array | None = None, **options: Any
) -> tuple[Array, Array]:
    """``pallas_kernels.short_convolution`` on the current mesh; a shard receives the last inputs of the one before."""
    mesh, given = current_mesh(), {"segment_ids": segment_ids, "initial_state": initial_state, **options}
    if mesh is None:
        return convolutions.short_convolution(x, weight, **given)  # type: ignore[arg-type]
    taps, shards = weight.shape[0], mesh.shape[SEQUENCE]
    split = x.shape[1] % shards == 0 and x.shape[1] // shards >= taps - 1
    length, over_shards = "length" if split else None, split and shards > 1

    def local(arrays: Arrays) -> tuple[Array, Array]:
        x, segments, before = arrays["x"], arrays.get("segments"), arrays.get("state")
        if over_shards:
            state, before = before, _from_before(x[:, 1 - taps :], 1, shards)
            if segments is not None:
                same = _from_before(segments[:, 1 - taps :], 1, shards) == _ends(segments, len(x))[0][:, None]
                before = jnp.where(same[..., None], before, jnp.zeros((), x.dtype))
            if state is not None:
                before = jnp.where(jax.lax.axis_index(SEQUENCE) == 0, state, before)
        y, after = convolutions.short_convolution(
            x, arrays["weight"], segment_ids=segments, initial_state=before, **options
        )
        if over_shards:
            last = jax.lax.axis_index(SEQUENCE) == shards - 1
            after = jax.lax.psum(jnp.where(last, after, jnp.zeros((), after.dtype)), SEQUENCE)
        return y, after

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


class _Plan:
    """What of one call is split on a mesh.

    Args:
      rows: shape [B,T,H,_] of what has all heads. keys: [B,U,K,_].
      whole: tokens are not split.
      share_groups: the query heads of one KV head may lie on several devices.
    """

    def __init__(
        self,
        mesh: AbstractMesh,
        rows: tuple[int, ...],
        keys: tuple[int, ...],
        *,
        whole: bool = False,
        share_groups: bool = True,
    ):
        self.mesh = mesh
        self._heads, self._kv_heads = rows[2], keys[2]
        ways = mesh.shape[TENSOR]
        split = self._heads % ways == 0
        self._slice = split and self._kv_heads % ways != 0
        if self._slice and not (share_groups and ways % self._kv_heads == 0):
            split = self._slice = False
        self._names = {"batch": "batch", "heads": "heads" if split else None, "kv_heads": "kv_heads" if split else None}
        sequence = mesh.shape[SEQUENCE]
        self.shards = 1 if whole or rows[1] % sequence or rows[1] != keys[1] else sequence
        self._names["length"] = "length" if self.shards == sequence else None

    def _spec(self, axes: Axes, shape: tuple[int, ...]) -> PartitionSpec:
        return sharding.spec([self._names.get(axis or "") for axis in axes], shape, self.mesh, every=True)

    def run(self, local: Any, named: dict[str, tuple[Any, Axes]], out_axes: Any) -> Any:
        arrays = {name: x for name, (x, _) in named.items() if x is not None}
        specs = {name: self._spec(named[name][1][: x.ndim], x.shape) for name, x in arrays.items()}
        leaf = isinstance(out_axes[0], str)
        shapes = {"batch": arrays["q"].shape[0], "length": arrays["q"].shape[1], "heads": self._heads}

        def out(axes: Axes) -> PartitionSpec:
            return self._spec(axes, tuple(shapes.get(axis or "", 1) for axis in axes))

        out_specs = out(out_axes) if leaf else tuple(out(axes) for axes in out_axes)
        return jax.shard_map(local, mesh=self.mesh, in_specs=(specs,), out_specs=out_specs, check_vma=False)(arrays)

    def own_kv_heads(self, arrays: Arrays, names: tuple[str, ...] | None = None) -> Arrays:
        """The one KV head that this device's heads read, where each device holds them all."""
        if not self._slice:
            return arrays
        names = names or tuple(name for name in arrays if name not in ("q", "segments"))
        ways = self.mesh.shape[TENSOR]
        mine = jax.lax.axis_index(TENSOR) // (ways // self._kv_heads)
        return arrays | {name: jax.lax.dynamic_slice_in_dim(arrays[name], mine, 1, axis=2) for name in names}


def _pad_front(x: Array, count: int) -> Array:
    return jnp.pad(x, ((0, 0), (count, 0)) + ((0, 0),) * (x.ndim - 2))


def _from_before(x: Array, back: int, shards: int) -> Array:
    """What the device ``back`` places before this one on the sequence axis holds; zeros where there is none."""
    return jax.lax.ppermute(x, SEQUENCE, [(i, i + back) for i in range(shards - back)])


def _with_past(arrays: Arrays, past: int) -> Arrays:
    """The arrays of keys with those of ``past`` devices before this one in front; devices not there are padding."""
    shards = jax.lax.axis_size(SEQUENCE)
    tokens = arrays["k"].shape[1]
    segments = arrays.get("segments")
    arrays = arrays | {"segments": jnp.ones(arrays["k"].shape[:2], jnp.int32) if segments is None else segments}
    joined = {
        name: jnp.concatenate([*(_from_before(x, back, shards) for back in range(past, 0, -1)), x], axis=1)
        for name, x in arrays.items()
        if name in ("k", "v", "scores", "expiry", "segments")
    }
    if "expiry" in joined:
        expiry = joined["expiry"]  # counted from the row's first token, now from the first that is here
        start = (jax.lax.axis_index(SEQUENCE) - past) * tokens
        moves = (expiry > 0) & (expiry < windows.NEVER)
        joined["expiry"] = jnp.where(moves, jnp.maximum(expiry - start, 0), expiry)
    return arrays | joined


def _state_before(inputs: list[Array], segments: Array | None, implementation: str | None, shards: int) -> Array:
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
    gathered = [jax.lax.all_gather(x, SEQUENCE) for x in (maps, after(v, None), *_ends(segments, B))]
    state, last = jnp.zeros((B, H, N, V), jnp.float32), jnp.zeros(B, jnp.int32)
    mine, states = jax.lax.axis_index(SEQUENCE), []
    for A, S, first, end in zip(*gathered, strict=True):
        # A state enters only the document that it comes from. Over a shard of padding (first 0) A is the identity.
        state = jnp.where(((first == last) | (first == 0))[:, None, None, None], state, 0.0)
        states.append(state)
        state = jnp.matmul(A, state, precision="highest") + S
        last = jnp.where(first == 0, last, end)
    return jnp.stack(states)[mine]


def _ends(segments: Array | None, batch: int) -> tuple[Array, Array]:
    """Numbers of the first and the last document among a shard's tokens, [B]; 0 where all are padding."""
    if segments is None:
        one = jnp.ones(batch, jnp.int32)
        return one, one
    real = segments != 0
    row = jnp.arange(batch)
    first = segments[row, jnp.argmax(real, axis=1)]
    last = segments[row, segments.shape[1] - 1 - jnp.argmax(real[:, ::-1], axis=1)]
    return first, last
