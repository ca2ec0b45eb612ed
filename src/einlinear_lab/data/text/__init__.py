"""Text for language models: from documents to tokens on disk.

prepare.py    prepare_tokens: from text to tokens on disk, a share of them held out
sources.py    read_text: from the name of a source to corpora
tokenizer.py  characters, bytes and byte-pair encodings
tokens.py     the files of tokens: opened and checked, and written atomically
"""
