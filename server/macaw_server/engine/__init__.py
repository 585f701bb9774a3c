"""The engine: a loaded model, its step loop, and the process that it runs in. Token ids only."""
