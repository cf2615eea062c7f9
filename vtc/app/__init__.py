"""What commands, sweeps and the lmms-eval plug-in share: loading models, preparing inputs, reading media, answering."""
