"""The ways to run a method: over a model in memory, from folder to folder, or file by file."""
