"""Text: between characters and token ids, between conversations and the ids that are learned."""
