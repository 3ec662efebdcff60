"""Tokenizers in GGUF: from a checkpoint's files, to metadata, and back from a GGUF.

    spec = load_tokenizer(folder, rows=32064, arch="llama", apart=False)
    tokenizer_metadata(spec, template)
    spec = tokenizer_from_gguf(fields, rows)

Byte-level BPE (GGUF's "gpt2") and SentencePiece-like BPE with byte fallback (GGUF's "llama") are known; read as JSON or, for a
lone tokenizer.model, as its protobuf. Nothing is tokenised here: llama.cpp does that, so a tokenizer whose splitting rule llama.cpp
does not have is refused.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from gguf import Keys, TokenType

from converters.checkpoint import TokenizerSpec
from converters.metadata import Metadata, boolean, f32s, i32s, text, texts, u32
from converters.sentencepiece_file import load_sentencepiece
from edgemed.core.conversation import ConversationTemplate, to_jinja
from edgemed.core.errors import CheckpointError, InputError, UnsupportedError
from edgemed.core.files import os_errors

Space = Literal["none", "first", "chunk", "each"]
_Read = TypeVar("_Read")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
BLANK = "▁"
FILL_SCORE, ADDED_SCORE = -10000.0, -1000.0

# llama.cpp's rule for splitting text → the regular expressions of tokenizer.json that mean it.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REGEX_PRE = {_CONTRACTIONS + r"\p{N}" + _TAIL: "qwen2", _CONTRACTIONS + r"\p{N}{1,3}" + _TAIL: "llama-bpe"}
# The same rule under the name that belongs to an architecture (other clean-up of blanks).
_ARCH_PRE = {("qwen2", "stablelm"): "stablelm2", ("gpt-2", "phi2"): "phi-2"}
# The way back: rules that are a regular expression.
SPLIT_REGEX = {pre: regex for regex, pre in _REGEX_PRE.items()} | {"stablelm2": _CONTRACTIONS + r"\p{N}" + _TAIL}
# vocab.json and merges.txt alone do not say how text is split; these families have one way each.
_FAMILY_PRE = {"phi2": "phi-2", "qwen2": "qwen2", "stablelm": "stablelm2"}


@dataclass
class _Parts:
    """A tokenizer as read, before it is laid out by id."""

    model: Literal["llama", "gpt2"]
    pre: str
    pieces: dict[int, tuple[str, int, float]]  # id → text, type, score
    merges: list[str] | None = None
    added: dict[int, tuple[str, bool]] = field(default_factory=dict)  # id → text, special
    space: Space = "none"
    adds_bos: bool | None = None
    unknown: str | None = None


def load_tokenizer(folder: Path, rows: int, arch: str, apart: bool, pre: str | None = None) -> TokenizerSpec:
    """The tokenizer in `folder`, filled up to the embedding's `rows`.

    apart: this layout's own code tokenises the text around an image in separate calls (all but HF's processor).
    pre: llama.cpp's name of the splitting rule, where the table below does not know it.
    Raises CheckpointError where files are missing or damaged or ids exceed the embedding, UnsupportedError for an unknown kind.
    """
    return _damaged(folder, lambda: _load_tokenizer(folder, rows, arch, apart, pre))


def _load_tokenizer(folder: Path, rows: int, arch: str, apart: bool, pre: str | None) -> TokenizerSpec:
    config = _json(folder / "tokenizer_config.json")
    parts = _read_parts(folder, arch, pre)
    added = {**_added_by_name(folder), **parts.added}
    added |= {int(i): (str(t["content"]), bool(t.get("special"))) for i, t in config.get("added_tokens_decoder", {}).items()}
    if parts.space == "each" and not (folder / "tokenizer.json").is_file() and config.get("legacy") is False:
        parts.space = "first"
    space = parts.space if config.get("add_prefix_space") is not False or parts.model == "gpt2" else "none"
    spec = _lay_out(parts, added, rows, folder)
    ids = {token: i for i, token in reversed(list(enumerate(spec.tokens)))}
    special = {**_json(folder / "special_tokens_map.json"), **{k: v for k, v in config.items() if v is not None}}

    def find(key: str, default: str | None = None) -> int | None:
        value = special.get(key, default)
        return ids.get(str(value["content"] if isinstance(value, dict) else value))

    bos_default, eos_default = ("<s>", "</s>") if parts.model == "llama" else (None, None)
    bos, eos = find("bos_token", bos_default), find("eos_token", eos_default)
    add_bos = first_bool(config.get("add_bos_token"), parts.adds_bos, parts.model == "llama")
    end_of_turn = ids.get("<|im_end|>")
    return TokenizerSpec(
        model=parts.model,
        pre=parts.pre,
        tokens=spec.tokens,
        types=spec.types,
        scores=spec.scores if parts.model == "llama" else None,
        merges=parts.merges if parts.model == "gpt2" else None,
        bos_id=bos,
        eos_id=eos,
        unk_id=find("unk_token", parts.unknown),
        pad_id=find("pad_token"),
        add_bos=add_bos and bos is not None,
        add_space_prefix=space != "none",
        space_prefix="chunk" if space == "first" and apart else space,
        eot_id=end_of_turn if end_of_turn != eos else None,
    )


def first_bool(*values: object) -> bool:
    """The first value that is a bool."""
    return next(v for v in values if isinstance(v, bool))


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    with os_errors(path):
        raw = path.read_bytes()
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"Expected JSON in {path}, found something else ({error}).", "Copy or download the file again.") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"Expected a JSON object in {path}, found {type(data).__name__}.", "Copy or download the file again.")
    return data


def _added_by_name(folder: Path) -> dict[int, tuple[str, bool]]:
    return {int(i): (name, looks_special(name)) for name, i in _json(folder / "added_tokens.json").items()}


def looks_special(token: str) -> bool:
    """Tokens that steer a model though their files do not mark them (llama.cpp's own rule)."""
    return token == "<pad>" or (token.startswith("<|") and token.endswith("|>"))


def _read_parts(folder: Path, arch: str, pre: str | None) -> _Parts:
    if (folder / "tokenizer.json").is_file():
        return _damaged(folder / "tokenizer.json", lambda: _from_json(_json(folder / "tokenizer.json"), arch, pre, folder))
    if (folder / "tokenizer.model").is_file():
        return _damaged(folder / "tokenizer.model", lambda: _from_protobuf(folder / "tokenizer.model"))
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        name = pre or _FAMILY_PRE.get(arch)
        if name is None:
            raise UnsupportedError(
                f"Expected tokenizer.json in {folder} for this family, found only vocab.json.", "Save the fast tokenizer beside it."
            )
        with os_errors(folder / "merges.txt"):
            raw = (folder / "merges.txt").read_bytes()
        lines = _damaged(folder / "merges.txt", raw.decode).split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
        return _Parts("gpt2", name, {i: (t, int(TokenType.NORMAL), 0.0) for t, i in _json(folder / "vocab.json").items()}, merges)
    raise CheckpointError(
        f"Expected tokenizer.json or tokenizer.model in {folder}, found neither.", "Copy the tokenizer's files into the folder."
    )


def _damaged(path: Path, read: Callable[[], _Read]) -> _Read:
    try:
        return read()
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError, struct.error) as error:
        raise CheckpointError(
            f"Expected a tokenizer in {path}, found a damaged file ({error}).", "Copy or download the file again."
        ) from error


def _choose_pre(steps: list[dict[str, Any]], arch: str, pre: str | None, folder: Path) -> str:
    """The checkpoint's own rule; `pre` where it is none that is known, never instead of a known one: other tokens would be made."""
    try:
        known = _find_pre(steps, arch, folder)
    except UnsupportedError:
        if pre is None:
            raise
        return pre
    if pre not in (None, known):
        raise InputError(f"Expected no --pre for {folder}, whose splitting rule is known ('{known}'), found '{pre}'.", "Leave it out.")
    return known


def _from_json(data: dict[str, Any], arch: str, pre: str | None, folder: Path) -> _Parts:
    model = data["model"]
    if model.get("type", "BPE") != "BPE":
        raise UnsupportedError(f"Expected a BPE tokenizer in {folder}, found {model['type']}.", "Only BPE tokenizers convert.")
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    added = {int(t["id"]): (str(t["content"]), bool(t.get("special"))) for t in data.get("added_tokens") or []}
    steps = list(_steps(data.get("normalizer"))) + list(_steps(data.get("pre_tokenizer")))
    if any(step["type"] == "ByteLevel" for step in steps):
        pieces = {int(i): (t, int(TokenType.NORMAL), 0.0) for t, i in model["vocab"].items()}
        parts = _Parts("gpt2", _choose_pre(steps, arch, pre, folder), pieces, merges, added)
    else:
        ranks: dict[str, float] = {}
        for rank, merge in enumerate(merges):
            left, right = merge.split(" ")
            ranks.setdefault(left + right, -float(rank))
        pieces = {int(i): (t, _piece_type(t, model.get("unk_token")), ranks.get(t, -float(len(merges)))) for t, i in model["vocab"].items()}
        parts = _Parts("llama", "default", pieces, None, added, _space_of(steps), unknown=model.get("unk_token"))
    parts.adds_bos = _template_adds_bos(data.get("post_processor"))
    return parts


def _steps(node: Any) -> Iterator[dict[str, Any]]:
    """A normalizer's or pre-tokenizer's steps, with nested sequences laid flat."""
    if not isinstance(node, dict):
        return
    nested = node.get("normalizers") or node.get("pretokenizers") or node.get("processors")
    if node.get("type") == "Sequence":
        for child in nested or []:
            yield from _steps(child)
    else:
        yield node


def _find_pre(steps: list[dict[str, Any]], arch: str, folder: Path) -> str:
    kinds = [step["type"] for step in steps if step["type"] not in ("NFC", "ByteLevel")]
    regex = next((step["pattern"].get("Regex") for step in steps if step["type"] == "Split"), None)
    by_level = next(step for step in steps if step["type"] == "ByteLevel")
    name: str | None = None
    if kinds == ["Split"]:
        name = _REGEX_PRE.get(str(regex))
    elif kinds == ["Digits"] and next(s for s in steps if s["type"] == "Digits").get("individual_digits"):
        name = "smollm"
    elif not kinds and by_level.get("use_regex", True):
        name = "gpt-2"
    if name is None:
        raise UnsupportedError(
            f"Expected a tokenizer whose splitting rule llama.cpp has in {folder}, found {kinds} with {regex!r}.",
            "Name llama.cpp's rule with --pre, if you know that it is the same.",
        )
    return _ARCH_PRE.get((name, arch), name)


def _space_of(steps: list[dict[str, Any]]) -> Space:
    for step in steps:
        if step["type"] == "Prepend":
            return "each"
        if step["type"] == "Metaspace":
            scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
            schemes: dict[str, Space] = {"always": "each", "first": "first", "never": "none"}
            return schemes[scheme]
    return "none"


def _template_adds_bos(node: Any) -> bool | None:
    for step in _steps(node):
        if step["type"] == "TemplateProcessing":
            return bool(step["single"]) and "SpecialToken" in step["single"][0]
    return None


def _piece_type(token: str, unknown: str | None) -> int:
    if token == unknown:
        return int(TokenType.UNKNOWN)
    is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return int(TokenType.BYTE if is_byte else TokenType.NORMAL)


def _from_protobuf(path: Path) -> _Parts:
    model = load_sentencepiece(path)
    unknown = next((token for token, kind, _ in model.pieces.values() if kind == TokenType.UNKNOWN), None)
    return _Parts("llama", "default", model.pieces, space="each" if model.leading_blank else "none", unknown=unknown)


@dataclass(frozen=True)
class _Layout:
    tokens: list[str]
    types: list[int]
    scores: list[float]


def _lay_out(parts: _Parts, added: Mapping[int, tuple[str, bool]], rows: int, folder: Path) -> _Layout:
    if not parts.pieces:
        raise CheckpointError(f"Expected a vocabulary in {folder}, found an empty one.", "Copy or download the tokenizer again.")
    last = max([*parts.pieces, *added])
    if min([*parts.pieces, *added]) < 0:
        raise CheckpointError(f"Expected token ids of at least 0 in {folder}, found others.", "Copy or download the tokenizer again.")
    if last >= rows:
        raise CheckpointError(
            f"Expected token ids below the embedding's {rows} rows in {folder}, found {last}.",
            "Check that the tokenizer belongs to this model.",
        )
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types, scores = [int(TokenType.UNUSED)] * rows, [FILL_SCORE] * rows
    for i, (token, kind, score) in parts.pieces.items():
        tokens[i], types[i], scores[i] = token, kind, score
    for i, (token, special) in added.items():
        control = special or looks_special(token)
        if types[i] != TokenType.UNKNOWN:
            types[i] = int(TokenType.CONTROL if control else TokenType.USER_DEFINED)
        tokens[i] = token if control else token.replace(BLANK, " ")  # llama.cpp looks for it in the text as it is
        scores[i] = ADDED_SCORE
    return _Layout(tokens, types, scores)


def tokenizer_metadata(spec: TokenizerSpec, template: ConversationTemplate) -> Metadata:
    """The keys of tokenizer.*, with the conversation template as Jinja."""
    keys: Metadata = {
        Keys.Tokenizer.MODEL: text(spec.model),
        Keys.Tokenizer.PRE: text(spec.pre),
        Keys.Tokenizer.LIST: texts(spec.tokens),
        Keys.Tokenizer.TOKEN_TYPE: i32s(spec.types),
        # as our own prompts have it, so that foreign programs agree
        Keys.Tokenizer.ADD_BOS: boolean(template.bos and spec.bos_id is not None),
        Keys.Tokenizer.ADD_PREFIX: boolean(spec.add_space_prefix),
        Keys.Tokenizer.CHAT_TEMPLATE: text(to_jinja(template)),
    }
    if spec.scores is not None:
        keys[Keys.Tokenizer.SCORES] = f32s(spec.scores)
    if spec.merges is not None:
        keys[Keys.Tokenizer.MERGES] = texts(spec.merges)
    ids = {
        Keys.Tokenizer.BOS_ID: spec.bos_id,
        Keys.Tokenizer.EOS_ID: spec.eos_id,
        Keys.Tokenizer.UNK_ID: spec.unk_id,
        Keys.Tokenizer.PAD_ID: spec.pad_id,
        Keys.Tokenizer.EOT_ID: spec.eot_id,
    }
    return keys | {key: u32(value) for key, value in ids.items() if value is not None}


_ID_KEYS = (Keys.Tokenizer.BOS_ID, Keys.Tokenizer.EOS_ID, Keys.Tokenizer.UNK_ID, Keys.Tokenizer.PAD_ID, Keys.Tokenizer.EOT_ID)


def _id(value: Any, rows: int) -> int | None:
    return value if isinstance(value, int) and 0 <= value < rows else None


def tokenizer_from_gguf(fields: Mapping[str, Any], rows: int, where: Path) -> TokenizerSpec:
    """The way back. Raises CheckpointError where keys are missing or the list has not `rows` tokens."""
    model = fields.get(Keys.Tokenizer.MODEL)
    tokens = fields.get(Keys.Tokenizer.LIST, [])
    if not isinstance(model, str) or model not in ("llama", "gpt2"):
        raise UnsupportedError(f"Expected a tokenizer 'llama' or 'gpt2' in {where}, found {model!r}.", "Only these convert.")
    lists = [fields.get(key, []) for key in (Keys.Tokenizer.TOKEN_TYPE, Keys.Tokenizer.SCORES, Keys.Tokenizer.MERGES)]
    if not all(isinstance(items, list) for items in (tokens, *lists)) or not all(isinstance(t, str) for t in (*tokens, *lists[2])):
        raise CheckpointError(f"Expected lists of tokens, types, scores and merges in {where}, found others.", "Get the file again.")
    if len(tokens) != rows or any(items and len(items) != rows for items in lists[:2]):
        raise CheckpointError(f"Expected {rows} tokens with types and scores in {where}, found {len(tokens)}.", "Get the file again.")
    spm = model == "llama"
    space = bool(fields.get(Keys.Tokenizer.ADD_PREFIX, True)) if spm else False
    ids = {key: _id(fields.get(key), rows) for key in _ID_KEYS}
    return TokenizerSpec(
        model="llama" if spm else "gpt2",
        pre=str(fields.get(Keys.Tokenizer.PRE, "default")),
        tokens=tokens,
        types=[int(t) for t in fields.get(Keys.Tokenizer.TOKEN_TYPE, [TokenType.NORMAL] * rows)],
        scores=[float(s) for s in fields.get(Keys.Tokenizer.SCORES, [0.0] * rows)] if spm else None,
        merges=None if spm else list(fields.get(Keys.Tokenizer.MERGES, [])),
        bos_id=ids[Keys.Tokenizer.BOS_ID],
        eos_id=ids[Keys.Tokenizer.EOS_ID],
        unk_id=ids[Keys.Tokenizer.UNK_ID],
        pad_id=ids[Keys.Tokenizer.PAD_ID],
        add_bos=bool(fields.get(Keys.Tokenizer.ADD_BOS, spm)),
        add_space_prefix=space,
        space_prefix="each" if space else "none",
        eot_id=ids[Keys.Tokenizer.EOT_ID],
    )
