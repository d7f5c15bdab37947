"""Text from a model: prompts, a cache of keys and values, sampling."""
