"""Calibration: the reference in torch, moments, rounding that makes up for its errors, and the choice of types under a budget."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, IMAGE_PX, TOWERS, make_checkpoint
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize
from PIL import Image

from converters import blocks
from converters.calibration.fit import Fit, fit_tensor
from converters.calibration.gather import Batch, Pack, build_batch, draw_samples, gather, load_values, pack_samples, run_pack
from converters.calibration.moments import Calibration, Moments
from converters.calibration.reference import Reference, build_reference, matrix_names
from converters.calibration.rounding import LAYOUTS, compensation, round_compensated
from converters.calibration.search import candidates, choose_types, measure_losses
from converters.checkpoint import Checkpoint
from converters.convert import convert, plan_llm, plan_vision
from converters.ggml import block_size, quantise_rows
from converters.quantise import Planned
from converters.readers import open_checkpoint
from converters.recipes import Recipe
from converters.tensors import ArrayTensor, GgufTensor, RopeRows, permute_heads, read_all
from converters.vision import MirroredTensor, PaddedTensor
from edgemed.cli import run
from edgemed.core.contract import Contract, save_contract
from edgemed.core.errors import CheckpointError, InputError, MissingExtraError, RecipeError
from edgemed.core.images import normalise
from edgemed.core.manifest import Artifact
from edgemed.core.units import parse_bytes
from edgemed.data import Sample, hash_samples, load_samples

QUESTIONS = ("What is shown in this image?", "Is there a fracture of the left femur?", "Is the liver enlarged?")


def save_slake(folder: Path, images: int = 3) -> Path:
    """A training split of random images, three questions each, in SLAKE's layout."""
    (folder / "imgs").mkdir(parents=True)
    random = np.random.default_rng(0)
    rows = []
    for i in range(images):
        Image.fromarray(random.integers(0, 256, (40, 50, 3), np.uint8)).save(folder / "imgs" / f"{i}.png")
        for j, question in enumerate(QUESTIONS):
            answer = ("The liver", "No", "Yes, it is")[(i + j) % 3]
            rows.append(
                {"qid": 10 * i + j, "img_name": f"{i}.png", "question": question, "answer": answer, "answer_type": "OPEN", "q_lang": "en"}
            )
    (folder / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


def open_tiny(folder: Path, family: str = "smollm", tower: str = "siglip", reader: str = "hf", **more: Any) -> Checkpoint:
    reference = make_checkpoint(folder, reader, family, tower, **more)
    return open_checkpoint(reference.source, **reference.options)


@pytest.fixture(scope="module")
def slake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_slake(tmp_path_factory.mktemp("data") / "slake")


@pytest.fixture(scope="module")
def samples(slake: Path) -> list[Sample]:
    return load_samples("slake", slake, "train")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_tiny(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def reference(checkpoint: Checkpoint) -> Reference:
    return build_reference(checkpoint)


@pytest.fixture(scope="module")
def calibration(checkpoint: Checkpoint, samples: list[Sample], reference: Reference) -> Calibration:
    return gather(checkpoint, samples, "slake", "train", reference=reference)


# ---------------------------------------------------------------- the reference


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_reference_is_the_model_and_every_block_tensor_has_its_module(tmp_path: Path, family: str, tower: str) -> None:
    made = make_checkpoint(tmp_path, "hf", family, tower)
    checkpoint = open_checkpoint(made.source, **made.options)
    model = build_reference(checkpoint)
    pixels = np.random.default_rng(3).integers(0, 256, (IMAGE_PX, IMAGE_PX, 3), np.uint8)
    ids = [5, 6, 7]
    with torch.no_grad():
        rows = model.image_rows(torch.from_numpy(normalise(pixels, checkpoint.image)[None]))[0]
        embeds = torch.cat([model.embed(torch.tensor(ids)), rows, model.embed(torch.tensor(ids))])
        logits = model.logits(embeds[None], torch.arange(len(embeds)))[0].numpy()
    right = made.vision_embeds(pixels)
    np.testing.assert_allclose(rows.numpy(), right, atol=1e-4)
    np.testing.assert_allclose(logits, made.logits(ids, right, ids), atol=1e-3)
    recipe = Recipe.of(quant="Q8_0")
    planned = {t.name: t for p in (plan_llm(checkpoint, recipe), plan_vision(checkpoint, recipe)) for t in p.tensors}
    assert {name for name, t in planned.items() if t.type == Type.Q8_0} == set(model.modules) == set(matrix_names(checkpoint))
    for name, module in model.modules.items():
        weight = module.weight.numpy()
        source = planned[name].source
        stored = permute_heads(weight, source.head_dim) if isinstance(source, RopeRows) else weight
        np.testing.assert_array_equal(stored, read_all(source), err_msg=name)


def test_linear_projector_has_one_matrix_to_fit(tmp_path: Path) -> None:
    checkpoint = open_tiny(tmp_path, "llama", "clip", "llava", projector="linear")
    names = matrix_names(checkpoint)
    assert "mm.0.weight" in names and "mm.2.weight" not in names


# ---------------------------------------------------------------- moments


def test_packed_questions_read_as_if_alone(checkpoint: Checkpoint, reference: Reference, samples: list[Sample]) -> None:
    packs = pack_samples(checkpoint, samples)
    assert [len(pack.tails) for pack in packs] == [3, 3, 3]
    pack = packs[1]
    values = load_values(pack, checkpoint)

    def logits(pack: Pack) -> Any:
        batch = build_batch(pack, checkpoint.tower.image_tokens)
        with torch.no_grad():
            return batch, run_pack(reference, batch, values)

    _, together = logits(pack)
    alone: list[tuple[Batch, Any]] = [logits(Pack(pack.image, pack.head, (tail,))) for tail in pack.tails]
    np.testing.assert_allclose(together.numpy(), torch.cat([found for _, found in alone]).numpy(), atol=1e-4)
    assert sum(len(batch.targets) for batch, _ in alone) == sum(sum(answers) for _, answers in pack.tails)


@pytest.mark.parametrize("name", ["blk.1.attn_q.weight", "blk.0.ffn_down.weight", "v.blk.1.attn_out.weight", "mm.2.weight"])
def test_moments_are_those_of_the_layer(checkpoint: Checkpoint, reference: Reference, samples: list[Sample], name: str) -> None:
    sample = samples[:1]
    found = gather(checkpoint, sample, "slake", "train", reference=reference)
    pack = pack_samples(checkpoint, sample)[0]
    batch, values = build_batch(pack, checkpoint.tower.image_tokens), load_values(pack, checkpoint)
    # The same by automatic differentiation with a shift at the layer's output, one drawn token after another.
    inputs: list[Any] = []
    shift: list[Any] = []

    def add_shift(module: Any, args: Any, output: Any) -> Any:
        inputs.append(args[0].detach().flatten(0, -2))
        shift.append(torch.zeros_like(output).requires_grad_(True))
        return output + shift[0]

    handle = reference.modules[name].register_forward_hook(add_shift)
    logits = run_pack(reference, batch, values)
    handle.remove()
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=torch.Generator().manual_seed(0))
    (g,) = torch.autograd.grad(torch.log_softmax(logits, -1).gather(1, drawn).sum(), shift[0])
    g = g.flatten(0, -2).double()
    x = inputs[0].double()
    right = torch.einsum("t,ti,tj->ij", g.square().sum(1), x, x).numpy()
    moments = found.moments[name]
    np.testing.assert_allclose(moments.covariance, right, rtol=1e-3, atol=1e-4 * np.abs(right).max())
    np.testing.assert_allclose(moments.outputs, g.square().sum(0).numpy(), rtol=1e-3, atol=1e-9)
    assert moments.importance.mean() == pytest.approx(1, rel=1e-3)
    assert found.record.positions == len(batch.keep)


def test_every_matrix_is_seen_and_the_record_names_the_samples(
    checkpoint: Checkpoint, calibration: Calibration, samples: list[Sample]
) -> None:
    assert set(calibration.moments) == set(matrix_names(checkpoint))
    record = calibration.record
    assert (record.dataset, record.split, record.samples) == ("slake", "train", 9)
    assert record.samples_sha256 == hash_samples(samples)


@pytest.mark.parametrize(("value", "says"), [(np.nan, "finite weights.*'layer.w'"), (3e38, "finite logits")])
def test_weights_that_are_no_numbers_are_told(checkpoint: Checkpoint, samples: list[Sample], value: float, says: str) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    values = read_all(checkpoint.llm.tensors[name]).copy()
    values[:, :2] = value
    tensors = {**checkpoint.llm.tensors, name: ArrayTensor("layer.w", values)}
    with pytest.raises(CheckpointError, match=says):
        gather(replace(checkpoint, llm=replace(checkpoint.llm, tensors=tensors)), samples[:2], "csv", "train")


def test_embedding_counts_only_the_tokens_that_were_read(checkpoint: Checkpoint, calibration: Calibration, samples: list[Sample]) -> None:
    seen = {token for pack in pack_samples(checkpoint, samples) for ids in (pack.head, *(t for t, _ in pack.tails)) for token in ids}
    rows = calibration.moments["token_embd.weight"].rows
    assert rows is not None and set(np.flatnonzero(rows)) <= seen and rows.sum() > 0


def test_drawing_is_the_same_each_time_and_spreads_over_images(samples: list[Sample]) -> None:
    drawn = draw_samples(samples, 6)
    assert drawn == draw_samples(samples, 6) and len({s.id for s in drawn}) == 6
    assert len(draw_samples(samples, 100)) == len(samples)


# ---------------------------------------------------------------- rounding


def correlated(width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Weights [24, width] and the covariance of inputs that lie mostly in a few directions."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((2000, 24)) @ random.standard_normal((24, width)) + 0.5 * random.standard_normal((2000, width))
    return random.standard_normal((24, width)).astype(np.float32), (x.T @ x).astype(np.float32)


@pytest.mark.parametrize("kind", LAYOUTS, ids=lambda kind: kind.name)
def test_compensated_blocks_lose_less_on_what_was_seen(kind: Type) -> None:
    rows, covariance = correlated(512)
    importance = np.diagonal(covariance).copy()

    def loss(data: np.ndarray) -> float:
        delta = dequantize(data, kind) - rows
        return float(np.einsum("ij,jk,ik", delta, covariance, delta, optimize=True))

    data = round_compensated(kind, rows, compensation(covariance), importance)
    plain = quantise_rows(kind, rows, importance)
    assert data.shape == plain.shape
    assert loss(data) < 0.5 * loss(plain)


@pytest.mark.skipif(not blocks.available(), reason="needs numba")
@pytest.mark.parametrize("kind", [Type.IQ4_NL, Type.Q4_K], ids=lambda kind: kind.name)
def test_compiled_scales_are_made_up_for_as_well(kind: Type) -> None:
    rows, covariance = correlated(512)
    fit = Fit(Moments(covariance, np.ones(24, np.float32)), 1)
    ggml, compiled = (fit.loss(dequantize(fit.round(kind, rows, c), kind) - rows, np.arange(24)) for c in (False, True))
    assert 0.8 * ggml < compiled < 1.2 * ggml


@pytest.mark.parametrize("kind", LAYOUTS, ids=lambda kind: kind.name)
def test_expected_loss_is_about_that_of_the_written_blocks(kind: Type) -> None:
    rows, covariance = correlated(512)
    fit = Fit(Moments(covariance, np.ones(24, np.float32)), 10)
    written = fit.loss(dequantize(fit.round(kind, rows), kind) - rows, np.arange(24))
    assert 0.5 * written < fit.expected_loss(kind, rows, np.arange(24)) < 2 * written


@pytest.mark.parametrize("kind", LAYOUTS, ids=lambda kind: kind.name)
def test_without_correlation_nothing_is_made_up_for(kind: Type) -> None:
    rows, _ = correlated(block_size(kind) * 2)
    data = round_compensated(kind, rows, compensation(np.eye(rows.shape[1], dtype=np.float32)))
    # Each value on the level nearest to it: never further from the source than ggml's own choice under the same scales.
    ours, ggml = (np.abs(dequantize(d, kind) - rows) for d in (data, quantise_rows(kind, rows)))
    assert (ours <= ggml + 1e-5).all()


def test_rows_are_rounded_apart(calibration: Calibration) -> None:
    rows, covariance = correlated(64)
    fit = Fit(Moments(covariance, np.ones(24, np.float32)), 1)
    whole = fit.round(Type.IQ4_NL, rows)
    np.testing.assert_array_equal(whole, np.concatenate([fit.round(Type.IQ4_NL, rows[:7]), fit.round(Type.IQ4_NL, rows[7:])]))


def test_moments_follow_padding_mirroring_and_rope_order() -> None:
    moments = Moments(np.diag(np.arange(1.0, 5.0)).astype(np.float32), np.arange(8, dtype=np.float32))
    weight = ArrayTensor("w", np.ones((8, 4), np.float32))
    padded = fit_tensor(PaddedTensor(weight, (10, 6)), moments, 1).moments
    np.testing.assert_array_equal(np.diagonal(padded.covariance), [1, 2, 3, 4, 0, 0])
    np.testing.assert_array_equal(padded.outputs, [*range(8), 0, 0])
    mirrored = fit_tensor(MirroredTensor(weight), moments, 1).moments
    np.testing.assert_array_equal(mirrored.outputs, [*range(8), *range(8)])
    roped = fit_tensor(RopeRows(weight, 4), moments, 1).moments
    np.testing.assert_array_equal(roped.outputs, [0, 2, 1, 3, 4, 6, 5, 7])


def test_padded_columns_are_rounded_to_zero() -> None:
    rows, covariance = correlated(64)
    source = PaddedTensor(ArrayTensor("w", rows), (24, 96))
    fit = fit_tensor(source, Moments(covariance, np.ones(24, np.float32)), 1)
    stored = dequantize(fit.round(Type.Q4_0, read_all(source)), Type.Q4_0)
    assert not stored[:, 64:].any()


# ---------------------------------------------------------------- types under a budget


def test_choice_spends_bytes_where_they_tell() -> None:
    shapes = {"a": (64, 256), "b": (64, 256)}
    losses = {
        "a": {Type.Q4_0: 1.0, Type.Q5_0: 0.5, Type.Q8_0: 0.1},
        "b": {Type.Q4_0: 0.1, Type.Q5_0: 0.05, Type.Q8_0: 0.01},
    }
    small = 2 * 64 * 144
    assert choose_types(shapes, losses, small) == {"a": Type.Q4_0, "b": Type.Q4_0}
    assert choose_types(shapes, losses, small + 64 * 128) == {"a": Type.Q8_0, "b": Type.Q4_0}
    assert choose_types(shapes, losses, 10**9) == {"a": Type.Q8_0, "b": Type.Q8_0}
    with pytest.raises(RecipeError, match=str(small + 7)):
        choose_types(shapes, losses, small + 6, fixed_bytes=7)


def test_the_coarsest_types_are_a_last_resort() -> None:
    shapes = {"a": (64, 256), "b": (64, 256)}
    losses = {"a": {Type.Q2_K: 1e-6, Type.Q4_0: 1e-7}, "b": {Type.Q2_K: 9.0, Type.Q4_0: 1.0, Type.Q8_0: 0.0}}
    enough = 2 * 64 * 144
    assert choose_types(shapes, losses, enough + 64 * 100)["a"] == Type.Q4_0
    assert choose_types(shapes, losses, enough - 1) == {"a": Type.Q2_K, "b": Type.Q4_0}


def test_types_are_those_that_fill_rows() -> None:
    assert {Type.Q4_K, Type.IQ4_XS} & set(candidates(576)) == set()
    assert {Type.Q4_K, Type.IQ4_XS, Type.F16} <= set(candidates(1536))
    assert candidates(14) == [Type.F16]


def measured_loss(artifact: Artifact, checkpoint: Checkpoint, calibration: Calibration) -> float:
    """The calibration's own measure of what is in the files."""
    from gguf import GGUFReader

    recipe = Recipe.of(bits=4)
    planned = {t.name: t for p in (plan_llm(checkpoint, recipe), plan_vision(checkpoint, recipe)) for t in p.tensors}
    total = 0.0
    for path in (artifact.llm_path, artifact.mmproj_path):
        for t in GGUFReader(path).tensors:
            if t.name in calibration.moments:
                source = planned[t.name].source
                stored = GgufTensor(t.name, source.shape, path, int(t.data_offset), t.tensor_type)
                fit = fit_tensor(source, calibration.moments[t.name], calibration.record.positions)
                total += fit.loss(read_all(stored) - read_all(source), np.arange(source.shape[0]))
    return total


def file_bytes(artifact: Artifact) -> int:
    return sum(record.size_bytes for record in artifact.manifest.files.values())


def test_calibrated_files_lose_less_in_no_more_bytes(tmp_path: Path, checkpoint: Checkpoint, calibration: Calibration) -> None:
    plain = convert(checkpoint, tmp_path / "plain", Recipe.of(bits=4))
    fitted = convert(checkpoint, tmp_path / "fitted", Recipe.of(bits=4), calibration=calibration)
    again = convert(checkpoint, tmp_path / "again", Recipe.of(bits=4), calibration=calibration)
    assert 0.98 * file_bytes(plain) <= file_bytes(fitted) <= file_bytes(plain)
    assert measured_loss(fitted, checkpoint, calibration) < 0.7 * measured_loss(plain, checkpoint, calibration)
    assert fitted.manifest.files == again.manifest.files
    assert fitted.manifest.calibration == calibration.record and plain.manifest.calibration is None
    assert fitted.manifest.calibration_sha256 == calibration.record.samples_sha256


def test_budget_is_kept_to_the_byte(tmp_path: Path, checkpoint: Checkpoint, calibration: Calibration) -> None:
    with pytest.raises(RecipeError, match="at least") as refused:
        convert(checkpoint, tmp_path / "none", Recipe.of(bits=4), calibration=calibration, budget_bytes=1000)
    smallest = int(refused.value.message.split()[6])
    assert not (tmp_path / "none").exists()
    small = convert(checkpoint, tmp_path / "small", Recipe.of(bits=4), calibration=calibration, budget_bytes=smallest)
    most = convert(checkpoint, tmp_path / "most", Recipe.of(bits=4), calibration=calibration, budget_bytes=10**9)
    middle_bytes = (file_bytes(small) + file_bytes(most)) // 2
    middle = convert(checkpoint, tmp_path / "middle", Recipe.of(bits=4), calibration=calibration, budget_bytes=middle_bytes)
    assert file_bytes(small) <= smallest and 0.9 * middle_bytes <= file_bytes(middle) <= middle_bytes
    assert middle.manifest.calibration is not None and middle.manifest.calibration.budget_bytes == middle_bytes
    types = {t.type for t in most.manifest.tensors if t.name in calibration.moments}
    assert types == {"F16"}
    losses = [measured_loss(a, checkpoint, calibration) for a in (small, middle, most)]
    assert losses[0] > losses[1] > losses[2]


def test_wide_inputs_are_rounded_by_importance_alone() -> None:
    rows, covariance = correlated(64)
    diagonal = np.diagonal(covariance).copy()
    fit = Fit(Moments(diagonal, np.ones(24, np.float32)), 1)
    np.testing.assert_array_equal(fit.round(Type.Q4_0, rows), quantise_rows(Type.Q4_0, rows, diagonal / diagonal.mean()))
    losses = measure_losses([Planned("w", ArrayTensor("w", rows), Type.Q4_0, fit=fit)], threads=1)["w"]
    assert losses[Type.Q4_1] > losses[Type.Q5_0] > losses[Type.Q8_0] > losses[Type.F16] >= 0


# ---------------------------------------------------------------- the command


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert run(["convert", *map(str, arguments)]) == 1
    return capsys.readouterr().err


def test_command_calibrates_and_records(checkpoint: Checkpoint, slake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["convert", str(checkpoint.path), "--calibrate", f"slake={slake}", "--samples", "4", "--out", str(tmp_path / "o"), "--json"]
    assert run([*arguments, "--no-verify", "--budget", "1MB"]) == 0
    written = json.loads((tmp_path / "o" / "manifest.json").read_text(encoding="utf-8"))["calibration"]
    drawn = draw_samples(load_samples("slake", slake, "train"), 4)
    assert (written["samples"], written["budget_bytes"]) == (4, 1_000_000)
    assert written["samples_sha256"] == hash_samples(drawn) and written["elapsed_s"] > 0


def test_command_warns_where_a_model_learnt_other_rounding_errors(
    checkpoint: Checkpoint, slake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "rounded"
    shutil.copytree(checkpoint.path, source)
    for rounded in (False, True):
        save_contract(source, Contract(image=checkpoint.image, template=checkpoint.template, rounded=rounded))
        capsys.readouterr()
        arguments = ["convert", source, "--calibrate", f"slake={slake}", "--samples", "2", "--no-verify", "--out", tmp_path / "o"]
        assert run([*map(str, arguments)]) == 0
        assert ("learnt with the rounding errors" in capsys.readouterr().err) == rounded


def test_command_refuses_in_one_sentence(
    checkpoint: Checkpoint, slake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint.path
    assert "--calibrate" in refused(capsys, source, "--budget", "1MB")
    assert "NAME=PATH" in refused(capsys, source, "--calibrate", "slake")
    assert "Expected a data set out of" in refused(capsys, source, "--calibrate", f"nothing={slake}")
    assert "found nothing" in refused(capsys, source, "--calibrate", f"slake={tmp_path / 'none'}")
    assert "Expected a size" in refused(capsys, source, "--calibrate", f"slake={slake}", "--budget", "much")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "torch" else found(name, *more))
    assert "edgemed[train]" in refused(capsys, source, "--calibrate", f"slake={slake}")
    with pytest.raises(MissingExtraError):
        build_reference(checkpoint)


@pytest.mark.parametrize(("text", "size"), [("0.8GB", 800_000_000), ("600 MB", 600_000_000), ("12kb", 12_000), ("905", 905)])
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1TB", "1e9", "0x10"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_bytes(text)
