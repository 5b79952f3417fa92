"""The trainer behind `bomkern train`: a VAE with nine goals on photographs. Needs ``pip install 'bomkern[train]'``.

`goals` holds the nine goals, `networks` the model, `data` the crops, `scales` the presets, `step` one step, `loop` a
run, `record` and `plots` what it leaves behind.
"""
