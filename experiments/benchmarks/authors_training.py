"""How fast do the authors train laLTE? Their model from a checkout, forward and backward passes and AdamW, on a GPU.

    python -m experiments.benchmarks.authors_training --authors_path=DIR --size=0.4B --rows=8
    python -m experiments.benchmarks.training --model=lalte --size=0.4B --rows=8

Their layers, FlexAttention path, kernels and chunked cross-entropy on random tokens; their window 767 stands for 768
(``authors_model``). Everything is bfloat16, weights and moments too, which is faster than their recipe of float32
weights under autocast. Their gradients on Triton 3.6 are not checked here: this is for time alone. One line of JSON for
each of two programs: without the optimiser, and with torch's fused AdamW and clipping.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from typing import Any

from absl import app, flags

from experiments.benchmarks import authors_model, clock

FLAGS = flags.FLAGS
LARGE = dict(hidden_size=2048, head_dim=256, tie_word_embeddings=False)
LARGE_LAYERS = dict(num_heads=32, num_kv_heads=8)


def define_flags() -> None:
    flags.DEFINE_string("authors_path", None, "A checkout of the authors' repository.")
    flags.DEFINE_string("size", "0.4B", "0.4B or 1.4B.")
    flags.DEFINE_integer("rows", 8, "Rows of a step.")
    flags.DEFINE_integer("length", 4096, "Tokens of a row, a multiple of 64.")
    flags.DEFINE_integer("steps", 10, "Steps whose median counts.")
    flags.DEFINE_string("lock", None, "A file to hold while timing: several processes then compile side by side.")
    flags.DEFINE_integer("configurations", 3, "Of each autotuned kernel's list, how many are tried; 0 for all.")
    flags.mark_flag_as_required("authors_path")


def build(size: str) -> tuple[Any, Any]:
    """Their model with weights as training starts, and the head's weight."""
    import torch
    from fla.models.hybrid_gated_deltanet.configuration_hybrid_gated_deltanet import HybridGatedDeltaNetConfig
    from fla.models.hybrid_gated_deltanet.modeling_hybrid_gated_deltanet import HybridGatedDeltaNetModel

    large = size == "1.4B"
    layers = {**authors_model.LAYERS, **(LARGE_LAYERS if large else {})}
    torch.manual_seed(0)
    with torch.device("cuda"):
        sizes: dict[str, Any] = {**authors_model.SIZE, **(LARGE if large else {})}
        model = HybridGatedDeltaNetModel(HybridGatedDeltaNetConfig(attn=layers, **sizes))
        head = torch.nn.Parameter(torch.empty_like(model.embeddings.weight)) if large else model.embeddings.weight
    for name, weight in [*model.named_parameters(), ("head", head)]:
        if weight.ndim > 1 and "router" not in name:
            torch.nn.init.normal_(weight, std=0.006)
    model = model.to(torch.bfloat16).train()
    return model, (torch.nn.Parameter(head.to(torch.bfloat16)) if large else model.embeddings.weight)


def measure(size: str, rows: int, length: int, steps: int, optimiser: bool) -> dict[str, Any]:
    """The line of one program."""
    import torch
    from fla.modules.fused_linear_cross_entropy import FusedLinearCrossEntropyLoss

    model, head = build(size)
    parameters = [*model.parameters(), *([] if head is model.embeddings.weight else [head])]
    adamw = torch.optim.AdamW(parameters, lr=3e-4, betas=(0.9, 0.95), eps=1e-15, weight_decay=0.1, fused=True)
    criterion = FusedLinearCrossEntropyLoss(num_chunks=8)
    ids = torch.randint(0, authors_model.SIZE["vocab_size"], (rows, length + 1), device="cuda")

    def step() -> Any:
        out = model(input_ids=ids[:, :-1], return_dict=True)
        loss = criterion(out.last_hidden_state, ids[:, 1:].contiguous(), head, None)
        scores = torch.stack([routing[0] for routing in out.routing if routing is not None and routing[0] is not None])
        (loss + 1e-9 * scores.float().mean()).backward()
        if optimiser:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            adamw.step()
        adamw.zero_grad()
        return loss

    began = time.perf_counter()
    first = float(step())
    torch.cuda.synchronize()
    compiled = time.perf_counter() - began
    step()
    torch.cuda.reset_peak_memory_stats()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    with clock.alone(FLAGS.lock):
        torch.cuda.synchronize()
        marks[0].record()
        for mark in marks[1:]:
            loss = step()
            mark.record()
        torch.cuda.synchronize()
    times = [start.elapsed_time(end) for start, end in itertools.pairwise(marks)]
    if not bool(torch.isfinite(loss)):
        raise RuntimeError("their loss is not finite")
    median = statistics.median(times)
    return {
        "who": "authors",
        "model": "lalte",
        "size": size,
        "rows": rows,
        "optimiser": optimiser,
        "first_step": round(compiled, 1),
        "step_ms": round(median, 1),
        "spread": round(max(times) / min(times), 3),
        "tokens_per_second": round(rows * length / median * 1e3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
        "losses": [round(first, 4), round(float(loss), 4)],
        "device": f"{torch.cuda.get_device_name()}, torch {torch.__version__}",
    }


def main(argv: list[str]) -> None:
    try:
        if len(argv) > 1:
            raise ValueError(f"{argv[1]!r}: no such argument")
        if FLAGS.length % 64 or FLAGS.size not in ("0.4B", "1.4B"):
            raise ValueError(f"--length={FLAGS.length} --size={FLAGS.size}: a multiple of 64; 0.4B or 1.4B")
        authors_model.prepare(FLAGS.authors_path, FLAGS.configurations)
        for optimiser in (False, True):
            print(json.dumps(measure(FLAGS.size, FLAGS.rows, FLAGS.length, FLAGS.steps, optimiser)), flush=True)
    except (ValueError, ImportError, RuntimeError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
