"""The authors' config.json, of any of their four model types, as a ModelConfig and back.

Field names follow the authors' ``fla/models/*/configuration_*.py``.
"""

from __future__ import annotations

import warnings
from typing import Any

from lte_jax.mixers import config_from_dict, gated_deltanet, mixer_name
from lte_jax.mixers.base import MixerConfig
from lte_jax.model_config import ModelConfig
from lte_jax.penalty_files import schedule_to_authors
from lte_jax.retention import PenaltyConfig

MODEL_TYPES = {
    "gated_deltanet": "GatedDeltaNetForCausalLM",
    "hybrid_gated_deltanet": "HybridGatedDeltaNetForCausalLM",
    "transformer": "TransformerForCausalLM",
    "nsa": "NSAForCausalLM",
}

# The defaults of the authors' configuration classes, for the fields that change what is computed.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gated_deltanet": dict(expand_v=2.0, head_dim=256, num_heads=6, num_hidden_layers=21, initializer_range=0.02),
    "hybrid_gated_deltanet": dict(expand_v=2, head_dim=256, num_heads=6, num_hidden_layers=21, initializer_range=0.006),
    "transformer": dict(num_heads=32, num_hidden_layers=24, initializer_range=0.02),
    "nsa": dict(num_heads=64, num_kv_heads=4, num_hidden_layers=24, initializer_range=0.02),
}
_COMMON_DEFAULTS: dict[str, Any] = dict(
    hidden_size=2048, vocab_size=32000, hidden_ratio=4, intermediate_size=None, norm_eps=1e-6,
    tie_word_embeddings=False, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=None,
    use_gate=True, use_short_conv=True, allow_neg_eigval=False, conv_size=4, num_v_heads=None, attn=None,
    num_kv_heads=None, qkv_bias=False, qk_norm=False, window_size=None, rope_theta=10000.0, block_size=64,
    block_counts=16, hidden_act="swish", elementwise_affine=True,
)  # fmt: skip

# What the authors' blocks build whatever the saved ``head_dim`` says: pure NSA's heads; other attention takes
# hidden_size / num_heads.
_NSA_HEAD_DIM = 64

# Fields that say how the authors' code runs, or what transformers adds, and change no result.
_IGNORED = frozenset(
    """architectures attn_mode dtype fuse_cross_entropy fuse_norm fuse_swiglu head_dim model_type num_heads
    num_hidden_layers initializer_range torch_dtype transformers_version use_cache use_l2warp expand_v
    _name_or_path auto_map""".split()
)


# Our name of a setting -> theirs, the same table for reading and for writing.
_MODEL = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "num_layers": "num_hidden_layers",
    "hidden_ratio": "hidden_ratio",
    "intermediate_size": "intermediate_size",
    "norm_eps": "norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "max_length": "max_position_embeddings",
    "init_std": "initializer_range",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}
_HEADS = {name: name for name in ("num_heads", "num_kv_heads", "rope_theta", "qkv_bias")}
_NAMES = {
    "gated_deltanet": {
        name: name
        for name in """num_heads head_dim num_v_heads expand_v use_gate use_short_conv conv_size
        allow_neg_eigval""".split()
    },
    "full_attention": {**_HEADS, "qk_norm": "qk_norm"},
    "window_attention": {**_HEADS, "qk_norm": "qk_norm", "window": "window_size"},
    "lte": {
        **_HEADS,
        "window": "window_size",
        "budget": "buffer_size",
        "sinks": "sink_size",
        "conv_sizes": "conv_size",
        "conv_dilations": "conv_dilation",
        "dropout": "dropout_prob",
        "routing_method": "routing_method",
        "routing_grad": "routing_grad",
        "routing_shared": "routing_shared",
    },
    "nsa": {
        **_HEADS,
        "head_dim": "head_dim",
        "block_size": "block_size",
        "block_counts": "block_counts",
        "window": "window_size",
    },
}

# What attn must name for a kind of layer, beside what has a default.
_REQUIRED = {
    "lte": (
        """window_size buffer_size sink_size conv_size conv_dilation dropout_prob routing_method routing_grad
        routing_shared""".split()
    ),
    "nsa": "head_dim block_size block_counts window_size".split(),
}


def model_config_from_hf(values: dict[str, Any], nsa_head_dim: int | None = None) -> ModelConfig:
    """The model that a config.json describes.

    Args:
      values: the parsed file.
      nsa_head_dim: the head size of a pure NSA model, read off its weights: the saved ``head_dim`` is not what the
        authors' layer is built with (their block passes none, so the layer takes its default, 64).

    Raises:
      ValueError: an unknown model_type, or a setting that this project does not compute; the message names it.
    """
    model_type = values.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(f"model_type={model_type!r} is not one of {', '.join(MODEL_TYPES)}")
    for name in sorted(set(values) - set(_COMMON_DEFAULTS) - _IGNORED):
        warnings.warn(f"config.json: {name}={values[name]!r} is not read", stacklevel=2)
    get = {**_COMMON_DEFAULTS, **_DEFAULTS[model_type], **values}
    for name, only in (("hidden_act", ("swish", "silu")), ("elementwise_affine", (True,))):
        if get[name] not in only:
            raise ValueError(f"config.json: {name}={get[name]!r} is not supported; only {only[0]!r} is")
    return ModelConfig(
        pattern=_shortest_period(_mixers(model_type, get, nsa_head_dim)),
        rescale_residual=model_type == "hybrid_gated_deltanet",
        **{ours: get[theirs] for ours, theirs in _MODEL.items()},
    )


def _mixer(name: str, get: dict[str, Any], **more: Any) -> MixerConfig:
    """The settings of a mixer from the authors' fields."""
    found = {ours: get[theirs] for ours, theirs in _NAMES[name].items() if ours not in more}
    return config_from_dict({"mixer": name, **found, **more})


def _mixers(model_type: str, get: dict[str, Any], nsa_head_dim: int | None) -> tuple[MixerConfig, ...]:
    """The mixer of every layer."""
    layers = get["num_hidden_layers"]
    if model_type == "nsa":
        return (_mixer("nsa", get, head_dim=nsa_head_dim or _NSA_HEAD_DIM),) * layers
    if model_type == "transformer":
        return (_attention(get),) * layers
    hybrid = model_type == "hybrid_gated_deltanet"
    never = dict(num_v_heads=None, allow_neg_eigval=False) if hybrid else {}  # their hybrid has neither
    linear = _mixer("gated_deltanet", get, norm_eps=get["norm_eps"], **never)
    attn = get["attn"]
    if attn is None:
        return (linear,) * layers
    _require(attn, "layers", "num_heads")
    defaults = {"qkv_bias": False, "window_size": None, "rope_theta": 10000.0, "num_kv_heads": attn["num_heads"]}
    attn = {**defaults, **attn, "qk_norm": False}  # their hybrid blocks do not pass it on
    kind = attn.get("attn_type", "attn") if hybrid else "attn"
    if kind not in ("attn", "lte", "nsa"):
        raise ValueError(f"config.json: attn_type={kind!r} is not one of attn, lte, nsa")
    _require(attn, *_REQUIRED.get(kind, ()))
    other = _attention(attn) if kind == "attn" else _mixer(kind, attn)
    return tuple(other if index in attn["layers"] else linear for index in range(layers))


def _require(attn: dict[str, Any], *names: str) -> None:
    missing = [name for name in names if attn.get(name) is None]
    if missing:
        raise ValueError(
            f"config.json: attn has no {', '.join(missing)}; hybrid models must name what they are built of"
        )


def _attention(get: dict[str, Any]) -> MixerConfig:
    name = "full_attention" if get["window_size"] is None else "window_attention"
    return _mixer(name, get, qk_norm=bool(get["qk_norm"]))


def _shortest_period(layers: tuple[MixerConfig, ...]) -> tuple[MixerConfig, ...]:
    """The shortest pattern that repeats to ``layers``."""
    for length in range(1, len(layers) + 1):
        if len(layers) % length == 0 and layers[:length] * (len(layers) // length) == layers:
            return layers[:length]
    raise AssertionError("the whole list repeats once")


def model_config_to_hf(config: ModelConfig, penalty: PenaltyConfig | None = None) -> dict[str, Any]:
    """The config.json that the authors' code would build this model from.

    Args:
      penalty: LTE's schedule, no part of a model here; default the published one.

    Raises:
      ValueError: their code has no such model (other mixers, mixed settings); the message says which.
    """
    layers = config.pattern * (config.num_layers // len(config.pattern))
    names = [mixer_name(mixer) for mixer in layers]
    values: dict[str, Any] = {theirs: getattr(config, ours) for ours, theirs in _MODEL.items()}
    values |= dict(hidden_act="swish", use_cache=True, torch_dtype="float32")
    linear = {mixer for mixer, name in zip(layers, names, strict=True) if name == "gated_deltanet"}
    others = {mixer for mixer, name in zip(layers, names, strict=True) if name != "gated_deltanet"}
    if len(linear) > 1 or len(others) > 1:
        raise ValueError(
            "the authors' config.json holds one setting for all Gated DeltaNet layers and one for the others"
        )
    if not linear and names[0] == "lte":
        linear = {gated_deltanet.Config()}  # their hybrid with LTE in every layer; these settings build nothing
    if not linear:
        model_type = "nsa" if names[0] == "nsa" else "transformer"
        other = _other_to_hf(others.pop(), config.width)
        if model_type == "nsa" and other["head_dim"] != _NSA_HEAD_DIM:
            raise ValueError(
                f"nsa: head_dim={other['head_dim']}: the authors' pure NSA models have heads of {_NSA_HEAD_DIM}, "
                "whatever their config.json says; convert to an Orbax checkpoint instead"
            )
        del other["attn_type"]
        values.update(other)
    else:
        model_type = "gated_deltanet"
        values.update(_gated_deltanet_to_hf(linear.pop()))
        if others:
            attn = _other_to_hf(others.pop(), config.width)
            attn["layers"] = [index for index, name in enumerate(names) if name != "gated_deltanet"]
            if attn["attn_type"] == "lte":
                attn.update(schedule_to_authors(penalty or PenaltyConfig()))
            if attn["attn_type"] in ("lte", "nsa"):
                model_type = "hybrid_gated_deltanet"
                if values.pop("allow_neg_eigval") or values.pop("num_v_heads") is not None:
                    raise ValueError("the authors' hybrid_gated_deltanet has no allow_neg_eigval and no num_v_heads")
            else:
                del attn["attn_type"]
                if attn.pop("qk_norm"):
                    raise ValueError("the authors' hybrid models have no qk_norm; only their transformer has")
            values["attn"] = attn
    return {"architectures": [MODEL_TYPES[model_type]], "model_type": model_type, **values}


def _gated_deltanet_to_hf(mixer: MixerConfig) -> dict[str, Any]:
    return {**_to_hf("gated_deltanet", mixer), "attn_mode": "chunk", "attn": None}


def _other_to_hf(mixer: Any, width: int) -> dict[str, Any]:
    name = mixer_name(mixer)
    softmax = name in ("full_attention", "window_attention")
    if softmax and mixer.head_dim not in (None, width // mixer.num_heads):
        raise ValueError(
            f"{name}: head_dim={mixer.head_dim} has no place in the authors' config.json: their heads have width / "
            f"num_heads = {width // mixer.num_heads}; convert to an Orbax checkpoint instead"
        )
    if name == "lte" and mixer.retention != "learned":
        raise ValueError(f"retention={mixer.retention!r} has no place in the authors' config.json; only 'learned' does")
    return {"attn_type": "attn" if softmax else name, "window_size": None, **_to_hf(name, mixer)}


def _to_hf(name: str, mixer: MixerConfig) -> dict[str, Any]:
    """The authors' fields of a mixer, as JSON has them."""
    found = {theirs: getattr(mixer, ours) for ours, theirs in _NAMES[name].items()}
    return {field: list(value) if isinstance(value, tuple) else value for field, value in found.items()}
