"""Other libraries, one file or folder each: what they need of structured layers, and what these need of them."""

from contextlib import suppress
from importlib import import_module

from einlinear.import_hooks import when_imported
from einlinear.integrations import transformers


def register_on_import() -> None:
    """Register what transformers and peft need to load folders of this library, as soon as they are imported."""
    transformers.register_on_import()
    when_imported("peft", _register_peft)


def _register_peft() -> None:
    # other versions may lack what the method needs: importing them must not fail
    with suppress(ImportError, AttributeError):
        import_module("einlinear.integrations.peft")
