"""Who computes what next: requests wait in line, are admitted to slots, share prefixes of the key-value cache, and advance together.

    scheduler = Scheduler(llm, images, manifest, settings, send)
    scheduler.post(id, Submit(request)); scheduler.cancel(id)      # from any thread
    scheduler.run()                                                 # for ever, in the thread that owns `llm`

A step is one batch: a token of every answering slot, and prompts' tokens and images of others. llama.cpp's batches are all tokens or
all rows; where rows of tokens can't be had, prompts' images and text take turns. Slots and the cache are placement.py's. Knows no pipes
and no pixels: images go to a queue and come back as rows (vision.py).
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Sequence

from edgemed.core.conversation import ImageSlot, Text, render
from edgemed.core.errors import ContextOverflowError, EdgemedError, EngineError, InputError
from edgemed.core.manifest import Manifest
from runtimes.batches import drop_spill, lay_out
from runtimes.evaluate import batch_error, decode, evaluate
from runtimes.groups import Group, Groups
from runtimes.jobs import Drawn, Job, Part, Slot
from runtimes.libllama import LanguageModel, NotANumberError, Sampler, current_account
from runtimes.messages import EngineSettings, Failed, FinishReason, PreparedImage, Request
from runtimes.placement import Placement
from runtimes.prompt import IMAGE_TOKEN, build_prompt, tokenize_segments
from runtimes.sampling import log_probability
from runtimes.vision import EmbeddingCache, Encoded, ImageQueue, hash_image
from runtimes.wire import Cancel, Command, Embed, Evaluate, SchedulerStats, Stats, Submit, SubmitGroup, Tokenize

RATE_WINDOW_S = 5.0
# The parent hears about so often that batches are run and images encoded: a prompt, an evaluation or a group may take long without a reply.
BEAT_S = 1.0

Send = Callable[[int, object], None]


class Scheduler:
    """One model's slots and queue."""

    def __init__(
        self,
        llm: LanguageModel,
        images: ImageQueue,
        manifest: Manifest,
        settings: EngineSettings,
        send: Send,
        ahead: bool = False,
    ) -> None:
        """`ahead`: decoding returns before it is done (on a GPU), so that a token's text can be looked at meanwhile."""
        self._ahead = ahead
        self._llm, self._images, self._manifest, self._settings = llm, images, manifest, settings
        # With all of the vocabulary's control tokens, of which a template lists its own: nobody types one.
        self._template = manifest.template.model_copy(update={"control": (*manifest.template.control, *llm.controls)})
        self._groups = Groups(send)
        self._send: Send = self._groups.send
        self._inbox: queue.SimpleQueue[tuple[int, float, Command | Encoded]] = queue.SimpleQueue()
        self._slots = [Slot(index) for index in range(settings.slots)]
        self._jobs: dict[int, Job] = {}
        # What has arrived and is not let in yet (groups.py says who waits for whom), and who was let in and waits for an image or a slot.
        self._line: deque[Job | Group] = deque()
        self._waiting: deque[Job] = deque()
        # Images in the queue or being encoded, and the jobs that wait for each: none may be left of one that is being encoded.
        self._encoding: dict[str, list[Job]] = {}
        self._cache = EmbeddingCache(settings.embedding_cache_bytes)
        self._limit = min(settings.context_tokens, llm.kv_tokens)
        self._placement = Placement(llm, self._slots, self._limit)
        self._image_turn = False
        # Where there is one slot: while it answers, nothing but what arrives can change what is to be done next.
        self._only = self._slots[0] if settings.slots == 1 else None
        # NaN was computed: nothing is begun until all is idle and the cache emptied.
        self._spoilt = False
        self._taken: list[Drawn] = []
        self._draws = 0
        self._drawn: deque[tuple[float, int]] = deque()
        self._beat = time.monotonic()
        self._total = self._encoded = self._reused = 0

    # -- from other threads -------------------------------------------------------------------------------------------

    def post(self, id: int, command: Command | Encoded) -> None:
        """Hand over a command (or an encoded image)."""
        self._inbox.put((id, time.monotonic(), command))

    def cancel(self, id: int) -> None:
        """Stop a request before its next token. Unknown ids have ended already."""
        job = self._jobs.get(id)
        if job is not None:
            job.cancel()
        # It may be waiting in the inbox itself, and the loop may be asleep.
        self._inbox.put((id, time.monotonic(), Cancel()))

    # -- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve for ever."""
        while True:
            self.step()

    def step(self) -> None:
        """Take in what has arrived (waiting for it where there is nothing else to do), admit, and run one batch."""
        if self._only is not None and self._only.next_token is not None and self._inbox.empty():
            return self._run_one(self._only)
        self._drain(wait=not self._has_work())
        self._drop_cancelled()
        self._let_in()
        self._admit()
        if any(slot.job for slot in self._slots):
            self._run_batch()
            self._show_life()

    def _show_life(self) -> None:
        """Something was computed. Said by no thread of its own, nor by an idle loop, as both go on while llama.cpp or a driver hangs.

        Nor where an image has been being encoded for too long, as answers without one go on then.
        """
        hangs = self._images.busy_s > self._settings.silence_limit_s
        if not hangs and (now := time.monotonic()) - self._beat >= BEAT_S:
            self._beat = now
            self._send(0, None)

    def _has_work(self) -> bool:
        return any(slot.job for slot in self._slots) or self._may_begin() or (bool(self._line) and not self._waiting)

    def _may_begin(self) -> bool:
        """Whether a request that was let in has its images; of a group all must have, so that its batches are always the same."""
        ready = [not job.missing for job in self._waiting]
        return all(ready) and bool(ready) if self._groups.answering else any(ready)

    def _let_in(self) -> None:
        """Requests up to the next group, and the group once they have ended."""
        while self._line and not self._groups.answering:
            first = self._line[0]
            if isinstance(first, Job):
                self._waiting.append(first)
            elif self._waiting or any(slot.job for slot in self._slots):
                return
            else:
                self._open_group(first)
            self._line.popleft()

    def _open_group(self, group: Group) -> None:
        """Begin a group as if nothing had ever been asked."""
        for slot in self._slots:
            self._placement.clear(slot)
            slot.last_used = slot.last_run = 0.0
        self._image_turn = False
        for member, request in self._groups.open(group):
            try:
                self._take_request(member, group.received, request)
            except EdgemedError as error:
                self._jobs.pop(member, None)
                self._send(member, Failed(error))

    def _drain(self, wait: bool) -> None:
        if not wait and self._inbox.empty():
            return
        try:
            while True:
                id, received, command = self._inbox.get(block=wait)
                wait = False
                try:
                    self._take(id, received, command)
                except EdgemedError as error:
                    self._jobs.pop(id, None)
                    self._send(id, Failed(error) if isinstance(command, Submit) else error)
        except queue.Empty:
            return

    def _take(self, id: int, received: float, command: Command | Encoded) -> None:
        if isinstance(command, Encoded):
            self._take_rows(command)
        elif isinstance(command, Submit):
            self._take_request(id, received, command.request)
        elif isinstance(command, SubmitGroup):
            if command.requests:
                self._line.append(Group(id, received, command.requests))
            else:
                self._send(id, [])
        elif isinstance(command, Evaluate):
            c = command
            job = Job(id, received, evaluate=True, all_positions=c.all_positions, last=c.last, reuse=c.reuse)
            self._queue_job(job, c.segments, c.images)
        elif isinstance(command, Embed):
            self._queue_job(Job(id, received, embed=True), (ImageSlot(0),), (command.image,))
        elif isinstance(command, Tokenize):
            items = self._tokenize(command.segments)
            self._send(id, [item if isinstance(item, int) else IMAGE_TOKEN for item in items])
        elif isinstance(command, Cancel):
            self._cancel(id)
        elif isinstance(command, Stats):
            self._send(id, self._stats())

    def _cancel(self, id: int) -> None:
        """A request, or a group, whose frame nobody waits for any more."""
        for job in (id, *self._groups.members(id)):
            if job in self._jobs:
                self._jobs[job].cancel()
        for group in [each for each in self._line if isinstance(each, Group) and each.id == id]:
            self._line.remove(group)

    def _tokenize(self, segments: Sequence[Text | ImageSlot | int]) -> list[int | ImageSlot]:
        return tokenize_segments(segments, self._manifest, self._llm.tokenize, self._llm.bos)

    def _take_request(self, id: int, received: float, request: Request) -> None:
        template = self._manifest.template
        stop = (*template.stop, *request.stop)
        # A control token shows no text, so as a stop string it is recognised by its id.
        single = [ids[0] for s in stop if s and len(ids := self._llm.tokenize(s)) == 1 and self._llm.is_control(ids[0])]
        job = Job(id, received, request=request, stop=stop, stop_ids=frozenset(single))
        self._queue_job(job, tuple(render(self._template, request.turns)), request.images)

    def _queue_job(self, job: Job, segments: Sequence[Text | ImageSlot | int], images: Sequence[PreparedImage]) -> None:
        keys = [hash_image(image.pixels) for image in images]
        job.prompt = build_prompt(self._tokenize(segments), keys, self._manifest.vision.image_tokens)
        if not job.embed:
            self._check_length(job)
        self._jobs[job.id] = job
        for key, image in zip(keys, images, strict=True):
            self._want_rows(job, key, image.pixels)
        (self._waiting if job.in_group else self._line).append(job)  # a group's own are let in with it

    def _check_length(self, job: Job) -> None:
        n, vocab = len(job.prompt.cells), self._llm.vocab_size
        room = self._limit - (0 if job.evaluate else 1)
        if n > room:
            images = len(job.prompt.spans) * self._manifest.vision.image_tokens
            most = self._manifest.llm.context_length
            larger = f"or allow a larger context, up to {most} (--context)."
            more = larger if self._limit < most else "as this is the model's whole context."
            raise ContextOverflowError(
                f"Expected a conversation of at most {room} tokens, found {n} ({images} of them for {len(job.prompt.spans)} image(s)).",
                f"Shorten it, show fewer images, start a new conversation, {more}",
            )
        if n == 0 or any(cell >= vocab for cell in job.prompt.cells):
            found = "none" if n == 0 else max(job.prompt.cells)
            raise InputError(f"Expected token ids below {vocab}, found {found}.", "Check the tokens.")

    # -- images -------------------------------------------------------------------------------------------------------

    def _want_rows(self, job: Job, key: str, pixels: bytes) -> None:
        if key in job.rows or key in job.missing:
            return
        rows = self._cache.get(key)
        if rows is not None:
            self._reused += 1
            job.rows[key] = rows
            return
        job.missing.add(key)
        if key not in self._encoding:
            self._encoding[key] = []
            self._images.submit(key, pixels)
        self._encoding[key].append(job)
        if job.in_group:  # those behind it wait for it
            self._images.prefer(key)

    def _take_rows(self, encoded: Encoded) -> None:
        self._show_life()
        jobs = self._encoding.pop(encoded.key, [])
        if encoded.rows is not None:
            self._encoded += 1
            self._cache.put(encoded.key, encoded.rows)
        for job in jobs:
            job.encode_s += encoded.seconds
            job.missing.discard(encoded.key)
            if encoded.rows is not None:
                job.rows[encoded.key] = encoded.rows
            else:
                del self._jobs[job.id]
                self._leave_queue(job)
                error = encoded.error or EngineError("An image could not be encoded.")
                self._send(job.id, Failed(error) if job.request else error)

    def _leave_queue(self, job: Job) -> None:
        """Take out a job that is never begun, and of its images those that nobody else wants, unless they are being encoded already."""
        (self._waiting if job in self._waiting else self._line).remove(job)
        for key in job.missing:
            self._encoding[key].remove(job)
            if not self._encoding[key] and self._images.drop(key):
                del self._encoding[key]

    # -- admission ----------------------------------------------------------------------------------------------------

    def _drop_cancelled(self) -> None:
        for job in [job for job in (*self._waiting, *self._line) if isinstance(job, Job) and job.cancelled]:
            self._leave_queue(job)
            self._finish(job, "cancelled")
        for slot in self._slots:
            if slot.job is not None and slot.job.cancelled:
                self._finish(slot.job, "cancelled", slot)

    def _admit(self) -> None:
        if self._spoilt:
            if any(slot.job for slot in self._slots):
                return
            for slot in self._slots:
                self._placement.clear(slot)
            self._llm.wipe()
            self._spoilt = False
        if not self._may_begin():
            return
        for job in list(self._waiting):
            if job.missing:
                continue
            if job.embed:
                self._waiting.remove(job)
                del self._jobs[job.id]
                self._send(job.id, job.rows[job.prompt.spans[0].key])
            elif job.evaluate:
                if any(slot.job for slot in self._slots):
                    return  # it needs the cache for itself; those behind it wait, or it would never come
                self._waiting.remove(job)
                self._evaluate(job)
            elif (placed := self._placement.place(job)) == "placed":
                self._waiting.remove(job)
                self._start(job)
            elif placed == "full":
                return  # and nobody overtakes

    def _start(self, job: Job) -> None:
        request = job.request
        if request is None:
            return
        job.sampler = Sampler(request.sampling, self._llm.vocab_size)
        if request.sampling.repeat_penalty != 1.0:
            job.sampler.accept([cell for cell in job.prompt.cells if cell >= 0])

    # -- batches ------------------------------------------------------------------------------------------------------

    def _run_batch(self) -> None:
        if self._only is not None and self._only.next_token is not None:
            return self._run_one(self._only)
        busy = [slot for slot in self._slots if slot.job is not None]
        images = [] if self._llm.token_rows else [slot for slot in busy if slot.wants_image]
        others = [slot for slot in busy if slot not in images]
        if images and (self._image_turn or not others):
            self._image_turn = False
            slot = min(images, key=lambda slot: slot.last_run)
            self._run_parts([slot.next_part(self._room(bool(others)), mixed=False)])
        elif others:
            self._image_turn = True
            self._run_slots(others)

    def _room(self, shared: bool) -> int:
        """Prompt cells for a batch; fewer where an answer is waiting for its next token."""
        return min(self._llm.batch_tokens, self._settings.shared_prefill_tokens) if shared else self._llm.batch_tokens

    def _run_slots(self, slots: list[Slot]) -> None:
        mixed = self._llm.token_rows is not None
        parts = [slot.next_part(1, mixed) for slot in slots if not slot.filling]
        room = min(self._room(bool(parts)), self._llm.batch_tokens - len(parts))
        # Then prompts, the one that was served longest ago first.
        for slot in sorted((slot for slot in slots if slot.filling), key=lambda slot: slot.last_run):
            if room > 0:
                parts.append(slot.next_part(room, mixed))
                room -= len(parts[-1].cells)
        self._run_parts(drop_spill(parts, self._llm.tile_rows, self._followers()))

    def _followers(self) -> bool:
        """Whether a request waits beside an idle slot: for a prefix that is just being filled in, or (rarely) for room in the cache."""
        idle = any(slot.job is None for slot in self._slots)
        return idle and any(not job.missing and not job.evaluate and not job.embed for job in self._waiting)

    def _run_one(self, slot: Slot) -> None:
        """An answer's next token where it is the only one: as `_run_slots` does it, and all but the draw while a GPU computes.

        For what stands between two batches it waits: at a small model's 1.2 ms a token, 12 µs are a hundredth of its speed.
        """
        job, token = slot.active, slot.next_token
        assert token is not None  # it is answering
        code = self._llm.decode_token(token, len(slot.cells), slot.index)
        self._hand_out()
        if code != 0:
            return self._part_failed(code, [Part(slot, job, [token], True)])
        slot.add([token])
        self._count_draws()
        self._show_life()
        if slot.job is job:
            self._draw(slot, 0)

    def _run_parts(self, parts: list[Part]) -> None:
        batch = lay_out(parts, self._llm.reuses)
        outputs = sorted({end for part, end in zip(parts, batch.ends, strict=True) if part.last})
        code = decode(self._llm, parts, batch.cells, batch.positions, batch.sequences, outputs)
        self._after(code, parts, batch.ends, batch.places)

    def _after(self, code: int, parts: list[Part], ends: Sequence[int], places: Sequence[list[int]]) -> None:
        self._hand_out()  # while a GPU is still computing this batch
        if code != 0:
            return self._part_failed(code, parts)
        for part, end, held in zip(parts, ends, places, strict=True):
            part.slot.add(part.cells, held)
            if part.last and part.slot.job is part.job:
                self._draw(part.slot, end)
        now = time.monotonic()
        for part in parts:
            part.slot.last_run = now
        self._count_draws()

    def _count_draws(self) -> None:
        if count := self._draws:
            now = time.monotonic()
            self._draws = 0
            self._total += count
            self._drawn.append((now, count))
            while now - self._drawn[0][0] > RATE_WINDOW_S:
                self._drawn.popleft()

    def _part_failed(self, code: int, parts: list[Part]) -> None:
        """Run a failed batch's parts one by one, so that only the request at fault ends."""
        for part in parts:  # some of the batch may have got into the cache
            self._llm.forget(part.slot.index, len(part.slot.cells))
        left = [part for part in parts if part.slot.job is part.job]
        if len(parts) == 1 or not self._llm.reuses:  # which cannot go back to where it was
            for part in left:
                self._fail(part.slot, batch_error(code))
            return
        for part in left:
            self._run_parts([part])

    def _draw(self, slot: Slot, index: int) -> None:
        """Draw a token. With `ahead` its text waits until the next batch is on its way, but for an answer's first and surely last ones.

        A stop string is so found one batch late: that batch's logits are dropped, its cell of the cache is a token of the answer.
        """
        job = slot.active
        if job.cancelled or job.sampler is None or job.request is None:
            return self._finish(job, "cancelled", slot)
        try:
            token = self._llm.sample(job.sampler, index)
        except NotANumberError as error:
            self._spoilt = True
            return self._fail(slot, EngineError(error.message, error.hint))
        logprob = log_probability(self._llm.logits(index), token) if job.request.logprobs else None
        end, full = self._llm.is_end(token), len(slot.cells) + 1 >= self._limit
        slot.next_token = token
        self._taken.append(Drawn(slot, job, token, logprob, end, full, time.monotonic()))
        self._draws += 1
        if not self._ahead or end or full or token in job.stop_ids or job.drawn == 0 or job.drawn + 1 >= job.request.max_tokens:
            self._hand_out()

    def _hand_out(self) -> None:
        """Turn drawn tokens into text and events, and end what ends with them."""
        taken, self._taken = self._taken, []
        for t in taken:
            if t.job.cancelled:
                continue  # it is ended before its next draw
            reason = t.job.take(t.token, self._llm.piece(t.token), t.end, t.full, t.at)
            self._send(t.job.id, t.job.event(t.token, reason is not None, t.logprob))
            if reason is not None:
                self._finish(t.job, reason, t.slot)

    # -- endings ------------------------------------------------------------------------------------------------------

    def _finish(self, job: Job, reason: FinishReason, slot: Slot | None = None) -> None:
        self._jobs.pop(job.id, None)
        self._send(job.id, job.finished(reason))
        self._release(job, slot)

    def _fail(self, slot: Slot, error: EngineError) -> None:
        job = slot.active
        self._jobs.pop(job.id, None)
        self._send(job.id, Failed(error))
        self._release(job, slot)
        self._placement.clear(slot)

    def _release(self, job: Job, slot: Slot | None) -> None:
        self._count_draws()
        if job.sampler is not None:
            job.sampler.close()
            job.sampler = None
        if slot is not None:
            slot.stop()

    def _evaluate(self, job: Job) -> None:
        first, *others = self._slots
        kept = self._placement.keep(first, job) if job.reuse else 0
        for slot in self._slots if kept == 0 else others:
            self._placement.clear(slot)
        del self._jobs[job.id]
        try:
            self._send(job.id, evaluate(self._llm, job, first, kept, self._show_life))
        except EngineError as error:
            self._send(job.id, error)
        first.stop()
        if not (job.reuse and len(first.cells) == len(job.prompt.cells)):
            self._placement.clear(first)

    def _stats(self) -> SchedulerStats:
        self._count_draws()
        span = self._drawn[-1][0] - self._drawn[0][0] if self._drawn else 0.0
        count = sum(n for _, n in self._drawn) - (self._drawn[0][1] if self._drawn else 0)
        return SchedulerStats(
            busy=sum(slot.job is not None for slot in self._slots),
            queued=len(self._waiting) + len(self._line),
            kv_used_tokens=sum(len(slot.cells) for slot in self._slots),
            tokens_per_s=count / span if span > 0 else 0.0,
            total_tokens=self._total,
            images_encoded=self._encoded,
            embeddings_reused=self._reused,
            account=current_account(),
        )
