"""The plan's arithmetic beside what llama.cpp really allocates, its properties, its words, and what it refuses."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runtimes_pair import make_artifact
from typer.testing import CliRunner

from bench.measure import measure_artifact
from bench.planning import Comparison, worst
from bench.render import rows_of
from edgemed.core.errors import ArtifactError, EngineMemoryError, InputError, ResourceError
from edgemed.core.manifest import Artifact
from edgemed.core.probe import probe_pixels
from runtimes import devices, libllama, opening
from runtimes.account import Lines, lacks_memory, read_account
from runtimes.devices import find_device, load_profile
from runtimes.engine import Engine
from runtimes.estimate import Host, estimate_memory, repacks
from runtimes.gguf_header import TensorInfo
from runtimes.graph import CPU, F32, GPU, Graph
from runtimes.messages import Buffer, EngineSettings, PreparedImage
from runtimes.opening import load_target, open_planned, plan_artifact, plan_target
from runtimes.planner import Plan, Target, Wish, list_plans, make_plan
from runtimes.shape import LlmShape, PairShape, TowerShape, read_shape

# The account is in MiB with two decimals.
ROUNDING = 6000
GB = 10**9


def type_bytes(kind: int, shape: tuple[int, ...]) -> int:
    return libllama.tensor_bytes(kind, shape) or 0


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_artifact(tmp_path_factory.mktemp("pair") / "pair", "clip")


@pytest.fixture(scope="module")
def pair(artifact: Artifact) -> PairShape:
    return read_shape(artifact, libllama.tensor_bytes)


def big_pair(layers: int = 32) -> PairShape:
    """LLaVA-Med's shape at 4 bits, without a file: Mistral-7B in Q4_K with CLIP-L/14-336."""
    q4_k, f16 = 12, 1
    shapes: dict[str, tuple[int, tuple[int, ...]]] = {"token_embd.weight": (q4_k, (4096, 32000)), "output.weight": (q4_k, (4096, 32000))}
    shapes["output_norm.weight"] = (F32, (4096,))
    for i in range(layers):
        rows = {"attn_q": (4096, 4096), "attn_k": (4096, 1024), "attn_v": (4096, 1024), "attn_output": (4096, 4096)}
        rows |= {"ffn_gate": (4096, 14336), "ffn_up": (4096, 14336), "ffn_down": (14336, 4096)}
        shapes |= {f"blk.{i}.{name}.weight": (q4_k, shape) for name, shape in rows.items()}
        shapes |= {f"blk.{i}.{name}.weight": (F32, (4096,)) for name in ("attn_norm", "ffn_norm")}
    tower: dict[str, tuple[int, tuple[int, ...]]] = {
        "v.patch_embd.weight": (f16, (14, 14, 3, 1024)),
        "v.class_embd": (F32, (1024,)),
        "v.position_embd.weight": (F32, (1024, 577)),
        "mm.0.weight": (f16, (1024, 4096)),
        "mm.2.weight": (f16, (4096, 4096)),
    }
    for i in range(23):
        square = {f"v.blk.{i}.attn_{part}.weight": (f16, (1024, 1024)) for part in ("q", "k", "v", "out")}
        tower |= square | {f"v.blk.{i}.ffn_up.weight": (f16, (1024, 4096)), f"v.blk.{i}.ffn_down.weight": (f16, (4096, 1024))}
    llm = LlmShape("llama", layers, 4096, 32, 8, 128, 14336, 32000, 32768, 0, infos(shapes))
    return PairShape("med", llm, TowerShape(336, 14, 1024, 16, 23, 4096, True, infos(tower)), 576)


def infos(shapes: dict[str, tuple[int, tuple[int, ...]]]) -> dict[str, TensorInfo]:
    found, at = {}, 0
    for name, (kind, shape) in shapes.items():
        found[name] = TensorInfo(shape, kind, at, type_bytes(kind, shape))
        at += found[name].size_bytes
    return found


def target(gpu: int | None = None, cpu: int | None = None, device: str = "rtx3050") -> Target:
    return Target(find_device(device), Host(gpu is not None, frozenset({"avx2"}), 400_000_000, 4), gpu, cpu)


# -- beside llama.cpp -------------------------------------------------------------------------------------------------

SETTINGS = [
    EngineSettings(context_tokens=512, gpu_layers=0, threads=1),
    EngineSettings(context_tokens=700, slots=3, gpu_layers=0, threads=1),
    EngineSettings(context_tokens=1024, micro_batch=64, kv_type="f32", gpu_layers=0, threads=1),
    EngineSettings(context_tokens=1024, slots=2, flash_attention="off", gpu_layers=0, threads=1),
    EngineSettings(context_tokens=512, vision_flash_attention="on", gpu_layers=0, threads=1),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_buffer_is_as_large_as_predicted(artifact: Artifact, pair: PairShape, settings: EngineSettings) -> None:
    with Engine.open(artifact, settings) as engine:
        size_px = artifact.manifest.image.size_px
        engine.ask("What?", [PreparedImage(probe_pixels(size_px).tobytes(), size_px)], max_tokens=2, ignore_end=True)
        account = engine.stats().account
    estimate = estimate_memory(pair, settings, Host(False, libllama.cpu_features(), 0, 1), libllama.tensor_bytes)
    measured = {what: sum(b.size_bytes for b in account if b.what == what) for what in {b.what for b in account}}
    assert set(measured) == {"weights", "cache", "output", "compute", "tower weights", "tower compute"}
    for what, size in measured.items():
        kinds = (what, "repacked weights") if what == "weights" else (what,)
        assert abs(estimate.sum(CPU, *kinds) - size) <= ROUNDING, what


def test_repacked_weights_are_a_second_buffer(tmp_path: Path) -> None:
    features = frozenset({"avx2"})
    assert repacks(TensorInfo((256, 16), 12, 0, 0), features) and not repacks(TensorInfo((256, 12), 12, 0, 0), features)
    assert not repacks(TensorInfo((256, 16), 8, 0, 0), features)
    assert repacks(TensorInfo((256, 16), 8, 0, 0), frozenset({"neon", "dotprod"}))
    shape = big_pair(2)
    cpu = estimate_memory(shape, EngineSettings(gpu_layers=0), Host(False, features), libllama.tensor_bytes)
    plain = estimate_memory(shape, EngineSettings(gpu_layers=0, repack=False), Host(False, features), libllama.tensor_bytes)
    matrices = sum(t.size_bytes for n, t in shape.llm.tensors.items() if t.type == 12 and n != "token_embd.weight")
    assert cpu.sum(CPU, "repacked weights") == matrices and plain.sum(CPU, "repacked weights") == 0


# -- the allocator ----------------------------------------------------------------------------------------------------


def test_a_sum_takes_over_its_first_sources_memory() -> None:
    graph = Graph(type_bytes)
    x = graph.input(F32, (8, 4))
    product = graph.mul_mat(graph.stored(F32, (8, 8), CPU), x)
    graph.expand(graph.like("add", product, graph.stored(F32, (8,), CPU)))
    assert graph.allocate((CPU,)) == {CPU: 2 * 8 * 4 * 4}


def test_memory_is_used_again_after_the_last_use() -> None:
    graph = Graph(type_bytes)
    x = graph.input(F32, (64, 64))
    for _ in range(10):
        x = graph.mul_mat(graph.stored(F32, (64, 64), CPU), x)
    graph.expand(x)
    # An input is freed like anything else once it was read: two of the eleven are alive at a time.
    assert graph.allocate((CPU,)) == {CPU: 2 * 64 * 64 * 4}


def test_what_lies_elsewhere_is_copied() -> None:
    graph = Graph(type_bytes)
    x = graph.input(F32, (64, 64))
    graph.expand(graph.mul_mat(graph.stored(F32, (64, 64), GPU), x))
    assert graph.allocate((GPU, CPU)) == {GPU: 2 * 64 * 64 * 4, CPU: 64 * 64 * 4}


def test_weights_on_the_cpu_travel_to_the_gpu_for_a_large_batch() -> None:
    def sizes(rows: int) -> dict[Any, int]:
        graph = Graph(type_bytes)
        graph.expand(graph.mul_mat(graph.stored(F32, (64, 64), CPU), graph.input(F32, (64, rows))))
        return dict(graph.allocate((GPU, CPU)))

    assert sizes(32)[GPU] == 64 * 64 * 4 + 2 * 64 * 32 * 4 and sizes(31)[GPU] == 0


# -- properties -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"context_tokens": 1024}, {"context_tokens": 2048}),
        ({"slots": 1}, {"slots": 4}),
        ({"kv_type": "q8_0"}, {"kv_type": "f16"}),
        ({"micro_batch": 128}, {"micro_batch": 512}),
        ({"flash_attention": "on"}, {"flash_attention": "off"}),
    ],
)
def test_asking_for_more_takes_more(gpu: bool, less: dict[str, Any], more: dict[str, Any]) -> None:
    shape, host = big_pair(4), Host(gpu, frozenset({"avx2"}))
    place = GPU if gpu else CPU
    sizes = [
        estimate_memory(shape, EngineSettings(gpu_layers=-1 if gpu else 0, **options), host, libllama.tensor_bytes).dynamic_bytes(place)
        for options in (less, more)
    ]
    assert sizes[0] < sizes[1]


def test_layers_move_their_weights_and_cache() -> None:
    shape, host = big_pair(4), Host(True)
    estimates = [estimate_memory(shape, EngineSettings(gpu_layers=n), host, libllama.tensor_bytes) for n in range(6)]
    for what in ("weights", "cache"):
        on_gpu = [e.sum(GPU, what) for e in estimates]
        assert on_gpu == sorted(on_gpu) and on_gpu[0] == 0
    assert estimates[1].sum(GPU, "cache") == 0  # the output layer goes first, and has no cache
    assert estimates[5].sum(CPU, "cache") == 0 and len({e.sum(GPU, "cache") + e.sum(CPU, "cache") for e in estimates}) == 1


@pytest.mark.parametrize("budget_mb", [500, 900, 1500, 2500, 4000, 4800, 5200, 5600, 6500, 20000])
@pytest.mark.parametrize("users", [1, 4])
def test_what_is_picked_fits_or_nothing_is(budget_mb: int, users: int) -> None:
    place = target(gpu=budget_mb * 10**6, cpu=9 * GB)
    try:
        plans = list(list_plans(big_pair(), place, Wish(users=users), libllama.tensor_bytes))
    except ResourceError as error:
        assert "found" in error.message and error.hint
        assert budget_mb < 900
        return
    for plan in plans:
        assert plan.estimate.dynamic_bytes(GPU) <= budget_mb * 10**6 and plan.estimate.dynamic_bytes(CPU) <= 9 * GB
        assert plan.settings.slots == users


def test_smaller_plans_need_less() -> None:
    sizes = [
        p.estimate.dynamic_bytes(CPU) for p in list_plans(big_pair(4), target(cpu=90 * GB, device="cpu"), Wish(), libllama.tensor_bytes)
    ]
    assert len(sizes) > 3 and sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)


def plan_with(budget_mb: int, **wish: Any) -> Plan:
    return make_plan(big_pair(), target(gpu=budget_mb * 10**6), Wish(**wish), libllama.tensor_bytes)


def test_a_plan_with_room_gives_nothing_up() -> None:
    plan = plan_with(20000)
    assert (plan.settings.kv_type, plan.settings.gpu_layers, plan.settings.tower) == ("f16", -1, "gpu")
    assert not any("were needed" in reason for reason in plan.reasons)


def test_each_thing_given_up_has_its_reason() -> None:
    plan = plan_with(3000)
    assert 0 < plan.settings.gpu_layers < 33 and plan.settings.tower == "cpu" and plan.settings.kv_type == "q8_0"
    text = "\n".join(plan.reasons)
    assert f"{plan.settings.gpu_layers} of 33 layers are on the GPU" in text and "and 3.00 GB are there" in text
    assert text.count("were needed") == 4  # micro-batch, cache, the tower, layers; its attention is in tiles from the start


def with_heads(heads: int) -> PairShape:
    pair = big_pair()
    return replace(pair, tower=replace(pair.tower, heads=heads))


@pytest.mark.parametrize(
    ("wanted", "heads", "device", "gpu", "expected"),
    [
        ("auto", 16, "gpu", True, True),  # 1024 / 16 = 64, as CLIP-L
        ("auto", 8, "gpu", True, True),
        ("auto", 14, "gpu", True, False),  # 73, no size that CUDA has a fast kernel for
        ("auto", 16, "cpu", False, True),
        ("auto", 14, "cpu", True, True),
        ("off", 16, "gpu", True, False),
        ("off", 16, "cpu", False, False),
        ("on", 14, "gpu", True, True),
        ("on", 14, "cpu", False, True),
    ],
)
def test_the_towers_attention_is_chosen_by_its_heads(wanted: Any, heads: int, device: Any, gpu: bool, expected: bool) -> None:
    pair, host = with_heads(heads), Host(gpu, frozenset({"avx2"}), 0, 4)
    sizes = [
        estimate_memory(pair, EngineSettings(vision_flash_attention=how, tower=device), host, libllama.tensor_bytes).sum(
            GPU if device == "gpu" else CPU, "tower compute"
        )
        for how in (wanted, "on", "off")
    ]
    assert sizes[1] != sizes[2] and sizes[0] == sizes[1 if expected else 2]


def test_a_tower_without_a_fast_kernel_takes_tiles_only_for_want_of_room() -> None:
    plans = [make_plan(with_heads(14), target(gpu=mb * 10**6), Wish(), libllama.tensor_bytes) for mb in (20000, 3000)]
    assert [plan.settings.vision_flash_attention for plan in plans] == ["auto", "on"]
    assert any("attention in tiles" in reason for reason in plans[1].reasons)


def test_what_was_asked_for_is_kept() -> None:
    plan = plan_with(4900, kv_type="f16", micro_batch=512, tower="gpu", context_tokens=4096)
    s = plan.settings
    assert (s.kv_type, s.micro_batch, s.tower, s.context_tokens) == ("f16", 512, "gpu", 4096) and s.gpu_layers < 33


def test_where_nothing_fits_it_says_what_to_change() -> None:
    with pytest.raises(ResourceError) as caught:
        make_plan(big_pair(), target(cpu=12 * GB, device="cpu"), Wish(users=64, context_tokens=8192), libllama.tensor_bytes)
    assert "64 × 8192 tokens" in caught.value.message and "found 12.00 GB" in caught.value.message
    assert "--users" in caught.value.hint
    with pytest.raises(ResourceError) as caught:
        make_plan(big_pair(), target(cpu=1 * GB, device="cpu"), Wish(), libllama.tensor_bytes)
    assert caught.value.hint.startswith("Close other programs")


@pytest.mark.parametrize("wish", [Wish(users=0), Wish(users=300), Wish(context_tokens=576), Wish(context_tokens=40000)])
def test_a_wish_that_no_device_can_meet(wish: Wish) -> None:
    with pytest.raises(InputError, match="Expected .* found"):
        make_plan(big_pair(4), target(cpu=90 * GB, device="cpu"), wish, libllama.tensor_bytes)


def test_a_unified_memory_is_one_budget() -> None:
    plan = make_plan(big_pair(4), target(gpu=60 * GB, device="jetson"), Wish(), libllama.tensor_bytes)
    need = plan.estimate.dynamic_bytes(GPU) + plan.estimate.dynamic_bytes(CPU)
    assert target(gpu=need, device="jetson").lacks(plan.estimate) is None
    assert target(gpu=need - 1, device="jetson").lacks(plan.estimate)[:2] == (need, need - 1)


# -- the account ------------------------------------------------------------------------------------------------------


def test_the_log_is_read_as_an_account() -> None:
    lines = Lines()
    for level, text in [
        (2, "load_tensors:   CPU_Mapped model buffer size =    81.54 MiB\n"),
        (2, "load_tensors:        CUDA0 model buffer size =     1.00 MiB\n"),
        (2, "llama_kv_cache:      CUDA0 KV buffer size =    45.00 MiB\n"),
        (2, "print_info: something else\n"),
        (2, "clip_ctx: CLIP using CUDA0 backend\n"),
        (2, "load_hparams: model size:         11.84 MiB\n"),
        (2, "sched_reserve:      CUDA0 compute buffer size =    15.50 MiB\n"),
        (2, "reserve_compute_meta:      CUDA0 compute buffer size =     3.20 MiB\n"),
        (4, "ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size 99\n"),
    ]:
        lines.add(level, text)
    account = read_account(lines.kept)
    assert Buffer("cache", "CUDA0", 45 << 20) in account and Buffer("tower compute", "CUDA0", round(3.2 * 2**20)) in account
    assert Buffer("tower weights", "CUDA0", round(11.84 * 2**20)) in account and len(account) == 6
    assert lacks_memory(lines.errors) and not lacks_memory(["key not found in model: llama.block_count"])


# -- profiles ---------------------------------------------------------------------------------------------------------


def test_every_profile_is_whole() -> None:
    for name in devices.device_names():
        profile = find_device(name)
        assert profile.local or None not in (profile.usable_bytes, profile.bandwidth_bytes_per_s, profile.compute_capability)
        if profile.usable_bytes is not None and profile.memory_bytes is not None:
            assert profile.usable_bytes.value < profile.memory_bytes.value
    assert find_device("cuda") is find_device("gpu") or find_device("cuda") == find_device("gpu")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (("memory_bytes]", "memory_byte]"), "memory_byte"),
        (("value = 5_600_000_000", 'value = "much"'), "usable_bytes.value"),
        (("value = 5_600_000_000", "value = -1"), "usable_bytes.value"),
        (("verified = true", ""), "verified"),
        (('name = "rtx3050"', 'name = "rtx3060"'), "rtx3060"),
        (('kind = "gpu"', 'kind = "gpu'), "TOML"),
    ],
)
def test_a_profile_with_a_typo_is_named(tmp_path: Path, change: tuple[str, str], found: str) -> None:
    text = (Path(devices.__file__).parent / "profiles" / "rtx3050.toml").read_text()
    assert change[0] in text
    path = tmp_path / "rtx3050.toml"
    path.write_text(text.replace(change[0], change[1], 1))
    with pytest.raises(InputError) as caught:
        load_profile(path)
    assert "rtx3050.toml" in caught.value.message and found in caught.value.message


# -- loading ----------------------------------------------------------------------------------------------------------

LIMIT = 500_000_000
HUNGRY = Wish(users=128, context_tokens=4096, micro_batch=128, kv_type="f16")


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_DATA")
def test_memory_that_cannot_be_had_is_an_error_of_its_own(artifact: Artifact) -> None:
    settings = EngineSettings(context_tokens=4096, slots=256, gpu_layers=0, threads=1, memory_limit_bytes=LIMIT)
    with pytest.raises(EngineMemoryError) as caught:
        Engine.open(artifact, settings)
    assert "memory" in caught.value.message + caught.value.hint
    with Engine.open(artifact, replace(settings, context_tokens=512, slots=1)) as engine:
        assert engine.report.kv_bytes > 0


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_DATA")
def test_loading_that_fails_steps_down_and_says_so(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Engine.open
    tried: list[EngineSettings] = []

    def limited(artifact: Artifact, settings: EngineSettings) -> Engine:
        tried.append(settings)
        return real(artifact, replace(settings, memory_limit_bytes=LIMIT, threads=1))

    monkeypatch.setattr(opening.Engine, "open", limited)
    notes: list[str] = []
    roomy = Target(find_device("cpu"), Host(False, libllama.cpu_features(), 0, 1), None, 900 * GB)
    engine, plan = open_planned(artifact, roomy, Wish(users=200), notes.append)
    engine.close()
    assert len(tried) > 1 and plan.settings == tried[-1] and plan.settings.context_tokens < tried[0].context_tokens
    assert len(notes) == len(tried) - 1 and all("smaller plan" in note for note in notes)
    assert f"A conversation has {plan.settings.context_tokens} tokens" in notes[-1]


def test_a_model_without_a_certificate_is_refused(tmp_path: Path) -> None:
    bare = make_artifact(tmp_path / "bare", certificate=False)
    with pytest.raises(ArtifactError, match="certificate"):
        plan_artifact(bare, plan_target("rtx3050"), Wish())


def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)


def test_a_device_to_load_on_must_be_here(monkeypatch: pytest.MonkeyPatch) -> None:
    no_gpu(monkeypatch)
    assert load_target(None).profile.name == "cpu"
    for name in ("gpu", "rtx3050"):
        with pytest.raises(ResourceError, match="NVML"):
            load_target(name)
    assert plan_target("rtx3050").gpu_bytes == 5_600_000_000  # a plan needs no device


def test_a_machine_that_swaps_loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    no_gpu(monkeypatch)
    memory, swap = SimpleNamespace(available=1 * GB, total=8 * GB), SimpleNamespace(used=3 * GB)
    monkeypatch.setattr(devices.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(devices.psutil, "swap_memory", lambda: swap)
    with pytest.raises(ResourceError, match="swapping"):
        load_target("cpu")
    swap.used = 0
    assert load_target("cpu").cpu_bytes == 1 * GB


def test_what_is_emulated_says_so(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    no_gpu(monkeypatch)
    profile = find_device("jetson")
    trace = measure_artifact(artifact, profile, questions=3)
    assert "Jetson" in trace.emulated and "this machine's CPU" in trace.emulated
    rows = rows_of(trace, profile)
    assert all("emulated" in name for name, _ in rows)
    assert ("measured on (emulated)", "CPU") in rows
    assert any("PSS" in name for name, _ in rows)


# -- the commands -----------------------------------------------------------------------------------------------------


def run(*args: object, code: int = 0) -> tuple[str, str]:
    import subprocess

    result = subprocess.run([sys.executable, "-m", "edgemed", *map(str, args)], capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    return result.stdout, result.stderr


def test_plan_prints_parts_and_reasons(artifact: Artifact) -> None:
    from edgemed.cli.app import app

    result = CliRunner().invoke(app, ["plan", str(artifact.folder), "--device", "rtx3080", "--users", "3", "--json", "--quiet"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout.splitlines()[-1])
    assert data["device"] == "rtx3080" and data["settings"]["slots"] == 3
    assert data["dynamic_bytes"]["gpu"] == sum(item["size_bytes"] for item in data["items"] if item["place"] == "GPU")
    assert data["static_bytes"]["gpu"] < data["dynamic_bytes"]["gpu"] <= data["budget_bytes"]["gpu"]
    assert any("3 users" in reason for reason in data["reasons"])
    result = CliRunner().invoke(app, ["plan", str(artifact.folder), "--device", "cpu"])
    assert "dynamic: at the peak" in result.stdout and "Flash attention is on" in result.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "rtx9000"], ["rtx3050", "jetson", "rtx9000"]),
        (["--device", "rtx3050", "--kv", "q3"], ["f16", "q3"]),
        (["--device", "rtx3050", "--context", "5000"], ["4096", "5000"]),
        (["--device", "rtx3050", "--users", "9999"], ["256", "9999"]),
    ],
)
def test_plan_refuses_in_a_sentence(artifact: Artifact, options: list[str], words: list[str]) -> None:
    out, err = run("plan", artifact.folder, *options, code=1)
    assert out == "" and err.startswith("Error: Expected ") and "Hint: " in err
    assert all(word in err for word in words)


def test_the_bench_tells_the_worst_of_each_figure() -> None:
    rows = [Comparison("a", 98, 100), Comparison("a", 105, 100), Comparison("b", 1, 1)]
    assert worst(rows) == {"a": {"settings": 2, "under": 0.98, "over": 1.05}, "b": {"settings": 1, "under": 1.0, "over": 1.0}}
