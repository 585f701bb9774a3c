"""Programs: the state machine of an application run, its objectives, and text to tokens and back. Pure."""
