"""Readers of medical VQA sets and LLaVA conversations.

    samples = load_samples("slake", Path("slake"), split="validate")

Each reader turns a set's native files into `Sample`s. Knows no tokenizer, model or metric.
"""

from edgemed.data.readers import READERS, load_samples
from edgemed.data.samples import Sample, hash_images, hash_samples
from edgemed.data.splits import DatasetName, load_named, parse_dataset

__all__ = ["READERS", "DatasetName", "Sample", "hash_images", "hash_samples", "load_named", "load_samples", "parse_dataset"]
