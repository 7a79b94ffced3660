"""Search kernel configs by measuring few of them (SearchSpace + a measure function handed in -> SearchResult).

search.py          the ask/tell loop: seeds, trials, budgets, finalists
sampler.py         what a sampler is, and the table of samplers
random_search.py   the baseline: every valid config equally likely
bandit.py          the learning sampler: Bayesian regression on log latency, Thompson sampling
space.py           configs as vectors in the unit cube
replay.py          recorded landscapes, measured on a GPU and replayed anywhere
"""
