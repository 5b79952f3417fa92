"""The trainer behind `bomkern train`: a VAE with nine goals on photographs. Needs ``pip install 'bomkern[train]'``.

`nine_goals` holds the goals, `presets` their anchors, `networks` the model, `data` the crops, `trainer` one step,
`loop` a run, `recorder` and `plots` its files.
"""
