"""What lies in a batch: its prompt, its visual items and what became of them. Values, without hooks or models."""
