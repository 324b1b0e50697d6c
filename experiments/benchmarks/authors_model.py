"""How fast is the authors' own laLTE? Their model from a checkout, prompt and greedy steps by hand, on a GPU.

    python -m experiments.benchmarks.authors_model --authors_path=DIR --batches=1,64 > theirs.jsonl
    python -m experiments.bench --lines=theirs.jsonl

Their window must be 64 n - 1 and prompts multiples of 64: window 767 stands for 768. Random weights, bfloat16. The
environment may be newer than theirs: transformers' cache is replaced by a plain base class, and where flash-attn is not
installed its decode call is torch's attention over the filled slots. Each autotuned kernel tries ``--configurations``
of its own list (0: all), which changes their prompt's time and no step's. ``--noprompt`` skips the prompt, whose
kernels take long to compile: the steps begin from a cache of random numbers in the form that a prompt leaves, and no
step's time depends on the numbers. ``--eager`` turns ``torch.compile`` off, and the line says so.
"""

from __future__ import annotations

import functools
import importlib.machinery
import json
import os
import statistics
import sys
import time
import types
from pathlib import Path
from typing import Any

from absl import app, flags

FLAGS = flags.FLAGS
LAYERS: dict[str, Any] = dict(
    attn_type="lte", layers=list(range(1, 24, 2)), num_heads=16, num_kv_heads=16, qkv_bias=False, window_size=767,
    rope_theta=10000.0, conv_size=[3, 3, 3], conv_dilation=[2, 2, 2], dropout_prob=0.1, buffer_size=512, sink_size=4,
    routing_method="sigmoid", routing_grad=True, routing_shared="head", l1_lambda_shared="head",
)  # fmt: skip
SIZE: dict[str, Any] = dict(
    hidden_size=1024, num_heads=8, head_dim=128, num_hidden_layers=24, vocab_size=32000, max_position_embeddings=4096,
    expand_v=1, hidden_ratio=4, tie_word_embeddings=True,
)  # fmt: skip


def define_flags() -> None:
    flags.DEFINE_string("authors_path", None, "A checkout of the authors' repository.")
    flags.DEFINE_list("batches", ["1", "64"], "Rows at a time.")
    flags.DEFINE_integer("length", 4096, "Tokens of the prompt, a multiple of 64.")
    flags.DEFINE_integer("steps", 16, "Tokens in one timed stretch.")
    flags.DEFINE_integer("configurations", 3, "Of each autotuned kernel's list, how many are tried; 0 for all.")
    flags.DEFINE_bool("prompt", True, "Read and time a prompt; without it, steps begin from a cache of random numbers.")
    flags.DEFINE_bool("eager", False, "Without torch.compile, which takes long.")
    flags.mark_flag_as_required("authors_path")


def prepare(path: str, configurations: int, eager: bool = False) -> None:
    """Makes their package importable in this environment."""
    if eager:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # read when torch is imported
    if not (Path(path) / "fla/layers/lte.py").is_file():
        raise ValueError(f"--authors_path={path}: there is no fla/layers/lte.py in it")
    import transformers.cache_utils
    from triton.runtime.autotuner import Autotuner

    class Plain:
        """In place of transformers' cache, which asks for layer classes; theirs keeps a list of its own."""

        def __init__(self, *_: Any, **__: Any):
            pass

    transformers.cache_utils.Cache = Plain  # type: ignore[misc, assignment]
    begin = Autotuner.__init__

    def few(self: Any, function: Any, names: Any, configs: list[Any], *rest: Any, **options: Any) -> None:
        count = len(configs)
        if configurations and count > configurations:
            configs = configs[:: count // configurations][:configurations]
        begin(self, function, names, configs, *rest, **options)

    Autotuner.__init__ = few
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        module = types.ModuleType("flash_attn")
        module.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
        module.flash_attn_with_kvcache = _slots_attention  # type: ignore[attr-defined]
        sys.modules["flash_attn"] = module
    sys.path.insert(0, path)


def _slots_attention(q: Any, k_cache: Any, v_cache: Any, cache_seqlens: Any, window_size: Any = (-1, -1)) -> Any:
    import torch

    seen = torch.arange(k_cache.shape[1], device=q.device)[None, :] < cache_seqlens[:, None]
    o = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k_cache, v_cache)), attn_mask=seen[:, None, None, :], enable_gqa=True
    )
    return o.transpose(1, 2)


def build() -> Any:
    """Their model with random weights, on the GPU."""
    import torch
    from fla.models.hybrid_gated_deltanet.configuration_hybrid_gated_deltanet import HybridGatedDeltaNetConfig
    from fla.models.hybrid_gated_deltanet.modeling_hybrid_gated_deltanet import HybridGatedDeltaNetModel

    torch.manual_seed(0)
    with torch.device("cuda"):
        model = HybridGatedDeltaNetModel(HybridGatedDeltaNetConfig(attn=LAYERS, **SIZE))
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and "router" not in name:
            torch.nn.init.normal_(weight, std=0.02)
        elif "router" in name and name.endswith("proj.bias"):
            torch.nn.init.zeros_(weight)  # slots are fought for
    return model.to(torch.bfloat16).eval()


def read(model: Any, ids: Any) -> tuple[Any, Any]:
    """The logits after a prompt, and the cache."""
    import torch
    from fla.models.utils import Cache

    with torch.inference_mode():
        out = model(input_ids=ids, past_key_values=Cache(), use_cache=True, return_dict=True)
        return out.last_hidden_state[:, -1:] @ model.embeddings.weight.T, out.past_key_values


def filled(batch: int, length: int) -> tuple[Any, Any]:
    """Logits and a cache as ``read`` returns them, of random numbers, every slot filled."""
    import torch
    from fla.models.utils import Cache

    heads, window = LAYERS["num_heads"], LAYERS["window_size"] + 1
    slots, size = window + LAYERS["buffer_size"], SIZE["hidden_size"] // heads

    def draw(*shape: int, dtype: Any = torch.bfloat16) -> Any:
        return torch.randn(batch, *shape, device="cuda", dtype=torch.float32).mul_(0.1).to(dtype)

    def zeros(dtype: Any) -> Any:
        return torch.zeros(batch, device="cuda", dtype=dtype)

    cache = Cache(length)
    for layer in range(SIZE["num_hidden_layers"]):
        state: dict[str, Any] = dict.fromkeys(("recurrent_state", "attn_state", "conv_state", "ffn_state"))
        if layer in LAYERS["layers"]:
            kept = torch.full((batch, heads), LAYERS["buffer_size"], device="cuda", dtype=torch.int32)
            keys, scores = (draw(slots, heads, size), draw(slots, heads, size)), draw(slots, heads)
            state["attn_state"] = (*keys, scores, zeros(torch.long), zeros(torch.int32), 0, kept)
        else:
            state["recurrent_state"] = draw(SIZE["num_heads"], SIZE["head_dim"], SIZE["head_dim"], dtype=torch.float32)
            state["conv_state"] = tuple(draw(SIZE["hidden_size"], 4) for _ in "qkv")
        cache.states.append(state)
    return draw(1, SIZE["vocab_size"]), cache


def decode(model: Any, logits: Any, cache: Any, steps: int) -> tuple[Any, Any]:
    """Greedy tokens one by one, without transformers' ``generate`` around them."""
    import torch

    with torch.inference_mode():
        for _ in range(steps):
            out = model(input_ids=logits.argmax(-1), past_key_values=cache, use_cache=True, return_dict=True)
            logits, cache = out.last_hidden_state @ model.embeddings.weight.T, out.past_key_values
    return logits, cache


def measure(model: Any, batch: int, length: int, steps: int, prompt: bool = True) -> dict[str, Any]:
    """A line as ``experiments.bench --model`` writes them."""
    import torch

    def seconds(call: Any) -> tuple[float, Any]:
        torch.cuda.synchronize()
        start = time.perf_counter()
        found = call()
        torch.cuda.synchronize()
        return time.perf_counter() - start, found

    found: dict[str, Any] = {}
    start = functools.partial(filled, batch, length)
    if prompt:
        ids = torch.randint(0, SIZE["vocab_size"], (batch, length), device="cuda")
        start = functools.partial(read, model, ids)
    decode(model, *start(), 3)  # compiles everything
    torch.cuda.reset_peak_memory_stats()
    took, (logits, cache) = seconds(start)
    if prompt:
        found = {"prompt": took, "prompt_bytes": torch.cuda.max_memory_allocated()}
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(4):
        took, (logits, cache) = seconds(functools.partial(decode, model, logits, cache, steps))
        times.append(took / steps)
    if not bool(torch.isfinite(logits.float()).all()):
        raise RuntimeError("their logits are not finite")
    case = {"who": "authors", "model": "lalte", "size": "0.4B", "length": length, "batch": batch}
    eager = ", torch.compile off" if os.environ.get("TORCHDYNAMO_DISABLE") == "1" else ""
    return {
        **case,
        **found,
        "run": f"{torch.cuda.get_device_name()}, torch {torch.__version__}{eager}",
        "token": statistics.median(times[1:]),
        "spread": max(times[1:]) / min(times[1:]),
        "token_bytes": torch.cuda.max_memory_allocated(),
    }


def main(argv: list[str]) -> None:
    try:
        if len(argv) > 1:
            raise ValueError(f"{argv[1]!r}: no such argument")
        if FLAGS.length % 64:
            raise ValueError(f"--length={FLAGS.length}: their prompts are multiples of 64")
        prepare(FLAGS.authors_path, FLAGS.configurations, FLAGS.eager)
        model = build()
        for batch in FLAGS.batches:
            print(json.dumps(measure(model, int(batch), FLAGS.length, FLAGS.steps, FLAGS.prompt)), flush=True)
    except (ValueError, ImportError, RuntimeError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
