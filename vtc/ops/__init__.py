"""Batched tensor functions behind the methods. They take tensors and whole numbers, return tensors, know no model."""
