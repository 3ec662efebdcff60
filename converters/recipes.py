"""Which GGUF type each tensor gets: `--bits 16/8/4`, or types by name.

    recipe = Recipe.of(bits=4)
    types = recipe.llm_types([("blk.0.attn_v.weight", (256, 2048)), ...])     # name → GGMLQuantizationType

At 4 bits the LLM gets llama.cpp's Q4_K_M mixture, tensor by tensor (llama-quant.cpp, `llama_tensor_get_type_impl`). Where a row is
no multiple of 256, K-quants do not exist; llama.cpp then takes Q5_0 for Q4_K, this takes IQ4_NL, which has 4.5 bits as Q4_K has. A model
that was trained with rounding errors gets the very types whose errors those were. Knows shapes, not weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType

from converters.ggml import bits_per_value, block_size
from edgemed.core.errors import RecipeError
from edgemed.core.model import Frozen

Shapes = Iterable[tuple[str, tuple[int, ...]]]

# Types that every backend of llama.cpp multiplies with, that need no importance matrix, and that our reading back knows.
PLAIN = (
    Type.F32,
    Type.F16,
    Type.BF16,
    Type.Q8_0,
    Type.Q6_K,
    Type.Q5_K,
    Type.Q5_1,
    Type.Q5_0,
    Type.Q4_K,
    Type.Q4_1,
    Type.Q4_0,
    Type.IQ4_NL,
    Type.IQ4_XS,
    Type.Q3_K,
    Type.Q2_K,
)
# A mixture's base type; its sensitive tensors are raised to Q6_K.
MIXTURES = {"Q4_K_M": Type.Q4_K, "Q5_K_M": Type.Q5_K}
# `--bits`: (LLM, tower).
BITS = {16: ("F16", "F16"), 8: ("Q8_0", "Q8_0"), 4: ("Q4_K_M", "Q4_K")}
# Where a row does not fill blocks of 256: the block-32 type with the nearest number of bits, not below.
FALLBACK = {
    Type.Q6_K: Type.Q8_0,
    Type.Q5_K: Type.Q5_0,
    Type.Q4_K: Type.IQ4_NL,
    Type.IQ4_XS: Type.IQ4_NL,
    Type.Q3_K: Type.IQ4_NL,
    Type.Q2_K: Type.IQ4_NL,
}
# How much wider a tower's feed-forward may become for blocks of 256.
MAX_PADDING = 1.02
_FLOATS = (Type.F32, Type.F16, Type.BF16)
_FILE_TYPES = {
    "F32": LlamaFileType.ALL_F32,
    "F16": LlamaFileType.MOSTLY_F16,
    "BF16": LlamaFileType.MOSTLY_BF16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
    "Q6_K": LlamaFileType.MOSTLY_Q6_K,
    "Q5_K": LlamaFileType.MOSTLY_Q5_K_S,
    "Q5_K_M": LlamaFileType.MOSTLY_Q5_K_M,
    "Q5_1": LlamaFileType.MOSTLY_Q5_1,
    "Q5_0": LlamaFileType.MOSTLY_Q5_0,
    "Q4_K": LlamaFileType.MOSTLY_Q4_K_S,
    "Q4_K_M": LlamaFileType.MOSTLY_Q4_K_M,
    "Q4_1": LlamaFileType.MOSTLY_Q4_1,
    "Q4_0": LlamaFileType.MOSTLY_Q4_0,
    "IQ4_NL": LlamaFileType.MOSTLY_IQ4_NL,
    "IQ4_XS": LlamaFileType.MOSTLY_IQ4_XS,
    "Q3_K": LlamaFileType.MOSTLY_Q3_K_S,
    "Q2_K": LlamaFileType.MOSTLY_Q2_K,
}


class Recipe(Frozen):
    """The types of both files. `bits` is what was asked for, or what the LLM's type rounds down to."""

    bits: int
    llm: str
    vision: str

    @classmethod
    def of(cls, bits: int | None = None, quant: str | None = None, vision_quant: str | None = None) -> Recipe:
        """From `--bits`, overridden by `--quant TYPE` and `--vision-quant TYPE`. Raises RecipeError."""
        if bits is None and quant is None:
            bits = 4
        if bits is not None and bits not in BITS:
            raise RecipeError(f"Expected --bits 4, 8 or 16, found {bits}.", "Pass one of them, or --quant TYPE.")
        llm = _known(quant, mixtures=True) if quant else BITS[bits or 4][0]
        base = MIXTURES.get(llm) or Type[llm]
        if vision_quant:
            vision = _known(vision_quant, mixtures=False)
        else:
            vision = BITS[bits][1] if bits is not None else base.name
        return cls(bits=int(bits_per_value(base)) if quant else (bits or 4), llm=llm, vision=vision)

    def describe(self) -> dict[str, str]:
        """For the manifest."""
        return {"bits": str(self.bits), "llm": self.llm, "vision": self.vision}

    def llm_types(self, shapes: Shapes, rounded: bool = False) -> dict[str, Type]:
        """Every LLM tensor's type, by GGUF name. `rounded`: as in core/contract.py; an output layer of its own never learnt so."""
        table = dict(shapes)
        base = MIXTURES.get(self.llm) or Type[self.llm]
        layers = sum(1 for name in table if re.fullmatch(r"blk\.\d+\.attn_v\.weight", name))
        tied = "output.weight" not in table
        types = {}
        for name, shape in table.items():
            if _is_small(name, shape):
                types[name] = Type.F32
            elif self.llm == "Q4_K_M" and ((rounded and name != "output.weight") or shape[-1] % block_size(base)):
                types[name] = fitting(_narrow_type(name, layers), shape[-1])
            else:
                types[name] = fitting(self._llm_type(name, base, layers, tied), shape[-1])
        return types

    def _llm_type(self, name: str, base: Type, layers: int, tied: bool) -> Type:
        if base in _FLOATS or base == Type.Q8_0:
            return base
        # llama.cpp quantises tied embeddings as the output that they also are.
        if name == "output.weight" or (tied and name == "token_embd.weight"):
            return Type.Q6_K
        if self.llm in MIXTURES:
            match = re.fullmatch(r"blk\.(\d+)\.(attn_v|ffn_down)\.weight", name)
            if match and _more_bits(int(match[1]), layers):
                return Type.Q6_K
        return base

    def vision_types(self, shapes: Shapes) -> dict[str, Type]:
        """Every tower and projector tensor's type, by GGUF name."""
        base = Type[self.vision]
        return {name: self._vision_type(name, shape, base) for name, shape in shapes}

    def _vision_type(self, name: str, shape: tuple[int, ...], base: Type) -> Type:
        # clip.cpp adds biases, norms and the class embedding in F32 only (the CPU backend aborts on F16).
        if len(shape) == 1 or not name.endswith(".weight"):
            return Type.F32
        if name in ("v.patch_embd.weight", "v.position_embd.weight"):
            # Never quantised: the patch convolution runs in F16 whatever is stored, positions are 0.2 % of a tower.
            return Type.F32 if base == Type.F32 else Type.F16
        if name == "mm.2.weight" and shape[1] == 2 * shape[0] and base not in _FLOATS:
            return fitting(Type.Q4_0, shape[-1])  # [I, -I] of a one-layer projector: exact in it
        if name.startswith("mm.") and base not in _FLOATS:
            # The projector writes straight into the LLM's embedding space: 8 bits cost it 3 MB at TinyLLaVA's size.
            return fitting(Type.Q8_0, shape[-1])
        return fitting(base, shape[-1])

    def padded_ffn(self, width: int) -> int:
        """The feed-forward width to store a tower's with, zeros included, so that the rows of ffn_down fill blocks.

        SigLIP so400m's 4304 becomes 4352 for K-quants and 4320 for types of block 32; a narrow one is not blown up for a K-quant.
        """
        block = block_size(Type[self.vision])
        padded = -(-width // block) * block
        return padded if padded <= width * MAX_PADDING else -(-width // 32) * 32


def fitting(kind: Type, width: int) -> Type:
    """`kind`, or what replaces it where a row of `width` does not fill its blocks; F16 where no block type fits."""
    if width % block_size(kind) == 0:
        return kind
    kind = FALLBACK.get(kind, kind)
    return kind if width % block_size(kind) == 0 else Type.F16


def file_type(quant: str) -> int:
    """`general.file_type` of a file called after this type or mixture."""
    return int(_FILE_TYPES[quant])


def _known(name: str, mixtures: bool) -> str:
    names = [t.name for t in PLAIN] + (list(MIXTURES) if mixtures else [])
    if name.upper() not in names:
        raise RecipeError(f"Expected a type out of {', '.join(names)}, found '{name}'.", "Pass one of them, or --bits 4, 8 or 16.")
    return name.upper()


def _narrow_type(name: str, layers: int) -> Type:
    """4 bits where a row fills no block of 256 (SmolLM2's 576): a mixture in Q4_K_M's spirit, made of types of block 32. Training with
    rounding errors knows this mixture (edgemed/finetune/rounding.py): change both or none.

    Found on edgemed-demo by KL to F16 (docs/LOG.md, 2026-11-22): v, and the first layers' way up into the feed-forward, are what 4 bits
    hurt; embeddings bear 5 bits. About half the divergence of IQ4_NL with llama.cpp's own raised tensors, in fewer bytes.
    """
    match = re.fullmatch(r"blk\.(\d+)\.(attn_v|ffn_up)\.weight", name)
    if match and (match[2] == "attn_v" or int(match[1]) < layers // 8):
        return Type.Q8_0
    return Type.Q5_0 if name in ("output.weight", "token_embd.weight") else Type.IQ4_NL


def _is_small(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) < 2 or not name.endswith(".weight") or "_norm." in name


def _more_bits(layer: int, layers: int) -> bool:
    # llama-quant.cpp, use_more_bits: the first and last eighth, and every third layer between.
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
