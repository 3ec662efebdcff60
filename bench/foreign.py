"""Our GGUF pair in a foreign program: does llama.cpp's own `llama-mtmd-cli` load it and say, greedily, what our engine says?

    python -m bench.foreign --model DIR --bin-dir llama.cpp/build/bin --image a.jpg [--image b.jpg] [--question "What is shown?"]

Each image is saved as a PNG of the tower's exact size, which that program leaves as it is, and the prompt comes from the template in
the GGUF. For towers that llama.cpp runs right (SigLIP) and tokenizers without a leading blank (BPE); both hold for edgemed-demo. Exit
code 1 where a text differs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from edgemed.core.conversation import ConversationTemplate, clean_answer
from edgemed.core.images import load_image, prepare
from edgemed.core.manifest import Artifact, load_artifact
from runtimes.engine import Engine
from runtimes.messages import EngineSettings, PreparedImage

QUESTIONS = ("What modality is used to take this image?", "Describe this image.", "Is there an abnormality in this image?")
CONTEXT_TOKENS = 2048
_MARKER = "<__media__>"
_RESPONSE = "----- response -----"


def user_content(template: ConversationTemplate, question: str) -> str:
    """A user's message as llama.cpp's templates take it, with its marker in the image's place."""
    image = template.image_prefix + _MARKER + template.image_suffix
    return f"{image}{template.image_separator}{question}" if template.image_first else f"{question}{template.image_separator}{image}"


def ask_foreign(binary: Path, artifact: Artifact, image: Path, question: str, max_tokens: int, threads: int) -> str:
    """What llama-mtmd-cli answers. Raises CalledProcessError where it fails."""
    command = [
        str(binary), "-m", str(artifact.llm_path), "--mmproj", str(artifact.mmproj_path), "--image", str(image), "--jinja", "--no-escape",
        "-p", user_content(artifact.manifest.template, question), "--temp", "0", "-n", str(max_tokens), "-c", str(CONTEXT_TOKENS),
        "-t", str(threads), "-ngl", "0", "--no-mmproj-offload", "--no-warmup",
    ]  # fmt: skip
    # The program prints this line of ours before its answer, and colours nothing where stdout is no terminal.
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"MTMD_TEST_RESPONSE_MARKER": _RESPONSE})
    return clean_answer(artifact.manifest.template, done.stdout.split(_RESPONSE, 1)[-1])


def compare(binary: Path, artifact: Artifact, image: Path, questions: list[str], max_tokens: int, threads: int) -> int:
    """Ask both about one image and print both answers; how many differ."""
    size_px = artifact.manifest.image.size_px
    pixels = prepare(load_image(image), artifact.manifest.image)
    settings = EngineSettings(context_tokens=CONTEXT_TOKENS, threads=threads, gpu_layers=0)
    different = 0
    with tempfile.TemporaryDirectory() as folder, Engine.open(artifact, settings) as engine:
        png = Path(folder) / "image.png"
        Image.fromarray(pixels).save(png)
        for question in questions:
            ours = engine.ask(question, [PreparedImage(pixels.tobytes(), size_px)], max_tokens=max_tokens).text
            theirs = ask_foreign(binary, artifact, png, question, max_tokens, threads)
            different += ours != theirs
            print(f"{image.name} · {question}\n  {'same' if ours == theirs else 'DIFFERENT'}\n  ours:   {ours!r}\n  theirs: {theirs!r}")
    return different


def main() -> int:
    """Run the comparison; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.foreign", description="Our GGUF pair in llama-mtmd-cli.")
    parser.add_argument("--model", type=Path, required=True, help="a converted model's folder")
    parser.add_argument("--bin-dir", type=Path, required=True, help="folder of llama-mtmd-cli")
    parser.add_argument("--image", type=Path, action="append", required=True)
    parser.add_argument("--question", action="append")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    artifact = load_artifact(a.model)
    questions = a.question or list(QUESTIONS)
    binary = a.bin_dir / "llama-mtmd-cli"
    different = sum(compare(binary, artifact, image, questions, a.max_tokens, a.threads) for image in a.image)
    print(f"{different} of {len(a.image) * len(questions)} answers differ")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
