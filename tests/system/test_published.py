"""Are the eight published folders understood by the names of their fields, without a GPU and without their weights?

Configs and lists of tensors are made here from the published sizes; the tensors are holes in sparse files.
"""

from __future__ import annotations

import dataclasses
import json
import math
import resource
import struct
from pathlib import Path

import pytest

from experiments import convert
from experiments.configs import _paper
from lte_jax.evaluate.inventory import inventory

KINDS = {"attn": "gdn_attn", "swa": "gdn_swa", "lte": "lalte", "nsa": "lansa"}
ROUTER = dict(conv_size=[3, 3, 3], conv_dilation=[2, 2, 2], dropout_prob=0.1, routing_method="sigmoid")
PENALTY = dict(
    routing_freeze_steps=0, l1_lambda_init=1e-9, l1_lambda_min=1e-9, l1_lambda_max=1.0, l1_alpha=1.5, l1_alpha_neg=2,
    l1_warmup_steps=0, l1_lambda_initial_steps=0, l1_lambda_update_steps=32, l1_lambda_shared="head",
    l1_lambda_tolerate=[0.95, 1.0],
)  # fmt: skip


def published(kind: str, size: str) -> dict:
    """A config.json with the fields and values of the published one."""
    small = size == "0.4B"
    heads = dict(num_heads=16 if small else 32, num_kv_heads=16 if small else 8, qkv_bias=False, rope_theta=10000.0)
    attn = {
        "attn": dict(heads, window_size=None),
        "swa": dict(heads, window_size=1024),
        "lte": dict(
            heads, attn_type="lte", window_size=768, buffer_size=512, sink_size=4, routing_grad=True,
            routing_shared="head", **ROUTER, **PENALTY,
        ),
        "nsa": dict(
            attn_type="nsa", num_heads=32, num_kv_heads=2, head_dim=64, qkv_bias=False, block_size=64, block_counts=16,
            window_size=512, rope_theta=10000.0,
        ),
    }[kind]  # fmt: skip
    return dict(
        attn_mode="chunk", bos_token_id=1, conv_size=4, eos_token_id=2, expand_v=1, fuse_cross_entropy=True,
        head_dim=128 if small else 256, hidden_act="swish", hidden_ratio=4, hidden_size=1024 if small else 2048,
        initializer_range=0.006, intermediate_size=None, max_position_embeddings=4096,
        model_type="hybrid_gated_deltanet" if kind in ("lte", "nsa") else "gated_deltanet", norm_eps=1e-06, num_heads=8,
        num_hidden_layers=24, tie_word_embeddings=small, use_cache=True, use_gate=True, use_short_conv=True,
        attn=dict(attn, layers=list(range(1, 24, 2))),
    )  # fmt: skip


def tensors(kind: str, size: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the authors' tensors, written down by hand."""
    small = size == "0.4B"
    width, inner, kv = (1024, 2816, 1024) if small else (2048, 5632, 512)
    gdn = 1024 if small else 2048  # 8 heads
    found: dict[str, tuple[int, ...]] = {"model.embeddings.weight": (32000, width), "model.norm.weight": (width,)}
    if not small:
        found["lm_head.weight"] = (32000, width)
    if kind == "lte":
        heads = 16 if small else 8
        found |= {"model.l1_lambda": (12, heads), "model.num_kept": (12, heads)}
    delta = {f"{name}_proj.weight": (gdn, width) for name in "qkvg"} | {
        "a_proj.weight": (8, width),
        "b_proj.weight": (8, width),
        "o_proj.weight": (width, gdn),
        "A_log": (8,),
        "dt_bias": (8,),
        "o_norm.weight": (gdn // 8,),
        **{f"{name}_conv1d.weight": (gdn, 1, 4) for name in "qkv"},
    }
    if kind == "nsa":
        other = {"q_proj.weight": (2048, width), "k_proj.weight": (128, width), "v_proj.weight": (128, width)}
        other |= {"g_proj.weight": (96, width), "o_proj.weight": (width, 2048)}
    else:
        other = {"q_proj.weight": (width, width), "k_proj.weight": (kv, width), "v_proj.weight": (kv, width)}
        other |= {"o_proj.weight": (width, width)}
    if kind == "lte":
        heads, channels = kv // 64, 128
        for number in range(3):
            stack = f"router.conv_stack.convs.{number}"
            other |= {f"{stack}.weight": (heads * channels // 2, channels, 1, 3)}
            other |= {f"{stack}.bias": (heads * channels // 2,)}
            channels //= 2
        other |= {"router.conv_stack.proj.weight": (heads, 16, 1, 1), "router.conv_stack.proj.bias": (heads,)}
    for layer in range(24):
        block = {"attn_norm.weight": (width,), "mlp_norm.weight": (width,), "mlp.down_proj.weight": (width, inner)}
        block |= {"mlp.gate_proj.weight": (inner, width), "mlp.up_proj.weight": (inner, width)}
        block |= {f"attn.{name}": shape for name, shape in (other if layer % 2 else delta).items()}
        found |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    return found


def put(folder: Path, config: dict, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A folder whose safetensors file has a header and holes: as long as the real one, and nothing on the disk."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return folder


@pytest.mark.parametrize("size", _paper.SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_published_folder_matches(kind, size, tmp_path, capsys):
    shapes = tensors(kind, size)
    folder = put(tmp_path / "model", published(kind, size), shapes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert convert.check(str(folder))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 * 1024, "weights were allocated"
    said = capsys.readouterr().out
    found = inventory(folder)
    # The authors start their baselines by another rule than their own models; ours start alike.
    rule = dict(rescale_residual=kind in ("lte", "nsa"))
    assert found.config == dataclasses.replace(_paper.model(KINDS[kind], size), **rule)
    state = {"model.l1_lambda", "model.num_kept"}
    assert found.parameters == sum(math.prod(shape) for name, shape in shapes.items() if name not in state)
    assert "weights: all match" in said and f"parameters: {found.parameters:,}" in said
    assert f"{4 * found.parameters / 2**30:.4g} GiB in float32" in said


def test_what_does_not_match_is_named(tmp_path, capsys):
    shapes = tensors("lte", "0.4B")
    del shapes["model.layers.3.attn.router.conv_stack.proj.bias"]
    shapes["model.layers.5.attn.q_proj.weight"] = (1024, 512)
    shapes["model.layers.24.attn_norm.weight"] = (1024,)
    folder = put(tmp_path / "model", published("lte", "0.4B"), shapes)
    assert not convert.check(str(folder))
    said = capsys.readouterr().out
    assert "missing: model.layers.3.attn.router.conv_stack.proj.bias" in said and "all match" not in said
    assert "extra: model.layers.24.attn_norm.weight" in said
    assert "wrong shape: model.layers.5.attn.q_proj.weight [1024, 512] instead of [1024, 1024]" in said
