"""Does every implementation of window attention compute its rule, whatever the mask, the sizes and the padding?"""

from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.window_attention import NEVER, Columns, api, window_attention, xla
from tests.tolerances import assert_close


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes and options of one test; every dimension differs from the others."""

    T: int
    U: int
    window: int | None
    C: int = 0
    expiry: str = ""  # "", "some", "one head" (all, the next head none), "all", "none", "until" (for a while)
    documents: str = ""  # "", "packed", "padded": padding before, between and after
    K: int = 2
    G: int = 3
    B: int = 2
    N: int = 8
    V: int = 5


SETUPS = {
    "window": Setup(37, 37, 7),
    "window of one": Setup(19, 23, 1, expiry="some"),
    "shorter than the window": Setup(11, 11, 29, C=5),
    "full": Setup(41, 41, None, documents="padded"),
    "full over a prefix": Setup(13, 47, None),
    "one query": Setup(1, 31, 5, expiry="some", C=3),
    "one head keeps all": Setup(53, 53, 9, expiry="one head", documents="packed"),
    "nothing kept": Setup(43, 43, 6, expiry="none"),
    "everything kept": Setup(43, 43, 6, expiry="all", K=1, G=8),
    "expiring": Setup(61, 67, 5, expiry="until", K=3, G=1),
    "columns": Setup(35, 35, 4, C=23, K=1, G=5),
    "all at once": Setup(59, 71, 8, C=21, expiry="until", documents="padded", G=2),
    "columns of packed rows": Setup(39, 39, 3, C=17, expiry="some", documents="packed"),
}


def make(setup: Setup, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    B, T, U, K, C = setup.B, setup.T, setup.U, setup.K, setup.C
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    arrays = dict(
        q=normal(B, T, K * setup.G, setup.N), k=normal(B, U, K, setup.N), v=normal(B, U, K, setup.V), s=normal(B, U, K)
    )
    if C:
        arrays |= dict(ck=normal(B, C, K, setup.N), cv=normal(B, C, K, setup.V))
        arrays["position"] = rng.integers(-40, U, (B, C, K)).astype(np.int32)
        arrays["until"] = rng.choice([0, U // 2, U, NEVER], (B, C, K)).astype(np.int32)
        arrays["position"][:, 0], arrays["until"][:, 0] = -(2**30), 0  # an empty slot
    shape = (B, U, K)
    kept = {
        "some": rng.random(shape) < 0.3,
        "one head": np.broadcast_to(np.arange(K) % 2 == 0, shape),
        "all": np.ones(shape, bool),
        "none": np.zeros(shape, bool),
    }
    if setup.expiry == "until":
        arrays["expiry"] = rng.integers(0, U + 5, shape).astype(np.int32)
    elif setup.expiry:
        arrays["expiry"] = np.where(kept[setup.expiry], NEVER, 0).astype(np.int32)
    if setup.documents:
        lengths = [U // 4, U // 3, U - U // 4 - U // 3] if setup.documents == "packed" else [3, U // 3, 4, U // 3]
        ids = [5, 2, 9] if setup.documents == "packed" else [0, 7, 0, 4]
        row = np.repeat([*ids, 0], [*lengths, U - sum(lengths)])
        arrays["segment_ids"] = np.stack([np.roll(row, b) if setup.documents == "padded" else row for b in range(B)])
        arrays["segment_ids"] = arrays["segment_ids"].astype(np.int32)
    return arrays


def sees(setup: Setup, a: dict, b: int, h: int, i: int) -> np.ndarray:
    """For query index i, which of the U keys and then the C columns it sees, read off the rule one by one."""
    W = setup.window
    ids = a["segment_ids"][b] if "segment_ids" in a else np.ones(setup.U, int)
    first = next((x for x in ids if x != 0), 0)
    seen = []
    for j in range(setup.U):
        near = W is None or i - j < W
        retained = "expiry" in a and i < a["expiry"][b, j, h]
        seen.append(j <= i and ids[i] == ids[j] and ids[i] != 0 and (near or retained))
    for c in range(setup.C):
        inside = i - int(a["position"][b, c, h]) >= W and i < a["until"][b, c, h]
        seen.append(inside and ids[i] != 0 and ids[i] == first)
    return np.flatnonzero(seen)


def truth(setup: Setup, a: dict, do: np.ndarray, dlse: np.ndarray, scale: float) -> tuple[dict, dict]:
    """Values and gradients in float64, one query and one head at a time."""
    a = {name: x.astype(np.float64) if x.dtype.kind not in "iu" else x for name, x in a.items()}
    keys = np.concatenate([a["k"], a["ck"]], 1) if setup.C else a["k"]
    values = np.concatenate([a["v"], a["cv"]], 1) if setup.C else a["v"]
    o, lse = np.zeros(do.shape), np.full(dlse.shape, -np.inf)
    dq, dk, dv = np.zeros_like(a["q"]), np.zeros_like(keys), np.zeros_like(values)
    for b in range(setup.B):
        for h in range(setup.K):
            for t in range(setup.T):
                at = sees(setup, a, b, h, setup.U - setup.T + t)
                if len(at) == 0:
                    continue
                for n in range(h * setup.G, (h + 1) * setup.G):
                    logits = scale * keys[b, at, h] @ a["q"][b, t, n]
                    lse[b, t, n] = np.log(np.sum(np.exp(logits - logits.max()))) + logits.max()
                    p = np.exp(logits - lse[b, t, n])
                    o[b, t, n] = p @ values[b, at, h]
                    dp = values[b, at, h] @ do[b, t, n]
                    dlogits = scale * p * (dp - p @ dp + dlse[b, t, n])
                    dq[b, t, n] = dlogits @ keys[b, at, h]
                    dk[b, at, h] += np.outer(dlogits, a["q"][b, t, n])
                    dv[b, at, h] += np.outer(p, do[b, t, n])
    U = setup.U
    gradients = dict(q=dq, k=dk[:, :U], v=dv[:, :U], s=np.sum(dv[:, :U] * a["v"], -1))
    return dict(o=o, lse=lse), gradients | (dict(ck=dk[:, U:], cv=dv[:, U:]) if setup.C else {})


DIFFERENTIABLE = ("q", "k", "v", "s", "ck", "cv")
FLOATS = ("q", "k", "v", "ck", "cv")


def dtype_for(implementation: str) -> str:
    """float32, or the widest that the implementation takes."""
    return "bfloat16" if implementation == "pallas" else "float32"


def rounded(a: dict, dtype: str) -> dict:
    """The arguments as the operation gets them: in ``dtype`` where that is free."""
    return {name: np.asarray(jnp.asarray(x, dtype) if name in FLOATS else x) for name, x in a.items()}


def widened(a: dict) -> dict:
    return {name: x.astype(np.float32) if name in FLOATS else x for name, x in a.items()}


def call(setup: Setup, a: dict, implementation: str, **options):
    columns = Columns(a["ck"], a["cv"], a["position"], a["until"]) if "ck" in a else None
    return window_attention(
        a["q"],
        a["k"],
        a["v"],
        a.get("s"),
        window=setup.window,
        expiry=a.get("expiry"),
        columns=columns,
        segment_ids=a.get("segment_ids"),
        implementation=implementation,
        **options,
    )


def with_gradients(setup: Setup, a: dict, do, dlse, implementation: str, runs: int = 1, **options) -> tuple[dict, dict]:
    """o, lse and all gradients from one compiled program; it must give the same bits ``runs`` times."""

    @jax.jit
    def program(a, do, dlse):
        fixed = {name: x for name, x in a.items() if name not in DIFFERENTIABLE}
        moving = {name: x for name, x in a.items() if name in DIFFERENTIABLE}
        (o, lse), vjp = jax.vjp(
            lambda moving: call(setup, moving | fixed, implementation, return_lse=True, **options), moving
        )
        return dict(o=o, lse=lse), vjp((do, dlse))[0]

    arguments = jax.tree.map(jnp.asarray, (a, do, dlse))
    first, *others = (jax.tree.map(np.asarray, program(*arguments)) for _ in range(runs))
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, first, other)
    return first


def cotangents(setup: Setup, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (setup.B, setup.T, setup.K * setup.G)
    return rng.normal(size=(*shape, setup.V)).astype(np.float32), rng.normal(size=shape).astype(np.float32)


@pytest.fixture
def small_blocks(monkeypatch):
    """Makes the XLA form walk many blocks at small sizes; kernels for a GPU have tiles of their own."""
    monkeypatch.setattr(xla, "BLOCK", 16)
    monkeypatch.setattr(xla, "DENSE_LIMIT", 0)


def compare(actual: tuple[dict, dict], expected: tuple[dict, dict], dtype: str = "float32") -> None:
    (values, gradients), (true_values, true_gradients) = actual, expected
    assert_close(values["o"], true_values["o"], "window_attention", dtype)
    seen = np.isfinite(true_values["lse"])
    assert (values["lse"][~seen] == -np.inf).all() and (values["o"][~seen] == 0).all()
    assert_close(values["lse"][seen], true_values["lse"][seen], "window_attention", dtype)
    assert gradients.keys() == true_gradients.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, true_gradients[name], "window_attention gradient", dtype)


def check_rounded(
    setup: Setup, a: dict, dtype: str, implementation: str, runs: int = 1, scale: float | None = None
) -> tuple[dict, dict]:
    """Values and gradients in ``dtype``, held to the truth of the rounded inputs: only the operation's own rounding."""
    low, (do, dlse) = rounded(a, dtype), cotangents(setup)
    do = np.asarray(jnp.asarray(do, dtype))
    options = {} if scale is None else {"scale": scale}
    actual = with_gradients(setup, low, do, dlse, implementation, runs, **options)
    expected = truth(setup, widened(low), do.astype(np.float32), dlse, scale or setup.N**-0.5)
    compare(actual, expected, dtype)
    return actual


@pytest.mark.parametrize("name", SETUPS)
def test_rule(name, implementation):
    setup = SETUPS[name]
    check_rounded(setup, make(setup), dtype_for(implementation), implementation, runs=2, scale=0.7)


IN_BLOCKS = ("window of one", "full", "full over a prefix", "one head keeps all", "everything kept", "all at once")


@pytest.mark.rotating(3)
@pytest.mark.parametrize("name", IN_BLOCKS)
def test_rule_in_blocks(name, small_blocks):
    setup = SETUPS[name]
    a, d = make(setup), cotangents(setup)
    compare(with_gradients(setup, a, *d, "xla", runs=2), truth(setup, a, *d, setup.N**-0.5))


def test_reference_follows_the_rule():
    setup = SETUPS["all at once"]
    a, d = make(setup), cotangents(setup)

    def reference(moving):
        columns = Columns(moving["ck"], moving["cv"], a["position"], a["until"])
        rest = dict(window=setup.window, expiry=a["expiry"], columns=columns, segment_ids=jnp.asarray(a["segment_ids"]))
        return xla.reference(moving["q"], moving["k"], moving["v"], moving["s"], **rest)

    @jax.jit
    def program(moving, d):
        (o, lse), vjp = jax.vjp(reference, moving)
        return dict(o=o, lse=lse), vjp(d)[0]

    actual = jax.tree.map(np.asarray, program({name: a[name] for name in DIFFERENTIABLE}, d))
    compare(actual, truth(setup, a, *d, setup.N**-0.5))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision(dtype, implementation):
    setup = Setup(150, 161, 37, C=11, expiry="some", N=16, V=16, B=1)
    values, gradients = check_rounded(setup, make(setup), dtype, implementation)
    assert values["o"].dtype == dtype and values["lse"].dtype == np.float32 and gradients["s"].dtype == np.float32
    assert all(gradients[name].dtype == dtype for name in FLOATS)


def test_packed_equals_alone(implementation):
    """Documents in one row, padding around them full of large numbers, against each document in a row of its own."""
    lengths, gaps, W = (13, 21), (3, 5, 2), 4
    U = sum(lengths) + sum(gaps)
    setup, dtype = Setup(U, U, W, expiry="until", B=1), dtype_for(implementation)
    a, (do, dlse) = make(setup), cotangents(setup)
    starts = (gaps[0], gaps[0] + lengths[0] + gaps[1])
    ids = np.zeros((1, U), np.int32)
    for n, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        ids[:, start : start + length] = 3 - n
    padding = ids[0] == 0
    for name in ("q", "k", "v", "s"):
        a[name][:, padding] = 1e4
    a, do = rounded(a, dtype), np.asarray(jnp.asarray(do, dtype))
    packed, gradients = with_gradients(setup, a | dict(segment_ids=ids), do, dlse, implementation)
    assert all((x[:, padding] == 0).all() for x in (packed["o"], *gradients.values()))
    assert (packed["lse"][:, padding] == -np.inf).all()
    for start, length in zip(starts, lengths, strict=True):
        part = slice(start, start + length)
        alone = {name: x[:, part] for name, x in a.items()}
        alone["expiry"] = np.maximum(alone["expiry"] - start, 0)
        own = dataclasses.replace(setup, T=length, U=length)
        expected = with_gradients(own, alone, do[:, part], dlse[:, part], implementation)
        actual = jax.tree.map(lambda x, part=part: x[:, part], (packed, gradients))
        compare(actual, expected, dtype)


def test_continues_from_columns(implementation):
    """The second part of a sequence over a window's history and a store is what the whole sequence gives there."""
    T, U, W, cut = 23, 50, 6, 27
    whole, dtype = Setup(U, U, W, expiry="until"), dtype_for(implementation)
    a = rounded(make(whole), dtype)
    expected = jax.jit(lambda a: call(whole, a, implementation))(a)[:, cut:]
    keep = slice(cut - W + 1, None)  # the history that the window still needs, then the new tokens
    second = {name: x[:, keep] for name, x in a.items() if name != "q"} | dict(q=a["q"][:, cut:])
    shift = cut - W + 1
    second["expiry"] = np.maximum(second["expiry"] - shift, 0)
    position = np.broadcast_to(np.arange(shift, dtype=np.int32)[None, :, None] - shift, a["expiry"][:, :shift].shape)
    until = np.maximum(a["expiry"][:, :shift] - shift, 0)
    second |= dict(ck=a["k"][:, :shift], cv=a["v"][:, :shift], position=position, until=until)
    setup = dataclasses.replace(whole, T=T, U=U - shift, C=shift)
    assert_close(jax.jit(lambda a: call(setup, a, implementation))(second), expected, "window_attention", dtype)


@pytest.mark.parametrize("kept", [0.0, 0.02])
def test_long_sequence_takes_linear_memory(kept):
    """16,384 tokens forward and backward; temporaries double with T, and a few rows are checked by hand."""
    W, N = 64, 8

    def build(T):
        rng = np.random.default_rng(2)
        q, k, v = (jnp.asarray(rng.normal(size=(1, T, h, N)), jnp.float32) for h in (2, 1, 1))
        expiry = jnp.asarray(np.where(rng.random((1, T, 1)) < kept, NEVER, 0), jnp.int32) if kept else None
        weights = jnp.asarray(rng.normal(size=q.shape), jnp.float32)

        def loss(q, k, v):
            o = window_attention(q, k, v, window=W, expiry=expiry, implementation="xla")
            return jnp.sum(o * weights), o

        program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)).lower(q, k, v).compile()
        return program, (q, k, v), expiry, program.memory_analysis().temp_size_in_bytes

    half = build(8192)[3]
    program, (q, k, v), expiry, temporaries = build(16384)
    assert temporaries < 2.1 * half and temporaries < 16384 * 8 * 4 * 40
    (_, o), gradients = program(q, k, v)
    assert all(np.isfinite(x).all() and np.abs(x).max() > 0 for x in gradients)
    for i in (0, 63, 64, 10007, 16383):
        seen = np.arange(max(0, i - W + 1), i + 1)
        if expiry is not None:
            seen = np.union1d(seen, np.flatnonzero(np.asarray(expiry)[0, : i + 1, 0]))
        logits = np.asarray(q, np.float64)[0, i] @ np.asarray(k, np.float64)[0, seen, 0].T * N**-0.5
        p = np.exp(logits - logits.max(-1, keepdims=True))
        expected = p / p.sum(-1, keepdims=True) @ np.asarray(v, np.float64)[0, seen, 0]
        assert_close(o[0, i], expected, "window_attention")


def test_vmap(implementation, small_blocks):
    """Over values and gradients, with one argument that is not mapped."""
    setup, dtype = SETUPS["columns of packed rows"], dtype_for(implementation)
    many = [jax.tree.map(jnp.asarray, rounded(make(setup, seed), dtype)) for seed in range(3)]
    shared = {name: many[0][name] for name in ("segment_ids", "k")}
    mapped = [{name: x for name, x in a.items() if name not in shared} for a in many]

    def loss(q, rest):
        return jnp.sum(jnp.sin(call(setup, rest | shared | dict(q=q), implementation).astype(jnp.float32)))

    gradient = jax.jit(jax.grad(loss))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *mapped)
    actual = jax.jit(jax.vmap(jax.grad(loss)))(stacked["q"], stacked)
    assert_close(actual, jnp.stack([gradient(a["q"], a) for a in mapped]), "window_attention gradient", dtype)


def test_vmap_folds_into_the_batch(monkeypatch):
    """A backend without a vmap rule sees the mapped axis as part of B."""
    seen = []
    backend = types.ModuleType("backend")
    backend.FOLD_VMAP = True
    backend.backward = xla.backward

    def forward(case, operands):
        seen.append((case.B, operands.q.shape[0]))
        return xla.forward(case, operands)

    backend.forward = forward
    monkeypatch.setattr(api, "OPERATION", types.SimpleNamespace(select=lambda implementation, case: backend))
    setup = SETUPS["window"]
    many = [jax.tree.map(jnp.asarray, make(setup, seed)) for seed in range(3)]
    loss = lambda a: jnp.sum(jnp.sin(call(setup, a, None)))  # noqa: E731
    gradient = jax.jit(jax.grad(loss))
    expected = [gradient(a) for a in many]
    seen.clear()
    actual = jax.jit(jax.vmap(jax.grad(loss)))(jax.tree.map(lambda *x: jnp.stack(x), *many))
    assert (3 * setup.B, 3 * setup.B) in seen
    for name in ("q", "k", "v", "s"):
        assert_close(actual[name], jnp.stack([x[name] for x in expected]), "window_attention gradient")


def test_remat_can_save_the_forward_pass():
    setup = SETUPS["window"]
    a = jax.tree.map(jnp.asarray, make(setup))

    def products(policy):
        loss = jax.checkpoint(lambda q: jnp.sum(jnp.sin(call(setup, a | dict(q=q), "xla"))), policy=policy)
        return str(jax.make_jaxpr(jax.grad(loss))(a["q"])).count("dot_general")

    names = jax.checkpoint_policies.save_only_these_names("window_attention_out", "window_attention_residual")
    assert (products(None), products(names)) == (9, 7)  # 2 forward, 5 backward, and 2 if the forward pass runs again
