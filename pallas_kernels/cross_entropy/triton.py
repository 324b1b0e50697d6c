"""Cross-entropy with its gradient in Triton: one program per row of logits.

The row is read twice: once for its largest logit and the sum of exponentials, kept relative to the largest so far, and
once more, from the cache, for the gradient. So the time is that of reading the logits and writing the gradient once.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.cross_entropy.api import Case
from pallas_kernels.triton_call import check_installed, jit, tl, triton_call

BLOCK = 8192
"""Columns that a program reads at a time: the fastest of 2048, 4096 and 8192 at 32,000 columns on an H200."""


@jit
def _row(
    z_ptr, label_ptr, loss_ptr, correct_ptr, gradient_ptr, L: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * L
    gradient_ptr += row * L
    label = tl.load(label_ptr + row)
    columns = tl.arange(0, BLOCK)
    largest, total, best = -float("inf"), 0.0, 0
    for start in range(0, L, BLOCK):
        z = tl.load(z_ptr + start + columns, mask=start + columns < L, other=-float("inf"))
        top, where = tl.max(z, 0, return_indices=True)
        # The first of equals counts, as argmax has it: within the block by tl.max, across blocks by ">".
        best = tl.where(top > largest, start + where, best)
        higher = tl.maximum(largest, top)
        # A block of -inf alone leaves nothing to compare with.
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(z - shift), 0)
        largest = higher
    lse = largest + tl.log(total)
    asked = label >= 0
    # A label beyond the columns makes the loss NaN; its logit would be another row's, or nobody's.
    chosen = tl.load(z_ptr + tl.where(asked, label, 0), mask=label < L, other=float("nan"))
    tl.store(loss_ptr + row, tl.where(asked, lse - chosen, 0.0))
    tl.store(correct_ptr + row, tl.where(asked & (best == label), 1.0, 0.0))
    for start in range(0, L, BLOCK):
        inside = start + columns < L
        z = tl.load(z_ptr + start + columns, mask=inside, other=-float("inf"))
        gradient = tl.exp(z - lse) - tl.where(start + columns == label, 1.0, 0.0)
        gradient = tl.where(asked, gradient, 0.0)
        tl.store(gradient_ptr + start + columns, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)


def check(case: Case) -> None:
    check_installed("cross_entropy")


def forward(logits: jax.Array, labels: jax.Array, *, dtype: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    rows, vocabulary = logits.shape
    block = 16
    while block < min(vocabulary, BLOCK):
        block *= 2
    numbers = jax.ShapeDtypeStruct((rows,), jnp.float32)
    return triton_call(
        _row, logits, labels,
        out_shape=(numbers, numbers, jax.ShapeDtypeStruct(logits.shape, dtype)),
        grid=(rows,), num_warps=8 if block == BLOCK else 4, num_stages=2,
        L=vocabulary, BLOCK=block,
    )  # fmt: skip
