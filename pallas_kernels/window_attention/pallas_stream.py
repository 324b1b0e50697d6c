"""What the Hopper kernels of window attention share: the stream of keys past tiles of queries, its masks, small parts.

A program has compute warpgroups with 64 queries each and one more warpgroup that brings tiles of keys and values by TMA
and runs ahead, into the next tile's keys too. The steps of a tile are in its row of the plan (``pallas_plan``).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from math import gcd
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.window_attention.api import Case
from pallas_kernels.window_attention.pallas_plan import ROWS, KeyList

BARRIERS = 4096  # bytes left for barriers and the compiler's own use
PROGRAMS = 132  # one per multiprocessor of a Hopper GPU
SWIZZLED: Any = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]
BY_ROW, BY_COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Compute warpgroups (of 64 queries), keys per tile, tiles of keys in flight."""

    warpgroups: int
    keys: int
    stages: int


def take_registers(warpgroups: int, copies: bool) -> None:
    """Shares the multiprocessor's 65536 registers out between the warpgroups that compute and the one that copies."""
    if warpgroups == 1:  # enough for both
        return
    compute, copy = {2: (232, 40), 3: (160, 32), 4: (112, 32)}[warpgroups]
    plgpu.set_max_registers(copy if copies else compute, action="decrease" if copies else "increase")


def share_work(warpgroup: Any, warpgroups: int, copy: Callable[[], None], compute: Callable[[], None]) -> None:
    """The last warpgroup of a program copies, the others compute."""

    @pl.when(warpgroup == warpgroups)
    def _copy():
        take_registers(warpgroups, True)
        copy()

    @pl.when(warpgroup < warpgroups)
    def _compute():
        take_registers(warpgroups, False)
        compute()


class Worker:
    """What a compute warpgroup does: its 64 rows of each item of its program, one item after another.

    A pass says how to ``fetch`` item n's own rows, if there is such an item, and to ``work`` on it: that begins when
    ``done`` steps have gone by, and returns how many have gone by at its end.
    """

    def __init__(self, case: Case, tiles: Any, items: Any, warpgroup: Any):
        self.case, self.tiles, self.items, self.warpgroup = case, tiles, items, warpgroup

    def first_row(self, tile):
        return pl.multiple_of(tile * (self.tiles.warpgroups * ROWS) + self.warpgroup * ROWS, ROWS)

    def fetch(self, n) -> None:
        raise NotImplementedError

    def work(self, n, done):
        raise NotImplementedError

    def run(self) -> None:
        self.fetch(jnp.int32(0))
        jax.lax.fori_loop(0, self.items.rounds, self.work, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


class Steps:
    """Where the keys of every step of a tile of queries are, from the tile's row of the plan."""

    def __init__(self, row: tuple[Any, ...], keys: int):
        self.cache_n, self.list_n, self.list_first, self.window_n, self.first = row[:5]
        self.high, self.cache_whole, self.list_whole = row[5:] if len(row) > 5 else (None,) * 3
        self.keys = keys
        self.listed = self.cache_n + self.list_n
        self.end = self.listed + self.window_n

    def slot(self, step):
        """The first slot of the list of a step before ``listed``."""
        at = jnp.where(step < self.cache_n, step * self.keys, self.list_first + (step - self.cache_n) * self.keys)
        return pl.multiple_of(at, 8)

    def key(self, step):
        """The first key of a later step."""
        return pl.multiple_of(self.first + (step - self.listed) * self.keys, 8)


def turn(n, program, programs: int):
    """The item that a program takes as its n-th: back and forth, so that the longer one and the shorter one add up."""
    return n * programs + jnp.where(jax.lax.rem(n, jnp.int32(2)) == 0, program, programs - 1 - program)


def turns(items, program, programs: int):
    """How many items a program takes."""
    rounds = jax.lax.div(items, jnp.int32(programs))
    return rounds + jnp.where(turn(rounds, program, programs) < items, 1, 0)


class Items:
    """The tiles of queries that a program takes in turn; the longest ones, those of the last queries, first."""

    def __init__(self, case: Case, plan_ref, tiles: int, programs: int):
        self.case, self.plan, self.tiles, self.programs = case, plan_ref, tiles, programs
        self.heads = case.B * case.H
        self.program = jax.lax.axis_index("programs")
        self.rounds = turns(jnp.int32(tiles * self.heads), self.program, programs)

    def place(self, n):
        """(b, head, KV head, tile) of this program's item n."""
        item = turn(n, self.program, self.programs)
        row = jax.lax.rem(item, jnp.int32(self.heads))
        head = jax.lax.rem(row, jnp.int32(self.case.H))
        h = jax.lax.div(head, jnp.int32(self.case.H // self.case.K))
        b = jax.lax.div(row, jnp.int32(self.case.H))
        return b, head, h, self.tiles - 1 - jax.lax.div(item, jnp.int32(self.heads))

    def row(self, n, warpgroup=None):
        """The plan of item n, or of the last one; with what masks must know, if a warpgroup is given."""
        b, _, h, tile = self.place(jnp.minimum(n, self.rounds - 1))
        fields: list[Any] = list(range(5))
        if warpgroup is not None:
            fields += [5, 6 + warpgroup, 6 + (self.plan.shape[3] - 6) // 2 + warpgroup]
        return tuple(self.plan[b, h, tile, field] for field in fields)


def program_count(items: int, heads: int) -> int:
    """Without a common divisor with the heads, so that a program meets all of them: some keep more than others."""
    return next(n for n in range(min(PROGRAMS, items), 0, -1) if gcd(n, heads) == 1)


def persistent(entry: Any, out_type: Any, programs: int, warpgroups: int, interpreted: bool) -> Any:
    """The kernel of ``programs`` programs that compute with so many warpgroups and copy with one more."""
    return plgpu.kernel(
        entry,
        out_type=out_type,
        grid=(programs,),
        grid_names=("programs",),
        num_threads=warpgroups + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpreted else None,
    )


def copy_keys(items: Items, tiles: Tiles, k_ref, v_ref, key_list: KeyList | None, buffers, full, used) -> None:
    """The copying warpgroup: brings every step's keys and values, as soon as their buffers are free."""
    k_smem, v_smem = buffers
    k_full, v_full = full
    k_used, v_used = used
    slot_of = lambda step: jax.lax.rem(step, jnp.int32(tiles.stages))  # noqa: E731

    def await_free(step):
        """Until the step that had this one's buffers before is done with them."""

        @pl.when(step >= tiles.stages)
        def _():
            plgpu.barrier_wait(k_used.at[slot_of(step)])
            plgpu.barrier_wait(v_used.at[slot_of(step)])

    def copy_item(n, carry):
        done, row = carry
        following = items.row(n + 1)
        b, _, h, _ = items.place(n)
        steps = Steps(row, tiles.keys)

        def copy(step, _):
            slot = slot_of(done + step)

            def fetch(k_source, v_source):
                plgpu.copy_gmem_to_smem(k_source, k_smem.at[slot], k_full.at[slot])
                plgpu.copy_gmem_to_smem(v_source, v_smem.at[slot], v_full.at[slot])

            await_free(done + step)

            @pl.when(step >= steps.listed)
            def _from_window():
                at = (b, pl.ds(steps.key(step), tiles.keys), h)
                fetch(k_ref.at[at], v_ref.at[at])

            if key_list is not None:

                @pl.when(step < steps.listed)
                def _from_list():
                    at = (b, h, pl.ds(steps.slot(step), tiles.keys))
                    fetch(key_list.k.at[at], key_list.v.at[at])

        jax.lax.fori_loop(0, steps.end, copy, None)
        return done + steps.end, following

    done, _ = jax.lax.fori_loop(0, items.rounds, copy_item, (jnp.int32(0), items.row(jnp.int32(0))))
    for n in range(tiles.stages):
        await_free(done + n)


def skip_steps(stages: int, full: Any, used: Any, first: Any, end: Any) -> None:
    """Lets steps go by whose buffers (one of every pair) this warpgroup has no use for."""

    def skip(step, _):
        slot = jax.lax.rem(step, jnp.int32(stages))
        for arrived, free in zip(full, used, strict=True):
            plgpu.barrier_wait(arrived.at[slot])
            plgpu.barrier_arrive(free.at[slot])

    jax.lax.fori_loop(first, end, skip, None)


def stream_keys(stages: int, steps: Steps, masks: Masks, full: Any, used: Any, done: Any, step: Any, carry: Any) -> Any:
    """Takes ``carry`` through the steps of a tile that hold a key for this warpgroup: ``step(mask, number, carry)``."""
    if masks.list is not None:
        carry = jax.lax.fori_loop(0, steps.listed, functools.partial(step, masks.listed), carry)
    first, end = masks.window_steps()
    skip_steps(stages, full, used, done + steps.listed, done + first)
    carry = jax.lax.fori_loop(first, end, functools.partial(step, masks.window), carry)
    skip_steps(stages, full, used, done + end, done + steps.end)
    return carry


class Masks:
    """Which of a warpgroup's queries (rows) see which keys (columns) of a step."""

    def __init__(self, case: Case, steps: Steps, place, t, begin_ref: Any, key_list: Any):
        self.case, self.steps, self.list, self.t = case, steps, key_list, t
        self.b, _, self.h, _ = place
        self.i = case.U - case.T + self.t
        self.begins = None
        if begin_ref is not None:
            self.begins = plgpu.load(begin_ref.at[self.b, pl.ds(self.t, ROWS)], layout=BY_ROW, optimized=False)

    def window_steps(self):
        """(first, end) of the steps in the window that hold a key for this warpgroup."""
        steps, W = self.steps, self.case.width
        end = jnp.minimum(steps.window_n, (self.i + ROWS - 1 - steps.first) // steps.keys + 1)
        first = jnp.minimum(jnp.maximum(self.i - W + 1 - steps.first, 0) // steps.keys, end)
        return steps.listed + first, steps.listed + end

    def window(self, step, logits):
        """The logits of a step in the window, -inf where not seen."""
        key, W = self.steps.key(step), self.case.width
        whole = (key >= jnp.maximum(self.i + ROWS - W, self.steps.high)) & (key + self.steps.keys - 1 <= self.i)

        def mask(logits):
            iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, logits.shape, layout=plgpu.Layout.WGMMA)
            ahead = iota(1) - iota(0) + (key - self.i)  # of the query
            seen = (ahead <= 0) & (ahead > -W)
            if self.begins is not None:
                seen &= iota(1) >= jax.lax.broadcast_in_dim(self.begins - key, logits.shape, [0])
            return jnp.where(seen, logits, -jnp.inf)

        return jax.lax.cond(whole, lambda x: x, mask, logits)

    def listed(self, step, logits):
        """The logits of a step in the list, -inf where not seen."""
        slot = self.steps.slot(step)
        end = jnp.where(step < self.steps.cache_n, self.steps.cache_whole, self.steps.list_whole)

        def mask(logits):
            i = plgpu.broadcasted_iota(jnp.int32, logits.shape, 0, layout=plgpu.Layout.WGMMA) + self.i
            low, high = (
                jax.lax.broadcast_in_dim(
                    plgpu.load(x.at[self.b, self.h, pl.ds(slot, self.steps.keys)], layout=BY_COLUMN, optimized=False),
                    logits.shape,
                    [1],
                )
                for x in (self.list.low, self.list.high)
            )
            return jnp.where((i >= low) & (i < high), logits, -jnp.inf)

        return jax.lax.cond(slot + self.steps.keys <= end, lambda x: x, mask, logits)


def fold(operation: Any, x):
    """[64, 8] of x [64, 8 n]: columns joined within threads, in short chains beside one another."""
    parts = [x[:, n : n + 8] for n in range(0, x.shape[1], 8)]
    while len(parts) > 1:
        parts = [operation(a, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def add_product(acc, a, b_smem, interpreter_smem=None):
    """acc + a b, with a in registers. The interpreter multiplies from shared memory alone, and adds apart."""
    if interpreter_smem is None:
        return pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, a, b_smem))(plgpu.ACC.init(acc))
    interpreter_smem[...] = a
    plgpu.commit_smem()

    def product(acc_ref):
        plgpu.wgmma(acc_ref, interpreter_smem, b_smem)
        return acc_ref[...]

    return acc + pl.run_scoped(product, plgpu.ACC(acc.shape, jnp.float32))


def flatten(operands: Any) -> tuple[list[Any], Any]:
    """The arrays of a tree, and what puts their references back into the tree, with None where there was None."""
    flat, tree = jax.tree.flatten(operands, is_leaf=lambda x: x is None)
    given = [x is not None for x in flat]

    def restore(refs):
        remaining = iter(refs)
        tree_of_refs = jax.tree.unflatten(tree, [next(remaining) if has else None for has in given])
        return (*tree_of_refs, *remaining)

    return [x for x in flat if x is not None], restore
