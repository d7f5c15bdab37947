"""Text in, batches of token windows out: corpora, tokenizers, the pipeline."""
