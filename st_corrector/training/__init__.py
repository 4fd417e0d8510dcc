"""The trainer, its arguments, and what accompanies a run: checkpoints, recorder, guard, callbacks.

A resumed run is the run that was not interrupted.
"""
