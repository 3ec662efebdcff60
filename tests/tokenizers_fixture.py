"""Small real tokenizers, trained on a few sentences: byte-level BPE in each family's splitting, and a SentencePiece-like one.

size = save_tokenizer(folder, "llama")      # tokenizer.json and tokenizer_config.json; the number of tokens
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEXTS = [
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers",
    "to the user's questions. USER: ASSISTANT: What is shown in this image? Is there a fracture of the left femur? No, it's normal.",
    "Does the chest radiograph show cardiomegaly, pleural effusion or 3 nodules of 12.5 mm? Yes. The lungs are clear bilaterally.",
    "\n\nDescribe the image.\nThe liver is enlarged (17 cm); don't know, we'll see: they've asked, I'm sure you're right!\n",
    "L'œdème pulmonaire est visible - ça va? Die Lunge ist größer. 5 10 15 20 25 100 2024 %&/()=",
]
REGEX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SIZE = 420
_CHAT = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def save_tokenizer(folder: Path, family: str, *, normalizer: str = "legacy") -> int:
    """Write a family's tokenizer. `normalizer` (SentencePiece-like ones): legacy, first or never."""
    folder.mkdir(parents=True, exist_ok=True)
    data, config = _sentencepiece(normalizer) if family in ("llama", "mistral") else _byte_level(family)
    (folder / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return 1 + max([*data["model"]["vocab"].values(), *(t["id"] for t in data["added_tokens"])])


def _byte_level(family: str) -> tuple[dict[str, Any], dict[str, Any]]:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(REGEX), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ])  # fmt: skip
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = {"qwen2": split, "stablelm": split, "smollm": digits, "phi": plain}[family]
    if family == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    special = _CHAT[:1] if family == "phi" else _CHAT
    first = special if family == "smollm" else []
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE, special_tokens=first, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    tokenizer.add_special_tokens(special)
    eos = {"qwen2": "<|im_end|>", "smollm": "<|im_end|>"}.get(family, "<|endoftext|>")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "pad_token": "<|endoftext|>", "add_prefix_space": False}
    if family == "smollm":
        config["bos_token"] = "<|im_start|>"
        config["add_bos_token"] = False
    return json.loads(tokenizer.to_str()), config


def _sentencepiece(normalizer: str) -> tuple[dict[str, Any], dict[str, Any]]:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator([t.replace("\n", "") for t in TEXTS] * 4, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    learned = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    words = [token for token, _ in learned if len(token) > 1]
    characters = sorted({token for token, _ in learned if len(token) == 1} | {"▁"})
    special = ["<unk>", "<s>", "</s>"]
    # sentencepiece's order: control, bytes, merged pieces by score, characters
    pieces = special + [f"<0x{i:02X}>" for i in range(256)] + words + characters
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [
        (word[:i], word[i:])
        for word in words
        for i in sorted(range(1, len(word)), key=lambda i: (vocab.get(word[:i], 0), vocab.get(word[i:], 0)))
        if word[:i] in vocab and word[i:] in vocab
    ]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": normalizer, "split": False}
    bos = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    data = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [
            {"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
            for i, t in enumerate(special)
        ],
        "normalizer": prepend if normalizer == "legacy" else None,
        "pre_tokenizer": None if normalizer == "legacy" else metaspace,
        "post_processor": {
            "type": "TemplateProcessing", "single": bos, "pair": [*bos, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": True, "byte_fallback": True, "ignore_merges": False, "vocab": vocab, "merges": [list(m) for m in merges],
        },
    }  # fmt: skip
    config = {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True,
        "add_eos_token": False, "legacy": normalizer == "legacy", "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    return data, config
