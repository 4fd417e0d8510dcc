"""The loss, its gradient-cached twin, the corrected corpus that both keep, and what they check of their input.

Pairs of texts and rows in, a loss out. The corrector never sees the task loss's gradient, nor the encoder the
corrector's.
"""
