"""Synthetic scenes with questions, and the training of the small embedded models on them."""
