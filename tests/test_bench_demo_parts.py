"""The demo's parts: what a training leaves, and what ships of it, are the same model."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="fine-tuning needs the train extra")

from bench.demo_parts import ADAPTER, VISION, load_parts, save_parts  # noqa: E402
from converters.adapters import save_gguf_adapter  # noqa: E402
from converters.convert import convert  # noqa: E402
from converters.readers import open_checkpoint  # noqa: E402
from converters.recipes import Recipe as Conversion  # noqa: E402
from edgemed.finetune import run_stage  # noqa: E402
from edgemed.finetune.model import load_model  # noqa: E402
from edgemed.finetune.recipe import load_recipe  # noqa: E402
from tests.finetune_fixture import save_data, save_model, write_recipe  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


def test_what_ships_has_the_tensors_of_the_training_under_the_training_s_names(tmp_path: Path) -> None:
    from peft import set_peft_model_state_dict

    model, data = save_model(tmp_path / "model"), save_data(tmp_path / "data")
    lora, rates = "lora = { rank = 4, alpha = 8 }", "llm_rate = 1e-2\ntower_rate = 1e-3"
    config = write_recipe(tmp_path / "vqa.toml", model, data, steps=3, extra=lora, optim=rates)
    out = run_stage("vqa", config)
    shipped = tmp_path / "shipped"
    artifact = convert(open_checkpoint(out), tmp_path / "artifact", Conversion.of(bits=16))
    shipped.mkdir()
    artifact.mmproj_path.rename(shipped / "mmproj.gguf")
    save_gguf_adapter(out / "adapter", shipped / "adapter.gguf", open_checkpoint(model).llm, quant="F32")

    recipe = load_recipe("vqa", config)
    begun, _ = load_model(recipe)
    adapter, vision = load_parts(shipped, begun)
    set_peft_model_state_dict(begun, adapter)
    rest = begun.get_base_model().load_state_dict(vision, strict=False)
    assert not rest.unexpected_keys and not [k for k in rest.missing_keys if "projector" in k or "layers.0" in k and "vision" in k]
    save_parts(tmp_path / "parts", begun, {})
    kept = load_parts(tmp_path / "parts", begun)
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {ADAPTER, VISION, "run.json"}
    assert kept[0].keys() == adapter.keys() and vision.keys() <= kept[1].keys()
    trained = dict(open_checkpoint(out).llm.tensors)
    name = "layers.0.self_attn.q_proj"
    a, b = (next(v for k, v in kept[0].items() if k.endswith(f"{name}.lora_{x}.weight")) for x in "AB")
    slot = next(key for key in trained if key.endswith(f"{name}.weight"))
    base = open_checkpoint(model).llm.tensors[slot]
    rows = base.shape[0]
    merged = torch.from_numpy(base.read(0, rows)) + 2 * b @ a
    assert torch.allclose(merged, torch.from_numpy(trained[slot].read(0, rows)), atol=1e-3)
    assert float((2 * b @ a).abs().max()) > 0.01, "it learnt something"
    for part in ("linear_1.weight", "layers.0.mlp.fc1.weight", "patch_embedding.weight"):
        learnt = next(v for k, v in vision.items() if k.endswith(part))
        before = next(v for k, v in load_model(recipe)[0].get_base_model().state_dict().items() if k.endswith(part))
        assert learnt.shape == before.shape and float((learnt - before).abs().max()) > 1e-4
