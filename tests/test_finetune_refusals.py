"""What a stage says to what it cannot do: bad numbers, a full disk, recipes that do not fit; and how rows are drawn and divided."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="fine-tuning needs the train extra")

from bench.reference import measure_reference  # noqa: E402
from edgemed.core.contract import Contract, load_contract, save_contract  # noqa: E402
from edgemed.core.conversation import find_template  # noqa: E402
from edgemed.core.errors import CheckpointError, InputError, RecipeError, ResourceError, UnsupportedError  # noqa: E402
from edgemed.core.images import ImagePreparation  # noqa: E402
from edgemed.core.probe import probe_pixels  # noqa: E402
from edgemed.evaluation.reference import Reference  # noqa: E402
from edgemed.finetune import run_stage, stage, trainer, workspace  # noqa: E402
from edgemed.finetune.joining import new_model  # noqa: E402
from edgemed.finetune.labels import Labeller  # noqa: E402
from edgemed.finetune.recipe import load_recipe  # noqa: E402
from edgemed.finetune.sampling import StepSampler  # noqa: E402
from tests.checkpoints import make_parts, save_json, save_tower, save_weights  # noqa: E402
from tests.finetune_fixture import save_data, save_model, write_recipe  # noqa: E402
from tests.tokenizers_fixture import save_tokenizer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

SMALL = ImagePreparation(size_px=32, mode="pad", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("material")
    return save_model(root / "model"), save_data(root / "data")


def test_a_loss_that_is_no_number_stops_with_the_rows_and_leaves_no_result(
    tmp_path: Path, material: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = material
    loss, seen = trainer.StageTrainer.compute_loss, []

    def broken(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append([name for row in inputs["names"] for name in row])
        value = loss(self, model, inputs, *args, **kwargs)
        return value * float("nan") if len(seen) == 4 else value

    monkeypatch.setattr(trainer.StageTrainer, "compute_loss", broken)
    with pytest.raises(RecipeError, match="Expected a finite loss at step 2") as caught:
        run_stage("align", write_recipe(tmp_path / "run.toml", model, data, steps=5))
    assert all(name in caught.value.message for name in seen[3])
    assert not any(name in caught.value.message for name in set(seen[2]) - set(seen[3]))
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("how", ["os", "library", "beforehand"])
def test_a_full_disk_at_a_checkpoint_keeps_the_last_one_and_is_gone_on_from(
    tmp_path: Path, material: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    model, data = material
    config = write_recipe(tmp_path / "run.toml", model, data, steps=4, optim="save_steps = 1")
    calls = []

    def full(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            if how == "os":
                raise OSError(errno.ENOSPC, "No space left on device")
            raise trainer.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        if how == "beforehand":
            usage = shutil.disk_usage(tmp_path)
            used = [usage, usage, usage._replace(free=1000)]
            patch.setattr(workspace.shutil, "disk_usage", lambda path: used.pop(0) if len(used) > 1 else used[0])
        else:
            real = trainer.save_file
            patch.setattr(trainer, "save_file", full)
        with pytest.raises(ResourceError, match="disk"):
            run_stage("align", config)
    left = sorted(path.name for path in (tmp_path / "run" / "trainer").iterdir())
    assert left == ["checkpoint-2", "fingerprint.json"]
    assert run_stage("align", config) == tmp_path / "run"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["steps"] == 4


@pytest.mark.parametrize(
    ("stage_name", "extra", "optim", "message"),
    [
        ("align", "lora = { rank = 2 }", "", r"\[lora\], though the align stage"),
        ("vqa", "lora = { rank = 2, base_bits = 4, adapter = 'a' }", "", "lora.adapter beside QLoRA"),
        ("vqa", "lora = { rank = 2 }", "compile = true\nsharding = true", "optim.compile beside optim.sharding"),
        ("vqa", "features = { folder = 'f' }", "brightness = 0.1", "brightness or contrast, though a changed image"),
        ("vqa", "lora = { rank = 2, base_bits = 4, rounding = 0.5 }", "sharding = true", "optim.sharding beside QLoRA; lora.rounding"),
        ("vqa", "lora = { rank = 2, base_bits = 4 }", "compile = true", "optim.compile beside QLoRA"),
        ("vqa", "lora = { rank = 2, base_bits = 5 }", "", "lora.base_bits"),
        ("vqa", "", "batch_sise = 3", "optim.batch_sise: Extra inputs"),
        ("vqa", 'join = { llm = "a", tower = "b", image_token = "c" }', "", "both of 'model' and"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(
    tmp_path: Path, material: tuple[Path, Path], stage_name: str, extra: str, optim: str, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(stage_name, write_recipe(tmp_path / "run.toml", *material, extra=extra, optim=optim))


def test_what_a_recipe_leaves_out_is_the_papers(tmp_path: Path, material: tuple[Path, Path]) -> None:
    path = tmp_path / "run.toml"
    image = "[image]\nsize_px = 32\nmode = 'pad'\nmean = [0.5, 0.5, 0.5]\nstd = [0.5, 0.5, 0.5]\n"
    path.write_text(f"output = 'o'\nmodel = '{material[0]}'\ntemplate = 'v1'\n{image}[[data]]\nname = 'llava'\npath = 'd'\n")
    align, instruct, vqa = (load_recipe(name, path) for name in ("align", "instruct", "vqa"))
    assert [r.optim.epochs for r in (align, instruct, vqa)] == [1, 10, 18]
    assert (align.optim.projector_rate, vqa.optim.projector_rate, vqa.optim.llm_rate, vqa.optim.tower_rate) == (1e-3, 2e-5, 2e-5, 0)
    assert (vqa.optim.batch_size * vqa.optim.accumulation, vqa.optim.warmup_ratio, vqa.max_tokens) == (64, 0.03, 2048)
    assert vqa.optim.bf16 == "auto" and vqa.optim.gradient_checkpointing


def test_4_bits_and_bf16_need_a_gpu(tmp_path: Path, material: tuple[Path, Path]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    for extra, optim in (("lora = { rank = 2, base_bits = 4 }", ""), ("", "bf16 = true")):
        with pytest.raises(ResourceError, match="Expected a GPU"):
            run_stage("vqa", write_recipe(tmp_path / "run.toml", *material, extra=extra, optim=optim))


def test_weights_beyond_the_saved_type_are_refused(tmp_path: Path, material: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from edgemed.finetune import export

    config = write_recipe(tmp_path / "run.toml", *material, steps=1)
    config.write_text(config.read_text().replace('"float32"', '"float16"'))
    exact = export.exact_model

    def large(*args: Any) -> Any:
        model = exact(*args)
        with torch.no_grad():
            next(model.parameters()).fill_(1e5)
        return model

    monkeypatch.setattr(export, "exact_model", large)
    with pytest.raises(RecipeError, match="range of float16"):
        run_stage("align", config)
    assert not (tmp_path / "run" / "run.json").exists()


def test_steps_hold_the_same_rows_however_many_processes_divide_them(tmp_path: Path, material: tuple[Path, Path]) -> None:
    recipe = load_recipe("align", write_recipe(tmp_path / "run.toml", *material))  # 2 × 2 rows a step
    assert [stage.divide_batch(recipe, n) for n in (1, 2, 4)] == [(2, 2), (2, 1), (1, 1)]
    with pytest.raises(RecipeError, match="multiple of 3 processes"):
        stage.divide_batch(recipe, 3)


@pytest.mark.parametrize("group", [False, True])
def test_the_sampler_shows_every_row_once_an_epoch(group: bool) -> None:
    lengths = [10 * (i % 7) for i in range(60)]
    sampler = StepSampler(lengths, 4, 45, seed=3, group=group)
    rows = list(sampler)
    assert len(rows) == len(sampler) == 180
    assert rows == list(sampler) and rows != list(StepSampler(lengths, 4, 45, seed=4, group=group))
    assert sorted(rows) == sorted(list(range(60)) * 3) if group else sorted(rows[:60]) == list(range(60))
    spread = sum(max(step) - min(step) for step in ([lengths[r] for r in rows[i : i + 4]] for i in range(0, 180, 4)))
    assert spread < 200 if group else spread > 1000


@pytest.mark.parametrize("pieces", [1, 2, 3, 8])
def test_a_split_batch_keeps_each_rows_images(pieces: int) -> None:
    ids = torch.tensor([[9, 1], [1, 1], [9, 2], [9, 3], [1, 4]])
    batch = {"input_ids": ids, "pixels": torch.tensor([[0], [2], [3]]), "names": [("a",), ("b",), ("c",), ("d",), ("e",)]}
    parts = list(trainer.split(batch, pieces, image_id=9))
    assert torch.equal(torch.cat([p["input_ids"] for p in parts]), ids)
    assert [name for p in parts for name in p["names"]] == batch["names"]
    for part in parts:
        count = int((part["input_ids"] == 9).any(1).sum())
        assert len(part["pixels"]) == count if count else "pixels" not in part
    assert torch.cat([p["pixels"] for p in parts if "pixels" in p]).flatten().tolist() == [0, 2, 3]


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Path, Path]:
    """A bare language model whose embedding has no row to spare, and a tower."""
    llm, tower = tmp_path / "llm", tmp_path / "tower"
    made = make_parts("qwen2", "siglip", save_tokenizer(llm, "qwen2"))
    save_weights(llm, made.llm)
    save_json(llm / "config.json", made.text_config.to_dict() | {"architectures": ["Qwen2ForCausalLM"]})
    save_tower(tower, made)
    return llm, tower


def test_new_joins_parts_and_the_align_stage_starts_there(tmp_path: Path, parts: tuple[Path, Path], material: tuple[Path, Path]) -> None:
    from transformers import AutoTokenizer, LlavaForConditionalGeneration

    out = new_model(*parts, tmp_path / "new")
    model, tokenizer = LlavaForConditionalGeneration.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    image = tokenizer.convert_tokens_to_ids("<image>")
    rows = model.get_input_embeddings().weight
    assert model.config.image_token_id == image == len(tokenizer) - 1 and len(rows) > image and len(rows) % 64 == 0
    assert torch.allclose(rows[image], rows[:image].float().mean(0).to(rows.dtype), atol=1e-3)
    contract = load_contract(out)
    assert contract is not None and (contract.template.name, contract.image.pad_colour) == ("chatml", (127, 127, 127))
    path = tmp_path / "align.toml"  # template and image preparation come from the model
    path.write_text(f"output = 'o'\nmodel = 'new'\n[[data]]\nname = 'llava'\npath = '{material[1]}'\n[optim]\nmax_steps = 1\n")
    assert (run_stage("align", path) / "run.json").is_file()


def test_new_takes_another_image_size(tmp_path: Path, parts: tuple[Path, Path]) -> None:
    out = new_model(*parts, tmp_path / "new", image_size_px=64)
    contract = load_contract(out)
    assert contract is not None and contract.image.size_px == 64
    assert json.loads((out / "config.json").read_text())["vision_config"]["image_size"] == 64
    with pytest.raises(RecipeError, match="multiple of"):
        new_model(*parts, tmp_path / "odd", image_size_px=65)
    assert not (tmp_path / "odd").exists()


def test_new_refuses_what_it_cannot_join(tmp_path: Path, parts: tuple[Path, Path]) -> None:
    llm, tower = parts
    with pytest.raises(CheckpointError, match="no config.json"):
        new_model(tmp_path / "nothing", tower, tmp_path / "new")
    with pytest.raises(InputError, match="Expected no files"):
        new_model(llm, tower, tower)
    (tower / "preprocessor_config.json").write_text('{"size": {"height": 48, "width": 48}, "image_mean": [0,0,0], "image_std": [1,1,1]}')
    with pytest.raises(CheckpointError, match="Expected images of 32 px"):
        new_model(llm, tower, tmp_path / "new")
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".new.*"))


def test_models_of_other_layouts_are_refused_before_a_random_one_is_made(
    tmp_path: Path, parts: tuple[Path, Path], material: tuple[Path, Path]
) -> None:
    llm, tower = parts
    path = write_recipe(tmp_path / "run.toml", llm, material[1])
    with pytest.raises(UnsupportedError, match="Expected LlavaForConditionalGeneration in .* found Qwen2ForCausalLM") as caught:
        run_stage("vqa", path)
    assert "--to hf" in caught.value.hint and not list(tmp_path.glob("run/*.safetensors"))
    with pytest.raises(CheckpointError, match="Expected a bare language model"):
        new_model(material[0], tower, tmp_path / "new")
    with pytest.raises(CheckpointError, match="Expected a checkpoint that transformers loads"):
        new_model(tower, llm, tmp_path / "new")
    with pytest.raises(RecipeError, match="Expected a feature layer from -4 to 3"):
        new_model(llm, tower, tmp_path / "new", feature_layer=-99)
    whole = tmp_path / "cut"
    shutil.copytree(material[0], whole)
    weights = whole / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="Expected a checkpoint that transformers loads"):
        run_stage("vqa", write_recipe(tmp_path / "cut.toml", whole, material[1]))


@pytest.mark.parametrize("noise", [b"\xff\xfe\xfd", b"", b"7", b"[1]", b'{"a": 1}', b"[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_noise_in_a_checkpoints_files_is_a_sentence(tmp_path: Path, material: tuple[Path, Path], name: str, noise: bytes) -> None:
    folder = Path(shutil.copytree(material[0], tmp_path / "model"))
    save_contract(folder, Contract(image=SMALL, template=find_template("v1")))
    (folder / name).write_bytes(noise)
    recipe = write_recipe(tmp_path / "run.toml", folder, material[1])
    calls: list[Callable[[], object]] = [lambda: run_stage("vqa", recipe), lambda: Labeller(folder, None), lambda: Reference(folder)]
    if name == "config.json":
        calls.append(lambda: measure_reference(folder, probe_pixels(32), SMALL, [None, 1]))
    for call in calls:
        with pytest.raises(CheckpointError, match="Expected") as caught:
            call()
        assert str(folder) in caught.value.message
