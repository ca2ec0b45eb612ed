"""Text for language models: tokens on disk, and batches of them.

prepare.py    prepare_tokens: from text to tokens on disk, a share of them held out
sources.py    read_text: from the name of a source to corpora
english.py    a source: English from Debian packages
corpus.py     Corpus: what every source returns
tokenizer.py  characters, bytes and byte-pair encodings
writer.py     writes the files of tokens atomically
tokens.py     load_tokens: opens and checks them
windows.py    batches of windows of a text
"""
