"""The stage runner on a two-layer LLaVA: what learns, what stays bit-identical, what the folder holds, what is refused."""

from __future__ import annotations

import json
import os
import signal
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="fine-tuning needs the train extra")

from edgemed.core.contract import load_contract  # noqa: E402
from edgemed.core.conversation import TEMPLATES, Turn  # noqa: E402
from edgemed.core.errors import CheckpointError, DatasetError, RecipeError  # noqa: E402
from edgemed.core.images import ImagePreparation  # noqa: E402
from edgemed.data import Sample  # noqa: E402
from edgemed.finetune import run_stage  # noqa: E402
from edgemed.finetune.callbacks import Reporter, Stop  # noqa: E402
from edgemed.finetune.examples import IGNORE, Collator, Examples, Row, check_labels, encode, pack_rows  # noqa: E402
from edgemed.finetune.model import join, part_of  # noqa: E402
from edgemed.finetune.recipe import JoinRecipe  # noqa: E402
from tests.checkpoints import make_checkpoint, make_parts, save_json, save_tower, save_weights  # noqa: E402
from tests.tokenizers_fixture import save_tokenizer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
STEPS = 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    return Path(make_checkpoint(folder, "hf", "smollm", "siglip").source)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for i in range(4):
        Image.effect_noise((40, 30), 80).save(folder / f"{i}.png")
        for question, answer in (("Is it normal?", "yes"), ("Which organ?", "lung")):
            rounds = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
            rows.append({"id": f"{i}-{answer}", "image": f"{i}.png", "conversations": rounds})
    (folder / "train.json").write_text(json.dumps(rows))
    return folder


def write_recipe(folder: Path, checkpoint: Path, data: Path, extra: str = "", optim: str = "") -> Path:
    config = json.loads((checkpoint / "config.json").read_text())
    size = config["vision_config"]["image_size"]
    text = f"""
output = "out"
model = {json.dumps(str(checkpoint))}
template = "chatml"
save_dtype = "float32"
{extra}
[image]
size_px = {size}
mode = "pad"
mean = [0.5, 0.5, 0.5]
std = [0.5, 0.5, 0.5]
[[data]]
name = "llava"
path = {json.dumps(str(data))}
[optim]
max_steps = {STEPS}
batch_size = 2
projector_rate = 1e-3
{optim}
"""
    path = folder / "run.toml"
    path.write_text(text)
    return path


def weights(folder: Path) -> dict[str, Any]:
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed_parts(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    assert before.keys() == after.keys()
    return {part_of(name) for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(
    ("stage", "extra", "optim", "parts"),
    [
        ("align", "", "llm_rate = 1e-3\ntower_rate = 1e-3", {"projector"}),
        ("instruct", "", "llm_rate = 1e-3", {"projector", "llm"}),
        (
            "vqa",
            "pack = 2\nlora = { rank = 4, alpha = 8, rounding = 0.5 }",
            "llm_rate = 1e-2\ntower_rate = 1e-3",
            {"projector", "llm", "tower"},
        ),
    ],
)
def test_a_stage_trains_its_parts_alone(
    tmp_path: Path, checkpoint: Path, data: Path, stage: str, extra: str, optim: str, parts: set[str]
) -> None:
    before = weights(checkpoint)
    out = run_stage(stage, write_recipe(tmp_path, checkpoint, data, extra, optim))
    assert out == tmp_path / "out"
    assert changed_parts(before, weights(out)) == parts
    run = json.loads((out / "run.json").read_text())
    assert run["steps"] == STEPS and len(run["loss"]) == STEPS
    assert [(data["name"], data["rows"]) for data in run["data"]] == [("llava", 8)]
    contract = load_contract(out)
    assert contract is not None and contract.template == TEMPLATES["chatml"] and contract.image.mode == "pad"
    assert contract.rounded == ("rounding" in extra)
    assert (out / "adapter" / "adapter_config.json").is_file() == ("lora" in extra)
    if os.name == "posix":
        assert not list(out.glob("*.part"))


def test_what_was_trained_converts_with_its_own_preparation(tmp_path: Path, checkpoint: Path, data: Path) -> None:
    from converters.readers import open_checkpoint

    out = run_stage("align", write_recipe(tmp_path, checkpoint, data))
    read = open_checkpoint(out)
    contract = load_contract(out)
    assert contract is not None
    assert (read.image, read.template, read.notes) == (contract.image, contract.template, ())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("template = ", "tempalte = "), "tempalte"),
        (("batch_size = 2", "batch_size = 0"), "optim.batch_size"),
        (('model = "', 'modle = "'), "modle"),
        (("mode = ", "mode = = "), "Expected TOML"),
        (("size_px = ", "size_px = 1"), "Expected image.size_px"),
    ],
)
def test_a_wrong_recipe_is_refused(tmp_path: Path, checkpoint: Path, data: Path, change: tuple[str, str], message: str) -> None:
    path = write_recipe(tmp_path, checkpoint, data)
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(RecipeError, match=message):
        run_stage("align", path)
    assert not (tmp_path / "out" / "run.json").exists()


def test_an_unknown_stage_and_a_missing_recipe_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="Expected a stage"):
        run_stage("pretrain", tmp_path / "run.toml")
    with pytest.raises(RecipeError, match="no such file"):
        run_stage("align", tmp_path / "run.toml")


@pytest.mark.parametrize(("name", "found"), [("gone", "no such folder"), ("run.toml", "a file")])
def test_a_model_that_is_none_is_told_before_what_it_would_have_filled_in(tmp_path: Path, name: str, found: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(f'output = "out"\nmodel = "{name}"\n[[data]]\nname = "csv"\npath = "a.csv"\n')
    with pytest.raises(RecipeError, match=f"Expected a checkpoint at .*{name}, found {found}"):
        run_stage("vqa", path)


@pytest.mark.skipif(os.name != "posix", reason="SIGHUP")
def test_a_terminal_that_went_away_stops_a_stage_at_the_steps_end() -> None:
    def gone(progress: Any) -> None:
        raise OSError(5, "Input/output error")

    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    state, control = SimpleNamespace(global_step=1, max_steps=9), SimpleNamespace(should_save=False, should_training_stop=False)
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)
            reporter = Reporter(gone, 1, deque([1.0]))
            reporter.on_train_begin(None, state, control)
            reporter.on_step_end(None, state, control)
            stop.on_step_end(SimpleNamespace(device=torch.device("cpu")), state, control)
        assert stop.stopped and control.should_save and control.should_training_stop
        assert signal.signal(signal.SIGHUP, signal.SIG_IGN) is signal.SIG_DFL
        with Stop():  # under nohup
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_labels_cover_the_answers_alone(checkpoint: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    template = TEMPLATES["chatml"]
    turns = (Turn("user", "One?", images=1), Turn("assistant", "First."), Turn("user", "Two?"), Turn("assistant", "Second."))
    ids, labels = encode(tokenizer, template, turns, image_id=3, image_tokens=5)
    assert len(ids) == len(labels) and ids.count(3) == 5
    learned = tokenizer.decode([i for i in labels if i != IGNORE])
    assert learned == "First.<|im_end|>\nSecond.<|im_end|>\n"
    check_labels(tokenizer, template, turns, labels, "x")
    with pytest.raises(DatasetError, match="Expected the labels of x"):
        check_labels(tokenizer, template, turns, [*labels[:-4], *[IGNORE] * 4], "x")


IMAGE = 3


def row(image: str, *question: int) -> Row:
    """A head of [1, image, image], then a question whose last two tokens are learned."""
    ids = [1, IMAGE, IMAGE, *question]
    return Row(ids, [IGNORE] * (len(ids) - 2) + ids[-2:], Path(image))


def test_packing_keeps_every_question_once_and_to_its_image() -> None:
    rows = [row(image, 10 + i, 20 + i, 30 + i) for image in "ab" for i in range(5)] + [Row([7, 8], [IGNORE, 8], None)]
    packed = pack_rows(rows, 3, seed=0, image_id=IMAGE, max_tokens=100)
    assert sorted(len(p.starts) for p in packed) == [0, 2, 2, 3, 3]
    assert all(p.ids.count(IMAGE) == 2 for p in packed if p.image)
    cut = [(p.image, tuple(p.ids[a:b])) for p in packed if p.image for a, b in zip(p.starts, [*p.starts[1:], None], strict=True)]
    assert sorted(map(str, cut)) == sorted(str((r.image, tuple(r.ids[3:]))) for r in rows if r.image)
    assert max(len(p.ids) for p in pack_rows(rows, 3, seed=0, image_id=IMAGE, max_tokens=9)) == 9


def test_a_packed_row_has_the_loss_of_its_questions_alone(checkpoint: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    config = model.config
    tokens, size = (config.vision_config.image_size // config.vision_config.patch_size) ** 2, config.vision_config.image_size
    rows = []
    for image, lengths in (("a", (4, 7, 5)), ("b", (6, 3))):
        for i, n in enumerate(lengths):
            ids = [1, *[config.image_token_id] * tokens, *range(40 + 9 * i, 40 + 9 * i + n)]
            rows.append(Row(ids, [IGNORE] * (len(ids) - 2) + ids[-2:], Path(image)))
    torch.manual_seed(0)
    pixels = {Path(name): torch.randn(3, size, size) for name in "ab"}

    def loss(rows: list[Row]) -> float:
        batch = Collator(0)([(r, None) for r in rows])
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = model(**batch, pixel_values=torch.stack([pixels[r.image] for r in rows if r.image])).logits
        flat = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return float(torch.nn.functional.cross_entropy(*flat, ignore_index=IGNORE, reduction="sum"))

    packed = pack_rows(rows, 3, seed=0, image_id=config.image_token_id, max_tokens=10_000)
    assert [len(p.starts) for p in packed] == [3, 2]
    assert loss(packed) == pytest.approx(sum(loss([r]) for r in rows), rel=1e-5)


def test_rounding_is_the_converters() -> None:
    import numpy as np

    from converters.ggml import quantise_rows
    from edgemed.finetune.rounding import round_to_5_bits, round_to_levels

    gguf = pytest.importorskip("gguf")
    torch.manual_seed(0)
    weight = torch.randn(200, 64) * torch.rand(200, 1)
    weight[3, :32] = 0
    for name, ours in (("IQ4_NL", round_to_levels(weight)), ("Q5_0", round_to_5_bits(weight))):
        kind = gguf.GGMLQuantizationType[name]
        theirs = gguf.quants.dequantize(quantise_rows(kind, weight.numpy()), kind)
        # Sums in another order choose another scale now and then.
        same = np.isclose(ours.numpy(), theirs, rtol=1e-6, atol=0).reshape(-1, 32).all(1)
        assert same.mean() > 0.98, name
        np.testing.assert_allclose(np.linalg.norm(ours - weight), np.linalg.norm(theirs - weight.numpy()), rtol=1e-3)


def test_the_types_of_rounding_are_the_converters() -> None:
    from gguf import GGMLQuantizationType as Type

    from converters.recipes import Recipe as Types
    from edgemed.finetune.rounding import _stays_exact

    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"}
    names |= {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    for width, layers in ((576, 30), (2048, 22)):
        shapes: dict[str, tuple[int, ...]] = {f"blk.{i}.{ours}.weight": (width, width) for i in range(layers) for ours in names.values()}
        both = {"token_embd.weight": (100, width), "output.weight": (100, width)}
        types = Types.of(bits=4).llm_types({**shapes, **both}.items(), rounded=True)
        assert types["token_embd.weight"] == Type.Q5_0
        assert types["output.weight"] == (Type.Q5_0 if width == 576 else Type.Q6_K), "training leaves it exact"
        for i in range(layers):
            for theirs, ours in names.items():
                exact = _stays_exact(f"base_model.model.language_model.layers.{i}.{theirs}", layers)
                assert types[f"blk.{i}.{ours}.weight"] == (Type.Q8_0 if exact else Type.IQ4_NL), (i, theirs)


class Narrow(torch.nn.Module):
    """Eight layers of a language model, by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(10, 64)
        names = ("q_proj", "v_proj", "up_proj")
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict({"part": torch.nn.ModuleDict({n: torch.nn.Linear(64, 48, bias=False) for n in names})}) for _ in range(8)
        )

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.embed


def test_rounding_comes_and_goes_and_spares_what_stays_at_8_bits() -> None:
    from peft import LoraConfig, get_peft_model

    from edgemed.finetune.rounding import LoraRounding, round_to_levels

    torch.manual_seed(0)
    model = get_peft_model(Narrow(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False))
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    before = {n: m.get_base_layer().weight.detach().clone() for n, m in layers.items()}
    table = model.get_input_embeddings().weight.detach().clone()
    rounding = LoraRounding(model)
    rounding.apply(True)
    for name, layer in layers.items():
        weight, delta = layer.get_base_layer().weight, layer.get_delta_weight("default")
        if name.endswith("v_proj") or "layers.0.part.up_proj" in name:
            assert torch.equal(weight, before[name]), name
        else:
            torch.testing.assert_close(weight + delta, round_to_levels(before[name] + delta))
    assert not torch.equal(model.get_input_embeddings().weight, table)
    rounding.apply(False)
    assert all(torch.equal(m.get_base_layer().weight, before[n]) for n, m in layers.items())
    assert torch.equal(model.get_input_embeddings().weight, table)


@pytest.mark.parametrize(("capitalise", "answer"), [(False, "yes"), (True, "Yes")])
def test_answers_are_capitalised_where_the_recipe_says_so(checkpoint: Path, data: Path, capitalise: bool, answer: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    image = ImagePreparation(size_px=32, mode="pad", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    sample = Sample.single("a", data / "0.png", "Is it normal?", "yes", "closed")
    examples = Examples([([sample], 1)], tokenizer, TEMPLATES["chatml"], image, 3, 5, 500, capitalise)
    assert tokenizer.decode([i for i in examples[0][0].labels if i != IGNORE]) == f"{answer}<|im_end|>\n"


def test_a_head_with_a_bias_cannot_be_joined(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    parts = make_parts("phi", "siglip", save_tokenizer(tmp_path / "llm", "phi"))
    save_weights(tmp_path / "llm", parts.llm)
    save_json(tmp_path / "llm" / "config.json", parts.text_config.to_dict())
    save_tower(tmp_path / "tower", parts)
    recipe = JoinRecipe(llm=tmp_path / "llm", tower=tmp_path / "tower", image_token="<|endoftext|>")
    with pytest.raises(CheckpointError, match="head has no bias"):
        join(recipe, AutoTokenizer.from_pretrained(tmp_path / "llm"))
