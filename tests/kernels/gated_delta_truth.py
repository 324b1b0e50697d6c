"""The gated delta rule and its gradients in numpy float64, derived by hand: the truth that the operation is held to."""

from __future__ import annotations

import numpy as np

NAMES = ("o", "final_state", "dq", "dk", "dv", "dg", "dbeta", "dinitial_state")


def _normalize(x):
    return x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def _normalize_gradient(x, dy):
    inverse = 1 / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + 1e-6)
    return inverse * dy - x * inverse**3 * np.sum(x * dy, axis=-1, keepdims=True)


def truth(q, k, v, g, beta, state, segment_ids=None, do=None, dstate=None, *, scale=None, normalize=True, rounded=None):
    """Every output, and every gradient for the cotangents ``do`` and ``dstate``, by name; "updates" besides.

    ``rounded`` is applied to v - S^T k and to dv at each token: what a recurrence of low precision would do to them.
    """
    rounded = rounded or (lambda x: x)
    q, k, v, g, beta, state = (np.asarray(x, np.float64) for x in (q, k, v, g, beta, state))
    (batch, tokens, kv_heads, size), heads = q.shape, v.shape[2]
    scale = size**-0.5 if scale is None else scale
    group = heads // kv_heads
    raw_q, raw_k = np.repeat(q, group, axis=2), np.repeat(k, group, axis=2)
    q, k = (_normalize(raw_q), _normalize(raw_k)) if normalize else (raw_q, raw_k)
    ids = np.ones((batch, tokens), int) if segment_ids is None else np.asarray(segment_ids)
    o, updates = np.zeros(v.shape), np.zeros(v.shape)
    current = np.zeros(batch, int)
    decayed, errors, resets = [], [], []
    after = []
    for t in range(tokens):
        live = ids[:, t] != 0
        reset = live & (current != 0) & (ids[:, t] != current)
        current = np.where(live, ids[:, t], current)
        state = np.where(reset[:, None, None, None], 0.0, state)
        alive = live[:, None]
        before = state * np.exp(np.where(alive, g[:, t], 0.0))[..., None, None]
        error = rounded(v[:, t] - np.einsum("bhnv,bhn->bhv", before, k[:, t]))
        updates[:, t] = np.where(alive, beta[:, t], 0.0)[..., None] * error
        state = before + k[:, t][..., None] * updates[:, t][..., None, :]
        o[:, t] = np.where(alive[..., None], scale * np.einsum("bhnv,bhn->bhv", state, q[:, t]), 0.0)
        decayed.append(before), errors.append(error), resets.append(reset), after.append(state)
    results = {"o": o, "final_state": state, "updates": updates}
    if do is None:
        return results

    do, ds = np.asarray(do, np.float64), np.asarray(dstate, np.float64)
    dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    dg, dbeta = np.zeros(g.shape), np.zeros(g.shape)
    for t in reversed(range(tokens)):
        alive = (ids[:, t] != 0)[:, None]
        dot = np.where(alive[..., None], do[:, t], 0.0) * scale
        rate = np.where(alive, beta[:, t], 0.0)[..., None]
        ds = ds + q[:, t][..., None] * dot[..., None, :]
        dq[:, t] = np.einsum("bhnv,bhv->bhn", after[t], dot)
        du = np.einsum("bhnv,bhn->bhv", ds, k[:, t])
        dbeta[:, t] = np.where(alive, np.sum(du * errors[t], axis=-1), 0.0)
        dv[:, t] = rounded(rate * du)
        dk[:, t] = np.einsum("bhnv,bhv->bhn", ds, updates[:, t]) - np.einsum("bhnv,bhv->bhn", decayed[t], dv[:, t])
        ds = ds - k[:, t][..., None] * dv[:, t][..., None, :]
        dg[:, t] = np.where(alive, np.sum(ds * decayed[t], axis=(-2, -1)), 0.0)
        ds = ds * np.exp(np.where(alive, g[:, t], 0.0))[..., None, None]
        ds = np.where(resets[t][:, None, None, None], 0.0, ds)
    if normalize:
        dq, dk = _normalize_gradient(raw_q, dq), _normalize_gradient(raw_k, dk)
    by_key = (batch, tokens, kv_heads, group, size)
    dq, dk = dq.reshape(by_key).sum(3), dk.reshape(by_key).sum(3)
    return results | dict(zip(NAMES[2:], (dq, dk, dv, dg, dbeta, ds), strict=True))
