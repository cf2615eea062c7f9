"""Visual-token compression for multimodal language models."""
