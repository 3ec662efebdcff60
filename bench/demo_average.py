"""The mean of several trainings of edgemed-demo that began alike, as one model (Wortsman et al. 2022, arXiv:2203.05482).

    python -m bench.demo_average PARTS PARTS… --out PARTS

PARTS are folders of bench/demo_parts.py. Tower and projector are averaged weight by weight, the adapter as what it
adds to the weights, B·A: the mean of n products of rank r has rank n·r, of which the r largest singular directions are kept (how much of
it that is, is printed). run.json is the first's, with every one's own steps and scores below "averaged".
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bench.demo_parts import ADAPTER, VISION, State


def average(states: Sequence[State]) -> State:
    """Weights of the same names and shapes → their mean, fp16."""
    return {name: (sum(state[name].double() for state in states) / len(states)).half() for name in states[0]}


def average_adapters(states: Sequence[State]) -> tuple[State, float]:
    """Adapters of rank r → one of rank r, fp16, and the share of the mean product's squared norm that it keeps."""
    out: State = {}
    kept = whole = 0.0
    for name in [name for name in states[0] if ".lora_A." in name]:
        other = name.replace(".lora_A.", ".lora_B.")
        rank = states[0][name].shape[0]
        a = torch.cat([state[name].double() for state in states])  # [n·r, in]
        b = torch.cat([state[other].double() for state in states], 1) / len(states)  # [out, n·r]
        q_b, r_b = torch.linalg.qr(b)
        q_a, r_a = torch.linalg.qr(a.T)
        u, s, vt = torch.linalg.svd(r_b @ r_a.T)
        root = s[:rank].sqrt()
        # as in training, neither factor is much larger than the other
        out[name] = (root[:, None] * (vt[:rank] @ q_a.T)).half().contiguous()
        out[other] = ((q_b @ u[:, :rank]) * root).half().contiguous()
        kept, whole = kept + float(s[:rank].square().sum()), whole + float(s.square().sum())
    return out, kept / whole


def average_parts(folders: Sequence[Path], out: Path) -> float:
    """Write OUT, as described above; the share of the adapters' mean that is kept. Raises AssertionError where the names differ."""
    adapters, visions = ([load_file(folder / file) for folder in folders] for file in (ADAPTER, VISION))
    runs = [json.loads((folder / "run.json").read_text()) for folder in folders]
    for state, model in ((s, states[0]) for states in (adapters, visions) for s in states):
        assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in model.items()}, "Expected parts of one model."
    adapter, kept = average_adapters(adapters)
    out.mkdir(parents=True, exist_ok=True)
    save_file(adapter, out / ADAPTER)
    save_file({name: tensor.contiguous() for name, tensor in average(visions).items()}, out / VISION)
    told = [{key: value for key, value in run.items() if key not in ("stages", "join")} for run in runs]
    first = {key: value for key, value in runs[0].items() if key != "probe"}
    (out / "run.json").write_text(json.dumps({**first, "averaged": told}))
    return kept


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    print(f"kept of the adapters' mean: {average_parts(arguments.parts, arguments.out):.5f}")
