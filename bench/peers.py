"""edgemed beside its peers on one device in one run: memory, first token, decode speed.

    python -m bench.peers SOURCE --artifact DIR --device gpu --bin-dir DIR [--json FILE]

SOURCE is an HF checkpoint (`python -m bench.full_width tiny OUT` makes one of full width), DIR its conversion. Every program runs in a
process of its own, one after another; this process watches the card (NVML) or the process tree (PSS) from outside. The task is the
one of the paper's baselines: an image, 64 text tokens, then 128 new tokens, greedy. First token: from the prepared image to the token,
median over images it has not seen; decode: the 128 tokens after the first. Of ours the first
token's time is told in parts, by the engine's own clocks: encode (the tower's thread), prefill (with the wait for a GPU that it ends
with, and the draw), and the rest (handing over, hashing, tokenising).

edgemed's static is the weights on the device by the runtime's own account, its dynamic adds cache and every buffer. transformers' are the
paper's: `get_memory_footprint()` and `torch.cuda.max_memory_allocated()`; on a CPU neither is counted. "device" is what the card lost.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench.measure import on_device, on_gpu
from edgemed.core.conversation import ImageSlot, Turn, render
from edgemed.core.manifest import load_artifact
from edgemed.core.probe import probe_pixels
from edgemed.report.tables import print_table
from runtimes.engine import Engine, prepare_request
from runtimes.memory import measure_memory
from runtimes.messages import EngineSettings, Finished, PreparedImage

TEXT_TOKENS = 64
NEW_TOKENS = 128
IMAGES = 5
# Reading pages on a CPU takes milliseconds of a core that is being measured.
_SAMPLE_S = {"gpu": 0.01, "cpu": 0.5}
_MARK = "RESULT "
PROGRAMS = ("bench", "mtmd", "server")
MODES = {"gpu": ("fp16", "8-bit", "4-bit"), "cpu": ("fp32", "bf16")}


@dataclass(frozen=True)
class Row:
    """One program. Bytes, seconds, tokens per second; None: not told by it."""

    program: str
    static_bytes: int | None = None
    dynamic_bytes: int | None = None
    device_bytes: int | None = None
    first_token_s: float | None = None
    encode_s: float | None = None
    prefill_s: float | None = None
    rest_s: float | None = None
    decode_tokens_per_s: float | None = None
    detail: str = ""


class Watch:
    """The largest value of a reading while it runs, from this process."""

    def __init__(self, read: Callable[[], int | None], interval_s: float) -> None:
        self.read, self.interval_s, self.peak, self._stop = read, interval_s, 0, threading.Event()
        self.before = read() or 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(self.interval_s):
            self.peak = max(self.peak, self.read() or 0)

    def end(self) -> int:
        """Stop; the peak over what was there before."""
        self._stop.set()
        self._thread.join()
        return max(0, self.peak - self.before)


def images(size_px: int) -> list[np.ndarray[Any, Any]]:
    """The probe's image, rolled: uint8 [size, size, 3] each."""
    return [np.roll(probe_pixels(size_px), 7 * k, axis=0) for k in range(IMAGES + 1)]


# -- what runs in a process of its own ----------------------------------------------------------------------------------


def run_edgemed(folder: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Our engine: `settings` of EngineSettings."""
    artifact = load_artifact(Path(folder))
    size_px, template = artifact.manifest.image.size_px, artifact.manifest.template
    with Engine.open(artifact, EngineSettings(**settings)) as engine:

        def text_tokens(question: str) -> int:
            segments = render(template, (Turn("user", question, images=1),))
            return len(engine.tokenize([s for s in segments if not isinstance(s, ImageSlot)]))

        question = "Describe"
        while text_tokens(question) < TEXT_TOKENS:
            question += " it"
        answers = []
        for pixels in images(size_px):
            picture = PreparedImage(pixels.tobytes(), size_px)
            request = prepare_request(artifact, (Turn("user", question, images=1),), [picture], max_tokens=NEW_TOKENS + 1, ignore_end=True)
            answers += [event for event in engine.submit(request) if isinstance(event, Finished)]
        stats = engine.stats()
        report = engine.report
    here = [b for b in stats.account if on_device(b.place, on_gpu(report.devices))]
    static = sum(b.size_bytes for b in here if b.what in ("weights", "tower weights"))
    timed = answers[1:]
    return asdict(
        Row(
            f"edgemed {artifact.manifest.llm.quant}",
            static_bytes=static,
            dynamic_bytes=sum(b.size_bytes for b in here),
            first_token_s=statistics.median(a.timings.first_token_s for a in timed),
            encode_s=statistics.median(a.timings.encode_s for a in timed),
            prefill_s=statistics.median(a.timings.prefill_s for a in timed),
            rest_s=statistics.median(a.timings.queue_s for a in timed),
            decode_tokens_per_s=statistics.median(a.timings.decode_tokens_per_s for a in timed),
            detail=json.dumps({f"{b.what} {b.place}": b.size_bytes for b in stats.account} | {"depth": timed[0].usage.prompt_tokens}),
        )
    )


def run_transformers(folder: str, mode: str) -> dict[str, Any]:
    """The paper's method: transformers, on a GPU with bitsandbytes for 8 and 4 bits."""
    import torch
    from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

    cuda = torch.cuda.is_available()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(mode, torch.float16)
    quantised = {
        "8-bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
        "4-bit": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float16, bnb_4bit_quant_type="nf4"),
    }
    extra = {"quantization_config": quantised[mode]()} if mode in quantised else {}
    if cuda:
        extra["device_map"] = {"": 0}
    model: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype, **extra).eval()
    config = model.config
    tower = config.vision_config
    count = (tower.image_size // tower.patch_size) ** 2
    text = torch.tensor([i for i in range(5, TEXT_TOKENS + 5) if i != config.image_token_id][: TEXT_TOKENS - 1])
    ids = torch.cat([torch.tensor([1]), torch.full((count,), config.image_token_id), text])[None].to(model.device)

    def seconds(pixels: Any, tokens: int) -> float:
        shown = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(model.device, dtype) / 127.5 - 1
        start = time.perf_counter()
        out = model.generate(input_ids=ids, pixel_values=shown, attention_mask=torch.ones_like(ids), **limits(tokens))
        assert out.shape[1] == ids.shape[1] + tokens
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def limits(tokens: int) -> dict[str, Any]:
        return {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}

    static = int(model.get_memory_footprint())
    first, *rest = images(tower.image_size)
    seconds(first, 8)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    ones = [seconds(pixels, 1) for pixels in rest]
    alls = [seconds(pixels, NEW_TOKENS + 1) for pixels in rest[:2]]
    return asdict(
        Row(
            f"transformers {mode}",
            static_bytes=static,
            dynamic_bytes=int(torch.cuda.max_memory_allocated()) if cuda else None,
            first_token_s=statistics.median(ones),
            decode_tokens_per_s=NEW_TOKENS / (statistics.median(alls) - statistics.median(ones)),
        )
    )


# -- llama.cpp's own programs --------------------------------------------------------------------------------------------


def llama_bench(binary: Path, llm: Path, depth: int, gpu: bool, threads: int, settings: dict[str, Any], repetitions: int) -> Row:
    """Its generation speed after `depth` tokens, with our cache type.

    Only the first repetition runs a prompt and, as every answer of ours, builds and captures the generation's graph after it (2.3 ms
    of tiny's 160 on an H200); the others go on from a stored cache. So one repetition is what an answer can be compared with.
    """
    kv = settings.get("kv_type", "f16")
    command = [str(binary), "-m", str(llm), "-p", "0", "-n", str(NEW_TOKENS), "-d", str(depth), "-r", str(repetitions)]
    command += ["-o", "json", "-t", str(threads), "-ngl", "99" if gpu else "0", "-ctk", kv, "-ctv", kv, "-fa", "1" if gpu else "0"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return Row("llama-bench", decode_tokens_per_s=float(json.loads(out)[0]["avg_ts"]), detail=f"depth {depth}, cache {kv}")


def llama_mtmd(binary: Path, llm: Path, mmproj: Path, image: Path, gpu: bool, threads: int) -> Row:
    """One answer of llama-mtmd-cli with its default settings, by its own clock: memory, and the tower's time."""
    command = [str(binary), "-m", str(llm), "--mmproj", str(mmproj), "--image", str(image), "-p", "Describe " + "it " * 40]
    command += ["-n", str(NEW_TOKENS), "-c", "2048", "--temp", "0", "--ignore-eos", "-t", str(threads), "--chat-template", "vicuna"]
    command += ["-ngl", "99"] if gpu else ["-ngl", "0", "--no-mmproj-offload"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, errors="replace")
    encode = re.search(r"(?:encoded|encoding done) in (\d+) ms", done.stderr + done.stdout)
    if encode is None:
        raise ValueError("llama-mtmd-cli told no time of encoding: " + done.stderr[-200:])
    return Row("llama-mtmd-cli, defaults", encode_s=int(encode[1]) / 1000)


def llama_server(binary: Path, llm: Path, mmproj: Path, size_px: int, gpu: bool, threads: int) -> Row:
    """llama-server with its default settings and one slot, over HTTP on this machine."""
    port = free_port()
    command = [str(binary), "-m", str(llm), "--mmproj", str(mmproj), "-c", "2048", "-np", "1", "--port", str(port), "-t", str(threads)]
    # The template in the file: llama-server's own "vicuna" drops the place of an image and then answers 400.
    command += ["--no-warmup", *(["-ngl", "99"] if gpu else ["-ngl", "0", "--no-mmproj-offload"])]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            wait_ready(url, process)
            timed = [_stream(url, pixels) for pixels in images(size_px)][1:]
        except (SystemExit, urllib.error.HTTPError) as error:
            log.seek(0)
            last = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()][-3:]
            raise SystemExit(f"{error} Its last words: {' / '.join(last)}") from error
        finally:
            process.terminate()
    firsts, speeds = zip(*timed, strict=True)
    return Row("llama-server, defaults", first_token_s=statistics.median(firsts), decode_tokens_per_s=statistics.median(speeds))


def free_port() -> int:
    """A port of this machine that nobody has at the moment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def wait_ready(url: str, process: subprocess.Popen[bytes], limit_s: float = 60) -> None:
    end = time.monotonic() + limit_s
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2) as reply:
                if reply.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.1)
    raise SystemExit("llama-server did not become ready.")


def _stream(url: str, pixels: Any) -> tuple[float, float]:
    """(seconds to the first token, tokens per second after it). Through the model's template; where that loses the image, without one."""
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    picture = base64.b64encode(data.getvalue()).decode()
    question = "Describe " + "it " * 40
    link = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
    chat = {"messages": [{"role": "user", "content": [link, {"type": "text", "text": question}]}], "max_tokens": NEW_TOKENS + 1}
    try:
        return _timed(f"{url}/v1/chat/completions", chat)
    except urllib.error.HTTPError as error:
        if error.code != 400:
            raise
    with urllib.request.urlopen(f"{url}/props", timeout=10) as reply:
        marker = json.load(reply).get("media_marker", "<__media__>")
    plain = {"prompt_string": f"USER: {marker}{question} ASSISTANT:", "multimodal_data": [picture]}
    return _timed(f"{url}/completion", {"prompt": plain, "n_predict": NEW_TOKENS + 1})


def _timed(url: str, body: dict[str, Any]) -> tuple[float, float]:
    body = body | {"stream": True, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    start = time.perf_counter()
    first = last = None
    timings: dict[str, float] = {}
    with urllib.request.urlopen(request, timeout=300) as reply:
        for line in reply:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            last = time.perf_counter()
            if first is None and _text(event):
                first = last
            timings = event.get("timings", timings)
    if first is None or last is None:
        raise SystemExit("llama-server sent no token.")
    return first - start, float(timings.get("predicted_per_second", NEW_TOKENS / (last - first)))


def _text(event: dict[str, Any]) -> str | None:
    """An event's piece of the answer, of either kind of request."""
    choices = event.get("choices")
    return choices[0]["delta"].get("content") if choices else event.get("content")


# -- the comparison ---------------------------------------------------------------------------------------------------


def measured(job: str, arguments: Sequence[Any], read: Callable[[int], int | None], interval_s: float) -> Row:
    """`job` in a process of its own, watched from here."""
    code = f"import sys, json; from bench import peers; print(peers._MARK + json.dumps(peers.{job}(*json.loads(sys.argv[1]))))"
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([sys.executable, "-c", code, json.dumps(arguments)], stdout=subprocess.PIPE, stderr=log, text=True)
        watch = Watch(lambda: read(process.pid), interval_s)
        out, _ = process.communicate()
        peak = watch.end()
        if process.returncode:
            log.seek(0)
            return Row(f"{job.removeprefix('run_')} {arguments[-1]}", detail="failed: " + log.read().strip()[-300:])
    found = next(line for line in out.splitlines() if line.startswith(_MARK))
    return Row(**{**json.loads(found.removeprefix(_MARK)), "device_bytes": peak or None})


def watched(name: str, run: Callable[[], Row], read: Callable[[], int | None], interval_s: float) -> Row:
    """A program of llama.cpp's, watched; `name` is the row's where it fails."""
    watch = Watch(read, interval_s)
    try:
        row = run()
    except (subprocess.CalledProcessError, SystemExit, OSError, ValueError, KeyError) as error:
        end = str(getattr(error, "stderr", "") or error).strip()[-300:]
        row = Row(name, detail=f"failed: {end}")
    return replace(row, device_bytes=watch.end() or None)


def columns(gpu: bool) -> list[str]:
    """A table's head, for `cells`."""
    memory = ["static GB", "dynamic GB", "device GB" if gpu else "PSS GB"]
    return ["program", *memory, "encode ms", "prefill ms", "rest ms", "first token ms", "decode tokens/s", ""]


def cells(row: Row) -> list[str]:
    """A table's row."""

    def gb(value: int | None) -> str:
        return "" if value is None else f"{value / 1e9:.3f}"

    def ms(value: float | None) -> str:
        return "" if value is None else f"{1000 * value:.1f}"

    speed = "" if row.decode_tokens_per_s is None else f"{row.decode_tokens_per_s:.1f}"
    failed = row.detail if row.detail.startswith("failed") else ""
    memory = [gb(row.static_bytes), gb(row.dynamic_bytes), gb(row.device_bytes)]
    parts = [ms(row.encode_s), ms(row.prefill_s), ms(row.rest_s)]
    return [row.program, *memory, *parts, ms(row.first_token_s), speed, failed[:60]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--artifact", type=Path, action="append", default=[])
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--bin-dir", type=Path, help="llama-bench, llama-mtmd-cli and llama-server of the same build")
    parser.add_argument("--programs", default=",".join(PROGRAMS), help="which of them, comma-separated")
    parser.add_argument("--modes", help="transformers' number formats, comma-separated; 'none' leaves it out")
    parser.add_argument("--settings", action="append", default=[], help="EngineSettings as JSON; each gives a row of ours")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=3, help="llama-bench's")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: list[Row] = []
    for folder in args.artifact:
        rows += [*compare_settings(folder, args), *compare_programs(folder, args)]
    modes = MODES[args.device] if args.modes is None else tuple(m for m in args.modes.split(",") if m != "none")
    read = reader(args.device == "gpu")
    rows += [measured("run_transformers", [str(args.source.resolve()), mode], read, _SAMPLE_S[args.device]) for mode in modes]
    title = f"{args.source.name}: an image, {TEXT_TOKENS} text tokens, {NEW_TOKENS} new tokens"
    print_table(title, columns(args.device == "gpu"), [cells(row) for row in rows])
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


def reader(gpu: bool) -> Callable[[int], int | None]:
    """What is watched of a process: the card's memory in use, or the tree's PSS."""

    def read(pid: int) -> int | None:
        report = measure_memory(pid)
        return report.device_used_bytes if gpu else report.pss_bytes

    return read


def compare_settings(folder: Path, args: argparse.Namespace) -> Iterator[Row]:
    """A row of ours for each of the settings, with llama-bench's beside it."""
    gpu, interval_s = args.device == "gpu", _SAMPLE_S[args.device]
    read, artifact = reader(gpu), load_artifact(folder)
    base: dict[str, Any] = {"threads": args.threads} | ({} if gpu else {"gpu_layers": 0})
    for settings in [base | json.loads(text) for text in args.settings] or [base]:
        row = measured("run_edgemed", [str(folder.resolve()), settings], read, interval_s)
        yield replace(row, program=f"{row.program} {json.dumps({k: v for k, v in settings.items() if k not in base})}")
        if args.bin_dir and "bench" in args.programs.split(",") and not row.detail.startswith("failed"):
            depth = int(json.loads(row.detail)["depth"])
            binary, model = args.bin_dir / "llama-bench", artifact.llm_path
            job = partial(llama_bench, binary, model, depth, gpu, args.threads, settings, args.repetitions)
            yield watched("llama-bench", job, lambda: read(os.getpid()), interval_s)


def compare_programs(folder: Path, args: argparse.Namespace) -> Iterator[Row]:
    """llama.cpp's own programs for images, with the same pair of files."""
    if not args.bin_dir:
        return
    gpu, artifact = args.device == "gpu", load_artifact(folder)
    pair, size_px = (artifact.llm_path, artifact.mmproj_path), artifact.manifest.image.size_px
    with tempfile.TemporaryDirectory() as scratch:
        image = Path(scratch) / "image.png"
        Image.fromarray(images(size_px)[0]).save(image)
        jobs = {
            "mtmd": partial(llama_mtmd, args.bin_dir / "llama-mtmd-cli", *pair, image, gpu, args.threads),
            "server": partial(llama_server, args.bin_dir / "llama-server", *pair, size_px, gpu, args.threads),
        }
        for name, job in jobs.items():
            if name in args.programs.split(","):
                yield watched(f"llama.cpp's {name}", job, lambda: reader(gpu)(os.getpid()), _SAMPLE_S[args.device])


if __name__ == "__main__":
    main()
