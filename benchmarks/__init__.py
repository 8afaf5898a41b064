"""Benchmarks: one definition of each case, measured beside what people would use instead; `python -m benchmarks
--help`.
"""
