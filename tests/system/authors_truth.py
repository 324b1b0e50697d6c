"""The authors' models in plain float64 numpy, from a folder's own names and shapes: a second opinion on any folder.

One row at a time and without padding, one head and one token at a time where that is plainer; nothing of the project
is used. It reads what the authors' layers read (``fla/layers/{gated_deltanet,attn,lte,nsa}.py``) and computes their
evaluation without a cache (``forward``), with one (``decode``: a query of the prompt sees what the store holds at the
prompt's end, a later one what it holds then), and their training loss with its exact derivative (``derivative``).

Derivatives are taken by a complex step: f(x + i h d) = f(x) + i h f'(x) d, with h so small that nothing is rounded
away. So every function here works on complex numbers, and decides (maxima, order, selections) by real parts.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

QK_NORM_EPS = 1e-5


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def rms(x, weight, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def softmax(x):
    e = np.exp(x - x.real.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rotate(x, theta):
    """[T, heads, N] by position, first half with second half."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None, None] * theta ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], -1)


class Layer:
    """The tensors of one layer's mixer."""

    def __init__(self, tensors, number):
        self.tensors, self.prefix = tensors, f"model.layers.{number}.attn."

    def __call__(self, name):
        return self.tensors[self.prefix + name]

    def linear(self, name, x):
        y = x @ self(f"{name}.weight").T
        return y + self(f"{name}.bias") if self.prefix + f"{name}.bias" in self.tensors else y

    def heads(self, name, x, count):
        return self.linear(name, x).reshape(len(x), count, -1)


def gated_deltanet(layer, x, config):
    K = config["num_heads"]
    hybrid = config["model_type"] == "hybrid_gated_deltanet"
    H = K if hybrid else config.get("num_v_heads") or K

    def mixed(name):
        y = layer.linear(f"{name}_proj", x)
        if config["use_short_conv"]:
            weight = layer(f"{name}_conv1d.weight")[:, 0]
            taps = weight.shape[1]
            padded = np.concatenate([np.zeros((taps - 1, y.shape[1])), y])
            y = sum(padded[i : i + len(y)] * weight[:, i] for i in range(taps))
        return silu(y)

    q, k = (mixed(name).reshape(len(x), K, -1) for name in "qk")
    v = mixed("v").reshape(len(x), H, -1)
    q, k = (y / np.sqrt((y**2).sum(-1, keepdims=True) + 1e-6) for y in (q, k))
    q, k = (np.repeat(y, H // K, axis=1) for y in (q * q.shape[-1] ** -0.5, k))
    beta = sigmoid(layer.linear("b_proj", x)) * (2 if not hybrid and config.get("allow_neg_eigval") else 1)
    g = -np.exp(layer("A_log")) * np.log1p(np.exp(layer.linear("a_proj", x) + layer("dt_bias")))
    state, out = np.zeros((H, q.shape[-1], v.shape[-1]), v.dtype), np.zeros_like(v)
    for t in range(len(x)):
        state *= np.exp(g[t])[:, None, None]
        update = beta[t][:, None] * (v[t] - np.einsum("hnv,hn->hv", state, k[t]))
        state += k[t][:, :, None] * update[:, None]
        out[t] = np.einsum("hnv,hn->hv", state, q[t])
    out = rms(out, layer("o_norm.weight"), config["norm_eps"])
    if config["use_gate"]:
        out = out * silu(layer.heads("g_proj", x, H))
    return layer.linear("o_proj", out.reshape(len(x), -1))


def attend(q, k, v, visible):
    """Queries [T, H, N] over keys [T, K, N], where ``visible`` [K, T, T] is true."""
    group, out = q.shape[1] // k.shape[1], np.zeros((*q.shape[:2], v.shape[-1]), v.dtype)
    for h in range(q.shape[1]):
        logits = q[:, h] @ k[:, h // group].T * q.shape[-1] ** -0.5
        out[:, h] = softmax(np.where(visible[h // group], logits, -np.inf)) @ v[:, h // group]
    return out


def projections(layer, x, attn):
    K = attn.get("num_kv_heads") or attn["num_heads"]
    return layer.heads("q_proj", x, attn["num_heads"]), layer.heads("k_proj", x, K), layer.heads("v_proj", x, K)


def attention(layer, x, attn):
    q, k, v = projections(layer, x, attn)
    if attn.get("qk_norm"):
        q, k = (rms(y, layer(f"{name}_norm.weight"), QK_NORM_EPS) for name, y in (("q", q), ("k", k)))
    q, k = (rotate(y, attn["rope_theta"]) for y in (q, k))
    back = np.subtract.outer(np.arange(len(x)), np.arange(len(x)))
    visible = (back >= 0) & (back < (attn.get("window_size") or len(x)))
    out = attend(q, k, v, np.broadcast_to(visible, (k.shape[1], *visible.shape)))
    return layer.linear("o_proj", out.reshape(len(x), -1))


def router(layer, features, attn):
    """Scores [T, K] of features [T, K, 2N]: convolutions that halve the channels, centred and padded with zeros."""
    T, K, _ = features.shape
    scores = np.zeros((T, K), features.dtype)
    groups = K if attn["routing_shared"] == "head" else 1
    for head in range(K):
        y = features[:, head]
        group = head % groups
        for number, (taps, dilation) in enumerate(zip(attn["conv_size"], attn["conv_dilation"], strict=True)):
            weight = layer(f"router.conv_stack.convs.{number}.weight")[:, :, 0]
            size = len(weight) // groups
            weight = weight[group * size : (group + 1) * size]
            bias = layer(f"router.conv_stack.convs.{number}.bias")[group * size : (group + 1) * size]
            side = (taps - 1) * dilation // 2
            padded = np.pad(y, ((side, side), (0, 0)))
            y = silu(bias + sum(padded[i * dilation : i * dilation + T] @ weight[:, :, i].T for i in range(taps)))
        z = y @ layer("router.conv_stack.proj.weight")[group, :, 0, 0] + layer("router.conv_stack.proj.bias")[group]
        scores[:, head] = z * (z.real > 0) if attn["routing_method"] == "relu" else sigmoid(z) - 0.5
    return scores


def reach(attn):
    """Tokens on each side that a score depends on."""
    return sum(
        (taps - 1) * dilation // 2 for taps, dilation in zip(attn["conv_size"], attn["conv_dilation"], strict=True)
    )


def kept(scores, before, attn):
    """The tokens before ``before`` that one head keeps: sinks, and the best of those that were selected."""
    M, Z = attn["buffer_size"], attn["sink_size"]
    chosen = [j for j in range(Z, before) if scores[j] > 0]
    return set(range(Z)) | set(sorted(chosen, key=lambda j: -scores[j])[: M - Z])


def lte(layer, x, attn, mode):
    """``mode``: the length of the prompt, or "train" (no budget; the gradient of a score is that of v's length)."""
    T, W = len(x), attn["window_size"]
    q, k, v = projections(layer, x, attn)
    features = np.concatenate([k, v], -1)
    scores = router(layer, features if attn.get("routing_grad", True) else features.real.astype(features.dtype), attn)
    visible = np.zeros((k.shape[1], T, T), bool)
    for head in range(k.shape[1]):
        r = scores[:, head].real
        for i in range(T):
            if mode == "train":
                seen = set(range(attn["sink_size"])) | {j for j in range(T) if r[j] > 0}
            else:
                seen = kept(r, max(i + 1, mode) - W - 1, attn)
            visible[head, i, [j for j in range(i + 1) if i - j <= W or j in seen]] = True
    if mode == "train":
        v = v * (1 + scores - scores.real)[..., None]
    q, k = (rotate(y, attn["rope_theta"]) for y in (q, k))
    return layer.linear("o_proj", attend(q, k, v, visible).reshape(T, -1)), scores


def nsa(layer, x, attn):
    T, S = len(x), attn["block_size"]
    q, k, v = projections(layer, x, attn)
    q, k = (rotate(y, attn["rope_theta"]) for y in (q, k))
    gates = sigmoid(layer.linear("g_proj", x)).reshape(T, q.shape[1], 3)
    group, out = q.shape[1] // k.shape[1], np.zeros((T, q.shape[1], v.shape[-1]), v.dtype)
    for t, head in np.ndindex(T, k.shape[1]):
        queries = slice(head * group, (head + 1) * group)
        rows, gate = q[t, queries] * q.shape[-1] ** -0.5, gates[t, queries]
        whole, own = (t + 1) // S, t // S
        importance = np.zeros(own + 1)
        if whole:
            means = [y[: whole * S, head].reshape(whole, S, -1).mean(1) for y in (k, v)]
            weights = softmax(rows @ means[0].T)
            out[t, queries] += gate[:, :1] * (weights @ means[1])
            importance[:whole] = weights.sum(0).real
        for forced in (0, own - 1, own):
            if forced >= 0:
                importance[forced] = group
        chosen = np.argsort(-importance, kind="stable")[: attn["block_counts"]]
        for branch, keys in (
            (1, [j for j in range(t + 1) if j // S in chosen]),
            (2, range(max(0, t + 1 - attn["window_size"]), t + 1)),
        ):
            keys = list(keys)
            weights = softmax(rows @ k[keys, head].T)
            out[t, queries] += gate[:, branch : branch + 1] * (weights @ v[keys, head])
    return layer.linear("o_proj", out.reshape(T, -1))


def read(folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Settings and weights."""
    tensors = load_file(folder / "model.safetensors")
    return json.loads((folder / "config.json").read_text()), {
        name: value.astype(np.float64) for name, value in tensors.items()
    }


def forward(folder: Path, ids: np.ndarray) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Logits [T, L] of one row, and LTE's scores [T, K] by layer."""
    return run(*read(folder), ids, len(ids))


def decode(folder: Path, ids: np.ndarray, prompt: int) -> np.ndarray:
    """Logits [T, L] of one row whose first ``prompt`` tokens are read at once and the others one by one."""
    return run(*read(folder), ids, prompt)[0]


def run(config, tensors, ids, mode):
    """``mode`` as in ``lte``; the other layers do not distinguish."""
    eps, kind, scores = config["norm_eps"], config["model_type"], {}
    x = tensors["model.embeddings.weight"][ids]
    for number in range(config["num_hidden_layers"]):
        layer, prefix = Layer(tensors, number), f"model.layers.{number}."
        h = rms(x, tensors[prefix + "attn_norm.weight"], eps)
        attn = config.get("attn")
        if kind in ("transformer", "nsa"):
            y = (attention if kind == "transformer" else nsa)(layer, h, config)
        elif attn is None or number not in attn["layers"]:
            y = gated_deltanet(layer, h, config)
        elif attn.get("attn_type", "attn") == "lte":
            y, scores[number] = lte(layer, h, attn, mode)
        else:
            y = (nsa if attn.get("attn_type") == "nsa" else attention)(layer, h, {**attn, "qk_norm": False})
        x = x + y
        h = rms(x, tensors[prefix + "mlp_norm.weight"], eps)
        gate, up = (h @ tensors[f"{prefix}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (silu(gate) * up) @ tensors[prefix + "mlp.down_proj.weight"].T
    head = "model.embeddings.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return rms(x, tensors["model.norm.weight"], eps) @ tensors[head].T, scores


def loss(config, tensors, ids, penalty):
    """Cross-entropy of the next token, and the mean of penalty[layer, head] * relu(score) without the last tokens."""
    logits, scores = run(config, tensors, ids, "train")
    rows, targets = logits[:-1], ids[1:]
    shifted = rows - rows.real.max(-1, keepdims=True)
    total = np.mean(np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(len(rows)), targets])
    if scores:
        counted = [r[: -reach(config["attn"])] * (r[: -reach(config["attn"])].real > 0) for r in scores.values()]
        total = total + np.mean(np.stack(counted) * penalty[:, None])
    return total


def derivative(folder: Path, ids: np.ndarray, penalty: np.ndarray, direction: dict[str, np.ndarray]):
    """(the training loss, its derivative along ``direction`` of the weights)."""
    config, tensors = read(folder)
    step = 1e-30
    moved = {name: value + 1j * step * direction.get(name, 0.0) for name, value in tensors.items()}
    found = loss(config, moved, ids, penalty)
    return found.real, found.imag / step
