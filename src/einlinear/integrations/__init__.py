"""Other libraries, one file or folder each: what they need of structured layers, and what these need of them."""
