"""Text for language models: tokens on disk, and batches of them.

prepare.py   prepare_tokens: from a text to its tokens on disk, a share of them held out
read.py      read_text: from a name to documents, in parts
english.py   a source: English from Debian packages
streamed.py  a source: rows of the Hugging Face hub, or of local files like these
part.py      Part: what every source gives
encode.py    characters and byte pairs: from text to tokens and back
writer.py    writes the files of tokens so that none is ever half there
tokens.py    load_tokens: opens and checks them
windows.py   batches of windows of a text, any of them by its number
"""
