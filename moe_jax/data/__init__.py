"""Text in, batches of token sequences out: sources, tokenizers, pipeline."""
