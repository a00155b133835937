"""The engine: one asyncio task that plans steps and takes in their results, and what turns tokens into text."""
