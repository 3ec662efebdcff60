"""Tiny random GGUF pairs with a manifest, made with gguf-py, and the tower's right output by numpy. For the engine's tests.

The LLM is a two-layer llama over a byte-level BPE vocabulary (256 bytes and a few control tokens) or over SmolLM2's file; the
tower is a two-layer SigLIP or CLIP. Weights come from a seed. Shapes here are in numpy order.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import gguf
import numpy as np

from edgemed.core.conversation import TEMPLATES, ConversationTemplate
from edgemed.core.images import ImagePreparation, normalise
from edgemed.core.manifest import Artifact, Certificate, FileRecord, LlmRecord, Manifest, SourceRecord, Summary, VisionRecord, save_manifest
from edgemed.core.probe import PROBE_SEED, probe_pixels, summarise

SIZE_PX, PATCH_PX, WIDTH, FFN, HEADS = 56, 14, 64, 128, 4
PATCHES = (SIZE_PX // PATCH_PX) ** 2
LLM_WIDTH, LLM_FFN, LLM_HEADS = 64, 128, 4
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]
PREPARATION = ImagePreparation(size_px=SIZE_PX, mode="pad", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def bytes_to_unicode() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in byte order."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in keep else chr(next(spare)) for b in range(256)]


VOCAB = 256 + len(CONTROL)


# A SentencePiece vocabulary of the same size: the 256 bytes and two pieces with a blank.
SPM_PIECES = ["▁", "▁a"]


def _add_bpe(w: gguf.GGUFWriter) -> None:
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list([*bytes_to_unicode(), *CONTROL])
    w.add_token_types([1] * 256 + [3] * len(CONTROL))
    w.add_token_merges(["Ā ā"])
    w.add_eos_token_id(256 + CONTROL.index("<|im_end|>"))
    w.add_bos_token_id(256 + CONTROL.index("<s>"))


def _add_spm(w: gguf.GGUFWriter) -> None:
    w.add_tokenizer_model("llama")
    w.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *SPM_PIECES])
    w.add_token_scores([0.0] * 259 + [-1.0, -2.0])
    w.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(SPM_PIECES))
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)


def write_llm(path: Path, seed: int = 0, width: int = LLM_WIDTH, spm: bool = False) -> None:
    rng = np.random.default_rng(seed)
    w = gguf.GGUFWriter(path, "llama")
    w.add_block_count(2)
    w.add_context_length(4096)
    w.add_embedding_length(width)
    w.add_feed_forward_length(LLM_FFN)
    w.add_head_count(LLM_HEADS)
    w.add_head_count_kv(LLM_HEADS)
    w.add_rope_dimension_count(width // LLM_HEADS)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_vocab_size(VOCAB)
    (_add_spm if spm else _add_bpe)(w)
    tensors = {"token_embd.weight": (VOCAB, width), "output_norm.weight": (width,), "output.weight": (VOCAB, width)}
    for i in range(2):
        tensors |= {f"blk.{i}.attn_{k}.weight": (width, width) for k in ("q", "k", "v", "output")}
        tensors |= {f"blk.{i}.ffn_{k}.weight": (LLM_FFN, width) for k in ("gate", "up")}
        tensors |= {
            f"blk.{i}.ffn_down.weight": (width, LLM_FFN),
            f"blk.{i}.attn_norm.weight": (width,),
            f"blk.{i}.ffn_norm.weight": (width,),
        }
    for name, shape in tensors.items():
        value = np.ones(shape, np.float32) if len(shape) == 1 else rng.normal(0, shape[-1] ** -0.5 * 2, shape).astype(np.float32)
        if name == "output.weight":
            value[256:] = 0  # control tokens are never the likeliest
        w.add_tensor(name, value if len(shape) == 1 else value.astype(np.float16))
    _write(w)


def tower_tensors(kind: str, out_width: int, seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def matrix(*shape: int) -> np.ndarray:
        return rng.normal(0, int(np.prod(shape[1:])) ** -0.5, shape).astype(np.float16)

    def vector(n: int, mean: float = 0.0) -> np.ndarray:
        return (mean + 0.1 * rng.normal(0, 1, n)).astype(np.float32)

    t = {"v.patch_embd.weight": matrix(WIDTH, 3, PATCH_PX, PATCH_PX)}
    t["v.position_embd.weight"] = rng.normal(0, 1, (PATCHES + (kind == "clip"), WIDTH)).astype(np.float32)
    if kind == "clip":
        t |= {"v.class_embd": vector(WIDTH), "v.pre_ln.weight": vector(WIDTH, 1), "v.pre_ln.bias": vector(WIDTH)}
    else:
        t["v.patch_embd.bias"] = vector(WIDTH)
    for i in range(2):
        b = f"v.blk.{i}"
        for part in ("attn_q", "attn_k", "attn_v", "attn_out"):
            t |= {f"{b}.{part}.weight": matrix(WIDTH, WIDTH), f"{b}.{part}.bias": vector(WIDTH)}
        for part in ("ln1", "ln2"):
            t |= {f"{b}.{part}.weight": vector(WIDTH, 1), f"{b}.{part}.bias": vector(WIDTH)}
        t |= {f"{b}.ffn_up.weight": matrix(FFN, WIDTH), f"{b}.ffn_up.bias": vector(FFN)}
        t |= {f"{b}.ffn_down.weight": matrix(WIDTH, FFN), f"{b}.ffn_down.bias": vector(WIDTH)}
    t |= {"mm.0.weight": matrix(out_width, WIDTH), "mm.0.bias": vector(out_width)}
    t |= {"mm.2.weight": matrix(out_width, out_width), "mm.2.bias": vector(out_width)}
    return t


def write_tower(path: Path, kind: str, tensors: dict[str, np.ndarray], **changed: object) -> None:
    w = gguf.GGUFWriter(path, "clip")
    w.add_bool("clip.has_vision_encoder", True)
    w.add_string("clip.projector_type", "mlp")
    w.add_bool("clip.use_gelu", True)
    numbers = {
        "image_size": SIZE_PX,
        "patch_size": PATCH_PX,
        "embedding_length": WIDTH,
        "feed_forward_length": FFN,
        "block_count": 2,
        "projection_dim": tensors["mm.2.weight"].shape[0] if "mm.2.weight" in tensors else LLM_WIDTH,
        "attention.head_count": HEADS,
    } | changed
    for key, value in numbers.items():
        w.add_uint32(f"clip.vision.{key}", int(value))  # type: ignore[call-overload]
    w.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-6)
    w.add_array("clip.vision.image_mean", list(PREPARATION.mean))
    w.add_array("clip.vision.image_std", list(PREPARATION.std))
    w.add_array("clip.vision.feature_layer", [2])
    for name, value in tensors.items():
        w.add_tensor(name, value)
    _write(w)


def _write(w: gguf.GGUFWriter) -> None:
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def tower_rows(kind: str, tensors: dict[str, np.ndarray], pixels: np.ndarray, keep_cls: bool = False) -> np.ndarray:
    """What the LLM should see: float32 [patches (+1), out], CLS first where kept."""
    t = {k: v.astype(np.float64) for k, v in tensors.items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * t[f"{name}.weight"] + t[f"{name}.bias"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    def gelu(x: np.ndarray) -> np.ndarray:
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    image = normalise(pixels, PREPARATION).astype(np.float64)
    grid = SIZE_PX // PATCH_PX
    blocks = image.reshape(3, grid, PATCH_PX, grid, PATCH_PX).transpose(1, 3, 0, 2, 4).reshape(PATCHES, -1)
    x = blocks @ t["v.patch_embd.weight"].reshape(WIDTH, -1).T + t.get("v.patch_embd.bias", 0.0)
    if kind == "clip":
        x = np.concatenate([t["v.class_embd"][None], x])
    x = x + t["v.position_embd.weight"]
    if kind == "clip":
        x = norm(x, "v.pre_ln")
    for i in range(2):
        b = f"v.blk.{i}"
        y = norm(x, f"{b}.ln1")
        q, k, v = (linear(y, f"{b}.attn_{p}").reshape(-1, HEADS, WIDTH // HEADS).transpose(1, 0, 2) for p in "qkv")
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(WIDTH // HEADS)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        y = (weights / weights.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(-1, WIDTH)
        x = x + linear(y, f"{b}.attn_out")
        x = x + linear(gelu(linear(norm(x, f"{b}.ln2"), f"{b}.ffn_up")), f"{b}.ffn_down")
    if kind == "clip" and not keep_cls:
        x = x[1:]
    return linear(gelu(linear(x, "mm.0")), "mm.2").astype(np.float32)


def _record(path: Path) -> FileRecord:
    data = path.read_bytes()
    return FileRecord(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def make_artifact(
    folder: Path,
    kind: str = "siglip",
    llm: Path | None = None,
    keep_cls: bool = False,
    skip_first_token: bool = False,
    template: ConversationTemplate = TEMPLATES["chatml"],
    certificate: bool = True,
    seed: int = 0,
    space_prefix: str = "none",
) -> Artifact:
    """A whole converted folder. `llm` is a real GGUF to be used instead of the random one."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "tiny.gguf"
    if llm is None:
        write_llm(target, seed, spm=space_prefix != "none")
        width, vocab, context = LLM_WIDTH, VOCAB, 4096
    else:
        target.symlink_to(llm)
        reader = gguf.GGUFReader(llm)
        width = int(reader.fields["llama.embedding_length"].parts[-1][0])
        context = int(reader.fields["llama.context_length"].parts[-1][0])
        vocab = next(int(t.shape[1]) for t in reader.tensors if t.name == "token_embd.weight")
    tensors = tower_tensors(kind, width, seed + 1)
    write_tower(folder / "mmproj-tiny.gguf", kind, tensors)
    probe = tower_rows(kind, tensors, probe_pixels(SIZE_PX), keep_cls)[int(skip_first_token) :]
    rows = tuple(tuple(float(x) for x in row) for row in summarise(probe))
    manifest = Manifest(
        name="tiny",
        bits=16,
        created="2026-01-01T00:00:00Z",
        tool_versions={},
        source=SourceRecord(reader="test", path="test", files={}),
        llm=LlmRecord(
            file="tiny.gguf",
            arch="llama",
            quant="F16",
            parameters=1,
            bits_per_weight=16,
            context_length=context,
            vocab_size=vocab,
            embedding_length=width,
        ),
        vision=VisionRecord(
            file="mmproj-tiny.gguf",
            tower=kind,  # type: ignore[arg-type]
            quant="F16",
            parameters=1,
            bits_per_weight=16,
            image_tokens=PATCHES + keep_cls - skip_first_token,
            keep_cls=keep_cls,
            skip_first_token=skip_first_token,
        ),
        files={name: _record(folder / name) for name in ("tiny.gguf", "mmproj-tiny.gguf")},
        image=PREPARATION,
        template=template,
        space_prefix=space_prefix,  # type: ignore[arg-type]
        recipe={},
        tensors=(),
        certificate=Certificate(probe=PROBE_SEED, vision=Summary(rows=rows, tolerance=5e-3)) if certificate else None,
    )
    save_manifest(folder, manifest)
    return Artifact(folder, manifest)
