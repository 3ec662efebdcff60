"""`edgemed convert` and `edgemed verify`: from a checkpoint to a folder that is proven right."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgemed.cli.compose import SourceOptions, convert_source, folder_name, named_bits, open_source, read_fitting, require_artifact
from edgemed.cli.options import (
    Adapter,
    Base,
    Bits,
    Budget,
    Calibrate,
    Folder,
    ImageMode,
    Json,
    Mmproj,
    Name,
    NoVerify,
    Out,
    Pre,
    Quant,
    Quiet,
    Reference,
    Samples,
    Source,
    Template,
    Threads,
    To,
    VisionQuant,
    VisionTower,
)
from edgemed.cli.output import Output

if TYPE_CHECKING:
    from bench.parity import Parity
    from edgemed.core.manifest import Artifact


def convert(
    source: Source = None,
    to: To = "gguf",
    bits: Bits = None,
    quant: Quant = None,
    vision_quant: VisionQuant = None,
    out: Out = None,
    adapter: Adapter = None,
    base: Base = None,
    vision_tower: VisionTower = None,
    mmproj: Mmproj = None,
    template: Template = None,
    image_mode: ImageMode = None,
    pre: Pre = None,
    name: Name = None,
    calibrate: Calibrate = None,
    samples: Samples = None,
    budget: Budget = None,
    threads: Threads = None,
    no_verify: NoVerify = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert a checkpoint to a GGUF pair with a manifest, then run it once to check it; or to a checkpoint for fine-tuning."""
    from converters.recipes import Recipe

    sink = Output(json=json, quiet=quiet)
    options = SourceOptions(adapter, base, vision_tower, mmproj, template, image_mode, name, pre)
    if to != "gguf":
        given = {"--bits": bits, "--quant": quant, "--vision-quant": vision_quant, "--calibrate": calibrate, "--budget": budget}
        given["--samples"] = samples
        _to_hf(source, options, out, sink, to, [key for key, value in given.items() if value is not None])
        return
    recipe = Recipe.of(bits if bits or quant else named_bits(source), quant, vision_quant)
    plain = quant is None and vision_quant is None and options == SourceOptions()
    fitting = read_fitting(calibrate, samples, budget)
    artifact = convert_source(source, options, recipe, sink, out_dir=out, plain_bits=plain, threads=threads, fitting=fitting)
    show_card(artifact, sink)
    for option, asked, record in (("--quant", quant, artifact.manifest.llm), ("--vision-quant", vision_quant, artifact.manifest.vision)):
        if asked is not None and asked.upper() != record.quant:
            sink.warn(f"{option} {asked.upper()} does not fit most rows of this model, whose weights are mostly {record.quant} therefore.")
    parity = None if no_verify else run_verify(artifact, sink)
    sink.result(describe_artifact(artifact) | {"parity": parity and parity.describe()})


def _to_hf(source: Source, options: SourceOptions, out_dir: Out, sink: Output, to: str, given: list[str]) -> None:
    from converters.hf_export import export_hf
    from edgemed.core.errors import InputError
    from edgemed.core.paths import checkpoints_dir

    if to != "hf":
        raise InputError(f"Expected --to gguf or hf, found '{to}'.", "Pass one of them.")
    if given:
        raise InputError(f"Expected no {given[0]} with --to hf, found one: weights keep the types that they have.", "Leave it out.")
    checkpoint = open_source(source, options)
    folder = out_dir or checkpoints_dir() / folder_name(checkpoint.name)
    sink.note(f"Writing {checkpoint.name} ({checkpoint.reader}) as an HF checkpoint into {folder}")
    for note in checkpoint.notes:
        sink.warn(note)
    with sink.progress() as bar:
        export_hf(checkpoint, folder, lambda done, total: bar("convert", done, total))
    sink.text(str(folder))
    sink.result({"checkpoint": folder, "reader": checkpoint.reader})


def verify(folder: Folder = None, reference: Reference = None, json: Json = False, quiet: Quiet = False) -> None:
    """Check a converted model: hashes, the probe's embedding and logits in the engine, and transformers where asked."""
    sink = Output(json=json, quiet=quiet)
    artifact = require_artifact(folder, sink)
    parity = run_verify(artifact, sink, reference)
    sink.result(describe_artifact(artifact) | {"parity": parity.describe()})


def run_verify(artifact: Artifact, sink: Output, reference: Reference = None) -> Parity:
    """Verify, and say how it went."""
    from bench.parity import verify_artifact

    sink.note("Verifying: hashes, then the probe in the engine …")
    parity = verify_artifact(artifact, reference)
    sink.table("Verified", ("what", "found", "allowed"), parity.rows())
    return parity


def describe_artifact(artifact: Artifact) -> dict[str, Any]:
    """An artifact in a result."""
    m = artifact.manifest
    return {
        "artifact": artifact.folder,
        "name": m.name,
        "bits": m.bits,
        "files": {name: record.size_bytes for name, record in m.files.items()},
        "llm": m.llm.model_dump(),
        "vision": m.vision.model_dump(),
    }


def show_card(artifact: Artifact, sink: Output) -> None:
    """Sizes and bits per weight of both files."""
    from edgemed.core.units import format_bytes

    m = artifact.manifest
    rows = []
    for part, record in (("language model", m.llm), ("tower and projector", m.vision)):
        size = format_bytes(m.files[record.file].size_bytes)
        rows.append((part, record.file, record.quant, f"{record.parameters / 1e6:.1f} M", f"{record.bits_per_weight:.2f}", size))
    sink.table(str(artifact.folder), ("part", "file", "type", "weights", "bits a weight", "size"), rows)
