"""What a recipe may ask for beside the paper's own: adapters that go on, mirrored rows, images held out or resized, compiling."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="fine-tuning needs the train extra")

from safetensors.torch import load_file, save_file  # noqa: E402

from edgemed.core.conversation import Turn, find_template  # noqa: E402
from edgemed.core.errors import CheckpointError, RecipeError  # noqa: E402
from edgemed.data import Sample  # noqa: E402
from edgemed.data.samples import merge_answers, mirror, swap_sides  # noqa: E402
from edgemed.data.splits import leave_out, take_part  # noqa: E402
from edgemed.finetune import callbacks, run_stage  # noqa: E402
from edgemed.finetune.augment import change_light  # noqa: E402
from edgemed.finetune.examples import Collator, Examples, Row  # noqa: E402
from edgemed.finetune.model import _resample_positions  # noqa: E402
from edgemed.finetune.recipe import DataRecipe, OptimRecipe, load_recipe  # noqa: E402
from edgemed.finetune.stage import load_set  # noqa: E402
from edgemed.finetune.trainer import _is_out_of_memory  # noqa: E402
from tests.finetune_fixture import read_losses, save_data, save_model, write_recipe  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
LORA = "lora = { rank = 4, alpha = 8 }"


@pytest.fixture(scope="module")
def instructed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data and the result of an instruct stage with an adapter."""
    folder = tmp_path_factory.mktemp("going-on")
    model, data = save_model(folder / "model"), save_data(folder / "data")
    run_stage("instruct", write_recipe(folder / "instruct.toml", model, data, steps=6, extra=LORA, optim="llm_rate = 1e-2"))
    return folder


def test_an_adapter_goes_on_where_it_ended(instructed: Path) -> None:
    more = f'lora = {{ rank = 4, alpha = 8, adapter = "{instructed / "instruct" / "adapter"}" }}'
    first, data = instructed / "instruct", instructed / "data"
    run_stage("vqa", write_recipe(instructed / "fresh.toml", first, data, steps=3, extra=LORA, optim="llm_rate = 1e-2"))
    run_stage("vqa", write_recipe(instructed / "more.toml", first, data, steps=3, extra=more, optim="llm_rate = 1e-2"))
    assert read_losses(instructed / "more")[0] == pytest.approx(read_losses(instructed / "fresh")[0], rel=1e-4)
    # what is saved are both stages' changes of the first model's weights
    q = "layers.0.self_attn.q_proj"
    base, done = (
        next(v.float() for k, v in load_file(instructed / folder / "model.safetensors").items() if q in k and "vision" not in k)
        for folder in ("model", "more")
    )
    adapter = load_file(instructed / "more" / "adapter" / "adapter_model.safetensors")
    a, b = (next(v for k, v in adapter.items() if q in k and f"lora_{x}" in k) for x in "AB")
    assert torch.allclose(done, base + 2 * b @ a, atol=1e-4)
    assert not torch.allclose(done, base, atol=1e-3)


def test_an_adapter_of_another_shape_or_model_is_refused(instructed: Path) -> None:
    adapter = instructed / "instruct" / "adapter"
    first, data = instructed / "instruct", instructed / "data"
    wider, empty = (shutil.copytree(adapter, instructed / name) for name in ("wider", "empty"))
    state = load_file(adapter / "adapter_model.safetensors")
    name = next(n for n in state if "lora_A" in n)
    save_file(state | {name: torch.zeros(4, state[name].shape[1] + 8)}, wider / "adapter_model.safetensors")
    (empty / "adapter_model.safetensors").unlink()
    for number, (text, error, said) in enumerate(
        (
            (f'lora = {{ rank = 2, alpha = 8, adapter = "{adapter}" }}', RecipeError, "4 and 8, found 2 and 8"),
            (f'lora = {{ rank = 4, alpha = 8, adapter = "{instructed}" }}', CheckpointError, "no adapter_config.json"),
            (f'lora = {{ rank = 4, alpha = 8, adapter = "{wider}" }}', CheckpointError, "found a difference at base_model"),
            (f'lora = {{ rank = 4, alpha = 8, adapter = "{empty}" }}', CheckpointError, "Expected an adapter's weights"),
        )
    ):
        with pytest.raises(error, match=said):
            run_stage("vqa", write_recipe(instructed / f"refused-{number}.toml", first, data, extra=text))


def test_sides_are_swapped_in_their_case() -> None:
    assert swap_sides("Left lung, RIGHT and leftover right-sided") == "Right lung, LEFT and leftover left-sided"
    sample = Sample("a", Path("x.png"), (Turn("user", "Is it on the left?", 1), Turn("assistant", "Right")))
    seen = mirror(sample)
    assert (seen.question, seen.answer, seen.mirrored, seen.id) == ("Is it on the right?", "Left", True, "a-mirrored")
    assert mirror(seen).turns == sample.turns


def test_mirrored_rows_show_the_mirrored_image(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model, data = save_model(tmp_path / "model"), save_data(tmp_path / "data", images=2)
    config = write_recipe(tmp_path / "run.toml", model, data, extra="")
    config.write_text(config.read_text().replace("[optim]", "mirror = true\n[optim]"))
    recipe = load_recipe("vqa", config)
    samples, tokenizer = load_set(recipe.data[0]), AutoTokenizer.from_pretrained(model)
    image_id = json.loads((model / "config.json").read_text())["image_token_index"]
    examples = Examples([(samples, 1)], tokenizer, find_template("chatml"), recipe.image, image_id, 4, 512, pack=8)
    rows = [examples[i] for i in range(len(examples))]
    assert len(rows) == 4
    for path in {row.image for row, _ in rows}:
        one, other = sorted((item for item in rows if item[0].image == path), key=lambda item: item[0].mirrored)
        assert one[1] is not None and other[1] is not None
        assert not one[0].mirrored and other[0].mirrored
        assert torch.equal(one[1].flip(1), other[1])


def test_text_alone_is_not_mirrored(tmp_path: Path) -> None:
    data = save_data(tmp_path / "data", images=1)
    rows = json.loads((data / "train.json").read_text())
    told = [{"from": "human", "value": "Which lung has three lobes?"}, {"from": "gpt", "value": "the right one"}]
    (data / "train.json").write_text(json.dumps([*rows, {"id": "text", "conversations": told}]))
    samples = load_set(DataRecipe(name="llava", path=data, mirror=True))
    assert [s.id for s in samples if s.image is None] == ["text"] and len(samples) == 2 * len(rows) + 1


def test_answers_to_one_question_about_an_image_are_merged(tmp_path: Path) -> None:
    path, other = Path("a.png"), Path("b.png")
    asked = [
        Sample.single("1", path, "What is present?", "Colon", "open"),
        Sample.single("2", path, "Is it red?", "Yes", "closed"),
        Sample.single("3", path, "what is present? ", "adenoma, tubular", "open"),
        Sample.single("4", other, "What is present?", "Colon", "open"),
        Sample.single("5", path, "What is present?", "colon", "open"),
        Sample.single("6", path, "Is it red?", "No", "closed"),
        Sample.single("7", None, "What is present?", "Nothing", "open"),
        mirror(Sample.single("8", path, "What is present?", "Left colon", "open")),
    ]
    merged = merge_answers(asked)
    assert [(s.id, s.answer) for s in merged] == [
        ("1", "Colon, adenoma, tubular"),
        ("2", "Yes"),
        ("4", "Colon"),
        ("6", "No"),
        ("7", "Nothing"),
        ("8-mirrored", "Right colon"),
    ]
    assert merge_answers(merged) == merged
    data = save_data(tmp_path / "data", images=1)
    rows = json.loads((data / "train.json").read_text())
    again = {**rows[-1], "id": "again", "conversations": [rows[-1]["conversations"][0], {"from": "gpt", "value": "another"}]}
    (data / "train.json").write_text(json.dumps([*rows, again]))
    loaded = load_set(DataRecipe(name="llava", path=data, merge_answers=True))
    assert len(loaded) == len(rows) and loaded[-1].answer.endswith("on the left, another")
    assert len(load_set(DataRecipe(name="llava", path=data))) == len(rows) + 1


def test_lengths_are_padded_to_a_multiple_and_the_loss_stays() -> None:
    rows = [Row([5, 6, 7], [-100, 6, 7], None), Row([5] * 9, [-100] * 8 + [5], None, starts=(2, 5))]
    plain, padded = (Collator(0, multiple=multiple)([(row, None) for row in rows]) for multiple in (1, 64))
    assert plain["input_ids"].shape == (2, 9) and padded["input_ids"].shape == (2, 64)
    assert torch.equal(padded["labels"][:, :9], plain["labels"]) and bool((padded["labels"][:, 9:] == -100).all())
    assert torch.equal(padded["attention_mask"][:, :, :9, :9], plain["attention_mask"])


def test_a_library_without_memory_for_its_workspace_is_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for free, expected in ((1 << 20, True), (8 << 30, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, 8 << 30))
        assert _is_out_of_memory(error) is expected
    assert not _is_out_of_memory(RuntimeError("shapes do not fit"))


def test_what_is_held_out_is_not_loaded(tmp_path: Path) -> None:
    data = save_data(tmp_path / "data", images=20)
    config = write_recipe(tmp_path / "run.toml", save_model(tmp_path / "model"), data)
    whole = load_set(load_recipe("vqa", config).data[0])
    config.write_text(config.read_text().replace("[optim]", 'hold_out = ["1/5", "2/10"]\n[optim]'))
    kept = load_set(load_recipe("vqa", config).data[0])
    held = {s.id for s in take_part(whole, 1, 5)} | {s.id for s in take_part(whole, 2, 10)}
    assert held and {s.id for s in kept} == {s.id for s in whole} - held
    config.write_text(config.read_text().replace("2/10", "9/5"))
    with pytest.raises(RecipeError, match=r"data\.hold_out '9/5'"):
        load_recipe("vqa", config)


def test_sets_with_a_folder_an_image_are_divided_by_folder() -> None:
    samples = [Sample(str(i), Path(f"imgs/xmlab{i}/source.jpg"), (Turn("user", "?", 1), Turn("assistant", "!"))) for i in range(50)]
    parts = [take_part(samples, k, 5, by_folder=True) for k in range(1, 6)]
    assert all(parts) and sorted(int(s.id) for part in parts for s in part) == list(range(50))
    assert leave_out(samples, ["1/5"], by_folder=True) == [s for s in samples if s not in parts[0]]


def test_light_leaves_black_alone_and_stays_in_range() -> None:
    x = torch.rand(8, 3, 6, 6)
    x[:, :, :2] = 0
    changed = change_light(x, OptimRecipe(brightness=0.3, contrast=0.5))
    assert torch.equal(changed[:, :, :2], x[:, :, :2])
    assert changed.min() >= 0 and changed.max() <= 1 and not torch.allclose(changed, x)
    assert torch.equal(change_light(x, OptimRecipe()), x)


def test_position_embeddings_are_resampled() -> None:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=56, patch_size=14))
    embeddings = getattr(tower, "vision_model", tower).embeddings
    with torch.no_grad():  # a ramp from left to right stays one
        embeddings.position_embedding.weight.copy_(torch.arange(16).remainder(4)[:, None].expand(16, 8).float())
    _resample_positions(tower, 112)
    grid = embeddings.position_embedding.weight.reshape(8, 8, 8)
    assert torch.allclose(grid[0], grid[7], atol=1e-5)
    assert bool((grid[0, 1:, 0] > grid[0, :-1, 0] - 0.1).all()) and float(grid[0, 7, 0] - grid[0, 0, 0]) > 3


def test_compiled_blocks_learn_the_same(tmp_path: Path) -> None:
    model, data = save_model(tmp_path / "model"), save_data(tmp_path / "data", images=2)
    counters = torch._dynamo.utils.counters
    counters.clear()
    for name, value in (("plain", "false"), ("compiled", "true")):
        optim = f"compile = {value}\nllm_rate = 1e-3"
        run_stage("vqa", write_recipe(tmp_path / f"{name}.toml", model, data, steps=3, extra=LORA, optim=optim))
    assert read_losses(tmp_path / "compiled") == pytest.approx(read_losses(tmp_path / "plain"), rel=1e-4)
    assert json.loads((tmp_path / "compiled" / "run.json").read_text())["recipe"]["optim"]["compile"] is True
    # one program for all blocks, in one piece: a cache of keys and values made one a block
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_all_processes_go_by_the_first_ones_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    def broadcast(told: torch.Tensor, src: int) -> None:
        assert src == 0
        told.fill_(61.0)

    monkeypatch.setattr(callbacks, "_several_processes", lambda: True)
    monkeypatch.setattr(torch.distributed, "broadcast", broadcast)
    args, control = SimpleNamespace(device="cpu"), SimpleNamespace(should_training_stop=False)
    clock = callbacks.Clock(shared=True)
    clock.on_optimizer_step(args, None, control)
    assert clock.spent_s == 61.0
    callbacks.Deadline(clock, minutes=1.5).on_step_end(args, None, control)
    assert not control.should_training_stop
    callbacks.Deadline(clock, minutes=1.0).on_step_end(args, None, control)
    assert control.should_training_stop
    alone = callbacks.Clock(shared=False)
    alone.on_optimizer_step(args, None, control)
    assert alone.spent_s < 61.0


def test_code_that_is_no_installed_package_trains_to_the_end(instructed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # four trainings on a hired machine were lost between their last step and their saving, for want of a version
    def nothing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("edgemed.core.versions.version", nothing)
    out = run_stage("vqa", write_recipe(instructed / "source.toml", instructed / "model", instructed / "data", steps=2))
    run = json.loads((out / "run.json").read_text())
    assert run["edgemed"]["version"] == run["versions"]["peft"] == "not installed as a package"
    assert run["versions"]["torch"] == torch.__version__ and (out / "model.safetensors").is_file()
