"""The effect of the advice of `bomkern.diagnose`."""
