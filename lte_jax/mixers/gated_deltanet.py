"""The Gated DeltaNet layer: short convolutions, the gated delta rule, a gated norm; its cache is one state per head.

    q, k, v = conv(x W), SiLU;   beta = sigmoid(x W_b);   g = -exp(A_log) softplus(x W_a + dt_bias)
    S <- exp(g_t) S;   u_t = beta_t (v_t - S^T k_t);   S <- S + k_t u_t^T;   o_t = N^-1/2 S^T q_t
    y = (rms(o) silu(x W_g)) W_o

with q and k normalised per head. Source: Yang et al., "Gated Delta Networks", arXiv 2412.06464.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from lte_jax.dims import Hidden, Positions, SegmentIds
from lte_jax.layers import Linear, Recipe, RMSNorm
from lte_jax.mixers.base import Aux, Mixer, MixerConfig, Reading
from lte_jax.partition import gated_delta_rule, rms_norm, short_convolution
from lte_jax.partition_plan import ROWS
from pallas_kernels.gated_deltanet import Parameters, Projections, State, gated_deltanet_step
from pallas_kernels.gated_deltanet.api import OPERATION as STEP
from pallas_kernels.rms_norm.api import OPERATION as NORM
from pallas_kernels.short_convolution.api import OPERATION as CONVOLUTION


@dataclasses.dataclass(frozen=True)
class Config(MixerConfig):
    """Settings of the Gated DeltaNet layer.

    Attributes:
      num_heads: heads of q and k.
      head_dim: N, their size.
      num_v_heads: H, heads of v; None means as many as q and k have.
      expand_v: V / N.
      use_gate: multiply the normalised output by silu(x W_g).
      use_short_conv: convolve q, k and v over time; without it they pass through SiLU only.
      conv_size: taps of that convolution.
      allow_neg_eigval: double beta, which lets the transition have negative eigenvalues.
      norm_eps: of the output norm.
      emit_write_strength: put the mean over heads of |u_t| into aux, for a layer above that ranks tokens by it.
    """

    num_heads: int = 8
    head_dim: int = 128
    num_v_heads: int | None = None
    expand_v: float = 1.0
    use_gate: bool = True
    use_short_conv: bool = True
    conv_size: int = 4
    allow_neg_eigval: bool = False
    norm_eps: float = 1e-6
    emit_write_strength: bool = False

    @property
    def value_heads(self) -> int:
        return self.num_heads if self.num_v_heads is None else self.num_v_heads

    @property
    def value_dim(self) -> int:
        return round(self.head_dim * self.expand_v)

    def validate(self, width: int) -> None:
        for name in ("num_heads", "head_dim", "value_heads"):
            if getattr(self, name) < 1:
                label = "num_v_heads" if name == "value_heads" else name
                raise ValueError(f"gated_deltanet: {label}={getattr(self, name)} must be at least 1")
        if self.value_heads % self.num_heads:
            raise ValueError(
                f"gated_deltanet: num_v_heads={self.num_v_heads} must be a multiple of num_heads={self.num_heads}"
            )
        if self.value_dim < 1 or not math.isclose(self.head_dim * self.expand_v, self.value_dim, rel_tol=1e-5):
            raise ValueError(
                f"gated_deltanet: expand_v={self.expand_v} times head_dim={self.head_dim} must be a whole number of at "
                "least 1; change one of them"
            )
        if self.use_short_conv and self.conv_size < 2:
            raise ValueError(
                f"gated_deltanet: conv_size={self.conv_size} must be at least 2; use_short_conv=False turns the "
                "convolution off"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GatedDeltaNetCache:
    """What a document leaves behind: the state, and the last inputs of each convolution (None without them)."""

    state: Float32[Array, "B H N V"]
    q_conv: Float[Array, "B past KN"] | None
    k_conv: Float[Array, "B past KN"] | None
    v_conv: Float[Array, "B past HV"] | None


def _init_decay(key: jax.Array, shape, dtype) -> jax.Array:
    """log U(0, 16)."""
    return jnp.log(jax.random.uniform(key, shape, jnp.float32, jnp.finfo(jnp.float32).tiny, 16.0)).astype(dtype)


def _init_dt_bias(key: jax.Array, shape, dtype) -> jax.Array:
    """The inverse softplus of dt, log-uniform in [1e-3, 0.1] and at least 1e-4."""
    dt = jnp.exp(jax.random.uniform(key, shape, jnp.float32, math.log(1e-3), math.log(0.1)))
    dt = jnp.maximum(dt, 1e-4)
    return (dt + jnp.log(-jnp.expm1(-dt))).astype(dtype)


class GatedDeltaNet(Mixer):
    """The layer. Its cache holds B * (4 H N V + b (conv_size - 1) (2 K N + H V)) bytes, b those of its dtype."""

    inputs = ("q_proj", "k_proj", "v_proj", "g_proj", "a_proj", "b_proj")

    def __init__(self, config: Config, width: int, recipe: Recipe):
        config.validate(width)
        self.config = config
        self.dtype = recipe.dtype
        self.implementation = recipe.implementation
        heads = config.value_heads
        keys, values = config.num_heads * config.head_dim, heads * config.value_dim
        self.q_proj = Linear(width, keys, recipe, axes=("embed", "kv_heads"))
        self.k_proj = Linear(width, keys, recipe, axes=("embed", "kv_heads"))
        self.v_proj = Linear(width, values, recipe, axes=("embed", "heads"))
        self.a_proj = Linear(width, heads, recipe, axes=("embed", "heads"))
        self.b_proj = Linear(width, heads, recipe, axes=("embed", "heads"))
        self.A_log = recipe.parameter(_init_decay, (heads,), ("heads",))
        self.dt_bias = recipe.parameter(_init_dt_bias, (heads,), ("heads",))

        def taps(size: int, axis: str) -> nnx.Param | None:
            if not config.use_short_conv:
                return None
            return recipe.parameter(recipe.init.normal(), (config.conv_size, size), (None, axis))

        self.q_conv = taps(keys, "kv_heads")
        self.k_conv = taps(keys, "kv_heads")
        self.v_conv = taps(values, "heads")
        self.g_proj = Linear(width, values, recipe, axes=("embed", "heads")) if config.use_gate else None
        self.o_norm = RMSNorm(config.value_dim, recipe, eps=config.norm_eps)
        self.o_proj = Linear(values, width, recipe, axes=("heads", "embed"), residual=True)

    def __call__(
        self,
        x: Hidden,
        *,
        positions: Positions,
        segment_ids: SegmentIds | None = None,
        reading: Reading = "train",
        key: jax.Array | None = None,
        context: Aux | None = None,
    ) -> tuple[Hidden, Aux]:
        y, _, aux = self._run(x, None, segment_ids)
        return y, aux

    def init_cache(self, batch: int, max_length: int | None, dtype: DTypeLike) -> GatedDeltaNetCache:
        config = self.config
        keys, values = config.num_heads * config.head_dim, config.value_heads * config.value_dim

        def inputs(size: int) -> jax.Array | None:
            return jnp.zeros((batch, config.conv_size - 1, size), dtype) if config.use_short_conv else None

        state = jnp.zeros((batch, config.value_heads, config.head_dim, config.value_dim), jnp.float32)
        return GatedDeltaNetCache(state, inputs(keys), inputs(keys), inputs(values))

    def extend(
        self,
        x: Hidden,
        cache: GatedDeltaNetCache,
        *,
        segment_ids: SegmentIds | None = None,
        reading: Reading = "streaming",
        context: Aux | None = None,
        wants_aux: bool = True,
    ) -> tuple[Hidden, GatedDeltaNetCache, Aux]:
        return (self._step if x.shape[1] == 1 else self._run)(x, cache, segment_ids)

    def cache_bytes(self, batch: int, max_length: int | None, dtype: DTypeLike) -> int:
        config = self.config
        size, heads, value_dim = config.head_dim, config.value_heads, config.value_dim
        inputs = (config.conv_size - 1) * (2 * config.num_heads * size + heads * value_dim)
        taps_bytes = inputs * jnp.dtype(dtype).itemsize if config.use_short_conv else 0
        return batch * (4 * heads * size * value_dim + taps_bytes)

    def _run(
        self, x: Hidden, cache: GatedDeltaNetCache | None, segment_ids: SegmentIds | None
    ) -> tuple[Hidden, GatedDeltaNetCache, Aux]:
        """A whole sequence, from a cache or (None) from nothing."""
        y, cache, *updates = self.between(self._projections(x), cache, segment_ids)
        return self.o_proj(y), cache, self._aux(*updates)

    def _step(
        self, x: Hidden, cache: GatedDeltaNetCache, segment_ids: SegmentIds | None
    ) -> tuple[Hidden, GatedDeltaNetCache, Aux]:
        """One token, from x [B,1,D]: one operation for all between the projections."""
        config = self.config
        weights = (self.q_conv, self.k_conv, self.v_conv)
        q, k, v = (None if weight is None else weight[...] for weight in weights)
        y, after, update = gated_deltanet_step(
            self._projections(x[:, 0]),
            Parameters(q, k, v, self.A_log[...], self.dt_bias[...], self.o_norm.weight[...]),
            State(cache.state, cache.q_conv, cache.k_conv, cache.v_conv),
            active=None if segment_ids is None else segment_ids[:, 0] != 0,
            eps=config.norm_eps,
            beta_range=2.0 if config.allow_neg_eigval else 1.0,
            return_update=config.emit_write_strength,
            implementation=STEP.beside(self.implementation),
        )
        aux = self._aux() if update is None else self._aux(update[:, None])
        return self.o_proj(y)[:, None], GatedDeltaNetCache(*after), aux

    def _projections(self, x: Float[Array, "... D"]) -> Projections:
        q, k, v, a, b = (p(x) for p in (self.q_proj, self.k_proj, self.v_proj, self.a_proj, self.b_proj))
        return Projections(q, k, v, a, b, None if self.g_proj is None else self.g_proj(x))

    def between(
        self, inputs: Projections, cache: GatedDeltaNetCache | None, segment_ids: SegmentIds | None
    ) -> tuple[Any, ...]:
        """The layer without its projections: y [B,T,HV] from theirs, the new cache, and the updates where wanted."""
        config, T = self.config, inputs.q.shape[1]
        states = (None, None, None) if cache is None else (cache.q_conv, cache.k_conv, cache.v_conv)
        weights = (self.q_conv, self.k_conv, self.v_conv)
        (q, q_last), (k, k_last), (v, v_last) = (
            self._convolve(*arrays, segment_ids) for arrays in zip(inputs[:3], weights, states, strict=True)
        )
        beta = jax.nn.sigmoid(inputs.b.astype(jnp.float32)) * (2.0 if config.allow_neg_eigval else 1.0)
        rate = inputs.a.astype(jnp.float32) + self.dt_bias[...].astype(jnp.float32)
        g = -jnp.exp(self.A_log[...].astype(jnp.float32)) * jax.nn.softplus(rate)
        o, state, *updates = gated_delta_rule(
            q.reshape(-1, T, config.num_heads, config.head_dim),
            k.reshape(-1, T, config.num_heads, config.head_dim),
            v.reshape(-1, T, config.value_heads, config.value_dim),
            g,
            beta,
            segment_ids=segment_ids,
            initial_state=None if cache is None else cache.state,
            return_updates=config.emit_write_strength,
            implementation=self.implementation,
        )
        gate = None if inputs.gate is None else inputs.gate.reshape(o.shape)
        named: Any = dict(dtype=self.dtype, axes=ROWS, implementation=NORM.beside(self.implementation))
        y = rms_norm(o, self.o_norm.weight[...], gate, eps=config.norm_eps, **named)
        return y.reshape(*y.shape[:2], -1), GatedDeltaNetCache(state, q_last, k_last, v_last), *updates

    def _convolve(
        self, x: jax.Array, weight: nnx.Param | None, state: jax.Array | None, segment_ids: SegmentIds | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """SiLU of the convolution, and its new state in the dtype of the old one."""
        if weight is None:
            return jax.nn.silu(x), None
        start = None if state is None else state.astype(x.dtype)
        named = CONVOLUTION.beside(self.implementation)
        y, after = short_convolution(x, weight[...], segment_ids=segment_ids, initial_state=start, implementation=named)
        return y, after if state is None else after.astype(state.dtype)

    def _aux(self, updates: Float32[Array, "B T H V"] | None = None) -> Aux:
        if updates is None:
            return {}
        return {"write_strength": jnp.mean(jnp.linalg.norm(updates, axis=-1), axis=-1)}
