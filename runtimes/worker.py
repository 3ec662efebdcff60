"""The engine's own process: `main()`, commands on stdin, replies on stdout (wire.py). Started by process.py.

A process of its own, because llama.cpp ends the process on some inputs. It lives as long as its stdin: when the parent closes it
or dies, it ends at once. stderr carries llama.cpp's errors and tracebacks, which the parent keeps for its messages.

llama_cpp comes first: with numpy in front of it some builds crash while loading a model.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
import traceback
from typing import BinaryIO

import llama_cpp

from edgemed.core.errors import EdgemedError, EngineLoadError
from runtimes import dense, libllama
from runtimes.direct import TowerRows
from runtimes.gguf_check import check_pair
from runtimes.libcuda import shrink_context
from runtimes.libmtmd import VisionTower
from runtimes.messages import EngineSettings, LoadReport, Token, VisionCheck
from runtimes.probes import check_vision
from runtimes.scheduler import Scheduler
from runtimes.shape import read_shape, read_tower, tower_flash_attention
from runtimes.system import keep_freed_memory, physical_cores
from runtimes.vision import EncodeThread, ImageQueue, VisionEncoder
from runtimes.wire import Cancel, Command, Load, pack_frame, read_frame, write_frame

# Tokens are gathered for so long before they are written: each write wakes the parent, which takes a core from llama.cpp's threads.
GATHER_S = 0.02


class Outbox:
    """Replies on their way to the parent, written by a thread of their own so that decoding never waits for the pipe."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._queue: queue.SimpleQueue[tuple[int, object]] = queue.SimpleQueue()
        self._urgent = threading.Event()
        threading.Thread(target=self._run, name="outbox", daemon=True).start()

    def send(self, id: int, reply: object) -> None:
        """Queue a reply to frame `id`. All but tokens (and the first of them) go at once."""
        self._queue.put((id, reply))
        if not isinstance(reply, Token) or reply.index == 0:
            self._urgent.set()

    def _run(self) -> None:
        while True:
            replies = [self._queue.get()]
            self._urgent.wait(GATHER_S)
            self._urgent.clear()
            while not self._queue.empty():
                replies.append(self._queue.get())
            try:
                write_frame(self._stream, pack_frame(replies))
            except OSError:
                os._exit(0)  # the parent is gone


class Inbox:
    """Reads commands; before a scheduler is there, they wait."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._scheduler: Scheduler | None = None
        self.first: queue.SimpleQueue[tuple[int, Command]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="inbox", daemon=True).start()

    def attach(self, scheduler: Scheduler) -> None:
        """From now on, commands go to the scheduler. (The parent sends none between Load and its reply.)"""
        self._scheduler = scheduler

    def _run(self) -> None:
        while True:
            frame = read_frame(self._stream)
            if not isinstance(frame, tuple):
                os._exit(0)  # the parent closed the pipe, or died
            id, command = frame
            if self._scheduler is None:
                self.first.put((id, command))
            elif isinstance(command, Cancel):
                self._scheduler.cancel(id)
            else:
                self._scheduler.post(id, command)


def load(command: Load, outbox: Outbox) -> tuple[Scheduler, LoadReport]:
    """Check and load the pair, and start its threads. Raises EdgemedError."""
    started = time.monotonic()
    artifact, settings = command.artifact, command.settings
    manifest, threads = artifact.manifest, settings.threads or physical_cores()
    if not command.text_only:
        check_pair(artifact, libllama.tensor_bytes)
    gpu = _find_gpu(settings)
    if settings.dense_prompts:
        _enable_dense(command, gpu is not None)
    own_blanks = manifest.space_prefix in ("first", "chunk")
    llm = libllama.LanguageModel(artifact.llm_path, settings, threads, no_space_prefix=own_blanks)
    if settings.dense_prompts and settings.gpu_layers < 0:
        llm.take_rows()
    device = gpu[1] if gpu and settings.gpu_layers != 0 else "CPU"
    tower_device = gpu[1] if gpu and settings.tower != "cpu" and not command.text_only else "CPU"
    encoder, checked = _load_tower(command, llm, threads, gpu, tower_device)
    images = ImageQueue()
    scheduler = Scheduler(llm, images, manifest, settings, outbox.send, ahead=device != "CPU")
    if encoder is not None:
        EncodeThread(encoder, images, lambda encoded: scheduler.post(0, encoded), on_cpu=tower_device == "CPU")
    report = LoadReport(
        load_s=time.monotonic() - started,
        model_bytes=llm.size_bytes,
        vision_bytes=0 if encoder is None else manifest.files[manifest.vision.file].size_bytes,
        kv_bytes=llm.kv_bytes(settings),
        kv_tokens=llm.kv_tokens,
        devices=tuple(dict.fromkeys((device, tower_device))) if encoder is not None else (device,),
        vision_mode="plain" if encoder is None else encoder.mode,
        vision_check=checked[0],
        vision_distance=checked[1],
        runtime=llama_cpp.__version__,
        account=libllama.current_account(),
    )
    return scheduler, report


def _find_gpu(settings: EngineSettings) -> tuple[int, str] | None:
    """(handle, description) of the GPU that the settings want, None for none. Raises EngineLoadError."""
    wants_gpu = settings.gpu_layers != 0 or settings.tower == "gpu"
    if wants_gpu and libllama.has_gpu_library():
        keep_freed_memory()
    if wants_gpu and settings.shrink_context:
        shrink_context(settings.device)
    elif not wants_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # llama.cpp would make a context (552 MB on an H100) and put nothing into it
    gpus = libllama.gpu_devices() if wants_gpu else []
    if gpus and not 0 <= settings.device < len(gpus):
        raise EngineLoadError(f"Expected a GPU number below {len(gpus)}, found {settings.device}.", "Choose another device.")
    return gpus[settings.device] if gpus else None


def _enable_dense(command: Load, gpu: bool) -> None:
    settings, hint = command.settings, "Leave dense_prompts out."
    if not gpu or settings.gpu_layers == 0:
        raise EngineLoadError("Expected layers on a GPU for dense prompts, found them on the CPU.", hint)
    if settings.flash_attention == "off":
        raise EngineLoadError("Expected flash attention for dense prompts, found it off.", hint)
    if not command.text_only and not read_shape(command.artifact, libllama.tensor_bytes).suits_dense_prompts:
        raise EngineLoadError("Expected Q4_K, Q6_K or Q8_0 and a quantised tower for dense prompts, found other types.", hint)
    dense.enable(libllama.cuda_libraries(), settings.device)


def _load_tower(
    command: Load, llm: libllama.LanguageModel, threads: int, gpu: tuple[int, str] | None, device: str
) -> tuple[VisionEncoder | None, tuple[VisionCheck, float | None]]:
    """The tower, checked, and how. `device`: what it is computed on, by name."""
    artifact, settings, manifest = command.artifact, command.settings, command.artifact.manifest
    if command.text_only:
        return None, ("skipped", None)
    handle = gpu[0] if gpu and settings.tower != "cpu" else None
    heads = read_tower(artifact.mmproj_path, libllama.tensor_bytes).head_dim
    wanted = settings.vision_flash_attention
    if wanted == "auto" and handle is not None and not libllama.has_gpu_library():
        wanted = "off"  # on other GPUs than NVIDIA's it was never measured
    flash = tower_flash_attention(wanted, heads, handle is not None)
    tower = VisionTower(
        artifact.mmproj_path,
        manifest.image.size_px,
        llm,
        threads,
        handle,
        rewritable=manifest.vision.tower == "clip",
        flash_attention=flash,
        exact=gpu is not None and manifest.vision.quant in ("F16", "BF16"),
        direct=TowerRows(settings.embedding_cache_bytes) if settings.dense_prompts and handle is not None else None,
    )
    encoder = VisionEncoder(tower, manifest)
    if handle is not None:
        encoder.prepare()
    return encoder, check_vision(encoder, manifest, libllama.runtime_version(), device, flash, settings)


def limit_memory(size: int | None) -> None:
    """Let no more than `size` bytes of private memory be allocated by this process."""
    if size is not None and sys.platform != "win32":
        import resource

        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (size if hard == resource.RLIM_INFINITY else min(size, hard), hard))


def end_on_fault() -> None:
    """The traceback to stderr and the process to its end: a parent sees a death, while a thread that is missing hangs it."""
    traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)


def _end_on_thread_fault(fault: threading.ExceptHookArgs) -> None:
    traceback.print_exception(fault.exc_type, fault.exc_value, fault.exc_traceback)
    sys.stderr.flush()
    os._exit(1)


def main() -> None:
    """Take the pipe's ends, load, serve; an exception that nobody expected ends the process."""
    threading.excepthook = _end_on_thread_fault
    try:
        serve()
    except Exception:
        end_on_fault()


def serve() -> None:
    """Load as the first command says, then serve for ever."""
    # Whatever llama.cpp prints to stdout must not end up between frames.
    stream = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    # Ctrl-C is the parent's to handle; this process ends with its pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    libllama.quiet_logs()
    outbox, inbox = Outbox(stream), Inbox(sys.stdin.buffer)
    id, command = inbox.first.get()
    if not isinstance(command, Load):
        raise SystemExit("The first command must be Load.")
    try:
        limit_memory(command.settings.memory_limit_bytes)
        scheduler, report = load(command, outbox)
    except EdgemedError as error:
        outbox.send(id, error)
        inbox.first.get()  # the parent reads the error and closes the pipe, which ends this process
        return
    inbox.attach(scheduler)
    outbox.send(id, report)
    scheduler.run()
