"""`edgemed demo`: the whole way on the embedded model, from its source to an answer about a radiograph, in about a minute."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

from edgemed.cli.ask import describe_answer, stream_answer
from edgemed.cli.compose import DEMO_BITS, SourceOptions, convert_source, engine_settings, prepare_images
from edgemed.cli.convert import describe_artifact, run_verify, show_card
from edgemed.cli.options import Json, Quiet
from edgemed.cli.output import Output

QUESTIONS = ("What modality is used to take this image?", "Is this a study of the chest?", "Is there an abnormality in this image?")
_DEMO = Path(__file__).parents[1] / "demo"


def demo(json: Json = False, quiet: Quiet = False) -> None:
    """Convert edgemed-demo at 4 bits, verify it, ask about a bundled radiograph, and show memory and speed."""
    from bench.measure import measure_artifact, on_gpu
    from bench.render import rows_of
    from converters.recipes import Recipe
    from edgemed.core.registry import DEFAULT_MODEL, load_registry, locate_sources
    from edgemed.core.units import format_duration
    from runtimes.devices import find_device
    from runtimes.engine import Engine
    from runtimes.libllama import has_gpu_library
    from runtimes.memory import read_gpu
    from runtimes.messages import Sampling

    out = Output(json=json, quiet=quiet)
    begun = time.monotonic()
    locate_sources(load_registry().find(DEFAULT_MODEL))  # what is missing is told before anything is made
    image = demo_image()
    artifact = convert_source(None, SourceOptions(), Recipe.of(bits=DEMO_BITS), out)
    show_card(artifact, out)
    parity = run_verify(artifact, out)
    answers = []
    images = prepare_images([image], artifact)
    out.text(f"Image: {image}")
    with Engine.open(artifact, engine_settings(artifact)) as engine:
        for question in QUESTIONS:
            out.text(f"Question: {question}\nAnswer: ", end="")
            finished = stream_answer(engine, question, images, Sampling(), 64, out)
            answers.append(describe_answer(artifact, question, finished))
    out.advise()
    # What has just answered; a GPU that NVML does not know (an Apple one) has no memory to be told, so that the CPU is measured there.
    profile = find_device("gpu" if on_gpu(engine.report.devices) and has_gpu_library() and read_gpu() else "cpu")
    trace = measure_artifact(artifact, profile, questions=3)
    out.table("Memory and speed on this machine", ("what", "value"), rows_of(trace, profile, brief=True))
    elapsed = time.monotonic() - begun
    out.note(f'Done in {format_duration(elapsed)}. Ask on: edgemed ask "What is shown?" --image {image}')
    result = {"parity": parity.describe(), "image": image, "answers": answers, "trace": asdict(trace), "elapsed_s": elapsed}
    out.result(describe_artifact(artifact) | result)


def demo_image() -> Path:
    """The bundled radiograph. Raises ImageError."""
    from edgemed.core.errors import ImageError

    found = sorted(_DEMO.glob("radiograph.*"))
    if not found:
        raise ImageError(f"Expected the bundled radiograph in {_DEMO}, found none.", "Install edgemed again.")
    return found[0]
