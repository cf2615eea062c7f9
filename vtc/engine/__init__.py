"""Hooks on an unmodified Hugging Face model: the only room that knows how its forward pass runs."""
