"""A tokenizer as transformers reads it, from the spec that the GGUF is written from: both give the same ids.

    save_tokenizer(spec, folder, jinja)         # tokenizer.json, tokenizer_config.json

The way back is `load_tokenizer` (tokenizers.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gguf import TokenType

from converters.checkpoint import TokenizerSpec
from converters.tokenizers import BLANK, SPLIT_REGEX
from edgemed.core.errors import UnsupportedError
from edgemed.core.files import save_text

_MARKED = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
# Texts of any length: the model's context is not the tokenizer's business.
_NO_LIMIT = 1_000_000_000
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def save_tokenizer(spec: TokenizerSpec, folder: Path, chat_template: str) -> None:
    """Write it. Raises UnsupportedError for a splitting rule that has no counterpart."""
    save_text(folder / "tokenizer.json", json.dumps(tokenizer_json(spec), ensure_ascii=False))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": _NO_LIMIT,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": spec.add_bos,
        "add_prefix_space": spec.add_space_prefix,
        "chat_template": chat_template,
    }
    ids = {"bos_token": spec.bos_id, "eos_token": spec.eos_id, "unk_token": spec.unk_id, "pad_token": spec.pad_id}
    config |= {key: spec.tokens[i] for key, i in ids.items() if i is not None}
    save_text(folder / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=1))


def tokenizer_json(spec: TokenizerSpec) -> dict[str, Any]:
    """The content of tokenizer.json."""
    used = {token: i for i, (token, kind) in enumerate(zip(spec.tokens, spec.types, strict=True)) if kind != TokenType.UNUSED}
    parts = _sentencepiece(spec, used) if spec.model == "llama" else _byte_level(spec, used)
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": _added(spec), "post_processor": None, **parts}


def _added(spec: TokenizerSpec) -> list[dict[str, Any]]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": i, "content": token, **plain, "special": kind != TokenType.USER_DEFINED}
        for i, (token, kind) in enumerate(zip(spec.tokens, spec.types, strict=True))
        if kind in _MARKED
    ]


def _byte_level(spec: TokenizerSpec, used: dict[str, int]) -> dict[str, Any]:
    steps: dict[str, Any] = {
        "smollm": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, {**_BYTE_LEVEL, "use_regex": True}],
        },
        "gpt-2": {**_BYTE_LEVEL, "use_regex": True},
        "phi-2": {**_BYTE_LEVEL, "use_regex": True},
    }
    if spec.pre in SPLIT_REGEX:
        split = {"type": "Split", "pattern": {"Regex": SPLIT_REGEX[spec.pre]}, "behavior": "Isolated", "invert": False}
        steps[spec.pre] = {"type": "Sequence", "pretokenizers": [split, {**_BYTE_LEVEL, "use_regex": False}]}
    if spec.pre not in steps:
        raise UnsupportedError(
            f"Expected a splitting rule out of {', '.join([*steps, *SPLIT_REGEX])}, found '{spec.pre}'.",
            "Copy the tokenizer of the original checkpoint instead.",
        )
    model = _bpe(used, [merge.split(" ", 1) for merge in spec.merges or []], unknown=None, bytes_too=False)
    return {"normalizer": None, "pre_tokenizer": steps[spec.pre], "decoder": {**_BYTE_LEVEL, "use_regex": True}, "model": model}


def _sentencepiece(spec: TokenizerSpec, used: dict[str, int]) -> dict[str, Any]:
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
    prepend = {"type": "Prepend", "prepend": BLANK}
    scheme = {"first": "first", "chunk": "first", "none": "never"}
    decoder: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": BLANK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if spec.space_prefix != "none":
        decoder.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    each = spec.space_prefix == "each"
    meta = None if each else {"type": "Metaspace", "replacement": BLANK, "prepend_scheme": scheme[spec.space_prefix], "split": False}
    model = _bpe(used, _merges(spec, used), None if spec.unk_id is None else spec.tokens[spec.unk_id], bytes_too=True)
    return {
        "normalizer": {"type": "Sequence", "normalizers": [prepend, replace]} if each else None,
        "pre_tokenizer": meta,
        "decoder": {"type": "Sequence", "decoders": decoder},
        "model": model,
    }


def _merges(spec: TokenizerSpec, used: dict[str, int]) -> list[list[str]]:
    """Pairs in the order in which SentencePiece joins them: by the score of what they make, then from the left."""
    scores = spec.scores or [0.0] * len(spec.tokens)
    found = []
    for token, i in used.items():
        if spec.types[i] != TokenType.NORMAL:
            continue
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token)) if token[:cut] in used and token[cut:] in used]
        found += [(-scores[i], i, used[left], used[right], left, right) for left, right in pairs]
    return [[left, right] for *_, left, right in sorted(found)]


def _bpe(vocabulary: dict[str, int], merges: list[list[str]], unknown: str | None, bytes_too: bool) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": bytes_too,
        "byte_fallback": bytes_too,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": merges,
    }
