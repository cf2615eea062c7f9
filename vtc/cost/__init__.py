"""What a prompt costs: operations, KV cache, memory and estimated time, from shapes and token counts alone."""
