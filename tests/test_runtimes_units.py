"""The engine's parts that need no model: text streams, prompts, GGUF checks, the tower's modes, memory."""

from __future__ import annotations

import os
import platform
import queue
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from runtimes_pair import LLM_WIDTH, PATCHES, SIZE_PX, make_artifact, tower_rows, tower_tensors, write_llm, write_tower

from edgemed.core.conversation import TEMPLATES, ImageSlot, Text, Turn
from edgemed.core.errors import ArtifactError, EngineError, EngineLoadError, InputError
from edgemed.core.manifest import Artifact
from edgemed.core.probe import probe_pixels, relative_l2
from runtimes import libllama
from runtimes.gguf_check import check_pair
from runtimes.jobs import Job, Slot
from runtimes.libmtmd import VisionTower
from runtimes.memory import measure_memory
from runtimes.messages import EngineSettings, PreparedImage, Request, Sampling
from runtimes.prompt import build_prompt, common_prefix, tokenize_segments
from runtimes.sampling import TextStream, log_probability
from runtimes.vision import EmbeddingCache, EncodeThread, ImageQueue, VisionEncoder


def test_stop_string_across_pieces() -> None:
    text = TextStream(("USER:", "###"))
    assert text.push(b" No, U") == " No, "
    assert text.push(b"SA. US") == "USA. "
    assert text.push(b"ER: and") == ""
    assert text.stopped and text.text == " No, USA. "
    assert text.flush() == "" and text.push(b"more") == ""


def test_held_back_text_comes_out_at_the_end() -> None:
    text = TextStream(("###",))
    assert text.push(b"a##") == "a"
    assert text.flush() == "##" and text.text == "a##"


def test_characters_come_out_whole() -> None:
    text = TextStream(())
    euro = "€".encode()
    assert [text.push(euro[:1]), text.push(euro[1:2]), text.push(euro[2:])] == ["", "", "€"]
    assert text.push(euro[:2]) == "" and text.flush() == "\ufffd"


def test_the_earliest_stop_string_wins() -> None:
    text = TextStream(("later", "now"))
    assert text.push(b"not now, later") == "not "


def test_log_probability() -> None:
    logits = np.array([0.0, 1.0, 2.0], np.float32)
    assert np.exp([log_probability(logits, i) for i in range(3)]).sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("rule", "expected"), [("none", ["a", "bc"]), ("first", [" a", "bc"]), ("chunk", [" a", " bc"])])
def test_blanks_go_where_the_manifest_says(tmp_path: Path, rule: str, expected: list[str]) -> None:
    manifest = make_artifact(tmp_path, template=TEMPLATES["v1"]).manifest.model_copy(update={"space_prefix": rule})
    seen: list[str] = []
    items = tokenize_segments(
        [Text("a"), ImageSlot(0), Text("b"), Text("c", answer=True)], manifest, lambda text: seen.append(text) or [7], bos=1
    )  # type: ignore[func-returns-value]
    assert seen == expected
    assert items == [1, 7, ImageSlot(0), 7]


def test_image_cells_tell_images_apart() -> None:
    a = build_prompt([5, ImageSlot(0), 6], ["a" * 64], 3)
    b = build_prompt([5, ImageSlot(0), 6], ["b" * 64], 3)
    assert common_prefix(a.cells, b.cells) == 1 and len(a.cells) == 5
    assert common_prefix(a.cells, build_prompt([5, ImageSlot(0), 7], ["a" * 64], 3).cells) == 4
    assert common_prefix([], a.cells) == 0 and common_prefix(a.cells, a.cells) == 5
    with pytest.raises(InputError, match="image"):
        build_prompt([ImageSlot(1)], ["a" * 64], 3)


class RuntimeTower:
    """libmtmd's graph in numpy, with the class token in front (`repaired`) or behind as the pinned version has it."""

    def __init__(self, repaired: bool) -> None:
        self.tensors, self.repaired = tower_tensors("clip", LLM_WIDTH), repaired

    def encode(
        self, pixels: bytes, positions: NDArray[np.int32] | None = None, patches: NDArray[np.int32] | None = None
    ) -> NDArray[np.float32]:
        image = np.frombuffer(pixels, np.uint8).reshape(SIZE_PX, SIZE_PX, 3)
        positions = np.arange(PATCHES + 1, dtype=np.int32) if positions is None else positions
        patches = np.arange(1, PATCHES + 1, dtype=np.int32) if patches is None else patches
        table = self.tensors["v.position_embd.weight"][positions]
        # tower_rows has the class token in front: put the positions in its order and the rows back into the graph's.
        order = np.arange(PATCHES + 1) if self.repaired else np.append(PATCHES, np.arange(PATCHES))
        rows = tower_rows("clip", {**self.tensors, "v.position_embd.weight": table[order]}, image, keep_cls=True)
        graph = np.empty_like(rows)
        graph[order] = rows
        return graph[patches]

    def prepare(self, rows: int) -> None:
        pass


@pytest.mark.parametrize("keep_cls", [False, True])
@pytest.mark.parametrize(("repaired", "mode"), [(False, "rewrite"), (True, "plain")])
def test_the_probe_chooses_the_mode(tmp_path: Path, repaired: bool, mode: str, keep_cls: bool) -> None:
    manifest = make_artifact(tmp_path, "clip", keep_cls=keep_cls).manifest
    encoder = VisionEncoder(RuntimeTower(repaired), manifest)
    assert manifest.certificate is not None
    assert encoder.check(manifest.certificate) < 1e-5
    assert encoder.mode == mode


def test_a_tower_that_never_agrees_is_refused(tmp_path: Path) -> None:
    manifest = make_artifact(tmp_path, "clip", seed=3).manifest  # the runtime's tower has other weights
    assert manifest.certificate is not None
    with pytest.raises(EngineLoadError, match="relative distance of .* and"):
        VisionEncoder(RuntimeTower(False), manifest).check(manifest.certificate)


@contextmanager
def language_model(artifact: Artifact) -> Iterator[libllama.LanguageModel]:
    """What a tower's rows are for."""
    model = libllama.LanguageModel(artifact.llm_path, EngineSettings(context_tokens=64, gpu_layers=0), 1, False)
    try:
        yield model
    finally:
        model.close()


class Watched(VisionTower):
    """A tower that tells which of its graph's nodes were looked at."""

    visited: list[int]

    def _visit(self, node: int) -> None:
        self.visited.append(node)
        super()._visit(node)


@pytest.mark.parametrize("exact", [False, True])
def test_the_nodes_of_a_graph_are_remembered_and_looked_for_again_where_it_is_another(tmp_path: Path, exact: bool) -> None:
    artifact = make_artifact(tmp_path, "clip")
    right = tower_rows("clip", tower_tensors("clip", LLM_WIDTH), probe_pixels(SIZE_PX))
    with language_model(artifact) as model:
        tower = Watched(artifact.mmproj_path, SIZE_PX, model, 1, None, rewritable=True, exact=exact)
        encoder = VisionEncoder(tower, artifact.manifest)  # rewrites, as CLIP's towers need

        def visited(pixels: bytes = probe_pixels(SIZE_PX).tobytes()) -> int:
            tower.visited = []
            encoder.prepare()
            rows = encoder.encode(pixels)
            assert relative_l2(rows, right) < 2e-3
            return len(tower.visited)

        try:
            tower.visited = []
            tower.encode(probe_pixels(SIZE_PX).tobytes())  # nothing to write yet
            whole, known = len(tower.visited), visited()
            assert whole > 40 and known == visited() == (2 + 2 * 8 + 3 if exact else 2)
            tower._places.pop()
            tower._places.add(tower.visited[0] + 1)  # an address at which there is nothing
            assert visited() == known - 1 + whole
            assert visited() == visited() == whole, "what has moved once is not relied on again"
        finally:
            tower.close()


def test_rows_that_were_handed_out_stay(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path)
    with language_model(artifact) as model:
        tower = VisionTower(artifact.mmproj_path, SIZE_PX, model, 1, None, rewritable=False)
        encoder = VisionEncoder(tower, artifact.manifest)
        try:
            images = [np.full((SIZE_PX, SIZE_PX, 3), value, np.uint8).tobytes() for value in (9, 200)]
            fresh = [encoder.encode(pixels) for pixels in images]
            kept = [rows.copy() for rows in fresh]
            for _ in range(2):
                encoder.prepare()
                fresh.append(encoder.encode(images[len(fresh) % 2]))
            for rows, right in zip(fresh, kept * 2, strict=True):
                np.testing.assert_array_equal(rows, right)
        finally:
            tower.close()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_a_tower_does_not_depend_on_what_memory_held_before(tmp_path: Path) -> None:
    make_artifact(tmp_path / "pair", "clip")
    # 2 is another model's way of counting rows: where libmtmd finds it by chance, it ends the process.
    words = f"""
        import ctypes, sys
        sys.path[:0] = {[str(Path(__file__).parent)]}
        from pathlib import Path
        from edgemed.core.manifest import load_artifact
        from runtimes import libllama
        from runtimes.libmtmd import VisionTower
        from test_runtimes_units import PATCHES, SIZE_PX, language_model, probe_pixels
        libc = ctypes.CDLL(None)
        libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
        artifact = load_artifact(Path({str(tmp_path / "pair")!r}))
        with language_model(artifact) as model:
            for _ in range(5):
                blocks = [(libc.malloc(size), size) for size in range(304, 1600, 16) for _ in range(12)]
                for block, size in blocks:
                    ctypes.memmove(block, bytes([2, 0, 0, 0]) * (size // 4), size)
                for block, _ in blocks:
                    libc.free(block)
                tower = VisionTower(artifact.mmproj_path, SIZE_PX, model, 1, None, rewritable=True)
                assert len(tower.encode(probe_pixels(SIZE_PX).tobytes())) == PATCHES
                tower.close()
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")))}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(words)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("on_cpu", [False, True])
def test_memory_is_made_ready_before_an_image_comes(tmp_path: Path, on_cpu: bool) -> None:
    order: queue.SimpleQueue[str] = queue.SimpleQueue()

    class Tower(RuntimeTower):
        def prepare(self, rows: int) -> None:
            order.put(f"prepare {rows}")

    encoder = VisionEncoder(Tower(False), make_artifact(tmp_path, "clip").manifest)
    images = ImageQueue()
    EncodeThread(encoder, images, lambda encoded: order.put(f"rows {encoded.key}"), on_cpu)
    for key in ("a", "b"):
        if not on_cpu:
            assert order.get(timeout=20) == f"prepare {PATCHES}"
        images.submit(key, probe_pixels(SIZE_PX).tobytes())
        assert order.get(timeout=20) == f"rows {key}"


def test_an_image_waits_until_it_is_taken() -> None:
    images = ImageQueue()
    for key in "abc":
        images.submit(key, key.encode())
    assert images.take() == ("a", b"a")
    assert [images.drop(key) for key in "abb"] == [False, True, False]
    assert images.take() == ("c", b"c")


def test_embedding_cache_forgets_the_oldest() -> None:
    cache = EmbeddingCache(limit_bytes=250)
    rows = np.zeros((5, 5), np.float32)
    for key in ("a", "b"):
        cache.put(key, rows)
    assert cache.get("a") is not None
    cache.put("c", rows)
    assert cache.get("b") is None and cache.get("a") is not None and cache.get("c") is not None
    cache.put("large", np.zeros(100, np.float32))
    assert cache.get("large") is None and cache.get("a") is not None


def check(artifact: Artifact) -> None:
    check_pair(artifact, libllama.tensor_bytes)


def test_good_pairs_pass(tmp_path: Path) -> None:
    for kind in ("siglip", "clip"):
        check(make_artifact(tmp_path / kind, kind))


@pytest.mark.parametrize("which", ["llm_path", "mmproj_path"])
def test_damaged_files(tmp_path: Path, which: str) -> None:
    artifact = make_artifact(tmp_path)
    path: Path = getattr(artifact, which)
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    for bad, words in (
        (data[:-33], "too early"),  # the file ends with up to 31 bytes of padding
        (data[: len(data) // 2], "too early|runs past"),
        (data[:200], "breaks off|runs past"),
        (data[:10], "few bytes"),
        (rng.bytes(5000), "another kind"),
        (data[:8] + rng.bytes(5000), "tensors"),
        (data[:24] + rng.bytes(5000), "Expected a GGUF"),
        (b"", "few bytes"),
    ):
        path.write_bytes(bad)
        with pytest.raises(ArtifactError, match=words):
            check(artifact)


def test_swapped_files(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path / "a")
    llm, tower = artifact.llm_path.read_bytes(), artifact.mmproj_path.read_bytes()
    artifact.llm_path.write_bytes(tower)
    with pytest.raises(ArtifactError, match="architecture llama.*found clip"):
        check(artifact)
    artifact.llm_path.write_bytes(llm)
    artifact.mmproj_path.write_bytes(llm)
    with pytest.raises(ArtifactError, match="to be clip.*found llama"):
        check(artifact)
    write_tower(artifact.mmproj_path, "siglip", tower_tensors("siglip", 96))
    with pytest.raises(ArtifactError, match="as wide as the LLM's"):
        check(artifact)
    write_tower(artifact.mmproj_path, "siglip", tower_tensors("siglip", LLM_WIDTH))
    write_llm(artifact.llm_path, width=96)
    with pytest.raises(ArtifactError, match="embedding length of 64"):
        check(artifact)


def test_a_context_that_the_model_has_not(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path)
    m = artifact.manifest
    longer = m.model_copy(update={"llm": m.llm.model_copy(update={"context_length": 1 << 20})})
    with pytest.raises(ArtifactError, match="a context length of 1048576 in .* found"):
        check(replace(artifact, manifest=longer))


@pytest.mark.parametrize(
    "name",
    [
        "mm.0.weight",
        "mm.2.weight",
        "mm.2.bias",
        "v.position_embd.weight",
        "v.patch_embd.weight",
        "v.blk.1.attn_q.weight",
        "v.blk.0.ln1.bias",
    ],
)
def test_missing_tensors_that_would_end_llama_cpp(tmp_path: Path, name: str) -> None:
    artifact = make_artifact(tmp_path)
    tensors = tower_tensors("siglip", LLM_WIDTH)
    del tensors[name]
    write_tower(artifact.mmproj_path, "siglip", tensors)
    with pytest.raises(ArtifactError, match=name):
        check(artifact)


def test_wrong_shapes_and_types_that_would_end_llama_cpp(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path)
    good = tower_tensors("siglip", LLM_WIDTH)
    for name, value in (
        ("v.blk.0.ln1.bias", good["v.blk.0.ln1.bias"].astype(np.float16)),
        ("v.position_embd.weight", good["v.position_embd.weight"][:-1]),
        ("mm.0.weight", good["mm.0.weight"][:, :-4]),
        ("v.blk.1.ffn_down.weight", good["v.blk.1.ffn_down.weight"][:, :-32]),
    ):
        write_tower(artifact.mmproj_path, "siglip", {**good, name: value})
        with pytest.raises(ArtifactError, match=name):
            check(artifact)
    for key, value in (("block_count", 3), ("image_size", 70), ("attention.head_count", 7)):
        write_tower(artifact.mmproj_path, "siglip", good, **{key: value})
        with pytest.raises(ArtifactError):
            check(artifact)


def test_memory_of_this_process() -> None:
    report = measure_memory(os.getpid())
    assert report.rss_bytes > 10_000_000
    if report.pss_bytes is not None and report.anonymous_bytes is not None:
        assert 0 < report.anonymous_bytes <= report.rss_bytes


def test_the_parents_side_does_not_load_llama_cpp() -> None:
    code = "import sys, runtimes.engine; print('llama_cpp' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("type_", [gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0", "Q5_0")])
def test_rows_of_tokens_are_the_tables(tmp_path: Path, type_: gguf.GGMLQuantizationType) -> None:
    table = np.random.default_rng(2).normal(size=(50, 64)).astype(np.float32)
    stored = gguf.quants.quantize(table, type_)
    for arch in ("llama", "gemma"):
        writer = gguf.GGUFWriter(tmp_path / f"{arch}.gguf", arch)
        writer.add_tensor("token_embd.weight", stored, raw_dtype=type_)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    rows = libllama.find_token_rows(tmp_path / "llama.gguf")
    assert rows is not None
    np.testing.assert_array_equal(rows([7, 0, 49, 7]), gguf.quants.dequantize(stored, type_)[[7, 0, 49, 7]])
    assert libllama.find_token_rows(tmp_path / "gemma.gguf") is None, "its graph scales the rows"


def test_attention_has_tiles_only_where_llama_cpp_has_them(tmp_path: Path) -> None:
    write_llm(tmp_path / "llm.gguf")

    def tile(**settings: Any) -> int:
        chosen = EngineSettings(**{"context_tokens": 64, "gpu_layers": 0, **settings})
        model = libllama.LanguageModel(tmp_path / "llm.gguf", chosen, 1, False)
        try:
            return model.tile_rows
        finally:
            model.close()

    assert tile() == tile(kv_type="f32") == libllama.CPU_TILE_ROWS
    assert {tile(kv_type="bf16"), tile(flash_attention="off"), tile(micro_batch=96)} == {1}


@pytest.mark.parametrize("as_rows", [False, True])
def test_a_token_of_several_sequences_is_computed_as_in_each(tmp_path: Path, as_rows: bool) -> None:
    write_llm(tmp_path / "llm.gguf")
    model = libllama.LanguageModel(tmp_path / "llm.gguf", EngineSettings(context_tokens=64, slots=3, gpu_layers=0), 1, False)
    prefix, endings = [1, 40, 65], ([7, 99], [7, 50], [8, 99])
    try:
        expected = []
        for ending in endings:
            assert model.decode_tokens([*prefix, *ending], range(5), [[0]] * 5, [4]) == 0
            expected.append(model.logits(4).copy())
            model.forget(0, 0)
        assert model.decode_tokens(prefix, range(3), [[0]] * 3, []) == 0
        for sequence in (1, 2):
            model.share(0, sequence, 3)
        tokens, positions, sequences, outputs = [7, 99, 50, 8, 99], [3, 4, 4, 3, 4], [[0, 1], [0], [1], [2], [2]], [1, 2, 4]
        if as_rows:
            assert model.token_rows is not None
            assert model.decode_rows(np.split(model.token_rows(tokens), [1, 3]), positions, sequences, outputs) == 0
        else:
            assert model.decode_tokens(tokens, positions, sequences, outputs) == 0
        for row, wanted in zip((1, 2, 4), expected, strict=True):
            np.testing.assert_allclose(model.logits(row), wanted, atol=1e-4)
        assert model.decode_tokens([3, 3], [5, 5], [[0], [1]], [0, 1]) == 0, "each goes on by itself"
        with pytest.raises(EngineError, match="places"):
            model.decode_tokens([1] * model.batch_tokens, range(model.batch_tokens), [[0, 1]] * model.batch_tokens, [])
    finally:
        model.close()


def test_rows_of_tokens_give_the_tokens_logits(tmp_path: Path) -> None:
    write_llm(tmp_path / "llm.gguf")
    rows = libllama.find_token_rows(tmp_path / "llm.gguf")
    assert rows is not None
    ids = [1, 40, 65, 7, 99]
    model = libllama.LanguageModel(tmp_path / "llm.gguf", EngineSettings(context_tokens=64, gpu_layers=0), 1, False)
    try:
        assert model.decode_tokens(ids, range(5), [[0]] * 5, [4]) == 0
        expected = model.logits(4).copy()
        model.forget(0, 0)
        assert model.decode_rows([rows(ids)], range(5), [[0]] * 5, [4]) == 0
        np.testing.assert_allclose(model.logits(4), expected, atol=1e-4)
        model.forget(0, 4)
        assert model.decode_token(ids[4], 4, 0) == 0
        np.testing.assert_allclose(model.logits(0), expected, atol=1e-2)
    finally:
        model.close()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_freed_memory_is_used_again() -> None:
    code = (
        "import resource, sys; from runtimes.system import keep_freed_memory\n"
        "if sys.argv[1] == 'keep': assert keep_freed_memory()\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(3): begin = faults(); blocks = [bytearray(20 << 20) for _ in range(5)]; del blocks\n"
        "print(faults() - begin)"
    )
    runs = [subprocess.run([sys.executable, "-c", code, how], check=True, capture_output=True, text=True) for how in ("keep", "not")]
    counts = [int(run.stdout) for run in runs]
    assert counts[0] < 100 < 1000 < counts[1]


def test_what_is_not_a_number_is_no_word(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path, "clip")
    with language_model(artifact) as model:
        rows = np.full((2, LLM_WIDTH), np.nan, np.float32)
        assert model.reuses and model.decode_rows([rows], [0, 1], [[0], [0]], [1]) == 0
        for temperature in (0.0, 0.7):
            with pytest.raises(libllama.NotANumberError, match="NaN"):
                model.sample(libllama.Sampler(Sampling(temperature=temperature), model.vocab_size), 1)
        model.forget(0, 0)
        model.wipe()
        assert model.decode_tokens([1, 40], [0, 1], [[0], [0]], [1]) == 0
        assert 0 <= model.sample(libllama.Sampler(Sampling(), model.vocab_size), 1) < model.vocab_size


def test_rows_that_are_no_numbers_are_not_handed_out(tmp_path: Path) -> None:
    class Tower(RuntimeTower):
        def encode(self, pixels: bytes, positions: Any = None, patches: Any = None) -> Any:
            rows = super().encode(pixels, positions, patches)
            rows[3, 5] = np.inf
            return rows

    encoder = VisionEncoder(Tower(True), make_artifact(tmp_path, "clip").manifest)
    with pytest.raises(EngineError, match="NaN or infinity"):
        encoder.encode(probe_pixels(SIZE_PX).tobytes())


def test_nothing_of_a_patient_is_in_what_is_printed_of_an_object() -> None:
    picture = PreparedImage(b"pixels of a patient", 4)
    request = Request((Turn("user", "a patient's question", 1),), (picture,))
    for thing in (picture, request, Job(1, 0.0, request=request), Slot(0, job=Job(1, 0.0, request=request))):
        assert "patient" not in repr(thing)
