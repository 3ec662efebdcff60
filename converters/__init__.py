"""From checkpoints to GGUF: readers, architecture tables, quantisation and the writer.

    from converters.readers import open_checkpoint      # any supported layout -> Checkpoint
    from converters.llm import llm_metadata, llm_tensors
    from converters.tokenizers import tokenizer_metadata

Knows nothing about training or running models; it meets both at files.
"""
