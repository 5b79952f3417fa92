"""The trainer behind `bomkern train`: a VAE with nine goals on photographs. Needs ``pip install 'bomkern[train]'``.

The goals are in `nine_goals`, their anchors in `presets`, the model in `networks`, the crops in `data`, one step in
`trainer`, a run in `loop`, and its files in `recorder` and `plots`.
"""
