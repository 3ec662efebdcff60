"""Text → token ids by transformers' tokenizer, made from what the GGUF will hold, whatever files the checkpoint came with.

    encode = build_encoder(checkpoint.tokenizer)
    ids, answers = encode_turns(encode, checkpoint, turns)      # an image is IMAGE; answers: whether a token is part of an answer

llama.cpp tokenises what users ask; this does the same for text without odd characters. Needs the `train` extra.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gguf import TokenType

from converters.checkpoint import Checkpoint, TokenizerSpec
from converters.tokenizers import BLANK, SPLIT_REGEX
from edgemed.core.conversation import Turn, render, split_chunks

IMAGE = -1
Encoder = Callable[[str], list[int]]


def build_encoder(spec: TokenizerSpec) -> Encoder:
    """A function from text, control tokens spelled out, to ids; without BOS."""
    from transformers import PreTrainedTokenizerFast

    data = _byte_level(spec) if spec.model == "gpt2" else _sentencepiece(spec)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
        tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=str(path))

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    return encode


def encode_turns(encode: Encoder, checkpoint: Checkpoint, turns: Sequence[Turn]) -> tuple[list[int], list[bool]]:
    """(ids, whether each belongs to an answer) of a conversation; an image is one IMAGE."""
    template, spec = checkpoint.template, checkpoint.tokenizer
    ids = [spec.bos_id] if template.bos and spec.bos_id is not None else []
    answers = [False] * len(ids)
    blank = spec.space_prefix in ("first", "chunk")
    for chunk in split_chunks(render(template, turns)):
        if not isinstance(chunk, tuple):
            ids.append(IMAGE)
            answers.append(False)
            continue
        start = BLANK if blank else ""
        blank = spec.space_prefix == "chunk"
        whole = encode(start + "".join(text.text for text in chunk))
        marks: list[bool] = []
        for count, text in enumerate(chunk, start=1):
            # A text ends where the ids of all up to it stop being those of the whole.
            part = whole if count == len(chunk) else encode(start + "".join(t.text for t in chunk[:count]))
            end = next((i for i, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b), min(len(part), len(whole)))
            marks += [text.answer] * (end - len(marks))
        ids += whole
        answers += marks
    return ids, answers


def _added(spec: TokenizerSpec) -> list[dict[str, Any]]:
    kinds = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": i, "content": token, "special": kind != TokenType.USER_DEFINED, **flags}
        for i, (token, kind) in enumerate(zip(spec.tokens, spec.types, strict=True))
        if kind in kinds
    ]


def _byte_level(spec: TokenizerSpec) -> dict[str, Any]:
    regex = SPLIT_REGEX.get(spec.pre)
    steps: list[dict[str, Any]] = []
    if regex:
        steps.append({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False})
    elif spec.pre == "smollm":
        steps.append({"type": "Digits", "individual_digits": True})
    steps.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": regex is None})
    vocab = {token: i for i, token in enumerate(spec.tokens)}
    merges = [merge.split(" ") for merge in spec.merges or () if "".join(merge.split(" ")) in vocab]
    model = {"type": "BPE", "vocab": vocab, "merges": merges}
    return {"version": "1.0", "added_tokens": _added(spec), "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "model": model}


def _sentencepiece(spec: TokenizerSpec) -> dict[str, Any]:
    """Pieces with scores, as merges: the pair that makes the piece of the best score goes first."""
    vocab = {token: i for i, token in enumerate(spec.tokens)}
    scores = spec.scores or [0.0] * len(spec.tokens)
    pieces = sorted((i for i, kind in enumerate(spec.types) if kind == TokenType.NORMAL), key=lambda i: -scores[i])
    merges = [
        [token[:cut], token[cut:]]
        for token in (spec.tokens[i] for i in pieces)
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": BLANK}]
    if spec.space_prefix == "each":
        steps.insert(0, {"type": "Prepend", "prepend": BLANK})
    unknown = None if spec.unk_id is None else spec.tokens[spec.unk_id]
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "byte_fallback": True, "fuse_unk": True, "unk_token": unknown}
    return {"version": "1.0", "added_tokens": _added(spec), "normalizer": {"type": "Sequence", "normalizers": steps}, "model": model}
