"""Are the gradients of few retained keys in a long row right where their queries go to several programs?"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pallas_kernels.window_attention import NEVER, triton_dkv
from tests.kernels import needs_triton
from tests.kernels.test_window_attention import Setup, check_rounded, make

pytestmark = [pytest.mark.gpu, needs_triton]
BASE = Setup(301, 333, 37, expiry="none", B=1, K=2, G=2, N=16, V=16)
CASES = {
    "grouped heads": BASE,
    "one head for each": dataclasses.replace(BASE, T=333, K=3, G=1),
    "packed documents": dataclasses.replace(BASE, documents="packed"),
    "padding, columns of a cache": dataclasses.replace(BASE, documents="padded", C=21, B=2),
}


def few(setup: Setup, per_head: int, expire: bool) -> np.ndarray:
    """The expiry of ``per_head`` keys in the first half of a row, none in the last head; some end within the row."""
    rng = np.random.default_rng(3)
    expiry = np.zeros((setup.B, setup.U, setup.K), np.int32)
    for b in range(setup.B):
        for h in range(setup.K - 1):
            kept = rng.choice(setup.U // 2, per_head, replace=False)
            until = rng.integers(kept + setup.window, setup.U + 2) if expire else NEVER
            expiry[b, kept, h] = until
    return expiry


@pytest.mark.parametrize("per_head, expire", [(23, True), (70, False), (161, True)])
@pytest.mark.parametrize("name, dtype", [("grouped heads", "float32"), *((name, "bfloat16") for name in CASES)])
def test_triton_gradients_in_parts(name, per_head, expire, dtype, monkeypatch):
    """From one tile of keys with as many parts as it has tiles of queries, to a list without room for a second part."""
    monkeypatch.setattr(triton_dkv, "STEPS", 1)
    setup = CASES[name]
    check_rounded(setup, make(setup) | {"expiry": few(setup, per_head, expire)}, dtype, "triton", runs=2)
