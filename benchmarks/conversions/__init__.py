"""Accuracy and size of every conversion: `python -m benchmarks.conversions`.

No times are taken here. Wherever another library stands at one end of a conversion, it runs that end itself.
"""
