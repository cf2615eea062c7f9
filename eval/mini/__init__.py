"""mini-llava: a LLaVA of LLaVA-1.5's geometry (576 visual tokens, 30 layers) made of two pretrained models."""
