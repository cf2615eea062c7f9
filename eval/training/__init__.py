"""Training of learned compressors on the embedded model, and the measurements of what they reach.

The commands `vtc train` and `vtc calibrate` lie in `vtc.cli.train`. The modules::

    settings.py         what decides the weights of a run
    prompts.py          batches of scenes with one question each, as a function of (seed, step)
    trainer.py          the resumable loop: answer loss through the real model plus the method's own loss
    measure.py          accuracy and tokens kept on held-out scenes, through processor and generate
    calibrations/       what methods measure of a model on training scenes, a module for each
    attention_rank.py   rank of the attention maps of each layer, an analysis
    atp_report.py       the generated page docs/results/atp.md
    vqtoken_report.py   the same for VQToken
    quecc_report.py     and for QueCC
    p_mod_report.py     and for p-MoD
"""
