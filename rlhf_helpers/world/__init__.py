"""The embedded synthetic world: its prompts, its people and its one truth."""
