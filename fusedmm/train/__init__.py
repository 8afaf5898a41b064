"""A trainer for multimodal forecasters: data in one format, fusions compared at one budget, a report that says which
modality earned what.

``python -m fusedmm.train recipe.toml`` is the whole interface; `fusedmm.train.runner.run_recipe` is the same from
Python.
"""
