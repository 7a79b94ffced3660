"""Search kernel configs by measuring few of them (SearchSpace + a measure function handed in -> SearchResult).

search.py          the loop: ask, measure, tell, polish, and the finals
study.py           the ask/tell core: batches, any order, foreign results, nothing twice, a ledger of it all
ledger.py          the append-only file that a killed search goes on from
measuring.py       one measurement with a deadline; failures by class
bound.py           the early end of a hopeless config
finals.py          the best few measured again, in turn, until the noise leaves no doubt
siblings.py        what other shapes and devices, hints and the compiler say of each config
moved.py           siblings of other shapes, moved to the shape in hand
foreign.py         from recordings and ledgers to siblings and measures
space.py           configs as vectors in the unit cube
sampler.py         what a sampler is, and the table of samplers
bandit.py          "rl": the contextual bandit; reward.py its two models, failing.py what does not run at all,
                   inputs.py and prior.py what is known before, gaussian.py and acquisition.py the mathematics
portfolio.py, reinforce.py, coordinate.py, evolution.py, parzen.py, random_search.py, exhaustive.py: the other samplers
environment.py     a gymnasium environment over any space
replay.py          recorded landscapes, measured on a GPU and replayed anywhere
"""
