"""One method, one file; being in this folder is the registration (with the `register` decorator)."""
