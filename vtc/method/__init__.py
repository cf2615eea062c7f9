"""What the author of a method reads: the base class, where it may act, what it sees and what it may spend.

    base.py        Compressor, ScoringCompressor: what a method is
    plan.py        stages, needs, the facts about a model
    view.py        StageView: what a method sees at a stage; Selection: what it answers
    layout.py      VisualItem: the geometry of one image or video
    readings.py    what can be recorded of attention, in the encoder and in the LLM
    budget.py      retention or keep -> numbers of tokens, and the one solver of what stages in the LLM may spend
    parts.py       choosing and merging in the crops or frames of items
    registry.py, text.py, plugins.py    methods by name, as text, from files of one's own
    composite.py, learned.py, weights.py    several methods as one; learned parts and their files

It imports `vtc.ops`, `vtc.embedded` and errors only.
"""
