"""A simulated machine with energy counters: its true energy, what its counters show, and what a meter should find.

Written from the energy design alone, without the project's meter. See ``world.py`` for the entry point. Only
``driver.py`` (feeds the real meter), ``covered.py`` and ``judge.py`` (compare its figures with the truth) know of it.
"""
