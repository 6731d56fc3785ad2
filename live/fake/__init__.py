"""A fake vLLM server: the same HTTP surface, timed by the simulator's engine model, with made-up text."""
