"""How do retained keys become dense tiles? Rows of k and v, gathered by TMA into the order of their list.

A program brings 64 rows and writes them as one tile: a copy for each row, or one for a group of rows side by side.
Tiles beyond the end of a list are left unwritten, so the time follows the number of keys retained.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

ROWS = 64
GROUP = 8  # rows that one copy brings where their positions follow each other
SLACK = 192  # slots beyond the end of a list that the tiles of other kernels may touch


def _kernel(k_ref, v_ref, position_ref, count_ref, k_out, v_out, k_smem, v_smem, joined, single) -> None:
    b, h, tile = (jax.lax.axis_index(name) for name in ("batch", "heads", "tiles"))
    first = pl.multiple_of(tile * ROWS, ROWS)
    buffers = ((k_ref, k_smem), (v_ref, v_smem))

    @pl.when(first < count_ref[b, h] + SLACK)
    def _():
        arrived = []
        for group, row in enumerate(range(0, ROWS, GROUP)):
            positions = [position_ref[b, h, first + row + n] for n in range(GROUP)]
            # Positions rise along a list, so the ends tell; behind it they are 0.
            neighbours = positions[-1] - positions[0] == GROUP - 1

            @pl.when(neighbours)
            def _(row=row, start=positions[0], barrier=joined.at[group]):
                for source, smem in buffers:
                    rows = source.at[b, pl.ds(start, GROUP), h]
                    plgpu.copy_gmem_to_smem(rows, smem.at[pl.ds(row, GROUP)], barrier)

            @pl.when(~neighbours)
            def _(row=row, positions=positions, barrier=single.at[group]):
                for n, position in enumerate(positions):
                    for source, smem in buffers:
                        plgpu.copy_gmem_to_smem(source.at[b, position, h], smem.at[row + n], barrier)

            arrived.append(neighbours)
        for group, neighbours in enumerate(arrived):
            pl.when(neighbours)(lambda group=group: plgpu.barrier_wait(joined.at[group]))
            pl.when(~neighbours)(lambda group=group: plgpu.barrier_wait(single.at[group]))
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
            plgpu.Barrier(num_arrivals=2, num_barriers=ROWS // GROUP),
            plgpu.Barrier(num_arrivals=2 * GROUP, num_barriers=ROWS // GROUP),
        ),
        grid=(S // ROWS, K, B),
        grid_names=("tiles", "heads", "batch"),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpreted else None,
    )
    return kernel(k, v, position, jnp.asarray(count))
