"""`edgemed ask`: one question, one streamed answer."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from edgemed.cli.compose import TEXT_TOKENS, open_view, prepare_view, require_artifact
from edgemed.cli.options import (
    Context,
    FrameNumber,
    Images,
    Json,
    LoadDevice,
    MaxTokens,
    Model,
    Question,
    Quiet,
    Seed,
    Temperature,
    WindowText,
)
from edgemed.cli.output import ADVICE, Output

if TYPE_CHECKING:
    from edgemed.clinic.records import View
    from edgemed.core.manifest import Artifact
    from runtimes.engine import Engine
    from runtimes.messages import Finished, PreparedImage, Sampling


def ask(
    question: Question,
    image: Images = None,
    frame: FrameNumber = 0,
    window: WindowText = None,
    model: Model = None,
    max_tokens: MaxTokens = 256,
    context: Context = None,
    device: LoadDevice = None,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Ask one question, about images where some are given. The answer advises and never replaces a clinician."""
    from edgemed.cli.plan import make_wish
    from edgemed.clinic.store.harden import forbid_core_files
    from edgemed.core.errors import InputError
    from runtimes.messages import Sampling
    from runtimes.opening import load_target, open_planned

    out = Output(json=json, quiet=quiet)
    if not question.strip():
        raise InputError("Expected a question, found an empty text.", 'Ask something, as in: edgemed ask "Is there a fracture?" --image X')
    forbid_core_files()  # the engine's, too: the image may be a patient's
    target = load_target(device)
    artifact = require_artifact(model, out)
    seen = [open_view(path, read_view(frame, window), out) for path in image or []]  # a bad image is told before a model is loaded
    images = tuple(prepare_view(pixels, artifact) for pixels, _ in seen)
    if not images:
        out.warn("No image was given: the model answers from the words alone.")
    needed = len(images) * artifact.manifest.vision.image_tokens + TEXT_TOKENS if len(images) > 1 else 0
    engine, plan = open_planned(artifact, target, make_wish(context=context, least_context=needed), out.note)
    with engine:
        finished = stream_answer(engine, question, images, Sampling(temperature=temperature, seed=seed), max_tokens, out)
    out.advise()
    settings = {"context_tokens": plan.settings.context_tokens, "kv_type": plan.settings.kv_type, "gpu_layers": plan.settings.gpu_layers}
    shown = [describe_seen(prepared, view) for prepared, (_, view) in zip(images, seen, strict=True)]
    answer = describe_answer(artifact, question, finished)
    out.result(answer | {"images": shown, "device": target.profile.name, "settings": settings})


def read_view(frame: int, window: str | None) -> View:
    """--frame and --window. Raises InputError."""
    from edgemed.clinic.imaging import parse_window
    from edgemed.clinic.records import View

    return View(frame=frame, window=None if window is None else parse_window(window))


def describe_seen(prepared: PreparedImage, view: View) -> dict[str, object]:
    """An image in a result: how it was shown, and the hash of the very pixels that the tower was given."""
    from hashlib import sha256

    window = asdict(view.window) if view.window else None
    return {"frame": view.frame, "window": window, "pixels_sha256": sha256(prepared.pixels).hexdigest()}


def stream_answer(
    engine: Engine, question: str, images: tuple[PreparedImage, ...], sampling: Sampling, max_tokens: int, out: Output
) -> Finished:
    """Ask and print tokens as they come. Raises what the engine failed with."""
    from runtimes.consult import Consultation, follow, plan_request

    planned = plan_request(engine, Consultation(question, images), sampling, max_tokens)
    try:
        answer = follow(engine.submit(planned.request), engine.artifact.manifest.template, lambda text: out.text(text, end=""))
    except (KeyboardInterrupt, SystemExit):  # what was printed so far stands on its line, and under the advice
        out.text("")
        out.advise()
        raise
    if answer.finished is None:
        raise answer.error or AssertionError("an answer has ended well or with an error")
    out.text("")
    return answer.finished


def describe_answer(artifact: Artifact, question: str, finished: Finished) -> dict[str, object]:
    """An answer in a result."""
    from edgemed.core.conversation import clean_answer

    return {
        "question": question,
        "answer": clean_answer(artifact.manifest.template, finished.text),
        "reason": finished.reason,
        "model": artifact.manifest.name,
        "artifact": artifact.folder,
        "usage": asdict(finished.usage),
        "timings": asdict(finished.timings),
        "advice": ADVICE,
    }
