"""Evaluation anyone can repeat: benchmarks, editors, generation, metrics, an exact checker, a judge and reports."""
