"""`vtc bench`: what a request costs in seconds and bytes, part by part, on one device in one process."""
