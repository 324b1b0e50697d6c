"""Does the list of each block name every token that selected it, once, whatever is sorted to find that out?"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_attention.blocks import plain_layout, row_layout
from pallas_kernels.block_attention.plan import readers


def _documents(B, T, lengths):
    """Documents of these lengths with two tokens of padding before each, and padding behind."""
    row = [n for number, length in enumerate(lengths, start=1) for n in [0, 0] + [number] * length]
    return jnp.asarray([row + [0] * (T - len(row))] * B, jnp.int32)


@pytest.mark.parametrize(
    ("B", "T", "K", "M", "S", "lengths", "most"),
    [(2, 61, 3, 4, 8, None, 5), (2, 61, 3, 4, 8, (9, 23, 1, 17), 5), (3, 501, 53, 3, 16, (130, 7, 301), 64)],
    ids=["one document", "packed", "keys of 32 bits"],
)
def test_lists_name_each_reader_once(B, T, K, M, S, lengths, most):
    rng = np.random.default_rng(17)
    layout = plain_layout(B, T, S) if lengths is None else row_layout(_documents(B, T, lengths), S)
    current, start = np.asarray(layout.position) // S, np.asarray(layout.start)
    indices = np.full((B, T, K, M), -1, np.int32)
    for b, t, kv in np.ndindex(B, T, K):
        if current[b, t] >= 0:
            chosen = np.sort(rng.permutation(current[b, t] + 1)[:M])
            indices[b, t, kv, : len(chosen)] = chosen
    lists = jax.tree.map(np.asarray, readers(jnp.asarray(indices), layout, S, lengths is not None, most))
    for b, kv in np.ndindex(B, K):
        found = set()
        for first, begin, end in zip(lists.first[b, kv], lists.begin[b, kv], lists.end[b, kv], strict=True):
            assert end - begin <= most
            found |= {(int(first), int(entry)) for entry in lists.entry[b, kv, begin:end]}
        wanted = {
            (int(start[b, t] + S * indices[b, t, kv, m]), t * M + m)
            for t, m in np.ndindex(T, M)
            if indices[b, t, kv, m] >= 0
        }
        assert found == wanted
        assert np.sum(lists.end[b, kv] - lists.begin[b, kv]) == len(wanted)
