"""Any GGUF language model, without a tower, in the same engine: a judge, for one.

    with open_text_model(Path("judge.gguf"), system="You judge answers.", settings=EngineSettings(context_tokens=8192)) as engine:
        engine.ask("Which answer is better? …")

The conversation is written by the file's own chat template (Jinja, in a sandbox); strings that this template uses as marks are broken up
in what is asked, so that no answer that is quoted there can end the turn. The system text is fixed when the model is opened. There is
no manifest to check such a file against: what llama.cpp refuses to load is an error, what it loads is taken as it is.
"""

from __future__ import annotations

import re
from pathlib import Path

from edgemed.core.conversation import ConversationTemplate
from edgemed.core.errors import ArtifactError
from edgemed.core.images import ImagePreparation
from edgemed.core.manifest import Artifact, LlmRecord, Manifest, SourceRecord, VisionRecord
from runtimes import libllama
from runtimes.engine import Engine
from runtimes.gguf_header import Header, read_header
from runtimes.messages import EngineSettings

# Stand for the texts while the template is read; no template contains them.
_SYSTEM, _USER = "\u2063system\u2063", "\u2063user\u2063"
# <|im_end|>, </s>, <start_of_turn>, [INST], [/INST], and <｜…｜> with DeepSeek's wide bars.
_MARK = re.compile(r"<[|｜/]?[\w▁]+(?:[ _-]\w+)*[|｜]?>|\[/?[A-Z_]{2,}\]")


def open_text_model(path: Path, system: str, settings: EngineSettings | None = None) -> Engine:
    """Load a GGUF. Raises ArtifactError for a file that is none, EngineLoadError or …MemoryError, EngineDiedError."""
    header = read_header(path, libllama.tensor_bytes)
    return Engine.open_text(_artifact(path, header, derive_template(header, system)), settings)


def derive_template(header: Header, system: str) -> ConversationTemplate:
    """The file's chat template for one question under a fixed system text. Without a template, both as plain text.

    A template that knows no system message, or drops it, has it in front of the question. Raises ArtifactError.
    """
    source = header.values.get("tokenizer.chat_template")
    bos = _adds_bos(header, source if isinstance(source, str) else "")
    if not isinstance(source, str):
        return _template(bos, f"{system}\n\n", "\n", frozenset())
    text = _render(source, [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}])
    if text is None or _SYSTEM not in text or _USER not in text:
        text = _render(source, [{"role": "user", "content": f"{_SYSTEM}\n\n{_USER}"}])
    if text is None or _SYSTEM not in text or _USER not in text:
        raise ArtifactError(
            f"Expected a chat template that writes a user's message in {header.path.name}, found one that does not.", "Use another model."
        )
    before, after = text.split(_USER, 1)
    return _template(bos, before.replace(_SYSTEM, system), after, frozenset(_MARK.findall(source)))


def _render(source: str, messages: list[dict[str, str]]) -> str | None:
    """The template's text, None where it refuses these messages. It is somebody else's program: a sandbox runs it."""
    from jinja2 import TemplateError
    from jinja2.exceptions import TemplateRuntimeError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateRuntimeError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.globals.update(raise_exception=refuse, strftime_now=lambda form: "")
    try:
        # BOS is a token and comes by its id.
        return environment.from_string(source).render(messages=messages, add_generation_prompt=True, bos_token="", eos_token="")
    except (TemplateError, TypeError, ValueError):
        return None


def _adds_bos(header: Header, source: str) -> bool:
    told = header.values.get("tokenizer.ggml.add_bos_token")
    if isinstance(told, bool):
        return told
    return "bos_token" in source or header.values.get("tokenizer.ggml.model") == "llama"


def _template(bos: bool, before: str, after: str, marks: frozenset[str]) -> ConversationTemplate:
    return ConversationTemplate(
        name="gguf",
        bos=bos,
        system=before,
        user_prefix="",
        user_suffix=after,
        assistant_prefix="",
        answer_suffix="",
        control=tuple(sorted(marks)),
    )


def _artifact(path: Path, header: Header, template: ConversationTemplate) -> Artifact:
    """What the engine wants to know, from the file alone. The tower's part stands for none and is never read."""
    arch = str(header.values.get("general.architecture"))
    numbers = [header.values.get(f"{arch}.{name}") for name in ("context_length", "embedding_length")]
    embedding = header.tensors.get("token_embd.weight")
    if not all(isinstance(n, int) and 0 < n < 1 << 31 for n in numbers) or embedding is None:
        raise ArtifactError(f"Expected a language model in {path.name}, found '{arch}' without its sizes.", "Name another GGUF file.")
    context, width = (int(str(n)) for n in numbers)
    llm = LlmRecord(
        file=path.name,
        arch=arch,
        quant="",
        parameters=0,
        bits_per_weight=0.0,
        context_length=context,
        vocab_size=embedding.shape[-1],
        embedding_length=width,
    )
    manifest = Manifest(
        name=path.stem,
        bits=0,
        created="",
        tool_versions={},
        source=SourceRecord(reader="gguf", path=str(path), files={}),
        llm=llm,
        vision=VisionRecord(file="", tower="siglip", quant="", parameters=0, bits_per_weight=0.0, image_tokens=1),
        files={},
        image=ImagePreparation(size_px=1, mode="pad", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        template=template,
        # llama.cpp puts SentencePiece's blanks where the file says so.
        space_prefix="each",
        recipe={},
        tensors=(),
    )
    return Artifact(path.parent, manifest)
