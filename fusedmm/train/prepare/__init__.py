"""Converters from public layouts to the data format: ``python -m fusedmm.train.prepare maec|stocknet SOURCE OUT``."""
