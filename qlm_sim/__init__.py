"""QLM: queue management for LLM serving, on a simulated cluster or in front of real engines."""

__version__ = "0.1.0"
