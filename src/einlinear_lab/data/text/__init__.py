"""Text for language models: from documents to tokens on disk."""
