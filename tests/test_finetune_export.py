"""Train, convert, run: the engine's logits on 50 validation items are the trainer's, adapters and a tuned tower included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="fine-tuning needs the train extra")

from converters.convert import convert  # noqa: E402
from converters.readers import open_checkpoint  # noqa: E402
from converters.recipes import Recipe as Types  # noqa: E402
from edgemed.core.conversation import render  # noqa: E402
from edgemed.core.images import load_image, normalise, prepare  # noqa: E402
from edgemed.core.probe import relative_l2  # noqa: E402
from edgemed.data import load_samples  # noqa: E402
from edgemed.finetune import stage  # noqa: E402
from edgemed.finetune.export import save_checkpoint  # noqa: E402
from edgemed.finetune.recipe import load_recipe  # noqa: E402
from runtimes.engine import Engine, prepare_image  # noqa: E402
from runtimes.messages import EngineSettings  # noqa: E402
from runtimes.prompt import IMAGE_TOKEN  # noqa: E402
from tests.finetune_fixture import save_data, save_model, write_recipe  # noqa: E402

ITEMS = 50


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("extra", ["", "lora = { rank = 4, alpha = 8 }"], ids=["full", "lora"])
def test_nothing_is_lost_from_the_trainer_to_the_engine(tmp_path: Path, extra: str) -> None:
    model, data = save_model(tmp_path / "model"), save_data(tmp_path / "data")
    save_data(data, images=17, split="validate", seed=7)
    rates = "llm_rate = 1e-2\ntower_rate = 1e-3"
    config = write_recipe(tmp_path / "run.toml", model, data, steps=12, extra=extra, optim=rates)
    config.write_text(config.read_text().replace('save_dtype = "float32"', 'save_dtype = "float16"'))
    trained: list[Any] = []

    def save(recipe: Any, model: Any, tokenizer: Any, run: Any) -> None:
        model.eval()
        trained.append([logits_of(model, *item) for item in items(recipe, tokenizer, model)])
        save_checkpoint(recipe, model, tokenizer, run)

    samples = load_samples("llava", data, "validate")[:ITEMS]
    assert len(samples) == ITEMS

    def items(recipe: Any, tokenizer: Any, model: Any) -> list[tuple[list[int], Any]]:
        from edgemed.finetune.examples import encode

        tokens = (recipe.image.size_px // 8) ** 2
        template = stage.find_template(recipe.template)
        out = []
        for sample in samples:
            ids, _ = encode(tokenizer, template, sample.turns, model.config.image_token_id, tokens)
            out.append((ids, normalise(prepare(load_image(sample.image), recipe.image), recipe.image)))
        return out

    out = stage.train(load_recipe("vqa", config), save=save)
    artifact = convert(open_checkpoint(out), tmp_path / "gguf", Types.of(bits=16))
    distances = []
    with Engine.open(artifact, EngineSettings(context_tokens=512, threads=1)) as engine:
        for sample, right in zip(samples, trained[0], strict=True):
            segments = render(artifact.manifest.template, sample.turns)
            logits = engine.evaluate(segments, [prepare_image(artifact, sample.image)])
            text = [i for i in engine.tokenize(segments)]
            after = len(text) - 1 - text.index(IMAGE_TOKEN)
            vocab = min(logits.shape[1], right.shape[1])
            distances.append(relative_l2(logits[-after:, :vocab], right[-after:, :vocab]))
    assert len(distances) == ITEMS
    assert max(distances) <= 5e-3


def logits_of(model: Any, ids: list[int], pixels: Any) -> np.ndarray:
    """float32 [tokens, vocab], by the model as it was trained, its adapters beside its weights."""
    with torch.no_grad():
        out = model(input_ids=torch.tensor([ids]), pixel_values=torch.from_numpy(pixels)[None])
    return np.asarray(out.logits[0].float().numpy())
