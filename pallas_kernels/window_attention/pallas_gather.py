"""How do retained keys become dense tiles? Rows of k and v, gathered by TMA into the order of their list.

A program brings 64 rows, one copy for each, and writes them as one tile. Tiles beyond the end of a list are left
unwritten, so the time follows the number of keys retained.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

ROWS = 64
SLACK = 192  # slots beyond the end of a list that the tiles of other kernels may touch


def _kernel(k_ref, v_ref, position_ref, count_ref, k_out, v_out, k_smem, v_smem, barrier) -> None:
    b, h, tile = (jax.lax.axis_index(name) for name in ("batch", "heads", "tiles"))
    first = pl.multiple_of(tile * ROWS, ROWS)

    @pl.when(first < count_ref[b, h] + SLACK)
    def _():
        positions = [position_ref[b, h, first + row] for row in range(ROWS)]
        for row, position in enumerate(positions):
            plgpu.copy_gmem_to_smem(k_ref.at[b, position, h], k_smem.at[row], barrier)
            plgpu.copy_gmem_to_smem(v_ref.at[b, position, h], v_smem.at[row], barrier)
        plgpu.barrier_wait(barrier)
        plgpu.copy_smem_to_gmem(k_smem, k_out.at[b, h, pl.ds(first, ROWS)])
        plgpu.copy_smem_to_gmem(v_smem, v_out.at[b, h, pl.ds(first, ROWS)])
        plgpu.wait_smem_to_gmem(0)


def gather_rows(
    k: Float[Array, "B U K N"],
    v: Float[Array, "B U K V"],
    position: Int32[Array, "B K S"],
    count: Int32[Array, "B K"],
    interpreted: bool = False,
) -> tuple[Any, Any]:
    """k and v at ``position``, [B,K,S,...]; S is a multiple of 64, and every position is a row of k."""
    B, K, S = position.shape
    kernel = plgpu.kernel(
        _kernel,
        out_type=tuple(jax.ShapeDtypeStruct((B, K, S, x.shape[-1]), x.dtype) for x in (k, v)),
        scratch_types=(
            plgpu.SMEM((ROWS, k.shape[-1]), k.dtype),
            plgpu.SMEM((ROWS, v.shape[-1]), v.dtype),
            plgpu.Barrier(num_arrivals=2 * ROWS),
        ),
        grid=(S // ROWS, K, B),
        grid_names=("tiles", "heads", "batch"),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpreted else None,
    )
    return kernel(k, v, position, jnp.asarray(count))
