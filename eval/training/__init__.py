"""Training of learned compressors on the embedded model, and the measurements of what they reach.

settings.py      what decides the weights of a run
prompts.py       batches of scenes with one question each, as a function of (seed, step)
trainer.py       the resumable loop: answer loss through the real model plus the method's own loss
measure.py       accuracy and tokens kept on held-out scenes, through processor and generate
calibrate.py     constants for methods that need a calibration instead of a training
atp_report.py    the generated page docs/results/atp.md
cli.py           the commands `train`, `calibrate` and `train-report`
"""
