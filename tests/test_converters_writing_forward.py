"""The numpy forward pass against transformers, on two-layer random towers."""

from __future__ import annotations

import numpy as np
import pytest

from converters.checkpoint import ProjectorSpec, TowerSpec
from converters.forward import erf, image_rows
from converters.tensors import ArrayTensor
from edgemed.core.images import ImagePreparation, normalise
from edgemed.core.probe import probe_pixels, relative_l2

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WIDTH = 40


def tensors_of(module):
    return {
        name.removeprefix("vision_model."): ArrayTensor(name, value.detach().numpy().astype(np.float32))
        for name, value in module.state_dict().items()
    }


def tower_of(kind, activation, layers, **choices):
    torch.manual_seed(3)
    common = dict(
        hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4, image_size=30, patch_size=7, hidden_act=activation
    )
    if kind == "clip":
        model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**common))
    else:
        model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**common, vision_use_head=False))
    model.eval()
    for parameter in model.parameters():  # transformers starts biases at zero and norms at one
        parameter.data += torch.randn_like(parameter) * 0.2
    spec = TowerSpec(kind, layers, 32, 56, 4, 30, 7, model.config.layer_norm_eps, activation, tensors_of(model), **choices)
    return model, spec


def projector_of(kind):
    torch.manual_seed(4)
    modules = (
        [torch.nn.Linear(32, WIDTH)] if kind == "linear" else [torch.nn.Linear(32, WIDTH), torch.nn.GELU(), torch.nn.Linear(WIDTH, WIDTH)]
    )
    model = torch.nn.Sequential(*modules)
    names = {"0": "linear_1", "2": "linear_2"}
    tensors = {f"{names[k[0]]}.{k[2:]}": ArrayTensor(k, v.numpy()) for k, v in model.state_dict().items()}
    return model, ProjectorSpec(kind, tensors)


@pytest.mark.parametrize(
    ("kind", "activation", "layers", "choices", "first"),
    [
        ("clip", "quick_gelu", 2, {}, 1),
        ("clip", "quick_gelu", 3, {"keep_cls": True}, 0),
        ("clip", "gelu", 2, {"skip_first_token": True}, 2),
        ("siglip", "gelu_pytorch_tanh", 2, {}, 0),
        ("siglip", "gelu", 3, {"skip_first_token": True}, 1),
    ],
)
@pytest.mark.parametrize("projector_kind", ["linear", "mlp2x_gelu"])
def test_rows_equal_transformers(kind, activation, layers, choices, first, projector_kind):
    model, tower = tower_of(kind, activation, layers, **choices)
    head, projector = projector_of(projector_kind)
    image = ImagePreparation(size_px=30, mode="stretch", mean=(0.5, 0.4, 0.3), std=(0.3, 0.2, 0.1))
    pixels = probe_pixels(30)
    with torch.no_grad():
        hidden = model(torch.from_numpy(normalise(pixels, image))[None], output_hidden_states=True).hidden_states[layers]
        reference = head(hidden[0, first:]).numpy()
    rows = image_rows(tower, projector, pixels, image)
    assert rows.shape == reference.shape == (tower.image_tokens, WIDTH)
    assert relative_l2(rows, reference) < 1e-5


def test_erf_is_accurate():
    x = np.linspace(-6, 6, 4001, dtype=np.float32)
    assert np.abs(erf(x) - torch.erf(torch.from_numpy(x)).numpy()).max() < 5e-7
