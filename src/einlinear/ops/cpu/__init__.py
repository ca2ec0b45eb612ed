"""Compiled CPU kernel, in C++; decode.h is the path for few tokens, as in decoding."""
