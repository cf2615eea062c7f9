"""Stand-alone encoders compared as `vtc sweep` compares language models: zero-shot classification and retrieval."""
