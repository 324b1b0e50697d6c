"""The product of few rows against float64: norm, bias, gate, residual, pieces, odd sizes; its kernels' registers."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import triton_call
from pallas_kernels.dispatch import UnsupportedCase
from pallas_kernels.row_product import row_product, triton
from tests.kernels import needs_triton
from tests.tolerances import assert_close

EPS = 1e-3  # large enough to be missed
# name: rows, depth, widths, what surrounds the product. Every tile of the kernels has an edge in one of them.
CASES = {
    "one_row": (1, 300, (61,), ()),
    "one_row_all": (1, 97, (37, 3, 40, 1, 8, 5), ("norm", "bias", "residual")),
    "one_row_gated": (1, 512, (67,), ("norm", "bias", "residual", "gated")),
    "two_rows": (2, 130, (16, 17), ("norm",)),
    "rows_all": (7, 97, (37, 3, 40, 1, 8, 5), ("norm", "bias", "residual")),
    "rows_gated": (19, 257, (67,), ("norm", "bias", "residual", "gated")),
    "shallow": (3, 7, (5,), ("norm", "residual")),
    "many_rows": (131, 64, (33,), ("residual",)),
    "many_rows_gated": (70, 1000, (129,), ("norm", "gated")),
}


def make_inputs(name: str, dtype: str):
    rows, depth, widths, parts = CASES[name]
    random = np.random.default_rng(sum(map(ord, name)))
    out = sum(widths) * (2 if "gated" in parts else 1)
    shapes = {"norm": depth, "bias": out, "residual": (rows, sum(widths))}
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), dtype)  # noqa: E731
    x, weight = draw(rows, depth), draw(out, depth)
    arrays = {key: draw(*np.atleast_1d(shape)) for key, shape in shapes.items() if key in parts}
    if "norm" in arrays:
        arrays["norm"] = arrays["norm"].astype(jnp.float32)
    return x, weight, arrays, {"eps": EPS, "gated": "gated" in parts, "widths": widths}


def truth(x, weight, arrays, options):
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    arrays = {key: np.asarray(value, np.float64) for key, value in arrays.items()}
    if "norm" in arrays:
        x = x / np.sqrt((x * x).mean(1, keepdims=True) + EPS) * arrays["norm"]
    y = x @ weight.T + arrays.get("bias", 0.0)
    if options["gated"]:
        gate, up = np.split(y, 2, axis=1)
        y = gate / (1 + np.exp(-gate)) * up
    return y + arrays.get("residual", 0.0)


@pytest.mark.rotating(12)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", CASES)
def test_values(name, dtype, implementation):
    x, weight, arrays, options = make_inputs(name, dtype)
    call = jax.jit(functools.partial(row_product, **options, implementation=implementation))
    pieces = call(x, weight, **arrays)
    assert [(piece.shape[1], str(piece.dtype)) for piece in pieces] == [(w, dtype) for w in options["widths"]]
    assert_close(np.concatenate(pieces, axis=1), truth(x, weight, arrays, options), "row_product", dtype)
    again = call(x, weight, **arrays)
    assert all(np.array_equal(one, two) for one, two in zip(pieces, again, strict=True))


def test_float32_out_of_16_bits(implementation):
    x, weight, _, options = make_inputs("two_rows", "bfloat16")
    (logits,) = row_product(x, weight, **options | {"widths": None}, dtype=jnp.float32, implementation=implementation)
    assert logits.dtype == jnp.float32
    assert_close(logits, truth(x, weight, {}, options), "row_product", "float32")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": (2, 3, 4)}, "x has shape"),
        ({"weight": (16, 5)}, r"weight has shape .* \[F, D\] with D = 8"),
        ({"norm": (7,)}, "norm has shape"),
        ({"bias": (15,)}, "bias has shape"),
        ({"residual": (2, 15)}, "residual has shape"),
        ({"widths": (8, 9)}, "add up to 16"),
        ({"widths": (16, 0)}, "pieces=0; it must be a Python integer >= 1"),
        ({"gated": True, "weight": (15, 8)}, "gated, it must have an even number"),
        ({"implementation": "pallas"}, "does not exist"),
    ],
)
def test_bad_arguments(change, words):
    arguments = {"x": (2, 8), "weight": (16, 8)} | change
    arguments = {
        key: jnp.ones(value) if isinstance(value, tuple) and key != "widths" else value
        for key, value in arguments.items()
    }
    with pytest.raises(UnsupportedCase, match=words):
        row_product(arguments.pop("x"), arguments.pop("weight"), **arguments)


def test_weight_of_another_dtype():
    with pytest.raises(UnsupportedCase, match="weight has dtype bfloat16; it must be float32"):
        row_product(jnp.ones((2, 8)), jnp.ones((4, 8), jnp.bfloat16))


def test_more_than_the_kernel_takes():
    with pytest.raises(UnsupportedCase, match="7 pieces"):
        triton.check(triton.Case(1, 8, (1,) * 7, "bfloat16", False))
    with pytest.raises(UnsupportedCase, match="257 rows"):
        triton.check(triton.Case(257, 8, (8,), "bfloat16", False))


SHAPES = {  # of the paper's models: depth, widths, gated, float32
    "into": (1024, (1024, 1024, 1024, 1024, 8, 8), False, False),
    "into_1p4b": (2048, (2048, 2048, 2048, 2048, 8, 8), False, False),
    "out": (1024, (1024,), False, False),
    "gate_up": (1024, (2816,), True, False),
    "down": (2816, (1024,), False, False),
    "head": (1024, (32000,), False, True),
}


@needs_triton
@pytest.mark.parametrize("rows", [1, 16, 64])
@pytest.mark.parametrize("name", ["into", *(pytest.param(n, marks=pytest.mark.exhaustive) for n in list(SHAPES)[1:])])
def test_compiles_without_spills(name, rows):
    depth, widths, gated, wide = SHAPES[name]
    x, weight = (jax.ShapeDtypeStruct((n, depth), jnp.bfloat16) for n in (rows, sum(widths) * (2 if gated else 1)))
    norm = jax.ShapeDtypeStruct((depth,), jnp.float32)
    call = functools.partial(
        row_product, gated=gated, widths=widths, dtype=jnp.float32 if wide else None, implementation="triton"
    )
    (recorded,) = triton_call.record_calls(lambda x, weight, norm: call(x, weight, norm=norm), x, weight, norm)
    kernel = triton_call.compile_call(recorded)
    assert kernel.spill_bytes == 0
    assert ("mma" in kernel.ptx) == (rows > 1)
