"""What does one training step compute? The state, how it is made on a mesh, and the function that moves it on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from lte_jax import losses, optim, partition, retention, sharding, spikes
from lte_jax.mixers import mixer_name
from lte_jax.mixers.lte import Config as LTEConfig
from lte_jax.model import LanguageModel
from lte_jax.model_config import ModelConfig
from lte_jax.optim import OptimizerConfig
from lte_jax.retention import PenaltyConfig, PenaltyState
from lte_jax.spikes import SpikeConfig, SpikeState

Params = dict[str, jax.Array]
"""Parameters by name, such as "units/blocks/0/mixer/q_proj/weight"; layers of a pattern are stacked."""


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How the model is computed; none of it changes what is learned, up to rounding."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    implementation: str | None = None
    """Of every operation: "pallas", "triton", "xla", or None for the fastest measured."""
    remat: str = "none"
    """What the backward pass keeps: a name in ``lte_jax.remat.POLICIES``."""
    layers: Literal["scan", "unroll"] | None = None
    """How training runs through the depth: "scan", "unroll", or None for the rule of ``lte_jax.depth.through``."""
    chunk_tokens: int = losses.CHUNK_TOKENS
    """Tokens whose logits are held at a time."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes; a checkpoint holds all of it."""

    params: Params
    optimizer: Any
    penalty: PenaltyState | None
    """None for models without learned retention."""
    spikes: SpikeState
    key: jax.Array
    """Raw key of dropout; step s draws with fold_in(key, s)."""
    step: jax.Array
    skipped: jax.Array
    """Steps that changed nothing, because a number was not finite or the loss a spike."""
    skipped_in_row: jax.Array


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """The settings that shape the step's program."""

    model: ModelConfig
    optimizer: OptimizerConfig
    penalty: PenaltyConfig
    compute: ComputeConfig
    steps: int
    accumulation: int
    seed: int
    length: int
    spikes: SpikeConfig = dataclasses.field(default_factory=SpikeConfig)


def model_arrays(batch: dict[str, Any]) -> dict[str, Any]:
    """What of a batch the model reads; ``segment_ids`` are there where rows hold several documents or padding."""
    return {name: batch[name] for name in ("input_ids", "labels", "segment_ids") if name in batch}


class Builder:
    """Makes models, states and steps for one config on one mesh, from shapes alone."""

    def __init__(self, config: StepConfig, mesh: Mesh):
        self.config, self.mesh = config, mesh
        for mixer in config.model.pattern:
            partition.check_heads(mixer_name(mixer), mixer, mesh)
        model = nnx.eval_shape(lambda: self._new_model())
        self.graph, state = nnx.split(model)
        self._paths = {}
        self.param_shapes: dict[str, jax.ShapeDtypeStruct] = {}
        for path, variable in nnx.to_flat_state(state):
            name = "/".join(map(str, path))
            self._paths[name] = path
            value = variable.get_value()
            place = sharding.named(variable.get_metadata().get("axes", ()), value.shape, mesh)
            self.param_shapes[name] = jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=place)
        self.lte = learned_retention(config.model)

    def _new_model(self, param_dtype: DTypeLike = jnp.float32) -> LanguageModel:
        compute = self.config.compute
        return LanguageModel(
            self.config.model,
            rngs=nnx.Rngs(params=self.config.seed),
            dtype=jnp.dtype(compute.dtype),
            param_dtype=param_dtype,
            implementation=compute.implementation,
            remat=compute.remat,
            layers=compute.layers,
        )

    def model(self, params: Params) -> LanguageModel:
        """The model that holds ``params``."""
        return nnx.merge(self.graph, nnx.from_flat_state([(self._paths[name], leaf) for name, leaf in params.items()]))

    def params_of(self, model: LanguageModel) -> Params:
        """The inverse of ``model``."""
        flat = nnx.to_flat_state(nnx.split(model)[1])
        return {"/".join(map(str, path)): variable.get_value() for path, variable in flat}

    def _new_state(self, params: Params) -> TrainState:
        zero = jnp.zeros((), jnp.int32)
        penalty = None
        if self.lte is not None:
            layers = sum(name == "lte" for name in self.config.model.layer_names())
            penalty = retention.init_state(layers, self.lte.kv_heads, self.config.length)
        key = jax.random.key_data(jax.random.fold_in(jax.random.key(self.config.seed), 1))
        moments = optim.adamw(self.config.optimizer).init(params)
        watched = spikes.init_state()
        return TrainState(params, moments, penalty, watched, key, step=zero, skipped=zero, skipped_in_row=zero)

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state; the optimiser's moments lie where their parameters do."""
        shapes = jax.eval_shape(self._new_state, self.param_shapes)
        whole = sharding.replicated(self.mesh)

        def place(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
            name = next((key.key for key in reversed(path) if getattr(key, "key", None) in self.param_shapes), None)
            where = whole if name is None else self.param_shapes[name].sharding
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

        return jax.tree_util.tree_map_with_path(place, shapes)

    def init_state(self, params: Params | None = None) -> TrainState:
        """The state before the first step, created where it will live; ``params`` replace the random ones."""
        places = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state())
        if params is None:
            return jax.jit(lambda: self._new_state(self.params_of(self._new_model())), out_shardings=places)()
        placed = {name: jax.device_put(leaf, places.params[name]) for name, leaf in params.items()}
        return jax.jit(self._new_state, out_shardings=places)(placed)

    def train_step(self) -> Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]:
        """(state, batch) -> (state, metrics), compiled; the old state is donated."""
        places = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state())
        return jax.jit(self._step, donate_argnums=0, out_shardings=(places, sharding.replicated(self.mesh)))

    def evaluate_step(self, reading: str) -> Callable[[Params, dict[str, jax.Array]], dict[str, jax.Array]]:
        """(params, batch) -> sums {"loss", "correct", "targets"} over the batch's labels, compiled."""

        def evaluate(params: Params, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
            with sharding.on(self.mesh):
                loss, correct, _ = losses.token_losses(
                    self.model(params),
                    batch["input_ids"],
                    batch["labels"],
                    segment_ids=batch.get("segment_ids"),
                    reading=reading,
                    chunk_tokens=self.config.compute.chunk_tokens,
                )
            targets = jnp.sum(batch["labels"] >= 0, dtype=jnp.float32)
            return {"loss": jnp.sum(loss), "correct": jnp.sum(correct), "targets": targets}

        return jax.jit(evaluate, out_shardings=sharding.replicated(self.mesh))

    def _step(self, state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
        config, schedule = self.config, self.config.penalty
        step = state.step + 1
        interrupted = jnp.max(batch["interrupted"])
        batch = model_arrays(batch)
        select = step > schedule.warmup_steps if state.penalty is not None and schedule.warmup_steps else None
        gradients, metrics = self._gradients(state, batch, step, select)
        watched, spike = spikes.detect(state.spikes, config.spikes, metrics["loss"])
        freeze = step <= schedule.freeze_steps if state.penalty is not None and schedule.freeze_steps else None
        params, optimizer, report = optim.apply(
            config.optimizer,
            gradients,
            state.optimizer,
            state.params,
            step=step,
            total_steps=config.steps,
            loss=metrics["loss"],
            hold=spike if config.spikes.skip else None,
            freeze_router=freeze,
        )
        penalty, kept = state.penalty, {}
        if penalty is not None:
            assert self.lte is not None
            fraction = metrics.pop("selected") / jnp.maximum(metrics["scored"], 1.0)
            rows = batch["input_ids"].shape[0]
            positions = metrics.pop("scored") / rows
            penalty = retention.update(penalty, schedule, self.lte.budget, fraction, positions, report["applied"])
            kept = {"kept": penalty.kept, "penalty_weights": penalty.weights}
        skipped = 1 - report["applied"].astype(jnp.int32)
        in_row = (state.skipped_in_row + 1) * skipped
        new = TrainState(params, optimizer, penalty, watched, state.key, step, state.skipped + skipped, in_row)
        accuracy = metrics.pop("correct") / jnp.maximum(metrics["targets"], 1.0)
        counts = {
            "spike": spike,
            "skipped": new.skipped,
            "skipped_in_row": in_row,
            "interrupted": interrupted,
            "step": step,
        }
        return new, {**metrics, **report, **kept, **counts, "accuracy": accuracy}

    def _gradients(
        self, state: TrainState, batch: dict[str, jax.Array], step: jax.Array, select: jax.Array | None
    ) -> tuple[Params, dict[str, jax.Array]]:
        """Gradients and metrics of the whole batch, computed in ``accumulation`` parts one after the other."""
        with sharding.on(self.mesh):
            return self._gradients_on_mesh(state, batch, step, select)

    def _gradients_on_mesh(
        self, state: TrainState, batch: dict[str, jax.Array], step: jax.Array, select: jax.Array | None
    ) -> tuple[Params, dict[str, jax.Array]]:
        parts = self.config.accumulation
        targets = jnp.sum(batch["labels"] >= 0, dtype=jnp.float32)
        scored = None
        weights = None
        if state.penalty is not None:
            reach = losses.router_reach(self.config.model)
            valid = retention.scored_positions(batch["input_ids"].shape, batch.get("segment_ids"), reach)
            scored, weights = jnp.sum(valid, dtype=jnp.float32), state.penalty.weights
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), step)

        def part(params: Params, rows: dict[str, jax.Array], number: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
            return losses.training_loss(
                self.model(params),
                rows["input_ids"],
                weights,
                labels=rows["labels"],
                segment_ids=rows.get("segment_ids"),
                key=jax.random.fold_in(key, number),
                select=select,
                targets=targets,
                scored=scored,
                chunk_tokens=self.config.compute.chunk_tokens,
            )

        gradient = jax.value_and_grad(part, has_aux=True)
        if parts == 1:
            (_, metrics), gradients = gradient(state.params, batch, jnp.int32(0))
            return gradients, metrics
        # Every parts-th row, so that each device keeps its own rows in every part.
        split = {name: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0) for name, x in batch.items()}

        def add(total: Any, inputs: Any) -> tuple[Any, None]:
            (_, metrics), gradients = gradient(state.params, *inputs)
            return jax.tree.map(jnp.add, total, (gradients, metrics)), None

        first = jax.tree.map(lambda x: x[0], split)
        shapes = jax.eval_shape(gradient, state.params, first, jnp.int32(0))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shapes[1], shapes[0][1]))
        (gradients, metrics), _ = jax.lax.scan(add, zeros, (split, jnp.arange(parts, dtype=jnp.int32)))
        return gradients, metrics


def learned_retention(config: ModelConfig) -> LTEConfig | None:
    """The settings of the layers whose routers learn what to keep; None for a model without any."""
    found = [mixer for mixer in config.pattern if isinstance(mixer, LTEConfig) and mixer.retention == "learned"]
    budgets, heads = {mixer.budget for mixer in found}, {mixer.kv_heads for mixer in found}
    if len(budgets) > 1 or len(heads) > 1:
        raise ValueError(
            f"the LTE layers have budgets {sorted(budgets)} and {sorted(heads)} KV heads: the penalty's controller has "
            "one of each for all layers; make them equal"
        )
    return found[0] if found else None
