"""Readers of medical VQA sets and LLaVA conversations.

    samples = load_samples("slake", Path("slake"), split="validate")

Each reader turns a set's native files into `Sample`s. Knows no tokenizer, model or metric.
"""

from edgemed.data.readers import READERS, load_samples
from edgemed.data.samples import Sample, hash_samples

__all__ = ["READERS", "Sample", "hash_samples", "load_samples"]
