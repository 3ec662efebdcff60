"""The engine as its users see it, on the real llama.cpp with tiny random pairs; with SmolLM2 where EDGEMED_TEST_SMOLLM2 names its GGUF."""

from __future__ import annotations

import gc
import math
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runtimes_pair import CONTROL, LLM_WIDTH, PATCHES, SIZE_PX, VOCAB, make_artifact, tower_rows, tower_tensors

from edgemed.core.conversation import TEMPLATES, ImageSlot, Text, Turn, render
from edgemed.core.errors import ArtifactError, ContextOverflowError, EngineLoadError, InputError
from edgemed.core.manifest import Artifact, load_artifact
from runtimes.engine import Engine, prepare_request
from runtimes.messages import Collected, EngineSettings, Event, Failed, Finished, PreparedImage, Request, Sampling, Token
from runtimes.prompt import IMAGE_TOKEN

SETTINGS = EngineSettings(context_tokens=512, slots=2, threads=1)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("engine")
        patch.setenv("EDGEMED_HOME", str(folder / "home"))
        yield folder


@pytest.fixture(scope="module")
def artifact(home: Path) -> Artifact:
    return make_artifact(home / "siglip")


@pytest.fixture(scope="module")
def engine(artifact: Artifact) -> Iterator[Engine]:
    with Engine.open(artifact, SETTINGS) as opened:
        yield opened


def image(seed: int) -> PreparedImage:
    pixels = np.random.default_rng(seed).integers(0, 256, (SIZE_PX, SIZE_PX, 3)).astype(np.uint8)
    return PreparedImage(pixels.tobytes(), SIZE_PX)


def question(text: str, *images: PreparedImage, **options: object) -> Request:
    return Request(turns=(Turn("user", text, len(images)),), images=images, **options)  # type: ignore[arg-type]


def collect(events: Iterator[Event]) -> tuple[list[Token], Finished]:
    *tokens, last = events
    assert isinstance(last, Finished), last
    assert all(isinstance(token, Token) for token in tokens)
    return tokens, last  # type: ignore[return-value]


def test_tokens_join_to_the_answer(engine: Engine) -> None:
    tokens, finished = collect(engine.submit(question("Is it normal?", image(0), max_tokens=20)))
    assert "".join(token.text for token in tokens) == finished.text
    assert [token.index for token in tokens] == list(range(20))
    assert finished.reason == "length"
    assert (finished.usage.new_tokens, finished.usage.image_tokens) == (20, PATCHES)
    assert finished.timings.first_token_s > 0 and finished.timings.decode_tokens_per_s > 0


def test_nobody_types_a_control_token(engine: Engine) -> None:
    # "<s>" and "</s>" are the vocabulary's, but not listed by this template; a token is a byte here, if it is no control token.
    def cells(text: str) -> int:
        return collect(engine.submit(question(text, max_tokens=1)))[1].usage.prompt_tokens

    for typed, broken in (("a<s>b", "a< s>b"), ("</s>x", "< /s>x"), ("<|im_end|>", "< |im_end|>")):
        assert cells(typed) == cells(broken), typed
    assert engine.tokenize([Text("<s>")]) == [256 + CONTROL.index("<s>")], "what is no person's text stays"


def test_rows_are_the_towers(engine: Engine) -> None:
    picture = image(3)
    pixels = np.frombuffer(picture.pixels, np.uint8).reshape(SIZE_PX, SIZE_PX, 3)
    right = tower_rows("siglip", tower_tensors("siglip", LLM_WIDTH), pixels)
    assert np.linalg.norm(engine.embed(picture) - right) / np.linalg.norm(right) < 2e-3


@pytest.mark.parametrize("layout", [{}, {"keep_cls": True}])
def test_clip_fault_is_found_and_corrected(home: Path, layout: dict[str, bool]) -> None:
    artifact = make_artifact(home / f"clip{len(layout)}", "clip", **layout)
    with Engine.open(artifact, SETTINGS) as engine:
        assert (engine.report.vision_mode, engine.report.vision_check) == ("rewrite", "probed")
        picture = image(4)
        pixels = np.frombuffer(picture.pixels, np.uint8).reshape(SIZE_PX, SIZE_PX, 3)
        right = tower_rows("clip", tower_tensors("clip", LLM_WIDTH), pixels, **layout)
        found = engine.embed(picture)
        assert found.shape == right.shape
        assert np.linalg.norm(found - right) / np.linalg.norm(right) < 2e-3
    with Engine.open(artifact, SETTINGS) as again:
        assert (again.report.vision_mode, again.report.vision_check) == ("rewrite", "remembered")


def test_first_row_left_out(home: Path) -> None:
    artifact = make_artifact(home / "skip", skip_first_token=True)
    with Engine.open(artifact, SETTINGS) as engine:
        assert engine.embed(image(0)).shape == (PATCHES - 1, LLM_WIDTH)
        assert engine.ask("And?", [image(0)], max_tokens=3).usage.image_tokens == PATCHES - 1


def test_wrong_certificate_is_refused(home: Path) -> None:
    other = make_artifact(home / "other", seed=5)
    artifact = make_artifact(home / "wrong")
    wrong = artifact.manifest.model_copy(update={"certificate": other.manifest.certificate})
    with pytest.raises(EngineLoadError, match="agree with the manifest's probe"):
        Engine.open(Artifact(artifact.folder, wrong), SETTINGS)


def test_several_images_and_turns(engine: Engine) -> None:
    a, b = image(1), image(2)
    turns = (Turn("user", "Compare.", 2), Turn("assistant", "They differ."), Turn("user", "How?"))
    first = engine.ask(turns, [a, b], max_tokens=12)
    assert first.usage.image_tokens == 2 * PATCHES
    swapped = engine.ask(turns, [b, a], max_tokens=12)
    assert swapped.text != first.text
    assert engine.ask(turns, [a, b], max_tokens=12).text == first.text
    segments = render(engine.artifact.manifest.template, turns)
    assert engine.tokenize(segments).count(IMAGE_TOKEN) == 2


def test_no_image_at_all(engine: Engine) -> None:
    assert engine.ask("Hello", max_tokens=4).usage.image_tokens == 0


def test_follow_up_neither_encodes_nor_prefills_the_image(engine: Engine) -> None:
    picture = image(10)
    first = engine.ask("What is it?", [picture], max_tokens=4)
    before = engine.stats().images_encoded
    second = engine.ask("Where is it?", [picture], max_tokens=4)
    assert first.usage.cached_tokens < PATCHES <= second.usage.cached_tokens
    assert second.timings.encode_s == 0
    assert engine.stats().images_encoded == before
    turns = (Turn("user", "Where is it?", 1), Turn("assistant", second.text), Turn("user", "Sure?"))
    third = engine.ask(turns, [picture], max_tokens=4)
    assert third.usage.cached_tokens > second.usage.cached_tokens


def assert_same_but_for_near_ties(some: Sequence[tuple[int, float | None]], others: Sequence[tuple[int, float | None]]) -> None:
    """Tokens and their log-probabilities. Batches of other sizes are rounded otherwise: up to the first token that differs, which must
    have been about as likely."""
    assert len(some) > 0 and len(others) > 0
    for (one, p), (other, q) in zip(some, others, strict=False):
        assert p == pytest.approx(q, abs=2e-2)
        if one != other:
            return
    assert len(some) == len(others)


def tokens_of(events: Iterator[Event]) -> list[tuple[int, float | None]]:
    return [(token.id, token.logprob) for token in collect(events)[0]]


def test_cached_prefix_does_not_change_the_answer(artifact: Artifact, engine: Engine) -> None:
    picture = image(11)
    again = question("And another", picture, max_tokens=16, logprobs=True)
    engine.ask("A first question", [picture], max_tokens=4)
    warm = tokens_of(engine.submit(again))
    with Engine.open(artifact, SETTINGS) as fresh:
        tokens, finished = collect(fresh.submit(again))
    assert finished.usage.cached_tokens == 0
    assert_same_but_for_near_ties(warm, [(token.id, token.logprob) for token in tokens])


def test_two_at_once_answer_as_one(engine: Engine) -> None:
    requests = [question(f"Question number {i}?", image(20 + i % 2), max_tokens=24, logprobs=True) for i in range(4)]
    alone = [tokens_of(engine.submit(request)) for request in requests]
    together: dict[int, list[tuple[int, float | None]]] = {}

    def run(index: int) -> None:
        together[index] = tokens_of(engine.submit(requests[index]))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, answer in enumerate(alone):
        assert_same_but_for_near_ties(together[index], answer)


def test_seed_decides(engine: Engine) -> None:
    def draw(seed: int) -> str:
        sampling = Sampling(temperature=1.5, top_k=0, top_p=1, min_p=0, seed=seed)
        return engine.ask("Say something", max_tokens=16, sampling=sampling).text

    draw(7)  # fills the prefix, so that all that follow start alike
    assert draw(7) == draw(7)
    assert len({draw(seed) for seed in range(4)}) > 1


def test_repeat_penalty_changes_a_greedy_answer(engine: Engine) -> None:
    plain = engine.ask("Repeat", max_tokens=24)
    other = engine.ask("Repeat", max_tokens=24, sampling=Sampling(repeat_penalty=3.0))
    assert plain.text != other.text


def test_stop_string_is_never_shown(engine: Engine) -> None:
    _, whole = collect(engine.submit(question("Go on", max_tokens=30)))
    stop = whole.text[8:11]
    tokens, finished = collect(engine.submit(question("Go on", max_tokens=30, stop=(stop,))))
    assert finished.reason == "stop"
    assert finished.text == whole.text[: whole.text.index(stop)] == "".join(token.text for token in tokens)


def test_context_is_at_most_the_models(artifact: Artifact) -> None:
    with Engine.open(artifact, EngineSettings(context_tokens=100_000)) as engine:
        assert engine.settings.context_tokens == engine.report.kv_tokens == 4096


def test_blanks_of_sentencepiece(home: Path) -> None:
    piece_a, blank = VOCAB - 1, VOCAB - 2
    b, z = 3 + ord("b"), 3 + ord("z")
    segments = [Text("a"), ImageSlot(0), Text("b a"), Text("</s>z", answer=True)]
    for rule, expected in (
        ("each", [1, piece_a, IMAGE_TOKEN, blank, b, piece_a, 2, blank, z]),
        ("chunk", [1, piece_a, IMAGE_TOKEN, blank, b, piece_a, 2, z]),
        ("first", [1, piece_a, IMAGE_TOKEN, b, piece_a, 2, z]),
    ):
        artifact = make_artifact(home / f"spm-{rule}", template=TEMPLATES["v1"], space_prefix=rule)
        with Engine.open(artifact, SETTINGS) as engine:
            assert engine.tokenize(segments) == expected
            assert engine.tokenize([5, 6]) == [5, 6]


def test_prompt_that_ends_with_an_image(home: Path) -> None:
    artifact = make_artifact(home / "plain", template=TEMPLATES["plain"])
    with Engine.open(artifact, SETTINGS) as engine:
        first = engine.ask("", [image(1)], max_tokens=5)
        assert first.usage.prompt_tokens == 1 + PATCHES
        again = engine.ask("", [image(1)], max_tokens=5)
        assert (again.text, again.usage.cached_tokens) == (first.text, PATCHES)


def test_logprobs_are_the_logits(engine: Engine) -> None:
    request = question("How likely?", max_tokens=3, logprobs=True)
    tokens, _ = collect(engine.submit(request))
    segments = render(engine.artifact.manifest.template, request.turns)
    ids = engine.tokenize(segments)
    logits = engine.evaluate([*ids, *(token.id for token in tokens)]).astype(np.float64)
    for token in tokens:
        row = logits[len(ids) - 1 + token.index]
        assert token.id == int(row.argmax())
        expected = row[token.id] - row.max() - np.log(np.exp(row - row.max()).sum())
        assert token.logprob == pytest.approx(expected, abs=0.02)


def test_evaluate_all_positions_and_last_agree(engine: Engine) -> None:
    segments = [Text("Look: "), ImageSlot(0), Text(" and answer. " * 8)]
    every = engine.evaluate(segments, [image(1)])
    last = engine.evaluate(segments, [image(1)], all_positions=False)
    assert every.shape == (len(engine.tokenize(segments)) - 1 + PATCHES, VOCAB)
    assert np.linalg.norm(every[-1] - last[0]) / np.linalg.norm(last) < 5e-3
    for count in (3, 80, 10_000):  # within the text, into the image, more than there are
        few = engine.evaluate(segments, [image(1)], all_positions=False, last=count)
        again = [engine.evaluate(segments, [image(1)], all_positions=False, last=count, reuse=True) for _ in range(2)]
        assert all(np.linalg.norm(every[-count:] - found) / np.linalg.norm(found) < 5e-3 for found in again)
        assert few.shape == every[-count:].shape
        assert np.linalg.norm(every[-count:] - few) / np.linalg.norm(few) < 5e-3
    assert engine.stats().kv_used_tokens == len(every)
    engine.evaluate(segments, [image(1)], all_positions=False)  # from an empty cache, which it leaves
    assert engine.stats().kv_used_tokens == 0


def test_cancel_stops_within_one_token(engine: Engine) -> None:
    stream = engine.submit(question("Talk", image(5), max_tokens=400))
    got = [next(stream), next(stream)]
    stream.cancel()
    rest, finished = collect(stream)
    assert finished.reason == "cancelled"
    assert finished.usage.late_tokens <= 1
    assert finished.usage.new_tokens == len(got) + len(rest) < 400
    assert engine.stats().busy == 0


def test_closing_a_stream_frees_its_slot(engine: Engine) -> None:
    stream = engine.submit(question("Talk", max_tokens=400))
    next(stream)
    stream.close()
    assert list(stream) == []
    engine.ask("Next", max_tokens=1)
    assert engine.stats().busy == 0


def test_losing_a_stream_frees_its_slot(engine: Engine) -> None:
    stream = engine.submit(question("Talk", max_tokens=400))
    next(stream)
    with engine._process._lock, engine._process._write_lock:  # a finaliser runs anywhere, also inside these
        del stream
        gc.collect()
    engine.ask("Next", max_tokens=1)
    assert engine.stats().busy == 0


def test_waiting_request_can_be_cancelled(engine: Engine) -> None:
    busy = [engine.submit(question(f"Long {i}", max_tokens=300)) for i in range(2)]
    waiting = engine.submit(question("Waiting", max_tokens=5))
    waiting.cancel()
    assert [event.reason for event in waiting if isinstance(event, Finished)] == ["cancelled"]
    for stream in busy:
        stream.close()


def test_overflow_is_told_before_the_first_token(engine: Engine) -> None:
    events = list(engine.submit(question("word " * 600, image(0))))
    assert len(events) == 1 and isinstance(events[0], Failed)
    error = events[0].error
    assert isinstance(error, ContextOverflowError) and "at most 511" in error.message and f"{PATCHES} of them" in error.message
    with pytest.raises(ContextOverflowError):
        engine.ask("word " * 600)


def test_answer_ends_at_the_contexts_end(engine: Engine) -> None:
    prompt = engine.ask("x" * 400, max_tokens=1).usage.prompt_tokens
    finished = engine.ask("x" * 400, max_tokens=500)
    assert finished.reason == "length"
    assert prompt + finished.usage.new_tokens == 512


def test_requests_that_make_no_sense(engine: Engine, artifact: Artifact) -> None:
    with pytest.raises(InputError, match="image"):
        engine.submit(Request(turns=(Turn("user", "Two?", 2),), images=(image(0),)))
    with pytest.raises(InputError, match="56"):
        engine.submit(question("Small", PreparedImage(bytes(12), 2)))
    with pytest.raises(InputError, match="end with the user"):
        engine.submit(Request(turns=()))
    with pytest.raises(InputError, match="below"):
        engine.evaluate([VOCAB])
    for wrong in (EngineSettings(slots=1000), EngineSettings(silence_limit_s=0)):
        with pytest.raises(InputError, match="slots|silence"):
            Engine.open(artifact, wrong)
    assert engine.ask("Still there?", max_tokens=1).usage.new_tokens == 1


@pytest.mark.parametrize("text", ["\ud800", os.fsdecode(b"\xff")])
def test_text_that_is_no_unicode_is_refused(engine: Engine, text: str) -> None:
    pid = engine.pid
    for call in (
        lambda: engine.submit(question(text)),
        lambda: engine.submit(question("Q", stop=(text,))),
        lambda: engine.evaluate([Text(text)]),
        lambda: engine.tokenize([Text(text)]),
    ):
        with pytest.raises(InputError, match="Unicode"):
            call()
    assert engine.ask("Still there?", max_tokens=1).usage.new_tokens == 1 and engine.pid == pid


def test_minus_one_is_a_seed_like_any_other(artifact: Artifact) -> None:
    # The first fills the prefix, of the one slot: on GPUs and ARM a longer batch rounds differently.
    with Engine.open(artifact, replace(SETTINGS, slots=1)) as engine:
        texts = [engine.ask("Draw", max_tokens=20, sampling=Sampling(temperature=2.0, seed=-1)).text for _ in range(3)]
    assert texts[1] == texts[2]


def test_stats_count(engine: Engine) -> None:
    before = engine.stats()
    engine.ask("Count", max_tokens=7)
    after = engine.stats()
    assert after.total_tokens == before.total_tokens + 7
    assert (after.slots, after.busy, after.queued, after.kv_size_tokens) == (2, 0, 0, 1024)
    assert 0 < after.kv_used_tokens <= 1024
    assert after.memory.rss_bytes > 10_000_000 and after.kv_bytes == 1024 * 2 * 2 * LLM_WIDTH * 2


def test_scarce_cache_makes_requests_wait(artifact: Artifact) -> None:
    settings = EngineSettings(context_tokens=256, slots=3, kv_tokens=300, threads=1)
    with Engine.open(artifact, settings) as engine:
        requests = [question(f"Question {i} " + "x" * 90, max_tokens=60, logprobs=True) for i in range(5)]
        answers = [tokens_of(stream) for stream in [engine.submit(request) for request in requests]]
        assert {len(answer) for answer in answers} == {60}
        assert engine.stats().kv_used_tokens <= 300
        assert_same_but_for_near_ties(tokens_of(engine.submit(requests[4])), answers[4])


def test_small_batches_give_the_same_text(artifact: Artifact, engine: Engine) -> None:
    request = question("The same in pieces? " * 4, image(6), max_tokens=16)
    whole = collect(engine.submit(request))[1].text
    settings = EngineSettings(context_tokens=512, threads=1, batch_tokens=10, micro_batch=10)
    with Engine.open(artifact, settings) as pieces:
        assert collect(pieces.submit(request))[1].text == whole


def test_damaged_files_are_refused(home: Path) -> None:
    artifact = make_artifact(home / "cut")
    data = artifact.mmproj_path.read_bytes()
    artifact.mmproj_path.write_bytes(data[:-1])
    with pytest.raises(ArtifactError, match="bytes"):
        load_artifact(artifact.folder)
    artifact.mmproj_path.write_bytes(data[:-1] + b"?")
    with pytest.raises(ArtifactError, match="SHA-256"):
        Engine.open(load_artifact(artifact.folder), SETTINGS)


def test_prepare_request_reads_files(tmp_path: Path, artifact: Artifact) -> None:
    from PIL import Image

    Image.new("RGB", (80, 40), (10, 200, 30)).save(tmp_path / "a.png")
    request = prepare_request(artifact, (Turn("user", "What?", 1),), [tmp_path / "a.png"], max_tokens=5)
    assert request.max_tokens == 5 and len(request.images[0].pixels) == SIZE_PX * SIZE_PX * 3


@pytest.fixture(scope="module")
def smollm2(home: Path) -> Iterator[Engine]:
    path = os.environ.get("EDGEMED_TEST_SMOLLM2")
    if not path or not Path(path).is_file():
        pytest.skip("EDGEMED_TEST_SMOLLM2 does not name SmolLM2's GGUF")
    with Engine.open(make_artifact(home / "smollm2", llm=Path(path)), EngineSettings(slots=2)) as engine:
        yield engine


def test_real_model_answers(smollm2: Engine) -> None:
    finished = smollm2.ask("What is the capital of France?", max_tokens=20)
    assert "Paris" in finished.text and finished.reason == "end"


def test_real_model_streams_whole_characters(smollm2: Engine) -> None:
    tokens, finished = collect(smollm2.submit(question("Write five emoji and the word Übergröße, twice.", max_tokens=60)))
    assert "".join(token.text for token in tokens) == finished.text
    assert all("\ufffd" not in token.text for token in tokens[:-1])


def texts(engine: Engine, requests: list[Request]) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    return [(c.token_ids, c.logprobs) for c in engine.ask_group(requests) if isinstance(c, Collected)]


def test_a_group_is_answered_the_same_whatever_came_before(artifact: Artifact) -> None:
    first = [question(f"Question {k} about it?", image(1), max_tokens=6, logprobs=True) for k in range(7)]
    other = [question("Something longer altogether, asked of another image?", image(k), max_tokens=9) for k in range(3)]
    settings = replace(SETTINGS, slots=4, kv_tokens=4 * 96)
    with Engine.open(artifact, settings) as fresh:
        alone = texts(fresh, first)
    with Engine.open(artifact, settings) as used:
        texts(used, other)
        collect(used.submit(question("And one by itself?", image(1), max_tokens=5)))
        assert texts(used, first) == alone  # to the last bit
    assert len(alone) == 7 and all(len(ids) == len(logprobs) == 6 for ids, logprobs in alone)
    assert all(value <= 0 for _, logprobs in alone for value in logprobs)


@pytest.mark.parametrize("more", ["", " Say so.", " Say so in one word.", " Say so in one word, or in two if need be."])
def test_questions_in_one_batch_are_answered_as_each_alone(artifact: Artifact, more: str) -> None:
    """Of several lengths, so that with some of them rows spill over the tiles of llama.cpp's attention and batches are cut."""
    asked = ["What organ is it?", "What organs are shown in this picture?", "Is it normal?", "Where is the abnormality, if there is one?"]
    requests = [question(text + more, image(1), max_tokens=8, logprobs=True) for text in asked]
    with Engine.open(artifact, replace(SETTINGS, slots=4)) as engine:
        together = texts(engine, requests)
        alone = [texts(engine, [request])[0] for request in requests]
    for some, others in zip(together, alone, strict=True):
        assert_same_but_for_near_ties(list(zip(*some, strict=True)), list(zip(*others, strict=True)))


def test_a_group_keeps_what_does_not_fit_in_its_place(engine: Engine) -> None:
    long = question("word " * 600, image(1), max_tokens=3)
    short = question("Is it?", image(1), max_tokens=3)
    first, second, third = engine.ask_group([short, long, short])
    assert isinstance(second, ContextOverflowError)
    assert isinstance(first, Collected) and isinstance(third, Collected)
    assert first.token_ids == third.token_ids and first.finished.usage.new_tokens == 3
    assert engine.ask_group([]) == []
    assert isinstance(engine.ask_group([long])[0], ContextOverflowError)
    with pytest.raises(InputError):
        engine.ask_group([short, question("Is it?", max_tokens=0)])


def test_a_request_between_groups_is_answered(engine: Engine) -> None:
    """One that is in flight when a group comes is finished first, by itself."""
    stream = engine.submit(question("Is it normal?", image(3), max_tokens=40))
    assert isinstance(next(stream), Token)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(engine.ask_group([question("Is it?", image(1), max_tokens=3)])))
    thread.start()
    _, finished = collect(stream)
    thread.join(60)
    assert finished.usage.new_tokens == 40 and isinstance(found[0], Collected)


def test_what_no_model_could_take_is_refused_before_it_costs_others_time(artifact: Artifact) -> None:
    with Engine.open(artifact, SETTINGS) as engine:
        with pytest.raises(ContextOverflowError, match="characters"):
            engine.ask("x" * 200_000)
        for sampling in (Sampling(seed=1.5), Sampling(temperature=math.nan), Sampling(repeat_penalty=0.0)):  # type: ignore[arg-type]
            with pytest.raises(InputError, match="whole numbers"):
                engine.ask("Hello", max_tokens=1, sampling=sampling)
        with pytest.raises(InputError, match="at least one position"):
            engine.evaluate([Text("Hello")], all_positions=False, last=0)
        assert engine.ask("Hello", max_tokens=2).usage.new_tokens == 2 and engine.stats().restarts == 0
