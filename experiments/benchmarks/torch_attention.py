"""Attention in torch: its fused causal call, FlexAttention with the LTE mask, and the authors' prompt kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from experiments.benchmarks import peers
from experiments.benchmarks.clock import Contender


def attend_sdpa(q: Any, k: Any, v: Any, *, grouped: bool) -> Any:
    """Causal attention over [B,T,H,N] by torch's choice of cuDNN or flash kernels."""
    torch = peers.torch_on_gpu()
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    kernels = [torch.nn.attention.SDPBackend.CUDNN_ATTENTION, torch.nn.attention.SDPBackend.FLASH_ATTENTION]
    with torch.nn.attention.sdpa_kernel(kernels, set_priority=True):
        o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return o.transpose(1, 2)


def flex_contenders(
    size: Any, inputs: Sequence[Any], cotangent: Any | None, kept: Any, names: Sequence[str]
) -> dict[str, Callable[[], Contender]]:
    """FlexAttention as the authors train with it, blocks of 64: with the mask built in each call, and with it at hand.

    The mask changes at every step of training, so the first is what a step costs.
    """

    def make(rebuild: bool) -> Contender:
        torch = peers.torch_on_gpu()
        flex = peers.load("torch.nn.attention.flex_attention", "torch")
        attend, block_mask = torch.compile(flex.flex_attention), torch.compile(flex.create_block_mask)
        rule = _rule(torch, size, kept)

        def build() -> Any:
            return block_mask(rule, size.B, size.H, size.T, size.T, device="cuda")

        ready = None if rebuild else build()

        def forward(q: Any, k: Any, v: Any) -> Any:
            moved = (x.transpose(1, 2) for x in (q, k, v))
            mask = build() if ready is None else ready
            options = {"BLOCK_M": 64, "BLOCK_N": 64}
            o = attend(*moved, block_mask=mask, enable_gqa=size.H != size.K, kernel_options=options)
            return o.transpose(1, 2)

        name = "flex: mask and attention" if rebuild else "flex: attention"
        high = None if cotangent is None else peers.to_torch(cotangent)[0].detach()
        return peers.torch_contender(name, forward, peers.to_torch(*inputs), high, names)

    return {
        "flex: attention": functools.partial(make, False),
        "flex: mask and attention": functools.partial(make, True),
    }


def _rule(torch: Any, size: Any, kept: Any) -> Callable[..., Any]:
    """Which query sees which key: causal, and within the window or retained."""
    group = size.H // size.K
    selected: Any = None
    if kept is not None:
        selected = torch.zeros((size.B, size.K, size.T), dtype=torch.bool, device="cuda")
        selected.scatter_(2, peers.to_torch(jnp.swapaxes(kept, 1, 2))[0].long(), True)

    def near(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q >= k) & (q - k < size.W)

    def near_or_kept(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q >= k) & ((q - k < size.W) | selected[b, h // group, k])

    return near if selected is None else near_or_kept


def authors_prompt(size: Any, inputs: Sequence[Any], kept: Any, path: str | None) -> Contender:
    """Their kernel of a prompt: the columns are gathered beforehand, as their cache does; its bounds are not."""
    module = peers.authors_file(path, "fla/ops/lte/parallel.py")
    torch = peers.torch_on_gpu()
    q, k, v = (x.detach() for x in peers.to_torch(*inputs))
    past: dict[str, Any] = {}
    if kept is not None:
        index = peers.to_torch(kept)[0].long()
        # Slots for the window come first in their cache; the kernel reads those behind them.
        room = torch.zeros((size.B, size.W, size.K, size.N), dtype=k.dtype, device="cuda")
        wide = index[..., None].expand(-1, -1, -1, size.N)
        held = [torch.cat([room, torch.gather(x, 1, wide)], dim=1) for x in (k, v)]
        past = dict(k_past=held[0], v_past=held[1], kv_past_indices=index, past_offset=size.W)

    def forward(*tensors: Any) -> Any:
        return module.flash_lte_attention(*tensors, window_size=size.W, **past)[0]

    return peers.torch_contender("authors", forward, (q, k, v), None, ("o",), note="columns gathered beforehand")
