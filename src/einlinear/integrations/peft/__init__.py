"""peft: adapters of any structure as a method of peft, and LoRA on structured layers. Importing this registers both."""

from einlinear.integrations.peft.all_linear import extend_all_linear
from einlinear.integrations.peft.lora_layers import register
from einlinear.integrations.peft.structured_method import StructuredConfig, StructuredModel, register_method

__all__ = ["StructuredConfig", "StructuredModel", "register"]

extend_all_linear()
register_method()
