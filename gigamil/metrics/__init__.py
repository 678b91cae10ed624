"""How good predictions of slides are, with intervals that respect patients.

Measures are pure functions of arrays; `bootstrap.scores` puts intervals around whatever they give.
"""
