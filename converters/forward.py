"""The right embedding of an image, computed in numpy from the source weights: what the parity certificate is made of.

    rows = image_rows(tower, projector, pixels, image)          # float32 [image_tokens, width of the LLM]

fp32, one layer's weights in memory at a time, with the source's own activations (exact GELU where it says so). It follows
transformers' CLIPVisionModel and SiglipVisionModel up to hidden_states[layers] (before any post-layernorm) and then the projector.
Knows nothing of GGUF; slow beside llama.cpp and meant for one probe image.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from converters.checkpoint import F32, ProjectorSpec, Tensors, TensorSource, TowerSpec
from edgemed.core.images import ImagePreparation, normalise

# Feature rows and activations are worked on in slices of this many values, so that temporaries stay small.
_SLICE = 1 << 18


def image_rows(
    tower: TowerSpec,
    projector: ProjectorSpec,
    pixels: NDArray[np.uint8],
    image: ImagePreparation,
    *,
    activation: str | None = None,
    after_layer: Callable[[], None] | None = None,
) -> F32:
    """uint8 [size, size, 3] → the rows that the LLM is to see, in order.

    CLS comes first where it is kept and is dropped where not; `skip_first_token` drops the first row. `activation` runs the tower
    with another activation than its own, to measure what that changes. `after_layer` is called once a layer, for a progress bar.
    """
    x = _embed(tower, normalise(pixels, image))
    act = ACTIVATIONS[activation or tower.activation]
    for i in range(tower.layers):
        x = _layer(x, tower, f"encoder.layers.{i}.", act)
        if after_layer:
            after_layer()
    if tower.kind == "clip" and not tower.keep_cls:
        x = x[1:]
    if tower.skip_first_token:
        x = x[1:]
    return _project(x, projector)


def _read(tensors: Tensors, name: str) -> F32:
    source: TensorSource = tensors[name]
    return source.read(0, source.shape[0])


def _linear(x: F32, tensors: Tensors, name: str) -> F32:
    out: F32 = x @ _read(tensors, f"{name}.weight").T
    if f"{name}.bias" in tensors:
        out += _read(tensors, f"{name}.bias")
    return out


def _norm(x: F32, tensors: Tensors, name: str, eps: float) -> F32:
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = np.square(centred).mean(axis=-1, keepdims=True)
    out: F32 = centred / np.sqrt(variance + np.float32(eps)) * _read(tensors, f"{name}.weight") + _read(tensors, f"{name}.bias")
    return out


def _embed(tower: TowerSpec, x: F32) -> F32:
    """[3, size, size] → [patches (+ 1), hidden]: a convolution whose stride is its kernel is a product of flattened patches."""
    p, n = tower.patch_size_px, tower.image_size_px // tower.patch_size_px
    patches = x[:, : n * p, : n * p].reshape(3, n, p, n, p).transpose(1, 3, 0, 2, 4).reshape(n * n, 3 * p * p)
    out = patches @ _read(tower.tensors, "embeddings.patch_embedding.weight").reshape(tower.hidden, -1).T
    if tower.kind == "siglip":
        out += _read(tower.tensors, "embeddings.patch_embedding.bias")
    else:
        out = np.concatenate([_read(tower.tensors, "embeddings.class_embedding").reshape(1, -1), out])
    out += _read(tower.tensors, "embeddings.position_embedding.weight")
    return out if tower.kind == "siglip" else _norm(out, tower.tensors, "pre_layrnorm", tower.norm_eps)


def _layer(x: F32, tower: TowerSpec, prefix: str, act: Callable[[F32], F32]) -> F32:
    x = x + _attention(_norm(x, tower.tensors, f"{prefix}layer_norm1", tower.norm_eps), tower, f"{prefix}self_attn.")
    hidden = _linear(_norm(x, tower.tensors, f"{prefix}layer_norm2", tower.norm_eps), tower.tensors, f"{prefix}mlp.fc1")
    _apply(act, hidden)
    return x + _linear(hidden, tower.tensors, f"{prefix}mlp.fc2")


def _attention(x: F32, tower: TowerSpec, prefix: str) -> F32:
    n, d = x.shape[0], tower.hidden // tower.heads
    q, k, v = (_linear(x, tower.tensors, f"{prefix}{part}_proj") for part in "qkv")
    out = np.empty_like(x)
    for head in range(tower.heads):
        span = slice(head * d, (head + 1) * d)
        scores = (q[:, span] * np.float32(d**-0.5)) @ k[:, span].T
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        out[:, span] = scores @ v[:, span]
    return _linear(out.reshape(n, -1), tower.tensors, f"{prefix}out_proj")


def _project(x: F32, projector: ProjectorSpec) -> F32:
    x = _linear(x, projector.tensors, "linear_1")
    if projector.kind == "linear":
        return x
    _apply(ACTIVATIONS[projector.activation], x)
    return _linear(x, projector.tensors, "linear_2")


def _apply(act: Callable[[F32], F32], x: F32) -> None:
    flat = x.reshape(-1)
    for start in range(0, flat.size, _SLICE):
        flat[start : start + _SLICE] = act(flat[start : start + _SLICE])


def erf(x: F32) -> F32:
    """erf to 1.5e-7 absolute: Abramowitz and Stegun, formula 7.1.26."""
    a = np.abs(x)
    t = 1 / (1 + np.float32(0.3275911) * a)
    series = np.zeros_like(a)
    for c in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = (series + np.float32(c)) * t
    out: F32 = np.copysign(1 - series * np.exp(-a * a), x)
    return out


def gelu(x: F32) -> F32:
    """x · Φ(x), as torch's nn.GELU()."""
    out: F32 = np.float32(0.5) * x * (1 + erf(x * np.float32(2**-0.5)))
    return out


def gelu_tanh(x: F32) -> F32:
    """The tanh form of GELU (Hendrycks and Gimpel), as ggml's."""
    out: F32 = np.float32(0.5) * x * (1 + np.tanh(np.float32((2 / np.pi) ** 0.5) * x * (1 + np.float32(0.044715) * x * x)))
    return out


def quick_gelu(x: F32) -> F32:
    """x · σ(1.702 x), written with tanh so that nothing overflows."""
    out: F32 = np.float32(0.5) * x * (1 + np.tanh(np.float32(0.851) * x))
    return out


ACTIVATIONS: dict[str, Callable[[F32], F32]] = {"gelu": gelu, "gelu_pytorch_tanh": gelu_tanh, "quick_gelu": quick_gelu}
