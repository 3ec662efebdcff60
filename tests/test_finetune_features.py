"""Cached features and what feeds a step: the same loss as with pixels, bounded disk, killed runs, broken images."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="fine-tuning needs the train extra")

from edgemed.core.conversation import TEMPLATES  # noqa: E402
from edgemed.core.errors import DatasetError, RecipeError, ResourceError  # noqa: E402
from edgemed.core.filelock import FileLock  # noqa: E402
from edgemed.core.images import ImagePreparation  # noqa: E402
from edgemed.data import Sample  # noqa: E402
from edgemed.finetune import features as features_module  # noqa: E402
from edgemed.finetune import run_stage  # noqa: E402
from edgemed.finetune.augment import normalise_pixels  # noqa: E402
from edgemed.finetune.examples import IGNORE, Broken, Collator, Examples  # noqa: E402
from edgemed.finetune.features import (  # noqa: E402
    FeatureCache,
    accept_features,
    tower_compute,
    tower_input,
    tower_key,
    tower_of,
)
from edgemed.finetune.pictures import BrokenImages, Pictures  # noqa: E402
from edgemed.finetune.trainer import split  # noqa: E402
from tests.checkpoints import make_checkpoint  # noqa: E402
from tests.test_finetune import weights, write_recipe  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
IMAGES = 5
Model = tuple[Any, Any, ImagePreparation]


@pytest.fixture(scope="module", params=["siglip", "clip"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(make_checkpoint(tmp_path_factory.mktemp(request.param), "hf", "smollm", request.param).source)


@pytest.fixture
def loaded(checkpoint: Path) -> Model:
    from transformers import AutoTokenizer, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    size = model.config.vision_config.image_size
    image = ImagePreparation(size_px=size, mode="pad", mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2))
    return model, AutoTokenizer.from_pretrained(checkpoint), image


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    out = []
    for i in range(IMAGES):
        path = tmp_path / f"{i}.png"
        Image.effect_noise((40, 30), 80).save(path)
        out.append(Sample.single(f"s{i}", path, "What is " + "very " * i + "dark?", "lung", "open"))
    return out


def build(loaded: Model, samples: list[Sample], **options: Any) -> Examples:
    model, tokenizer, image = loaded
    config = model.config.vision_config
    tokens = (config.image_size // config.patch_size) ** 2
    return Examples([(samples, 1)], tokenizer, TEMPLATES["chatml"], image, model.config.image_token_id, tokens, 2000, **options)


def loss(loaded: Model, rows: list[Any]) -> float:
    model, _, image = loaded
    batch = Collator(0)(rows)
    labels = batch.pop("labels")
    shown = tower_input(batch, lambda pixels: normalise_pixels(pixels, image, None))
    with torch.no_grad():
        logits = model(**batch, pixel_values=shown).logits
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE))


def open_cache(folder: Path, loaded: Model, rows: int = 100) -> FeatureCache:
    model, _, image = loaded
    one = FeatureCache.open(folder, model, image, 0).row_bytes
    return FeatureCache.open(folder, model, image, rows * one)


@pytest.mark.parametrize("fits", [100, 2, 0])
def test_cached_features_leave_the_loss_as_it_is(tmp_path: Path, loaded: Model, samples: list[Sample], fits: int) -> None:
    model, _, image = loaded
    plain = build(loaded, samples)
    expected = loss(loaded, [plain[i] for i in range(IMAGES)])
    cached = build(loaded, samples, preload_bytes=0)
    cache = open_cache(tmp_path / "cache", loaded, fits)
    assert cached.use_features(cache, tower_compute(model, image), batch=2) == max(0, IMAGES - fits)
    assert len(cache) == min(fits, IMAGES)
    accept_features(model)
    rows = [cached[i] for i in (3, 0, 4, 1, 2)]
    assert sum(picture is not None and picture.is_floating_point() for _, picture in rows) == min(fits, IMAGES)
    assert loss(loaded, rows) == pytest.approx(expected, rel=1e-6)
    assert loss(loaded, [plain[i] for i in range(IMAGES)]) == pytest.approx(expected, rel=1e-6)
    pieces = list(split(Collator(0)(rows), 3, model.config.image_token_id))
    whole, parts = run_tower(loaded, [Collator(0)(rows)]), run_tower(loaded, pieces)
    assert len(pieces) == 3 and torch.allclose(whole, parts, atol=1e-5)


def run_tower(loaded: Model, batches: list[dict[str, Any]]) -> Any:
    """The projected features of every image of the batches, in order."""
    model, _, image = loaded
    out = []
    for batch in batches:
        shown = tower_input(dict(batch), lambda pixels: normalise_pixels(pixels, image, None))
        with torch.no_grad():
            out += model.model.get_image_features(
                pixel_values=shown,
                vision_feature_layer=model.config.vision_feature_layer,
                vision_feature_select_strategy=model.config.vision_feature_select_strategy,
            ).pooler_output
    return torch.stack(out)


def count(compute: Callable[[Any], Any]) -> tuple[Callable[[Any], Any], list[int]]:
    sizes: list[int] = []

    def counted(pixels: Any) -> Any:
        sizes.append(len(pixels))
        return compute(pixels)

    return counted, sizes


def test_a_second_run_computes_and_decodes_nothing(
    tmp_path: Path, loaded: Model, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, image = loaded
    compute, sizes = count(tower_compute(model, image))
    double = [*samples, Sample.single("again", tmp_path / "copy.png", "What?", "lung", "open")]
    (tmp_path / "copy.png").write_bytes((tmp_path / "0.png").read_bytes())
    build(loaded, double, preload_bytes=0).use_features(open_cache(tmp_path / "cache", loaded), compute, batch=4)
    assert sum(sizes) == IMAGES
    monkeypatch.setattr("edgemed.finetune.pictures.load_image", lambda path: pytest.fail(f"decoded {path}"))
    again = build(loaded, double, preload_bytes=0)
    assert again.use_features(open_cache(tmp_path / "cache", loaded), compute, batch=4) == 0
    assert sum(sizes) == IMAGES and again.workers == 0
    assert torch.equal(again[0][1], again[IMAGES][1]) and not torch.equal(again[0][1], again[1][1])
    assert torch.equal(pickle.loads(pickle.dumps(again))[1][1], again[1][1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_keep_the_type_they_were_computed_in(tmp_path: Path, loaded: Model, samples: list[Sample], dtype: Any) -> None:
    model, _, image = loaded
    tower_of(model).to(dtype)

    def compute(pixels: Any) -> Any:
        with torch.no_grad():
            states = tower_of(model)(normalise_pixels(pixels, image, None).to(dtype), output_hidden_states=True).hidden_states
        return states[model.config.vision_feature_layer]

    cached, plain = build(loaded, samples, preload_bytes=0), build(loaded, samples)
    one = compute(plain[0][1][None])[0]
    cache = FeatureCache(tmp_path / "cache", tuple(one.shape), dtype, 10**9)
    cached.use_features(cache, compute, batch=1)
    assert cached[0][1].dtype == dtype and torch.equal(cached[0][1], one)


def test_autocast_features_are_kept_in_its_type_without_a_loss(tmp_path: Path, loaded: Model, samples: list[Sample]) -> None:
    model, _, image = loaded
    cached, plain = build(loaded, samples, preload_bytes=0), build(loaded, samples)
    cache = FeatureCache.open(tmp_path / "cache", model, image, 10**9, torch.bfloat16)
    cached.use_features(cache, tower_compute(model, image, torch.bfloat16), batch=IMAGES)
    accept_features(model)
    assert cached[0][1].dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(loaded, [cached[i] for i in range(IMAGES)]) == loss(loaded, [plain[i] for i in range(IMAGES)])


def test_another_tower_layer_or_preparation_never_meets_these_features(loaded: Model) -> None:
    model, _, image = loaded
    keys = [tower_key(model, image), tower_key(model, image.model_copy(update={"mode": "stretch"}))]
    model.config.vision_feature_layer = -1
    keys.append(tower_key(model, image))
    with torch.no_grad():
        next(tower_of(model).parameters()).flatten()[0] += 1
    keys.append(tower_key(model, image))
    assert len(set(keys)) == 4
    model.config.vision_feature_layer = [-2, -1]
    with pytest.raises(RecipeError, match="features of one layer"):
        tower_key(model, image)


def test_what_a_killed_run_left_is_completed(tmp_path: Path, loaded: Model, samples: list[Sample]) -> None:
    model, _, image = loaded
    compute, sizes = count(tower_compute(model, image))
    build(loaded, samples, preload_bytes=0).use_features(open_cache(tmp_path / "cache", loaded), compute, batch=2)
    (folder,) = (d for d in (tmp_path / "cache").iterdir() if d.is_dir())
    whole = (folder / "features.bin").read_bytes()
    lines = (folder / "rows.txt").read_text()
    (folder / "rows.txt").write_text(lines[: 3 * 65 + 20])  # killed within the fourth line, and features ran ahead
    (folder / "images.txt").write_text((folder / "images.txt").read_text()[:200])
    build(loaded, samples, preload_bytes=0).use_features(open_cache(tmp_path / "cache", loaded), compute, batch=2)
    assert (folder / "rows.txt").read_text() == lines and sum(sizes) == IMAGES + 2
    assert np.allclose(*(np.frombuffer(b, np.float32) for b in (whole, (folder / "features.bin").read_bytes())), atol=1e-5)
    (folder / "features.bin").write_bytes(whole[:-1])
    with pytest.raises(ResourceError, match=f"Expected {IMAGES} features"):
        open_cache(tmp_path / "cache", loaded)


def test_a_full_disk_and_a_small_one(tmp_path: Path, loaded: Model, samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, image = loaded
    compute = tower_compute(model, image)
    cache = open_cache(tmp_path / "cache", loaded)
    monkeypatch.setattr(features_module, "RESERVE_BYTES", 10**18)
    assert build(loaded, samples, preload_bytes=0).use_features(cache, compute) == IMAGES and len(cache) == 0
    monkeypatch.undo()

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features_module.os, "fsync", full)
    with pytest.raises(ResourceError, match="disk is full"):
        build(loaded, samples, preload_bytes=0).use_features(cache, compute)
    monkeypatch.undo()
    assert build(loaded, samples, preload_bytes=0).use_features(open_cache(tmp_path / "cache", loaded), compute) == 0


def test_older_towers_make_room_unless_they_are_in_use(tmp_path: Path, loaded: Model, samples: list[Sample]) -> None:
    model, _, image = loaded
    compute = tower_compute(model, image)
    cache = open_cache(tmp_path / "cache", loaded)
    build(loaded, samples, preload_bytes=0).use_features(cache, compute)
    model.config.vision_feature_layer = -1
    lock = FileLock(cache.folder / ".lock", ResourceError("busy"))
    with lock:
        other = FeatureCache.open(tmp_path / "cache", model, image, 2 * cache.row_bytes)
        assert (cache.folder / "rows.txt").is_file() and other.limit_rows == 0
    other = FeatureCache.open(tmp_path / "cache", model, image, 2 * cache.row_bytes)
    assert not cache.folder.exists() and other.limit_rows == 2


def test_broken_images_are_named_counted_and_refused_above_a_share(tmp_path: Path, loaded: Model, samples: list[Sample]) -> None:
    model, _, image = loaded
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.raises(DatasetError, match=r"at most 0.0% of 5 images to be unreadable, found 1, among them .*1\.png"):
        build(loaded, samples)
    kept = build(loaded, samples, max_broken=0.2)
    assert [row.names for row, _ in (kept[i] for i in range(len(kept)))] == [("s0",), ("s2",), ("s3",), ("s4",)]
    cached = build(loaded, samples, preload_bytes=0, max_broken=0.2)
    cached.use_features(open_cache(tmp_path / "cache", loaded), tower_compute(model, image))
    assert len(cached) == 4 and cached.broken.names == {str(tmp_path / "1.png")}


def test_an_image_that_breaks_in_the_middle_of_an_epoch_is_replaced_and_named(tmp_path: Path, loaded: Model, samples: list[Sample]) -> None:
    examples = build(loaded, samples, preload_bytes=0)
    assert examples.workers > 0
    (tmp_path / "1.png").write_bytes(b"no image")
    loader = torch.utils.data.DataLoader(examples, batch_size=2, collate_fn=Collator(0, step=True), num_workers=1)
    first = next(iter(loader))
    assert first["names"] == [("s0",), ("s2",)] and first["broken"] == [(), (str(tmp_path / "1.png"),)]
    assert isinstance(examples[1][0], Broken)
    broken = BrokenImages(10, 0.1)
    broken.add(first["broken"][1])
    broken.add(first["broken"][1])
    with pytest.raises(DatasetError, match="found 2"):
        broken.add(["other.png"])
    for i in range(IMAGES):
        (tmp_path / f"{i}.png").write_bytes(b"")
    with pytest.raises(DatasetError, match="found none in 5 rows"):
        examples[0]


def test_pictures_are_kept_in_memory_only_where_they_fit(loaded: Model, samples: list[Sample]) -> None:
    _, _, image = loaded
    paths = [s.image for s in samples if s.image]
    need = IMAGES * image.size_px**2 * 3
    assert Pictures(paths, image, need).ready and not Pictures(paths, image, need - 1).ready
    assert torch.equal(Pictures(paths, image, need)[paths[0]], Pictures(paths, image, 0)[paths[0]])


def test_rows_come_back_from_memory_as_they_went_in(loaded: Model, samples: list[Sample]) -> None:
    text = Sample.single("text", None, "Is it?", "yes", "closed")
    packed = build(loaded, [*samples, *samples, text], pack=2)
    names = sorted(packed[i][0].names for i in range(len(packed)))
    assert names == [*((f"s{i}", f"s{i}") for i in range(IMAGES)), ("text",)]
    image_id, tokens = loaded[0].config.image_token_id, packed.lengths
    for i in range(len(packed)):
        row, _ = packed[i]
        assert len(row.ids) == len(row.labels) == tokens[i]
        assert row.ids.count(image_id) in (0, (loaded[0].config.vision_config.image_size // loaded[0].config.vision_config.patch_size) ** 2)
        assert {row.labels[k] for k, token in enumerate(row.ids) if token == image_id} <= {IGNORE}


# Both towers are seen above; a whole stage is run with one.
ONE_TOWER = pytest.mark.parametrize("checkpoint", ["siglip"], indirect=True)
FEATURES = 'features = { folder = "../cache", limit = "100MB" }\n'


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = []
    for i in range(4):
        Image.effect_noise((40, 30), 80).save(tmp_path / f"{i}.png")
        for question, answer in (("Is it normal?", "yes"), ("Which organ?", "lung")):
            rounds = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
            rows.append({"id": f"{i}-{answer}", "image": f"{i}.png", "conversations": rounds})
    (tmp_path / "train.json").write_text(json.dumps(rows))
    return tmp_path


@ONE_TOWER
@pytest.mark.parametrize(
    ("stage", "extra"),
    [("align", ""), ("instruct", "pack = 2\n"), ("vqa", "lora = { rank = 4, alpha = 8 }\n")],
)
def test_a_stage_with_cached_features_is_the_stage_without(
    tmp_path: Path, checkpoint: Path, data: Path, stage: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    curves, ends = [], []
    for name, keys in (("plain", ""), ("first", FEATURES), ("second", FEATURES)):
        (tmp_path / name).mkdir()
        optim = "tower_rate = 0\nllm_rate = 1e-3\nworkers = 0"
        told: list[tuple[str, int, int]] = []
        recipe = write_recipe(tmp_path / name, checkpoint, data, extra + keys, optim)
        out = run_stage(stage, recipe, prepare=lambda *what, told=told: told.append(what))
        assert [done for _, done, _ in told] == ([1, 2, 3, 4] if name == "first" else [])
        curves.append([entry["loss"] for entry in json.loads((out / "run.json").read_text())["loss"]])
        ends.append(weights(out))
        if name == "first":
            monkeypatch.setattr(FeatureCache, "_append", lambda *args: pytest.fail("computed again") if args[1] else None)
    assert len(curves[0]) == 3 and curves[0] == pytest.approx(curves[1], rel=1e-5) and curves[1] == curves[2]
    assert all(torch.allclose(ends[0][name], ends[1][name], atol=1e-4) for name in ends[0])
    (folder,) = (d for d in (tmp_path / "cache").iterdir() if d.is_dir())
    assert len((folder / "rows.txt").read_text().splitlines()) == 4


@ONE_TOWER
@pytest.mark.parametrize(
    ("extra", "optim", "message"),
    [
        (FEATURES, "tower_rate = 1e-5", "beside optim.tower_rate"),
        (FEATURES, "rotate_deg = 5.0", "beside optim.rotate_deg"),
        ('features = { folder = "c", limit = "much" }', "", "features.limit: Expected a size"),
        ('features = { path = "c" }', "", "features.folder"),
    ],
)
def test_features_that_would_be_wrong_are_refused(
    tmp_path: Path, checkpoint: Path, data: Path, extra: str, optim: str, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        run_stage("vqa", write_recipe(tmp_path, checkpoint, data, extra, optim))
    assert not (tmp_path / "out").exists()


@ONE_TOWER
def test_a_stage_goes_on_without_broken_and_missing_images_where_the_recipe_says_so(tmp_path: Path, checkpoint: Path, data: Path) -> None:
    (data / "0.png").unlink()
    (data / "1.png").write_bytes(b"no image")
    (tmp_path / "run").mkdir()
    recipe = write_recipe(tmp_path / "run", checkpoint, data)
    with pytest.raises(DatasetError, match=r"2 of 8 rows lack theirs"):
        run_stage("align", recipe)
    recipe.write_text(recipe.read_text().replace('name = "llava"', 'name = "llava"\nmax_missing = 0.25'))
    with pytest.raises(DatasetError, match=r"at most 0.0% of 3 images to be unreadable, found 1"):
        run_stage("align", recipe)
    recipe.write_text("max_broken = 0.4\n" + recipe.read_text())
    assert json.loads((run_stage("align", recipe) / "run.json").read_text())["steps"] == 3
