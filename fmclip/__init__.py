"""fmclip: learn from a handful of normal scans, map where a new scan deviates (research use, not a medical device)."""

__version__ = "0.1.0"
